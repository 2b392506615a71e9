"""Measurements: nothing here is needed to train."""

import gpt.model  # noqa: F401 - it says so where another package called kernels hides ours
