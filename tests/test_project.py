"""The tree keeps what its documents say."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ["kernels", "gpt", "train", "bench"]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_one_way(folder):
    right = [*FOLDERS[FOLDERS.index(folder) + 1 :], "tests"]
    for path in (ROOT / folder).rglob("*.py"):
        for name in imports(path):
            assert name.split(".")[0] not in right, f"{path.relative_to(ROOT)} imports {name}"


def test_only_the_parser_imports_the_command_line_library():
    users = {
        p.relative_to(ROOT).as_posix()
        for f in FOLDERS
        for p in (ROOT / f).rglob("*.py")
        if "tyro" in imports(p)
    }
    assert users == {"gpt/cli.py"}


def test_every_module_can_be_imported_with_torch_and_numpy_alone():
    """A GPU machine may have no more; nor does an import look for a GPU or print."""
    names = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for f in FOLDERS
        for p in sorted((ROOT / f).rglob("*.py"))
        if "configs" not in p.parts and not p.name.startswith("test_")
    ]
    script = (
        "import sys\n"
        "names = 'tyro tiktoken rich matplotlib transformers wandb datasets tokenizers pyarrow'\n"
        "for name in names.split():\n"
        "    sys.modules[name] = None\n"
        "import importlib, torch\n"
        "torch.cuda.is_available = torch.cuda.get_device_properties = lambda *a: 1 / 0\n"
        f"for name in {names!r}:\n    importlib.import_module(name)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


def test_the_layout_in_contributing_is_the_tree():
    """Every file named there exists, and every module is named there."""
    block = re.search(r"## Layout\n\n```\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)[1]
    named, folder = set(), ""
    for line in block.splitlines():
        if not line.startswith(" "):
            folder = line.strip().rstrip("/")
            assert (ROOT / folder).is_dir()
            continue
        for word in line.split("   ")[0].split() + re.findall(r"\S+\.py", line):
            if word.endswith((".py", ".sh", "/")):
                named.add(f"{folder}/{word}".rstrip("/"))
    for path in named:
        assert (ROOT / path).exists(), path
    modules = {p.relative_to(ROOT).as_posix() for f in FOLDERS for p in (ROOT / f).glob("*.py")}
    assert {m for m in modules if not m.endswith("__init__.py")} <= named


def test_the_readme_names_what_exists():
    text = (ROOT / "README.md").read_text()
    for module in set(re.findall(r"python -m ([\w.]+)", text)):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (?:PYTHON=\S+ )?(\w+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    presets = {p.stem for p in (ROOT / "train" / "configs").glob("*.py")}
    listed = set(re.findall(r"`(\w+)`", re.search(r"Presets: (.*?);", text, re.DOTALL)[1]))
    assert listed == presets
    assert all(p in presets for p in re.findall(r"-m train (\w+)(?![\w/])", text))
    from bench.nanogpt import NanoGPTConfig
    from gpt.cli import flag_names
    from gpt.convert import ConvertConfig
    from gpt.sample import SampleConfig
    from train.config import TrainConfig
    from train.evaluate import EvaluateConfig
    from train.plot import PlotConfig
    from train.prepare.__main__ import PrepareConfig, TokenizerConfig

    configs = (
        TrainConfig,
        SampleConfig,
        PrepareConfig,
        TokenizerConfig,
        ConvertConfig,
        EvaluateConfig,
        NanoGPTConfig,
        PlotConfig,
    )
    flags = {n for c in configs for n in flag_names(c)} | {
        "model",  # lm-evaluation-harness
        "model_args",
        "nanogpt",
        "help",
        "check",
        "ablate",
        "gpu",
        "gpus",
        "tokens",
        "compare",
        "benchmark",
    }
    torchrun = {
        "standalone",
        "nproc_per_node",
        "nnodes",
        "rdzv_backend",
        "rdzv_endpoint",
        "max_restarts",
        "nodes",
    }
    torchrun |= {"ntasks", "gpus"}  # srun's
    assert set(re.findall(r"--(\w+)", text)) <= flags | torchrun


FAKE_PYTHON = """#!/bin/sh
case "$*" in
    --version*) echo "Python 3.11.0" ;;
    *"-m venv"*) rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *"-m pip"*) echo pip >> log; [ ! -e broken ] ;;
esac
"""


def executable(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_an_interrupted_install_is_made_again_and_a_whole_one_is_not(tmp_path):
    python = executable(tmp_path / "python", FAKE_PYTHON)
    for name in ("Makefile", "setup.py", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())

    def install():
        done = subprocess.run(
            ["make", f"PYTHON={python}", "install"], cwd=tmp_path, capture_output=True, text=True
        )
        log = tmp_path / "log"
        return done.returncode == 0, log.read_text().count("pip") if log.exists() else 0

    (tmp_path / "broken").touch()
    assert install() == (False, 1)
    (tmp_path / "broken").unlink()
    assert install() == (True, 2)
    assert install() == (True, 2)
    (tmp_path / "constraints.txt").write_text("torch==9\n")
    assert install() == (True, 3)


@pytest.mark.parametrize(("code", "dataset"), [(0, "plays_char"), (1, "stdlib_char"), (130, None)])
def test_quickstart_goes_on_with_the_standard_library_where_the_plays_cannot_be_had(tmp_path, code, dataset):
    python = executable(
        tmp_path / "python",
        f'#!/bin/sh\necho "$*" >> log\n[ "$*" != "-m train.prepare plays_char" ] || exit {code}\n',
    )
    done = subprocess.run(
        ["sh", str(ROOT / "train" / "quickstart.sh")],
        cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "PYTHON": str(python), "DATA": "plays_char"},
        capture_output=True, text=True,
    )  # fmt: skip
    steps = (tmp_path / "log").read_text().splitlines()
    if dataset is None:
        assert done.returncode == 130 and len(steps) == 1
        return
    assert done.returncode == 0, done.stderr
    assert f"-m train quickstart --dataset={dataset} --out_dir=out-quickstart-{dataset}" in steps
    assert ("could not be fetched" in done.stdout) == (code == 1)


def test_make_lists_its_targets_and_refuses_an_old_python(tmp_path):
    listing = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert all(f"make {target}" in listing for target in ("quickstart", "test", "lint", "help"))
    old = executable(tmp_path / "python3", "#!/bin/sh\nexit 1\n")
    for name in ("Makefile", "setup.py", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    command = ["make", f"PYTHON={old}", "quickstart"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode != 0 and "Python 3.11 or newer is needed" in result.stderr
    assert not (tmp_path / ".venv").exists()
