"""The model, and what is done with one that is trained."""

import sys
from importlib.util import find_spec
from pathlib import Path

from gpt.cli import IfSlow

if sys.platform == "win32":  # no fcntl, no resource
    sys.exit("error: tritongpt needs Linux or macOS; on Windows run it in WSL 2")
try:
    with IfSlow("loading PyTorch"):
        import torch  # noqa: F401
except ModuleNotFoundError as error:
    sys.exit(
        f"error: {error.name} is not installed for {sys.executable}: run make install once, and then "
        "source .venv/bin/activate in each shell"
    )

# Hugging Face publishes a package that is called kernels too. Python takes the one that it finds first.
spec = find_spec("kernels")
folder = Path(next(iter(spec.submodule_search_locations or [""]))) if spec else None
if folder and folder.resolve() != Path(__file__).resolve().parents[1] / "kernels":
    sys.exit(
        f"error: the package kernels in {folder} is not this project's, and Python finds it first: move that "
        "folder away or `pip uninstall kernels`, then `pip install -e .` in this project again"
    )
del spec, folder
