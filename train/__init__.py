"""Data to weights: preparation, the loop, checkpoints, evaluation."""

import gpt  # noqa: F401 - it says so where PyTorch is missing
