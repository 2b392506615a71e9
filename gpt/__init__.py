"""The model, and what is done with one that is trained."""

import sys

from gpt.cli import IfSlow

try:
    with IfSlow("loading PyTorch"):
        import torch  # noqa: F401
except ModuleNotFoundError as error:
    sys.exit(
        f"error: {error.name} is not installed for {sys.executable}: run make install once, and then "
        "source .venv/bin/activate in each shell"
    )
