"""What README.md and the guides in docs/ say is done here, at a small size and without a network.

A document is a story. Its blocks are taken in order, in a folder that is a copy of the checkout:

    ```sh           each command is run
    ```text         what the block before printed: numbers may differ, `...` stands for other lines
    ```LANG PATH    goes to the end of the file PATH
    ```diff PATH    is made in the file PATH
    ```python       is executed

A command is run in a process forked from one that has imported PyTorch. What makes it small are flags that
are appended, so that those of the document are read too. All that a document may use is listed from SMALL to
FILES: that is where a new program, or a file that is taken for granted, goes.
"""

import ast
import json
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = [path.stem for path in DOCUMENTS]


class Small(NamedTuple):
    flags: str  # appended to the command
    prints: str  # a pattern that shows it has done something


TRAINING = """
    --n_layer=1 --n_head=2 --n_embd=8 --block_size=16 --batch_size=2 --gradient_accumulation_steps=2
    --eval_interval=1000 --eval_iters=1 --log_interval=1 --warmup_iters=1 --wandb_log=False
"""  # --max_iters: two more with every training of a document
SMALL = {  # what is run, by module or program
    "train": Small(TRAINING, r"step \d+: train loss|usage: |# Every setting"),
    "train.evaluate": Small("--stride=8", r'"loss": \d|"acc_norm": \d'),
    "train.plot": Small("", r"(loss|compare)\.png"),
    "train.prepare": Small("", r"[\d,]+ tokens"),
    "gpt.sample": Small("--max_new_tokens=4", r"-{15}|> "),
    "gpt.convert": Small("", r"M parameters, tokenizer"),
    "bench.aot": Small("--only=sm_90 --only=C=768 --jobs=1", r"[1-9]\d* kernels, 0 with faults"),
    "bench.generate": Small("--size=tiny --prompt=2 --new=4 --seconds=0.01", r"tokens/s"),
    "bench.kernels": Small("--seconds=0.001", r"eager +forward"),
    "bench.report": Small("", r"^$|figures compared"),
    "bench.roofline": Small("", r"predicted"),
    "bench.throughput": Small("--seconds=0.01", r"tritongpt +[\d,]+ tokens/s"),
    "pytest bench": Small("-k 'layer_norm and eager and forward'", r"[1-9] passed"),
    "pytest tests": Small(
        "-p no:cacheprovider --deselect tests/test_kernels.py::test_opcheck "
        "--deselect tests/test_kernels.py::test_compiles_without_a_graph_break "
        "--deselect tests/test_kernels.py::test_same_bits_every_run",
        r"[1-9]\d* passed",
    ),
    "bash bench/gpu.sh": Small("", r"== \w+ took"),
}
ONLY_READ = {"bench.data", "bench.nanogpt", "bench.sweep"}  # minutes, or a GPU: their flags are read
NOT_HERE = {  # programs that are not at hand: the flags of them that are known
    "lm_eval": {"--model", "--model_args", "--tasks"},
    "sbatch": {
        "--job-name", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--time",
        "--signal", "--requeue", "--open-mode", "--output",
    },
    "scancel": {"--signal", "--batch"},
    "squeue": {"--me"},
    "srun": {"--cpus-per-task", "--kill-on-bad-exit"},
}  # fmt: skip
OTHERS = {"--field", "--help"}  # flags in the prose that no table here has
PLACES = {"/shared/": "shared/", "HOST": "localhost", "20:23": "0:1"}
TEXT = "".join(
    f"The {a} and the {b} went to sea; the end of it was {a}. Once, THE END; ship and sea.\n"
    for a in "abcdef"
    for b in "uvwxyz"
)
EXAMPLE = json.dumps({"ctx": "The sea", "endings": ["is wide", "ate", "of", "to it"], "label": 0})
FILES = {  # what the documents take for granted
    "FILE": TEXT,
    "input.txt": TEXT,
    "prompt.txt": "The ",
    "prompts.txt": "The a\nThe b\n",
    "FILE.jsonl": EXAMPLE + "\n",
    "corpus/a.txt": TEXT,
    "corpus/b.jsonl": "".join(json.dumps({"body": line, "text": line}) + "\n" for line in TEXT.splitlines()),
    "more/c.txt": TEXT,
    "PATH/model.py": "from gpt.model import GPT, GPTConfig  # in place of nanoGPT's\n",
    "path/to/nanogpt/config/train_gpt2.py": "batch_size = 12\nblock_size = 1024\n",
    ".venv/bin/activate": "",
}


