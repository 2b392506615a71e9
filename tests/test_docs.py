"""Each command in README.md and docs/ is accepted by its program. The commands of two documents are run.

In a copy of the checkout, a block ```LANG PATH of docs/kernel.md is appended to the file PATH, and a block
```diff PATH changes that file.
"""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.run import get_args_parser

from gpt import cli

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOREIGN = {"cp", "ln", "mkdir", "sbatch", "scancel", "squeue"}  # programs whose flags we do not know


def blocks(document):
    """(language, path, text) of each block."""
    pattern = r"^```(\w*) ?([^\n]*)\n(.*?)^```$"
    return re.findall(pattern, document.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def commands(document):
    """The words of each command, and of each torchrun in a script."""
    for language, path, text in blocks(document):
        for line in text.replace("\\\n", " ").splitlines() if language in ("sh", "bash") else ():
            if path:
                torchrun = re.search(r"^[^#]*\b(torchrun .*?)&?$", line)
                line = torchrun[1] if torchrun else ""
            if words := shlex.split(line, comments=True):
                yield words


def main_of(module):
    assert module.split(".")[0] in ("gpt", "train", "bench"), f"{module} is not a program of this project"
    try:
        return importlib.import_module(f"{module}.__main__").main
    except ModuleNotFoundError:
        return importlib.import_module(module).main


COMMANDS = [
    pytest.param(words, id=f"{document.stem}: {' '.join(words)[:60]}")
    for document in DOCUMENTS
    for words in commands(document)
]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_is_accepted_by_its_program(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program, *rest = words
    if program == "make":
        assert re.search(rf"^{rest[-1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "pip":
        assert rest[:2] == ["install", "-e"]
        assert f'"{rest[2][2:-1]}":' in (ROOT / "setup.py").read_text()
    elif program == "source":
        assert rest == [".venv/bin/activate"]
    elif program == "pytest":
        assert (ROOT / rest[0]).exists()
    elif program == "bash":  # it ends with 2 for a wrong flag, and with 1 where there is no GPU
        environment = os.environ | {"PYTHON": "false"}
        assert subprocess.run(["bash", ROOT / rest[0], *rest[1:]], env=environment).returncode == 1
    elif program not in FOREIGN:
        if program == "torchrun":
            options = get_args_parser().parse_args(rest)
            rest = ["-m", options.training_script, *options.training_script_args]
        assert program in ("python", "torchrun") and rest[0] == "-m", words
        for file in [word for word in rest[2:] if word.endswith(".py")]:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Path(file).touch()
        monkeypatch.setattr(sys, "argv", rest[1:])
        parse_given = cli.parse_given

        def parse_and_end(*args, **options):
            parse_given(*args, **options)
            sys.exit(0)

        monkeypatch.setattr(cli, "parse_given", parse_and_end)
        try:
            main_of(rest[1])()
        except FileNotFoundError:  # `train.prepare inspect` has no flags, and no data here
            pass
        except SystemExit as stop:
            assert stop.code == 0, words


# ---- the README, run

TRAINING = """
    --n_layer=1 --n_head=2 --n_embd=8 --block_size=16 --batch_size=2 --gradient_accumulation_steps=2
    --eval_interval=1000 --eval_iters=1 --log_interval=1 --warmup_iters=1 --wandb_log=False
""".split()
SMALL = {"train.evaluate": ["--stride=8"], "gpt.sample": ["--max_new_tokens=4"]}
TEXT = "".join(f"Once the {a} and the {b} went to sea.\n" for a in "abcdef" for b in "uvwxyz")


def test_the_commands_of_the_readme_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text(TEXT)
    Path("path/to/nanogpt/config").mkdir(parents=True)
    Path("path/to/nanogpt/config/train_gpt2.py").write_text("batch_size = 12\nout_dir = 'out-nanogpt'\n")
    Path("data/openwebtext").mkdir(parents=True)
    for split in ("train", "val"):
        np.arange(2000, dtype=np.uint16).tofile(f"data/openwebtext/{split}.bin")
    trainings = 0
    for words in commands(ROOT / "README.md"):
        if words[0] in ("make", "source"):
            continue
        module, *flags = words[words.index("-m") + 1 :]
        flags += SMALL.get(module, [])
        if module == "train":
            trainings += 1
            flags += [*TRAINING, f"--max_iters={2 * trainings}", f"--lr_decay_iters={2 * trainings}"]
        monkeypatch.setattr(sys, "argv", [module, *flags])
        try:
            main_of(module)()
        except SystemExit as stop:
            assert stop.code == 0, words
        out = capsys.readouterr().out
        assert module != "train" or "--help" in words or f"step {2 * trainings}: train loss" in out, words
    assert Path("out-mine/loss.png").exists() and Path("FOLDER/model.safetensors").exists()
    assert Path("out-nanogpt/ckpt.pt").exists() and Path("out2/ckpt.pt").exists()


def test_the_python_of_the_readme_runs(device):
    B, T, H, D, N, C, V = 2, 8, 2, 16, 6, 32, 68

    def tensor(*shape):
        return torch.randn(*shape, device=device)

    ids = torch.zeros(B, T, dtype=torch.int64, device=device)
    names = {
        "C": C, "x": tensor(N, C), "branch": tensor(N, C), "residual": tensor(N, C), "carrier": tensor(N, C),
        "weight": tensor(C), "bias": tensor(C), "qkv": tensor(B, T, 3, H, D),
        "target": ids.flatten()[:N], "lm_head": torch.nn.Linear(C, V).to(device), "q": tensor(B, H, D),
        "k_cache": tensor(B, H, T, D), "v_cache": tensor(B, H, T, D),
        "lengths": torch.full((B,), T, device=device), "idx": ids, "targets": ids,
    }  # fmt: skip
    for language, _, program in blocks(ROOT / "README.md"):
        if language == "python":
            results = dict(names)
            exec(program.replace('"cuda"', repr(device)), results)
            if "summed" in results:
                summed, logits = names["branch"] + names["residual"], names["lm_head"].weight @ names["x"].T
                expected = torch.nn.functional.cross_entropy(logits.T, names["target"])
                torch.testing.assert_close(results["summed"], summed)
                torch.testing.assert_close(results["loss"], expected, rtol=1e-4, atol=1e-5)
            else:
                assert results["logits"].shape == (B, 1, V) and torch.equal(results["ids"][:, :T], ids)


# ---- docs/kernel.md, followed

QUICK = {
    "pytest": "-p no:cacheprovider -k 'rms_norm and not opcheck and not compiles and not same_bits'",
    "bench.aot": "--only='sm_90 rms_norm' --jobs=1",
    "bench.kernels": "--seconds=0.001",
}


def test_a_kernel_can_be_added_as_the_guide_says(tmp_path):
    for name in ("kernels", "gpt", "train", "bench", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    for language, path, text in blocks(ROOT / "docs" / "kernel.md"):
        if language == "diff":
            lines = text.splitlines(keepends=True)
            before = "".join(row[1:] for row in lines if row[0] != "+")
            after = "".join(row[1:] for row in lines if row[0] != "-")
            content = (tmp_path / path).read_text()
            assert content.count(before) == 1, f"{path} does not have this, once:\n{before}"
            (tmp_path / path).write_text(content.replace(before, after))
        elif path:
            with (tmp_path / path).open("a") as file:
                file.write(text)
    for words in commands(ROOT / "docs" / "kernel.md"):
        if words[0] in ("source", "pip"):
            continue
        module, *flags = words[2:] if words[0] == "python" else words
        interpreter = "1" if module == "pytest" else "0"
        result = subprocess.run(
            [sys.executable, "-m", module, *flags, *shlex.split(QUICK[module])],
            cwd=tmp_path, env=environment | {"TRITON_INTERPRET": interpreter}, capture_output=True, text=True,
        )  # fmt: skip
        output = result.stdout + result.stderr
        assert result.returncode == 0 and "0 kernels" not in output, (words, output)


# ---- between the blocks


def test_links_and_quoted_messages_exist():
    folders = [ROOT / name for name in ("kernels", "gpt", "train", "bench")]
    code = "".join(path.read_text("utf-8") for folder in folders for path in folder.rglob("*.py"))
    for document in DOCUMENTS:
        text = document.read_text("utf-8")
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (document.parent / link).exists(), f"{document.name} links to {link}"
        symptoms = text.partition("## What goes wrong")[2]
        for message in re.findall(r"^\| `([^`|]+)` \|", symptoms, re.MULTILINE):
            assert message in code, f"{document.name}: nothing prints {message!r}"
    guides = set(re.findall(r"\((docs/[\w-]+\.md)\)", DOCUMENTS[0].read_text("utf-8")))
    assert guides == {str(path.relative_to(ROOT)) for path in DOCUMENTS[1:]}
