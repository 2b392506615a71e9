"""The formats of token files, and meta.json beside them. Needs only NumPy.

    no header         nanoGPT's: uint16 ids, nothing else
    magic 20240520    llm.c's and modded-nanogpt's: 256 int32 (magic, version 1, count, zeros), uint16 ids
    magic 20240801    llm.c's for more than 65,536 tokens: the same header with version 7, uint32 ids

This project uses the zero after the count as the upper half of a 64-bit count. A split is one file, train.bin
or val.bin, or several shards with the word train or val in their names.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from gpt.reading import read_json, regular

HEADER_INTS = 256
FORMATS: dict[int, DTypeLike] = {20240520: np.uint16, 20240801: np.uint32}  # by magic
# The first bytes of files that are not token files.
FOREIGN = {"a NumPy array (.npy)": b"\x93NUMPY", "compressed (gzip)": b"\x1f\x8b", "a zip archive": b"PK\3\4"}
WORDS = {"train": {"train", "training"}, "val": {"val", "valid", "validation"}}  # in the names of shards


def find(path: Path) -> list[Path]:
    """The files of the split data/NAME/train.bin: this file, or else its shards in order of name.

    A shard has `train` (or `val`) as a word of its name: web_train_01.bin is one, constraint_01.bin is not.
    Raises FileNotFoundError if there is none, and ValueError if a name has the words of both splits.
    """
    if path.exists():
        return [regular(path)]
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no {path}")
    split = path.stem
    own = WORDS.get(split, {split})
    others = set().union(*WORDS.values()) - own
    shards = []
    for shard in sorted(path.parent.glob("*.[bB][iI][nN]")):
        words = set(re.findall("[a-z]+", shard.stem.lower()))
        # macOS leaves a file ._NAME beside each file that it copies to another system.
        if words & own and not shard.name.startswith("._"):
            if words & others:
                both = ", ".join(sorted(words & (own | others)))
                raise ValueError(f"{shard} has the words of both splits in its name ({both}): rename it")
            shards.append(shard)
    if not shards:
        raise FileNotFoundError(f"there is no {path}, and no shard with the word {split} in its name")
    return shards


def open_tokens(path: Path) -> NDArray:
    """The ids in `path`, mapped into memory: (tokens,) uint16 or uint32. Raises ValueError, OSError."""
    size = regular(path).stat().st_size
    start = np.fromfile(path, "<i4", count=4)
    if len(start) < 4 or int(start[0]) not in FORMATS:
        return _open_headerless(path, size, start.tobytes())
    dtype, n_tokens = FORMATS[int(start[0])], int(start[2:].view("<i8")[0])
    expected_size = 4 * HEADER_INTS + n_tokens * np.dtype(dtype).itemsize
    if n_tokens < 0 or size != expected_size:
        raise ValueError(
            f"{path} has {size:,} bytes, but its header, which says {n_tokens:,} tokens, makes "
            f"{expected_size:,}: it is incomplete; copy or prepare it again"
        )
    return np.memmap(path, dtype, mode="r", offset=4 * HEADER_INTS, shape=(n_tokens,))


def _open_headerless(path: Path, size: int, head: bytes) -> NDArray:
    for name, magic in FOREIGN.items():
        if head.startswith(magic):
            raise ValueError(f"{path} is {name}, not a file of ids: write uint16 ids by numpy's tofile")
    if size % 2:
        raise ValueError(f"{path} has an odd number of bytes, {size:,}, and is not uint16; prepare it again")
    ids = np.memmap(path, "<u2", mode="r") if size else np.empty(0, np.uint16)
    if _is_uint32(ids) and read_meta(path.parent).get("dtype") != "uint16":
        code = f"import numpy as np; p = {str(path)!r}; np.fromfile(p, 'u4').astype('u2').tofile(p)"
        convert = f'python -c "{code}"'
        if int(np.memmap(path, "<u4", mode="r").max()) >= 65536:
            convert = f"write train.shards.header(np.uint32, {len(ids) // 2}) before its bytes"
        raise ValueError(
            f"{path} has uint32 ids without a header (read as uint16, every second one is near 0), and a "
            f"headerless file must be uint16. Convert it: {convert}"
        )
    return ids


def _is_uint32(ids: NDArray) -> bool:
    """Whether ids read as uint16 are probably uint32, as some forks of nanoGPT write them."""
    # Then the upper half of each id is 0, or small if the vocabulary is above 65,536. A text with one symbol
    # on each line has a 0 in every second place too, but few symbols, and no 0 elsewhere.
    low, high = ids[: 1 << 16 : 2], ids[1 : 1 << 16 : 2]
    if len(ids) % 2 or len(ids) < 64 or not low.any():
        return False
    is_wide = low.max() >= 256
    return bool((high.max() == 0 and (is_wide or low.min() == 0)) or (high.max() < 16 and is_wide))


def dtype_for(vocab_size: int) -> DTypeLike:
    return np.uint16 if vocab_size <= 65536 else np.uint32


def header(dtype: DTypeLike, n_tokens: int) -> bytes:
    """The bytes before the ids: none for uint16, as in nanoGPT's files, and llm.c's header for uint32."""
    if dtype == np.uint16:
        return b""
    words = np.zeros(HEADER_INTS, "<i4")
    words[:2] = 20240801, 7  # magic and version
    words[2:4].view("<i8")[:] = n_tokens
    return words.tobytes()


def read_meta(folder: Path) -> dict[str, Any]:
    """The content of meta.json, {} if there is none. Raises ValueError, OSError."""
    path = folder / "meta.json"
    if not path.exists():
        return {}
    try:
        meta = read_json(path)
        counts = [meta["vocab_size"], *(meta[split]["tokens"] for split in ("train", "val"))]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise TypeError("counts must be whole numbers of at least 0")
        return meta
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}); remove it, or prepare the data again"
        ) from None