# ---- reading a document


class Block(NamedTuple):
    line: int
    kind: str
    path: str
    text: str


def blocks(document):
    text = document.read_text()
    for found in re.finditer(r"^```(\w*) ?([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(text[: found.start()].count("\n") + 2, *found.groups())


def commands(block):
    """(line, words) of each command of a block."""
    text, line = "", block.line
    for number, row in enumerate(block.text.splitlines(), start=block.line):
        text, line = text + row, line if text else number
        if text.endswith("\\"):
            text = text[:-1]
            continue
        if words := shlex.split(text, comments=True):
            yield line, words
        text = ""


# ---- the processes

IMPORTED = [
    "torch", "torch.distributed.fsdp", "torch._dynamo", "triton.language", "numpy", "tyro", "tiktoken",
    "tqdm", "matplotlib.pyplot", "transformers.models.gpt2.modeling_gpt2", "tokenizers", "datasets", "pytest",
]  # fmt: skip
WITHOUT_NETWORK = {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "https_proxy": "http://127.0.0.1:9"}


@pytest.fixture(scope="module")
def processes():
    """Makes processes that have imported what is slow to import, and nothing of ours."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n == "TRITON_INTERPRET" or n.startswith("PYTEST_")]:
            patch.delenv(name)  # a pytest in there is no worker of this one
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("OMP_NUM_THREADS", "1")
        for name, value in WITHOUT_NETWORK.items():
            patch.setenv(name, value)
        multiprocessing.forkserver.ensure_running()
    return context


def run_module(folder, module, flags, environment, log):
    """`python -m MODULE FLAGS`, in a new process and in `folder`."""
    os.chdir(folder)
    os.environ.update(environment)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    sys.path.insert(0, str(folder))
    if os.environ.get("TRITON_INTERPRET"):  # Triton asks for it when it is imported
        for name in [n for n in sys.modules if n.startswith("triton") and not n.startswith("triton._C")]:
            del sys.modules[name]
    stand_ins()
    if module in ONLY_READ:
        stop_after_reading()
    sys.argv = [module, *flags]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def stand_ins():
    """In place of what the network would bring."""
    import tiktoken

    from gpt import tokenizer
    from train.prepare import corpora, documents

    def bpe():  # 50,256 tokens: the bytes, and pairs of them
        pairs = (bytes([i, j]) for i in range(256) for j in range(256))
        tokens = [bytes([i]) for i in range(256)] + [next(pairs) for _ in range(50_000)]
        ranks = {token: rank for rank, token in enumerate(tokens)}
        return tiktoken.Encoding("gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=END)

    tokenizer._gpt2_bpe = bpe
    tokenizer.gpt2_files = lambda: {"encoder.json": json.dumps(END).encode(), "vocab.bpe": b"#version: 0.2\n"}
    corpora.plays = corpora.shakespeare = lambda: TEXT
    documents.hub = lambda path, field, val_fraction, processes, part=None: documents.text(TEXT, path)


END = {"<|endoftext|>": 50256}


def stop_after_reading():
    import argparse

    from gpt import cli

    for owner, name in ((argparse.ArgumentParser, "parse_args"), (cli, "parse")):
        read = getattr(owner, name)
        setattr(owner, name, lambda *args, read=read, **options: sys.exit(0 * bool(read(*args, **options))))


class Reader:
    """Somebody who follows a document in `folder`."""

    def __init__(self, document, folder, processes):
        self.folder, self.processes = folder, processes
        self.trainings = 0
        self.output = ""
        for name in ("kernels", "gpt", "train", "bench", "tests", "Makefile", "README.md", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, folder / name)
        for name, content in FILES.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
        if "prepare openwebtext" not in document.read_text():
            data = folder / "data" / "openwebtext"
            data.mkdir(parents=True)
            for split in ("train", "val"):
                np.random.default_rng(0).integers(0, 50257, 2000).astype(np.uint16).tofile(
                    data / f"{split}.bin"
                )
        if "gpt2" in document.read_text():
            made = processes.Process(target=random_gpt2, args=(folder / "gpt2",))
            made.start()
            made.join(120)
            assert made.exitcode == 0

    def run(self, words):
        """Runs a command. Returns what it printed; fails where it fails, or is not known here."""
        words = [re.sub("|".join(PLACES), lambda match: PLACES[match[0]], word) for word in words]
        program, *rest = words
        if program == "make":
            targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert rest[-1] in targets, f"the Makefile has no target {rest[-1]}"
        elif program == "pip":
            assert rest[:2] == ["install", "-e"], "another pip command than install -e"
            named = re.fullmatch(r"\.\[(\w+)\]", rest[2])
            assert named and f'"{named[1]}":' in (ROOT / "setup.py").read_text(), f"setup.py has no {rest[2]}"
        elif program in NOT_HERE:
            own = [word.partition("=")[0] for word in rest]
            if program == "srun":  # what follows is run by it
                first = next(i for i, word in enumerate(rest) if not word.startswith("-"))
                own, rest = own[:first], rest[first:]
            flags = {word for word in own if word.startswith("-")}
            assert flags <= NOT_HERE[program], f"{program} is not known to have {flags - NOT_HERE[program]}"
            if program == "srun":
                return self.run(rest)
            if program == "sbatch":
                return self.run(batch_script(self.folder, rest[-1])[0])
        elif program == "torchrun":
            return self.torchrun(rest)
        elif words[:2] == ["python", "-m"]:
            return self.module(rest[1], rest[2:])
        elif program == "pytest":
            return self.module("pytest", rest, f"pytest {rest[0].partition('/')[0]}")
        elif program == "bash":
            return self.bash(rest)
        else:
            pytest.fail(f"no program {program!r} is known here: see NOT_HERE and SMALL")
        return ""

    def small(self, name):
        assert name in SMALL, f"SMALL does not say how to make {name!r} small"
        return SMALL[name]

    def torchrun(self, words):
        from torch.distributed.run import config_from_args, parse_args

        arguments = parse_args(words)
        assert arguments.module, "torchrun without -m"
        config, _, _ = config_from_args(arguments)
        assert config.nproc_per_node == 8
        return self.module(arguments.training_script, arguments.training_script_args, ranks=2)

    def module(self, module, flags, name=None, ranks=0):
        if module in ONLY_READ:
            small = Small("", "")
        else:
            small = self.small(name or module)
            flags = [*flags, *shlex.split(small.flags)]
        if module == "train":
            self.trainings += 1
            flags = [*flags, f"--max_iters={2 * self.trainings}", f"--lr_decay_iters={2 * self.trainings}"]
        environments = [{"TRITON_INTERPRET": "1"} if name == "pytest tests" else {}]
        if ranks:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            environments = [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        logs = [self.folder / f"output-{rank}.log" for rank in range(len(environments))]
        started = [
            self.processes.Process(target=run_module, args=(self.folder, module, flags, environment, log))
            for environment, log in zip(environments, logs)
        ]
        for process in started:
            process.start()
        deadline = time.monotonic() + 200  # the first waits for the imports
        for process in started:
            process.join(max(0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
        output = "".join(log.read_text() for log in logs)
        assert [process.exitcode for process in started] == [0] * len(started), output
        assert re.search(small.prints, output), f"no {small.prints!r} in: {output}"
        if module == "train" and not {"--help", "--print_config", "eval_gpt2"} & set(flags):
            assert f"step {2 * self.trainings}: train loss" in output, (
                f"it did not train to the end: {output}"
            )
        return output

    def bash(self, words):
        """Python is an echo: what the script itself does is seen."""
        small, python = self.small(f"bash {words[0]}"), self.folder / "python"
        python.write_text("#!/bin/sh\necho stand-in\n")
        python.chmod(0o755)
        environment = os.environ | {"PYTHON": str(python)}
        done = subprocess.run(
            ["bash", *words], cwd=self.folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0 and re.search(small.prints, done.stdout), done.stdout + done.stderr
        return done.stdout

    def edit(self, block):
        """Takes the lines of a diff without numbers over; what it changes must be there, once."""
        lines = block.text.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] != "+")
        after = "".join(line[1:] for line in lines if line[0] != "-")
        text = (self.folder / block.path).read_text()
        assert text.count(before) == 1, f"{block.path} has this {text.count(before)} times:\n{before}"
        (self.folder / block.path).write_text(text.replace(before, after))

    def add(self, block):
        with (self.folder / block.path).open("a") as file:
            file.write(block.text)


def random_gpt2(folder):
    """As Hugging Face's hub would have it under this name, in the shape of TRAINING."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_positions=16, n_layer=1, n_head=2, n_embd=8)).save_pretrained(folder)


def printed(expected, output):
    """The lines of `expected` that `output` lacks, in this order, whatever their numbers are."""
    where, missing = 0, []
    for line in expected.splitlines():
        if line.strip() == "...":
            continue
        words = re.sub(r"\d[\d,.]*", "0", " ".join(line.split()))
        pattern = re.escape(words).replace("0", r"\d[\d,.]*").replace(r"\ ", " *")
        found = re.compile(f"^ *{pattern} *$", re.MULTILINE).search(output, where)
        if found is None:
            missing.append(line)
        else:
            where = found.end()
    return missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)
