"""Small training runs for tests, in this process or in forked processes that have imported torch already."""

import importlib
import multiprocessing
import os
import sys
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed as dist

from gpt import cli
from train import distributed, metrics
from train.config import parse
from train.loop import train

TINY = """
    --dataset=tiny --device=cpu --n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=4
    --gradient_accumulation_steps=2 --max_iters=8 --lr_decay_iters=8 --warmup_iters=2 --learning_rate=1e-2
    --eval_interval=4 --eval_iters=2
""".split()
FORKS = multiprocessing.get_context("forkserver")
# The last two are imported late: by the first optimizer and by the command line.
FORKS.set_forkserver_preload(["tests.runs", "train.__main__", "train.evaluate", "torch._dynamo"])


def surroundings(**more: str) -> dict[str, str]:
    """The environment for a program of this project in any working directory."""
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"} | more


def run(*flags: str, out_dir: str = "out") -> dict[str, Any]:
    """Trains in this process with the flags TINY and `flags`. Returns the checkpoint."""
    config, given = parse([*TINY, f"--out_dir={out_dir}", *flags])
    train(config, distributed.start("auto", config.device), given)
    return load(out_dir)


def run_ranks(*flags: str, ranks: int = 2, module: str = "train.__main__") -> str:
    """Like `start`, but waits for exit code 0 of every process. Returns what they printed."""
    launch = start(*flags, ranks=ranks, module=module)
    codes = launch.wait()
    assert codes == [0] * len(codes), launch.printed()
    return launch.printed()


def start(*flags: str, ranks: int = 0, module: str = "train.__main__") -> "Launch":
    """Starts a command in `ranks` processes with torchrun's environment, or in one process without it.

    `module` has the command's `main`. `train` gets the flags TINY before `flags`. The processes are forked
    from a server that has imported torch and the project, so they start in milliseconds; torchrun's need
    seconds.
    """
    Path("printed.txt").write_text("")
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if ranks else None
    words = [*(TINY if module == "train.__main__" else ()), *flags]
    processes: list[BaseProcess] = []
    for rank in range(max(ranks, 1)):
        environment: dict[str, str] = {}
        if store is not None:  # torchrun's agent has a store for its ranks too
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
            environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        arguments = (module, words, environment, os.getcwd())
        process = FORKS.Process(target=_command, args=arguments, daemon=True)
        with mock.patch.dict(os.environ, surroundings(TRITON_INTERPRET="1")):  # for the server's start
            process.start()
        processes.append(process)
    return Launch(processes, store)


@dataclass
class Launch:
    processes: list[BaseProcess]  # by rank
    store: dist.Store | None  # through which the ranks find each other

    def wait(self) -> list[int | None]:
        """Exit codes by rank. A process that runs longer than two minutes is killed; its code is -9."""
        for process in self.processes:
            process.join(120)
            process.kill()
            process.join()
        return [process.exitcode for process in self.processes]

    @staticmethod
    def printed() -> str:
        """The stdout and stderr of all processes."""
        return Path("printed.txt").read_text()


def _command(module: str, words: list[str], environment: dict[str, str], folder: str) -> None:
    """Runs in the forked process."""
    os.chdir(folder)
    os.environ.update(environment)
    printed = os.open("printed.txt", os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(printed, descriptor)
    sys.argv = [module, *words]
    cli.run(importlib.import_module(module).main)


def load(out_dir: str, name: str = "ckpt.pt") -> dict[str, Any]:
    return torch.load(Path(out_dir, name), weights_only=True)


def records(out_dir: str) -> list[dict[str, Any]]:
    """metrics.jsonl without the fields that depend on the machine."""
    machine = {"ms", "tokens_per_s", "mfu", "memory_gb"}
    lines = metrics.read(Path(out_dir, "metrics.jsonl"))
    return [{key: value for key, value in line.items() if key not in machine} for line in lines]


def series(out_dir: str, name: str, of: str = "") -> list[Any]:
    """The values of the field `name`, in the records that have the field `of` (by default, `name`)."""
    return [record[name] for record in records(out_dir) if (of or name) in record]


def assert_close_weights(first: dict[str, Any], second: dict[str, Any], rtol: float = 1e-4) -> None:
    for name, weight in first["model"].items():
        torch.testing.assert_close(second["model"][name], weight, rtol=rtol, atol=rtol / 10, msg=name)


def assert_same_weights(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Compares the weights of two checkpoints bit for bit."""
    for name, weight in first["model"].items():
        assert torch.equal(weight, second["model"][name]), name


def assert_same_state(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Compares, bit for bit, everything in two checkpoints that decides how a run continues."""
    assert_same_weights(first, second)
    for i, moments in first["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, second["optimizer"]["state"][i][name]), f"{name} of {i}"
    assert all(torch.equal(a["cpu"], b["cpu"]) for a, b in zip(first["rng"], second["rng"], strict=True))
    for key in ("iter_num", "position", "skipped", "best_val_loss", "scaler"):
        assert first[key] == second[key], key


def assert_same_run(first: str, second: str) -> None:
    """Compares ckpt.pt, best.pt and the metrics of two runs bit for bit."""
    for name in ("ckpt.pt", "best.pt"):
        assert_same_state(load(first, name), load(second, name))
    assert records(first) == records(second)
