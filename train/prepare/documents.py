"""Read texts, files and data sets as a corpus, in pieces, of which only a few are in memory at a time.

A corpus is one running text or many documents. nanoGPT splits Shakespeare as a running text, whose end is for
validation, and OpenWebText as documents, some of which are drawn at random for validation.
"""

import glob
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from gpt import cli
from gpt.reading import open_text, regular

PIECE = 1 << 20  # characters that are encoded at a time
SPLIT_SEED = 2357  # nanoGPT's
KINDS = (".txt", ".jsonl", ".ndjson", ".parquet")  # the endings that are read from a folder
# The readers of the package datasets.
READERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# A text may be cut after a lone line end and before a lone space: GPT-2 encodes each word alone, and no word
# goes across these places. So the ids of the pieces are those of the whole text. A tokenizer.json that puts a
# space before each text it encodes (add_prefix_space, Metaspace) may get a different token at each seam.
SEAM = re.compile(r"(?<=\S)(?:\n(?=\S)|(?= \S))")

Pieces = Iterator[str | None]  # None ends a document


@dataclass
class Split:
    """One split of a corpus. Each call of `pieces` reads it from the start."""

    pieces: Callable[[], Pieces]
    size: int  # in bytes of UTF-8, roughly
    documents: int


Splits = tuple[Split, Split]  # train and val


@dataclass
class Corpus:
    train: Split
    val: Split
    source: str  # where it came from, in words


def text(content: str, source: str, val_fraction: float = 0.1) -> Corpus:
    """A running text that is in memory. Raises ValueError when it is too short to split."""
    starts = range(0, len(content), PIECE)
    return _running(lambda: (content[i : i + PIECE] for i in starts), val_fraction, source)


def files(inputs: str, field: str = "text", val_fraction: float = 0.1) -> Corpus:
    """The files, folders and globs in `inputs`, separated by commas. Raises ValueError and OSError.

    A single text file is a running text. Otherwise each text file is a document, and so is the column `field`
    of each row of a .jsonl, .ndjson, .json, .csv or .parquet file. All but .parquet may be compressed as .gz.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} must be above 0 and below 1")
    paths = find(inputs)
    number = "1 file" if len(paths) == 1 else f"{len(paths):,} files"
    source = f"{inputs}: {number}, {sum(p.stat().st_size for p in paths):,} bytes"
    texts = [p for p in paths if _kind(p) not in READERS]
    if len(paths) == len(texts) == 1:
        return _running(partial(_read, paths[0]), val_fraction, source)
    splits = [_text_files(texts, val_fraction, at_least=int(texts == paths))] if texts else []
    for kind in READERS:
        if same_kind := [p for p in paths if _kind(p) == kind]:
            splits.append(_row_files(inputs, same_kind, kind, field, val_fraction))
    train, val = map(_joined, zip(*splits))
    return Corpus(train, val, source)


def hub(path: str, part: str | None, val_fraction: float, processes: int) -> Corpus:
    """The column `text` of a data set on the Hugging Face hub, or of its configuration `part`."""
    table = _load(path, path, part, num_proc=processes)
    source = f"{path}{f' ({part})' if part else ''}, {len(table):,} documents"
    return Corpus(*_rows(table, "text", val_fraction), source)


def find(inputs: str) -> list[Path]:
    """The files that `inputs` names, each once. Raises ValueError and OSError."""
    paths: dict[Path, None] = {}
    names = [os.path.expanduser(name) for name in inputs.split(",") if name]
    if not names:
        raise ValueError(f"input={inputs!r} names no file: give files, folders or globs, separated by commas")
    for name in names:
        matches = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
        named: list[Path] = []
        for path in map(Path, matches):
            named += _files_in(path) if path.is_dir() else [regular(path)]
        if not named:
            kinds = ".txt, .jsonl or .parquet in" if Path(name).is_dir() else "file"
            raise FileNotFoundError(f"there is no {kinds} {name}")
        paths |= dict.fromkeys(named)
    return list(paths)


def _files_in(folder: Path) -> list[Path]:
    """The files in a folder that can be read, sorted. Prints how many others it leaves out."""
    # macOS leaves a file ._NAME beside each file that it copies to another system.
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("._"))
    others = Counter(_kind(p) for p in paths if _kind(p) not in KINDS and not p.name.startswith("."))
    if others:
        counts = ", ".join(f"{n:,} {kind or 'without an ending'}" for kind, n in others.most_common())
        problem = f"{folder}: only .txt, .jsonl and .parquet are read; left out: {counts}"
        print(f"{problem} (a glob takes them)", file=sys.stderr)
    return [p for p in paths if _kind(p) in KINDS]


def cut(chunks: Iterable[str], look_back: int = 1 << 16) -> Iterator[str]:
    """Cuts a text into pieces whose ids together are those of the whole text, with the exception at SEAM.

    A piece ends at a seam. A text without one in `look_back` characters is cut anywhere, and its
    ids may differ there.
    """
    rest = ""
    for chunk in chunks:
        rest += chunk
        end = len(rest) if len(rest) >= look_back else 0
        for match in SEAM.finditer(rest, max(0, len(rest) - look_back)):
            end = match.end()
        if end:
            yield rest[:end]
        rest = rest[end:]
    if rest:
        yield rest


def _running(read: Callable[[], Iterator[str]], val_fraction: float, source: str) -> Corpus:
    """A running text, which `read` yields in chunks."""
    n_characters = sum(map(len, read()))
    if n_characters < 2:
        raise ValueError(f"the text has {n_characters} characters: nothing to train on")
    n_train = max(1, min(n_characters - 1, int(n_characters * (1 - val_fraction))))

    def split(start: int, stop: int) -> Split:
        return Split(lambda: cut(_between(read(), start, stop)), stop - start, documents=1)

    return Corpus(split(0, n_train), split(n_train, n_characters), source)


def _between(chunks: Iterator[str], start: int, stop: int) -> Iterator[str]:
    """Characters `start` to `stop` of a text."""
    position = 0
    for chunk in chunks:
        if part := chunk[max(0, start - position) : max(0, stop - position)]:
            yield part
        position += len(chunk)


def _text_files(paths: list[Path], val_fraction: float, at_least: int) -> Splits:
    """Text files, each a document. At least `at_least` of them are for validation."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(paths))
    in_val = {paths[i] for i in order[: max(at_least, round(len(paths) * val_fraction))]}

    def split(part: list[Path]) -> Split:
        def pieces() -> Pieces:
            for path in part:
                yield from cut(_read(path))
                yield None

        return Split(pieces, sum(p.stat().st_size for p in part), len(part))

    return split([p for p in paths if p not in in_val]), split([p for p in paths if p in in_val])