def test_what_a_document_says_is_so(document, tmp_path, processes):
    reader, output = Reader(document, tmp_path, processes), ""
    for block in blocks(document):
        where = f"{document.name}:{block.line}"
        if block.path:
            reader.edit(block) if block.kind == "diff" else reader.add(block)
        elif block.kind == "sh":
            output = ""
            for line, words in commands(block):
                try:
                    output += reader.run(words)
                except (AssertionError, SystemExit) as error:
                    pytest.fail(f"{document.name}:{line}: {shlex.join(words)}\n{error}")
        elif block.kind == "text":
            assert not (missing := printed(block.text, output)), f"{where}: not printed: {missing}\n{output}"
        elif block.kind == "python":
            execute(block.text)
        else:
            assert block.kind == "", f"{where}: a block of {block.kind!r} is not known here"


def execute(program):
    """Python of the README, on tensors of its shapes; the kernels run in the interpreter, or on a GPU."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    B, T, H, D, N, C, V = 2, 8, 2, 16, 6, 32, 68

    def tensor(*shape):
        return torch.randn(*shape, device=device)

    names = {
        "C": C, "x": tensor(N, C), "update": tensor(N, C), "residual": tensor(N, C), "weight": tensor(C),
        "bias": tensor(C), "qkv": tensor(B, T, 3, H, D), "logits": tensor(N, V), "q": tensor(B, H, D),
        "target": torch.zeros(N, dtype=torch.int64, device=device),
        "lm_head": torch.nn.Linear(C, V).to(device),
        "k_cache": tensor(B, H, T, D), "v_cache": tensor(B, H, T, D),
        "lengths": torch.full((B,), T, device=device),
        "idx": torch.zeros(B, T, dtype=torch.int64, device=device),
    }  # fmt: skip
    names["targets"] = names["idx"]
    shapes = {"B": B, "T": T, "H": H, "D": D, "N": N, "C": C, "V": V}
    for statement in ast.parse(program).body:
        line = program.splitlines()[statement.lineno - 1]
        exec(ast.unparse(statement).replace('"cuda"', repr(device)).replace("'cuda'", repr(device)), names)
        # what the comment says of the result: `# (B, T, V)`, or `-> (B, T, H, D)`
        if isinstance(statement, ast.Assign) and (said := re.search(r"# (?:.*-> )?(\([\w, +]+\))", line)):
            target = statement.targets[0]
            first = target.elts[0] if isinstance(target, ast.Tuple) else target
            assert tuple(names[first.id].shape) == eval(said[1], {}, shapes), line


# ---- the batch script of docs/slurm.md

SRUN = """#!/bin/bash
printf '%s\\n' srun "$@" > srun.words
case $ENDING in
    finished) exit 0 ;;
    failed) exit 3 ;;
