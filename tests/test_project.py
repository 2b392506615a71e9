"""Imports go one way and load only what they need."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ["kernels", "gpt", "train", "bench"]  # each imports only from those before it
MODULES = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py")) if "configs" not in p.parts]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def test_imports_go_one_way():
    for path in MODULES:
        folder = path.relative_to(ROOT).parts[0]
        for name in imports(path):
            top = name.split(".")[0]
            later = [*FOLDERS[FOLDERS.index(folder) + 1 :], "tests"]
            assert top not in later, f"{path.relative_to(ROOT)} imports {name}"


def test_every_module_can_be_imported_with_torch_and_numpy_alone():
    """A machine with GPUs may have no other packages. An import neither looks for a GPU nor prints."""
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES]
    script = (
        "import sys, importlib, torch\n"
        "names = 'tiktoken rich matplotlib transformers wandb datasets tokenizers pyarrow'\n"
        "for name in names.split():\n    sys.modules[name] = None\n"
        "torch.cuda.is_available = torch.cuda.get_device_properties = lambda *a: 1 / 0\n"
        f"for name in {[n.removesuffix('.__init__') for n in names if '.test_' not in n]!r}:\n"
        "    importlib.import_module(name)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
