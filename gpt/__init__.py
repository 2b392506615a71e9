"""The model, and what is done with one that is trained."""

import sys
from importlib.util import find_spec

if find_spec("torch") is None:
    sys.exit(
        f"error: PyTorch is not installed for {sys.executable}: run make install once, and then "
        "source .venv/bin/activate in each shell"
    )