esac
trap 'sleep 0.1; echo saved > saved; exit 1' TERM
echo > running
while :; do sleep 0.05; done
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'localhost\\nother\\n'; else echo "$@" > requeued; fi
"""


def batch_script(folder, name, ending="finished"):
    """Slurm runs the script, srun ends so; (what srun was given, the script's exit code)."""
    script = folder / name
    for option in re.findall(r"^#SBATCH (--[\w-]+)", script.read_text(), re.MULTILINE):
        assert option in NOT_HERE["sbatch"], f"sbatch is not known to have {option}"
    for program, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / program).write_text(text)
        (folder / program).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "two", "SLURM_JOB_NUM_NODES": "2"}
    slurm |= {"SLURM_CPUS_PER_TASK": "64", "ENDING": ending, "PATH": f"{folder}:{os.environ['PATH']}"}
    running = subprocess.Popen(["bash", script], cwd=folder, env=os.environ | slurm)
    if ending == "stopped":
        deadline = time.monotonic() + 30
        while not (folder / "running").exists():
            assert time.monotonic() < deadline and running.poll() is None
            time.sleep(0.02)
        running.send_signal(signal.SIGUSR1)
    code = running.wait(30)
    return (folder / "srun.words").read_text().splitlines(), code


@pytest.mark.parametrize(
    ("ending", "code", "requeued"), [("finished", 0, 0), ("failed", 3, 0), ("stopped", 0, 1)]
)
def test_a_job_is_queued_again_where_it_was_stopped_and_only_there(tmp_path, ending, code, requeued):
    (block,) = (b for b in blocks(ROOT / "docs" / "slurm.md") if b.path.endswith(".sbatch"))
    (tmp_path / "gpt2.sbatch").write_text(block.text)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    assert batch_script(tmp_path, "gpt2.sbatch", ending)[1] == code
    assert (tmp_path / "requeued").exists() == bool(requeued)
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"
        assert (tmp_path / "saved").exists(), "queued again before the ranks had saved"


