"""Token files to batches. Which windows a batch holds is a pure function of (seed, position).

An epoch cuts the tokens into windows of block_size at an offset of its own, and visits each window exactly
once, in an order of its own. A run is one sequence of windows, epoch after epoch; step, micro-step and rank
only say which stretch of it to read, so batches never overlap, and a resumed run goes on where it stopped.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt.model import GPTConfig
from gpt.tokenizer import describe_dataset

U64 = NDArray[np.uint64]


def describe(folder: Path) -> dict[str, Any]:
    """The tokenizer of a data set, as `Tokenizer.to_dict` has it. Raises FileNotFoundError."""
    for name in ("train.bin", "val.bin"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"there is no {folder / name}: prepare the data first, see python -m train.prepare"
            )
    return describe_dataset(folder)


class TokenFile:
    """A headerless file of uint16 token ids, mapped into memory once: batches of its windows by position.

    Raises ValueError when the file is of odd size, or shorter than one window.
    """

    def __init__(self, path: Path, model: GPTConfig, seed: int):
        block_size = model.block_size
        size = path.stat().st_size
        if size % 2:
            raise ValueError(
                f"{path} has an odd number of bytes, {size:,}: no file of uint16; prepare it again"
            )
        if size // 2 < block_size + 1:
            raise ValueError(
                f"{path} has {size // 2:,} tokens, too few for one window of block_size={block_size} and its "
                f"targets; lower block_size to {max(size // 2 - 1, 0)} or less, or add text"
            )
        self.path = path
        self.block_size = block_size
        assert model.vocab_size is not None
        self.vocab_size = model.vocab_size
        self.seed = seed
        self.tokens = np.memmap(path, np.uint16, mode="r")
        # One block is kept back so that the offset of an epoch can be anything within a block, and more.
        self.windows = max(1, (len(self.tokens) - block_size) // block_size)
        self._all = np.lib.stride_tricks.sliding_window_view(self.tokens, block_size + 1)

    def batch(self, position: int, count: int) -> tuple[Tensor, Tensor]:
        """Windows `position` to `position + count` of the run -> inputs, targets: (count, block_size) int64.

        Raises ValueError for a token id that the vocabulary lacks.
        """
        ids = self._all[self.starts(position, count)]  # (count, block_size + 1), a copy
        self.check_ids(int(ids.max()))
        rows = torch.from_numpy(ids.astype(np.int64))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def __len__(self) -> int:
        """Tokens in the file."""
        return len(self.tokens)

    def read(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """The `length` ids from each of `starts` on: (len(starts), length)."""
        return np.stack([self.tokens[start : start + length] for start in starts]).astype(np.int64)

    def check_ids(self, largest: int) -> None:
        """Raises ValueError where the vocabulary lacks the token id `largest`."""
        if largest >= self.vocab_size:
            raise ValueError(
                f"{self.path} holds the token id {largest}, but vocab_size={self.vocab_size} allows 0 to "
                f"{self.vocab_size - 1}: was it prepared with another tokenizer?"
            )

    def starts(self, position: int, count: int) -> NDArray[np.int64]:
        """The first token of each of these windows."""
        starts = []
        while count:
            epoch, index = divmod(position, self.windows)
            n = min(count, self.windows - index)
            key = _key(self.seed, epoch)
            slack = len(self.tokens) - 1 - self.windows * self.block_size
            offset = int(key[2]) % (slack + 1)
            order = _permute(np.arange(index, index + n, dtype=np.uint64), self.windows, key)
            starts.append(offset + order.astype(np.int64) * self.block_size)
            position, count = position + n, count - n
        return np.concatenate(starts)


def _key(seed: int, epoch: int) -> U64:
    """Three words that look random, two for the order of an epoch and one for its offset."""
    words = np.array([3 * epoch, 3 * epoch + 1, 3 * epoch + 2], np.uint64)
    return _mix(_mix(np.array([seed % 2**64], np.uint64)) + words)


def _mix(x: U64) -> U64:
    """splitmix64's finalizer, a good hash of 64 bits. Source: Steele, Lea and Flood, OOPSLA 2014."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _permute(index: U64, n: int, key: U64) -> U64:
    """Where a keyed permutation of range(n) sends `index`: O(1) memory whatever n.

    A Feistel network permutes the smallest range of 4^h >= n; values that fall outside range(n) walk on
    along their cycle until they are inside. Source: Black and Rogaway, 2002, "Ciphers with arbitrary finite
    domains".
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
    """Copies to `device`; from pinned memory the CPU does not wait for it."""
    if device.startswith("cuda"):
        return tuple(t.pin_memory().to(device, non_blocking=True) for t in batch)  # type: ignore[return-value]
    return tuple(t.to(device) for t in batch)  # type: ignore[return-value]
