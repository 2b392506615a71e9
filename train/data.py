"""Batches from token files. A batch is a pure function of (seed, position).

An epoch cuts the tokens into windows of block_size and visits each window once. Each epoch has its own order
and its own offset, at which the first window begins. A run is one sequence of windows, epoch after epoch.
Step, micro-step and rank only decide which part of the sequence is read. So batches never overlap, and a
resumed run continues exactly where it stopped.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt import cli
from gpt.model import GPTConfig
from gpt.tokenizer import describe_dataset
from train import shards
from train.prepare.corpora import CORPORA

U64 = NDArray[np.uint64]
SAMPLE = (256, 1 << 17)  # pieces that are checked before training, and tokens in each: 34M tokens


def describe(folder: Path) -> dict[str, Any]:
    """Reads the description of a data set's tokenizer.

    Raises FileNotFoundError if a .bin file is missing, and ValueError if the tokenizer cannot be read.
    """
    try:
        for name in ("train.bin", "val.bin"):
            shards.find(folder / name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}: {_how_to_prepare(folder)}") from None
    return describe_dataset(folder)


def _how_to_prepare(folder: Path) -> str:
    if entry := CORPORA.get(folder.name):
        hint = f"{cli.command('train.prepare', folder.name)} prepares it, {entry.help}"
    else:
        words = ("text", "--input=FILE", f"--name={folder.name}")
        hint = f"{cli.command('train.prepare', *words)} makes it from a text"
    ready = sorted(path.parent.name for path in folder.parent.glob("*/train.bin"))
    other = f"; --dataset={ready[0]} exists" if ready else ""
    return f"{hint}{other}; make quickstart begins with a small one"


class Split:
    """The ids of a split, mapped into memory. Several shards are read like one file.

    Raises FileNotFoundError, and ValueError for a file that is not a token file.
    """

    def __init__(self, path: Path, vocab_size: int):
        self.path, self.vocab_size = path, vocab_size
        # As plain arrays over the map: slicing a memmap takes three times as long.
        self._paths = shards.find(path)
        self._bytes = [p.stat().st_size for p in self._paths]
        self._shards = [np.asarray(shards.open_tokens(p)) for p in self._paths]
        self._ends = np.cumsum([len(shard) for shard in self._shards])

    def __len__(self) -> int:
        """The number of tokens."""
        return int(self._ends[-1])

    def read(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """The `length` ids from each of `starts` on: (len(starts), length).

        Raises ValueError if a file was cut short after it was opened.
        """
        ids = np.empty((len(starts), length), np.int64)
        # The shards in which each window begins and ends.
        first = np.searchsorted(self._ends, starts, "right").tolist()
        last = np.searchsorted(self._ends, starts + length - 1, "right").tolist()
        for i in {i for pair in zip(first, last) for i in range(pair[0], pair[1] + 1)}:
            # Reading a memory map beyond the end of its file kills the process.
            if self._paths[i].exists() and (now := self._paths[i].stat().st_size) < self._bytes[i]:
                raise ValueError(
                    f"{self._paths[i]} was cut short while it was in use: {self._bytes[i]:,} bytes before, "
                    f"{now:,} now; put it back and continue with --init_from=resume"
                )
        for row, start, i in zip(ids, starts.tolist(), first):
            filled = 0
            while filled < length:
                begin = start + filled - int(self._ends[i]) + len(self._shards[i])
                part = self._shards[i][begin : begin + length - filled]
                row[filled : filled + len(part)] = part
                filled, i = filled + len(part), i + 1
        return ids

    def check_ids(self, largest: int) -> None:
        """Raises ValueError if the id `largest` is outside the vocabulary."""
        if largest >= self.vocab_size:
            raise ValueError(
                f"{self.path} holds the token id {largest}, but vocab_size={self.vocab_size} allows 0 to "
                f"{self.vocab_size - 1}: was it prepared with a different tokenizer?"
            )

    def pieces(self) -> Iterator[NDArray[np.int64]]:
        """All ids of a small file, or an evenly spread sample of 34M ids of a large one."""
        number, length = SAMPLE
        whole = len(self) <= number * length
        begins = range(0, len(self), length) if whole else np.linspace(0, len(self) - length, number)
        for begin in map(int, begins):
            yield self.read(np.array([begin]), min(length, len(self) - begin))[0]


class TokenFile(Split):
    """A split in the order of training. A window may begin in one shard and end in another.

    Raises ValueError for a split that is shorter than one window.
    """

    def __init__(self, path: Path, model: GPTConfig, seed: int):
        assert model.vocab_size is not None
        super().__init__(path, model.vocab_size)
        self.block_size = block_size = model.block_size
        self.seed = seed
        if len(self) < block_size + 1:
            raise ValueError(
                f"{path} has {len(self):,} tokens, too few for one window of block_size={block_size} and its "
                f"targets; lower block_size to {max(len(self) - 1, 0)} or less, or add text"
            )
        # One block is left out, so that the offset of an epoch can take any value within a block.
        self.windows = max(1, (len(self) - block_size) // block_size)

    def batch(self, position: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of `count` windows from `position` on: (count, block_size) int64 each.

        Raises ValueError for an id outside the vocabulary.
        """
        ids = self.read(self.starts(position, count), self.block_size + 1)
        self.check_ids(int(ids.max()))
        rows = torch.from_numpy(ids)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def starts(self, position: int, count: int) -> NDArray[np.int64]:
        """The index of the first token in each of `count` windows from `position` on."""
        starts = []
        while count:
            epoch, index = divmod(position, self.windows)
            n = min(count, self.windows - index)
            key = _key(self.seed, epoch)
            # The windows and the last target are windows * block_size + 1 tokens. The rest is the slack.
            slack = len(self) - 1 - self.windows * self.block_size
            offset = int(key[2]) % (slack + 1)
            order = _permute(np.arange(index, index + n, dtype=np.uint64), self.windows, key)
            starts.append(offset + order.astype(np.int64) * self.block_size)
            position, count = position + n, count - n
        return np.concatenate(starts)