# ---- what is said between the blocks


def known_flags():
    from torch.distributed.run import get_args_parser

    from bench.nanogpt import NanoGPTConfig
    from gpt.cli import describe
    from gpt.convert import ConvertConfig
    from gpt.sample import SampleConfig
    from train.config import TrainConfig
    from train.evaluate import EvaluateConfig
    from train.plot import PlotConfig
    from train.prepare.__main__ import PrepareConfig, TokenizerConfig

    own = (
        TrainConfig,
        SampleConfig,
        PrepareConfig,
        TokenizerConfig,
        ConvertConfig,
        EvaluateConfig,
        PlotConfig,
    )
    flags = {f"--{name}" for config in (*own, NanoGPTConfig) for name, *_ in describe(config)}
    for path in (ROOT / "bench").glob("*.py"):
        flags |= set(re.findall(r'add_argument\(\s*"(--\w+)"', path.read_text()))
    return flags | {*get_args_parser()._option_string_actions} | set().union(*NOT_HERE.values()) | OTHERS


@pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)
def test_a_document_names_what_exists(document):
    text = document.read_text()
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert not (unknown := set(re.findall(r"--[a-z][\w-]*", prose)) - known_flags()), unknown
    for module in set(re.findall(r"python -m ([\w.]+)", text)):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / link).exists(), f"a link to {link}"
    # What it says when something goes wrong, in the first column of a table, is what the code says.
    says = "".join(
        p.read_text() for f in ("gpt", "train", "kernels") for p in sorted((ROOT / f).rglob("*.py"))
    )
    for row in re.findall(r"^\| `([^`|]+)` \|", text.partition("## What goes wrong")[2], re.MULTILINE):
        assert row in says, f"nothing says {row!r}"


def test_the_readme_lists_the_guides_and_the_presets():
    text = (ROOT / "README.md").read_text()
    assert set(re.findall(r"\(docs/([\w-]+)\.md\)", text)) == set(IDS) - {"README"}
    presets = {p.stem for p in (ROOT / "train" / "configs").glob("*.py")}
    assert set(re.findall(r"`(\w+)`", re.search(r"Presets: (.*?);", text, re.DOTALL)[1])) == presets
