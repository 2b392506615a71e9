"""Measurements: nothing here is needed to train."""