def preflight(files: Mapping[str, Split], saved: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Checks the data before training. Returns what a resumed run needs to see whether the data changed.

    `saved` is what this function returned for the checkpoint, {} for a new run. Raises ValueError if
    meta.json has different counts, if the model's vocabulary is too small, or if the data changed. Of a large
    file only a sample is checked, see Split.pieces. TokenFile.batch checks every id.
    """
    data: dict[str, dict[str, Any]] = {}
    for split, file in files.items():
        meta = shards.read_meta(file.path.parent)
        # meta.json counts whole splits, not a single shard or a file with a different name.
        if meta and split in shards.WORDS and meta[split]["tokens"] != len(file):
            raise ValueError(
                f"{file.path} has {len(file):,} tokens, and meta.json beside it says "
                f"{meta[split]['tokens']:,}: it was cut short or replaced; prepare the data again, or remove "
                "meta.json if the file is right"
            )
        if meta and meta["vocab_size"] > file.vocab_size:
            raise ValueError(
                f"{file.path} was prepared with a vocabulary of {meta['vocab_size']:,}, and the model's has "
                f"{file.vocab_size:,}: set vocab_size to {meta['vocab_size']} or more, or prepare the data "
                "with the model's tokenizer"
            )
        digest, largest = hashlib.sha256(), 0
        for ids in file.pieces():
            digest.update(ids.astype("<u4").data)
            largest = max(largest, int(ids.max(initial=0)))
        file.check_ids(largest)
        # The model's vocabulary may be padded with ids that no token has.
        if meta and largest >= meta["vocab_size"]:
            raise ValueError(
                f"{file.path} holds the token id {largest:,}, and meta.json beside it says a vocabulary of "
                f"{meta['vocab_size']:,}: it is damaged; prepare the data again"
            )
        data[split] = {"tokens": len(file), "sha256_of_pieces": digest.hexdigest()}
        if saved.get(split, data[split]) != data[split]:
            raise ValueError(
                f"{file.path} is not what the checkpoint was trained on: {saved[split]['tokens']:,} tokens "
                f"then, {len(file):,} now, or others; put the old data back, or start a new run from the "
                "checkpoint with --init_from=PATH and another --out_dir"
            )
    return data


def _key(seed: int, epoch: int) -> U64:
    """Three pseudorandom words: two for the order of an epoch, one for its offset."""
    words = np.array([3 * epoch, 3 * epoch + 1, 3 * epoch + 2], np.uint64)
    return _mix(_mix(np.array([seed % 2**64], np.uint64)) + words)


def _mix(x: U64) -> U64:
    """The finalizer of splitmix64, a good 64-bit hash (Steele, Lea and Flood, OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _permute(index: U64, n: int, key: U64) -> U64:
    """Where a keyed permutation of range(n) sends each `index`. It needs no table, however large n is.

    A Feistel network permutes range(4^h), the smallest such range that contains range(n). A value outside
    range(n) is permuted again until it is inside (Black and Rogaway 2002, cycle walking).
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    out = np.empty_like(index)
    todo = np.arange(len(index))
    x = index
    while len(todo):
        for r in range(6):
            left, right = x >> half, x & mask
            x = (right << half) | (left ^ (_mix(right ^ key[r % 2] ^ np.uint64(r << 56)) & mask))
        inside = x < n
        out[todo[inside]] = x[inside]
        todo, x = todo[~inside], x[~inside]
    return out


def to_device(batch: tuple[Tensor, Tensor], device: str) -> tuple[Tensor, Tensor]:
    """Copies a batch to `device`. From pinned memory the copy is asynchronous: the CPU does not wait."""
    if torch.device(device).type == "cuda":
        return tuple(t.pin_memory().to(device, non_blocking=True) for t in batch)  # type: ignore[return-value]
    return tuple(t.to(device) for t in batch)  # type: ignore[return-value]
