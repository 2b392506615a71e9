"""Data to weights: preparation, the loop, checkpoints, evaluation."""