def _row_files(inputs: str, paths: list[Path], kind: str, field: str, val_fraction: float) -> Splits:
    """Files of rows, each row a document. Raises ValueError and OSError."""
    try:
        table = _load(inputs, READERS[kind], data_files=[str(p) for p in paths])
        # Texts that were collected from Windows may each begin with a byte-order mark.
        return _rows(table, field, val_fraction, prefix="\ufeff")
    except (ValueError, OSError):
        if kind in (".jsonl", ".ndjson"):
            for path in paths:
                _check_lines(path, field)
        raise


def _rows(table: Any, field: str, val_fraction: float, prefix: str = "") -> Splits:
    """Rows of a datasets.Dataset, each a document without `prefix`. Raises ValueError."""
    if field not in table.column_names:
        columns = ", ".join(table.column_names)
        raise ValueError(f"there is no column {field!r}; choose by --field among {columns}")
    if getattr(table.features[field], "dtype", "") not in ("string", "large_string"):
        raise ValueError(f"the column {field!r} is not text but {table.features[field]}")
    if len(table) < 2:
        raise ValueError(f"there are {len(table)} rows; training and validation need at least 2")
    table = table.select_columns([field])
    bytes_per_row = table.data.nbytes / len(table)
    parts = table.train_test_split(test_size=val_fraction, seed=SPLIT_SEED, shuffle=True)

    def split(part: Any) -> Split:
        def pieces() -> Pieces:
            for batch in part.iter(max(1, round(PIECE / bytes_per_row))):
                for document in batch[field]:
                    if document is not None:
                        yield document.removeprefix(prefix)
                        yield None

        return Split(pieces, round(bytes_per_row * len(part)), len(part))

    return split(parts["train"]), split(parts["test"])


def _joined(splits: tuple[Split, ...]) -> Split:
    return Split(
        lambda: chain.from_iterable(split.pieces() for split in splits),
        sum(split.size for split in splits),
        sum(split.documents for split in splits),
    )


def _kind(path: Path) -> str:
    """The ending in lower case without .gz: ".txt" for A.TXT and a.txt.gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _read(path: Path) -> Iterator[str]:
    """A text file in chunks."""
    with open_text(path) as f:
        while chunk := f.read(PIECE):
            yield chunk


def _check_lines(path: Path, field: str) -> None:
    """Raises ValueError for the first line of a .jsonl file that is not an object with a text in `field`."""
    with open_text(path) as f:
        if f.encoding != "utf-8-sig":
            raise ValueError(f"{path} is {f.encoding.upper()}; convert it to UTF-8")
        for number, line in enumerate(f, start=1):
            try:
                row = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                last = "" if line.endswith("\n") else ", the last one (the file may be cut short)"
                raise ValueError(
                    f"{path}, line {number:,}{last}: {error.msg} at column {error.colno}"
                ) from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number:,} is not an object, such as {{{field!r}: ...}}")
            if not isinstance(row.get(field), str | None):
                raise ValueError(f"{path}, line {number:,}: {field!r} is {row[field]!r:.40}, not text")


def _load(source: str, path: str, part: str | None = None, **options: Any) -> Any:
    """datasets.load_dataset. Any of its errors becomes an OSError about `source`."""
    try:
        # `import datasets` would also find an empty folder called datasets, so import a name from it.
        from datasets import load_dataset
    except ImportError:
        packages = f"the package datasets: {cli.install('data')}"
        raise ValueError(f".jsonl, .parquet and the Hugging Face hub need {packages}") from None
    try:
        return load_dataset(path, part, split="train", **options)
    except Exception as error:
        reason = error.__cause__ or error
        if isinstance(reason, StopIteration):
            raise ValueError(f"{source} has no rows") from None
        line = (str(reason).splitlines() or [""])[0]
        raise OSError(f"{source} could not be loaded ({type(reason).__name__}: {line})") from None
