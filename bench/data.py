"""python -m bench.data: reading on one core and tokenizing on several, against what they must keep up with.

Batches of 64 x 1024 tokens out of shards of random ids are assembled by one thread, as the training's reader
does; the goal is four GPUs of 570,000 tokens/s each. The text (the Python standard library's sources, or
--input) is encoded by `python -m train.prepare`, from the start of the command to data on the disk, and by
tiktoken's own encode_ordinary_batch in as many threads, in turns; the goal is 0.9 of its rate.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from bench.timing import Timing, summary
from gpt import cli
from gpt.model import GPTConfig
from gpt.tokenizer import GPT2_VOCAB_SIZE, GPT2Tokenizer
from train import shards
from train.data import TokenFile
from train.prepare import corpora, documents

ROOT = Path(__file__).parents[1]
NEEDED = 4 * 570_000  # tokens/s
BATCH, BLOCK = 64, 1024


@dataclass
class DataConfig:
    """Measure reading and tokenizing on this machine's CPU."""

    input: str = ""  # a file of text; without it, the standard library's sources
    megabytes: int = 96  # of text to encode: the input is repeated or cut to that
    processes: int = 2  # that encode, and threads of tiktoken's
    rounds: int = 3  # of encoding by each, in turns


def reading(folder: Path, batches: int = 300) -> Timing:
    """Milliseconds of one batch, out of 4 shards of 25M tokens."""
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    for shard in range(4):
        generator.integers(0, GPT2_VOCAB_SIZE, 25_000_000, np.uint16).tofile(folder / f"{shard}_train.bin")
    file = TokenFile(folder / "train.bin", GPTConfig(block_size=BLOCK, vocab_size=GPT2_VOCAB_SIZE), seed=0)
    times = []
    for i in range(batches):
        started = time.perf_counter()
        file.batch(i * BATCH, BATCH)
        times.append(1000 * (time.perf_counter() - started))
    return summary(times[batches // 10 :])


def tokenizing(folder: Path, config: DataConfig) -> dict[str, list[float]]:
    """Tokens/s of each round."""
    text = Path(config.input).read_text(encoding="utf-8") if config.input else corpora.stdlib()
    text = (text * (config.megabytes * 10**6 // len(text) + 1))[: config.megabytes * 10**6]
    path = folder / "text.txt"
    path.write_text(text, encoding="utf-8")
    bpe = GPT2Tokenizer().bpe
    rates: dict[str, list[float]] = {"tritongpt": [], "tiktoken": []}
    for i in range(config.rounds):
        flags = [f"--input={path}", f"--name=round{i}", f"--processes={config.processes}"]
        started = time.perf_counter()
        # The command itself: a process that is started from here would load torch before it encodes.
        subprocess.run(
            [sys.executable, "-m", "train.prepare", "text", *flags],
            cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, check=True,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        meta = shards.read_meta(folder / "data" / f"round{i}")
        rates["tritongpt"].append((meta["train"]["tokens"] + meta["val"]["tokens"]) / seconds)
        pieces = list(documents.cut(chunks(text)))
        started = time.perf_counter()
        theirs = bpe.encode_ordinary_batch(pieces, num_threads=config.processes)
        rates["tiktoken"].append(sum(map(len, theirs)) / (time.perf_counter() - started))
    return rates


def chunks(text: str) -> Iterator[str]:
    return (text[i : i + documents.PIECE] for i in range(0, len(text), documents.PIECE))


def main() -> None:
    config = cli.parse(DataConfig, sys.argv[1:], prog="python -m bench.data")
    with tempfile.TemporaryDirectory() as folder:
        batch = reading(Path(folder))
        rate = BATCH * BLOCK / batch.median * 1000
        print(
            f"reading, one core: {batch.median:.2f} ms a batch ({batch.low:.2f} to {batch.high:.2f}),",
            end=" ",
        )
        print(
            f"{rate / 1e6:.1f}M tokens/s, {rate / NEEDED:.1f} times the {NEEDED / 1e6:.2f}M to keep up with"
        )
        rates = tokenizing(Path(folder), config)
    for name, values in rates.items():
        print(f"{name}: {statistics.median(values) / 1e6:.2f}M tokens/s", end=" ")
        print(f"({min(values) / 1e6:.2f} to {max(values) / 1e6:.2f}), {config.processes} cores")
    ratios = [ours / theirs for ours, theirs in zip(rates["tritongpt"], rates["tiktoken"])]
    print(f"of tiktoken's rate, round by round: median {statistics.median(ratios):.2f}", end=" ")
    print(f"({min(ratios):.2f} to {max(ratios):.2f})")
    print(json.dumps({"config": asdict(config), "batch_ms": asdict(batch), "tokens_per_s": rates}))


if __name__ == "__main__":
    cli.run(main)
