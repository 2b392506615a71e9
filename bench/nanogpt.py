"""python -m bench.nanogpt --nanogpt=PATH: time whole training runs of nanoGPT and of ours in turns.

Both train nanoGPT's CPU preset (the quickstart) on the same token files with the same settings, not compiled.
The time is that of the whole process, with start-up and evaluations. nanoGPT makes one update more than
max_iters, so its max_iters is one lower.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench import timing
from gpt import cli
from gpt.cli import UserPath

ROOT = Path(__file__).parents[1]
PRESET = {
    "eval_interval": 250, "eval_iters": 20, "log_interval": 10, "n_layer": 4, "n_head": 4, "n_embd": 128,
    "block_size": 64, "dropout": 0.0, "batch_size": 12, "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3, "min_lr": 1e-4, "beta2": 0.99, "warmup_iters": 100,
    "device": "cpu", "compile": False,
}  # fmt: skip


@dataclass
class NanoGPTConfig:
    """Compare whole training runs with nanoGPT's train.py."""

    nanogpt: str  # a checkout of nanoGPT
    dataset: str = "plays_char"  # folder in data/
    iters: int = 500  # updates in a run
    rounds: int = 5  # runs of each, alternating
    out: UserPath = ""  # a JSON file for the results


def seconds(command: list[str], folder: Path) -> float:
    """Runs a training to its end. Raises ValueError with the last line it printed when it fails."""
    started = time.perf_counter()
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ)
    elapsed = time.perf_counter() - started
    if result.returncode:
        raise ValueError(f"{' '.join(command[:3])} failed: {result.stderr.strip().splitlines()[-1:]}")
    return elapsed


def main() -> None:
    config = cli.parse(NanoGPTConfig, sys.argv[1:], prog="python -m bench.nanogpt")
    checkout, data = Path(config.nanogpt).resolve(), Path("data", config.dataset).resolve()
    if not (checkout / "train.py").is_file():
        raise ValueError(f"{checkout} is not a checkout of nanoGPT: it has no train.py")
    times: dict[str, list[float]] = {"nanogpt": [], "tritongpt": []}
    with tempfile.TemporaryDirectory() as out_dir:
        shared = PRESET | {"dataset": data, "out_dir": out_dir, "lr_decay_iters": config.iters}
        flags = [f"--{key}={value}" for key, value in shared.items()]
        theirs = [sys.executable, "train.py", *flags, f"--max_iters={config.iters - 1}"]
        ours = [sys.executable, "-m", "train", *flags, f"--max_iters={config.iters}"]
        for _ in range(config.rounds):
            times["nanogpt"].append(seconds(theirs, checkout))
            times["tritongpt"].append(seconds(ours, ROOT))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(f"{name}: median {medians[name]:.2f} s, from {min(values):.2f} to {max(values):.2f}")
    print(f"ratio of the medians, ours to nanoGPT's: {medians['tritongpt'] / medians['nanogpt']:.2f}")
    if config.out:
        timing.write(config.out, "nanogpt", "cpu", iters=config.iters, preset=PRESET, seconds=times)


if __name__ == "__main__":
    cli.run(main)
