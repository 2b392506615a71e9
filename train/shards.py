"""What a token file is, and meta.json beside it. Needs NumPy alone.

    headerless        nanoGPT's: nothing but uint16 ids
    magic 20240520    llm.c's and modded-nanogpt's: 256 int32 (magic, version 1, tokens, zeros), uint16 ids
    magic 20240801    llm.c's for vocabularies over 65536: the same header with version 7, uint32 ids

The zero after the count holds, in files of uint32 written here, what of the count is past 32 bits.
A split of a dataset is one file, train.bin or val.bin, or many, whose names have the word train or val.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from gpt.reading import read_json, regular

HEADER_INTS = 256
FOREIGN = {"a NumPy array (.npy)": b"\x93NUMPY", "compressed (gzip)": b"\x1f\x8b", "a zip archive": b"PK\3\4"}
WORDS = {"train": {"train", "training"}, "val": {"val", "valid", "validation"}}  # in the names of shards
KINDS: dict[int, tuple[int, type]] = {20240520: (1, np.uint16), 20240801: (7, np.uint32)}


def find(path: Path) -> list[Path]:
    """The files that data/NAME/train.bin stands for: itself, else its shards in order of name.

    A shard has the word `train` (or `val`) in its name: web_train_01.bin, not constraint_01.bin. Raises
    FileNotFoundError where there is none, ValueError where a name has both words.
    """
    if path.exists():
        return [regular(path)]
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no {path}")
    own = WORDS.get(path.stem, {path.stem})
    other = set().union(*(words for split, words in WORDS.items() if split != path.stem))
    shards = []
    # A Mac leaves a file ._NAME of its own beside each that it copies.
    for shard in sorted(p for p in path.parent.glob("*") if not p.name.startswith("._")):
        if shard.suffix.lower() != ".bin":
            continue
        words = set(re.findall("[a-z]+", shard.stem.lower()))
        if words & own and words & other:
            raise ValueError(
                f"{shard} has the words of both splits in its name "
                f"({', '.join(sorted(words & (own | other)))}): rename it, so that one is left"
            )
        if words & own:
            shards.append(shard)
    if not shards:
        raise FileNotFoundError(
            f"there is no {path}, and no shard with the word {path.stem} in its name (such as "
            f"web_{path.stem}_000001.bin) in its place"
        )
    return shards


def open_tokens(path: Path) -> NDArray:
    """The ids in `path`, mapped into memory: (tokens,) uint16 or uint32. Raises ValueError."""
    size = regular(path).stat().st_size
    start = np.fromfile(path, "<i4", count=4)
    if len(start) < 4 or int(start[0]) not in KINDS:
        if how := next((how for how, magic in FOREIGN.items() if start.tobytes().startswith(magic)), None):
            raise ValueError(
                f"{path} is {how}, not a file of ids: write its ids by numpy's tofile, as uint16"
            )
        if size % 2:
            raise ValueError(
                f"{path} has an odd number of bytes, {size:,}: no file of uint16; prepare it again"
            )
        ids = np.memmap(path, "<u2", mode="r") if size else np.empty(0, np.uint16)
        _check_width(path, ids)
        return ids
    magic, version, tokens = int(start[0]), int(start[1]), int(start[2:].view("<i8")[0])
    known_version, dtype = KINDS[magic]
    if version != known_version:
        raise ValueError(
            f"{path} is a shard of version {version}; of magic {magic} only version {known_version} is known"
        )
    expected = 4 * HEADER_INTS + tokens * np.dtype(dtype).itemsize
    if tokens < 0 or size != expected:
        raise ValueError(
            f"{path} has {size:,} bytes, and its header, which says {tokens:,} tokens, makes {expected:,}: "
            "it is not whole; copy or prepare it again"
        )
    return np.memmap(path, dtype, mode="r", offset=4 * HEADER_INTS, shape=(tokens,))


def _check_width(path: Path, ids: NDArray) -> None:
    """Raises ValueError where headerless ids are uint32, as forks of nanoGPT write them: (n,) uint16.

    Half of each such id is 0, or a few where the vocabulary is past 65,536. A text with one symbol a line has
    a 0 in every second place too, but no other one.
    """
    low, high = ids[: 1 << 16 : 2], ids[1 : 1 << 16 : 2]
    if len(ids) % 2 or len(ids) < 64 or not low.any() or read_meta(path.parent).get("dtype") == "uint16":
        return
    wide = low.max() >= 256
    if (high.max() == 0 and (wide or low.min() == 0)) or (high.max() < 16 and wide):
        code = f"import numpy as np; p = {str(path)!r}; np.fromfile(p, 'u4').astype('u2').tofile(p)"
        convert = f'python -c "{code}"'
        if int(np.memmap(path, "<u4", mode="r").max()) >= 65536:
            convert = f"write train.shards.header(np.uint32, {len(ids) // 2}) before its bytes"
        raise ValueError(
            f"{path} has uint32 ids without a header (read as uint16, every second one is near 0), and a "
            f"headerless file must be uint16. Convert it: {convert}"
        )


def dtype_for(vocab_size: int) -> DTypeLike:
    return np.uint16 if vocab_size <= 65536 else np.uint32


def header(dtype: DTypeLike, tokens: int) -> bytes:
    """What comes before the ids: nothing for uint16, so that nanoGPT reads it; llm.c's header for uint32."""
    if dtype == np.uint16:
        return b""
    magic = next(m for m, (_, kind) in KINDS.items() if kind == dtype)
    words = np.zeros(HEADER_INTS, "<i4")
    words[:2] = magic, KINDS[magic][0]
    words[2:4].view("<i8")[:] = tokens
    return words.tobytes()


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json, {} where there is none. Raises ValueError."""
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
