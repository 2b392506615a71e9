"""Imports go one way and load only what they need; `make` installs once, `make quickstart` always ends."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
    """A GPU machine may have no more; nor does an import look for a GPU or print."""
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


FAKE_PYTHON = """#!/bin/sh
echo "$*" >> log
case "$*" in
    --version*) echo "Python 3.11.0" ;;
    *"-m venv"*) rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *"-m pip"*) [ ! -e broken ] ;;
    "-m train.prepare plays_char") exit ${PREPARE_ENDS_WITH:-0} ;;
    *"sys.version_info"*) exit ${TOO_OLD:-0} ;;
esac
"""


@pytest.fixture
def run_make(tmp_path):
    """Runs make with a Python that only writes down its arguments."""
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    shutil.copytree(ROOT / "train", tmp_path / "train", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for name in ("Makefile", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)

    def run(*arguments, **environment):
        result = subprocess.run(
            ["make", f"PYTHON={tmp_path}/python", *arguments],
            cwd=tmp_path, env={"PATH": "/usr/bin:/bin"} | environment, capture_output=True, text=True,
        )  # fmt: skip
        log = tmp_path / "log"
        return result, log.read_text() if log.exists() else ""

    return run


def test_an_old_python_is_refused(run_make, tmp_path):
    result, _ = run_make("quickstart", TOO_OLD="1")
    assert result.returncode != 0 and "Python 3.11 or newer is needed" in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_an_interrupted_install_is_made_again_and_a_whole_one_is_not(run_make, tmp_path):
    def install():
        result, log = run_make("install")
        return result.returncode == 0, log.count("-m pip")

    (tmp_path / "broken").touch()
    assert install() == (False, 1)
    (tmp_path / "broken").unlink()
    assert install() == (True, 2)
    assert install() == (True, 2)
    (tmp_path / "constraints.txt").write_text("torch==9\n")
    assert install() == (True, 3)


@pytest.mark.parametrize(("code", "dataset"), [("0", "plays_char"), ("1", "stdlib_char"), ("130", None)])
def test_quickstart_goes_on_with_the_standard_library_where_the_plays_cannot_be_had(run_make, code, dataset):
    result, log = run_make("quickstart", PREPARE_ENDS_WITH=code)
    trainings = [line for line in log.splitlines() if line.startswith("-m train quickstart")]
    assert len(trainings) == (dataset is not None), result.stderr
    assert all(f" --dataset={dataset} --out_dir=out-quickstart-{dataset}" in line for line in trainings)
    assert (result.returncode == 0) == (dataset is not None)
