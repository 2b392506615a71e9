"""From texts, files and data sets to a corpus: documents in pieces, of which a few are in memory at a time.

A corpus is one running text, split as nanoGPT splits Shakespeare (the first characters are for training), or
many documents, split as nanoGPT splits OpenWebText (some of them, drawn at random, are for validation).
"""

import glob
import gzip
import json
import math
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

import numpy as np

from gpt import cli
from gpt.reading import encoding_name, regular, text_encoding

PIECE = 1 << 20  # characters that are encoded at a time
SPLIT_SEED = 2357  # nanoGPT's
KINDS = (".txt", ".jsonl", ".ndjson", ".parquet")  # what is read of a folder, in any case of its letters
# The readers of the package datasets.
READERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# How compressed files begin.
MAGIC = {
    "gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "xz": b"\xfd7zXZ", "bzip2": b"BZh", "zip": b"PK\3\4",
}  # fmt: skip
# Where a text can be cut and its pieces encoded one by one to the same ids: no match of GPT-2's pattern goes
# on after a lone line end, or over the front of a lone space.
SEAM = re.compile(r"(?<=\S)(?:\n(?=\S)|(?= \S))")

Pieces = Iterator[str | None]  # None ends a document


@dataclass
class Split:
    """`pieces()` reads it from its start; `size` is in bytes of UTF-8, about."""

    pieces: Callable[[], Pieces]
    size: int
    documents: int


@dataclass
class Corpus:
    train: Split
    val: Split
    source: str  # where it is from, for people


def text(content: str, source: str, val_fraction: float = 0.1) -> Corpus:
    """One running text that is in memory. Raises ValueError when there is nothing to split."""

    def read(start: int, stop: int) -> Iterator[str]:
        return (content[at : min(at + PIECE, stop)] for at in range(start, stop, PIECE))

    return _running(read, len(content), val_fraction, source)


def files(inputs: str, field: str = "text", val_fraction: float = 0.1) -> Corpus:
    """What `inputs` names: files, folders and globs, separated by commas. Raises ValueError and OSError.

    A single file of text is a running text; else each file of text is a document, and so is the column
    `field` of each row of a .jsonl, .ndjson, .json, .csv or .parquet file. Any but .parquet may be compressed
    as .gz.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} must be above 0 and below 1")
    paths = find(inputs)
    number = "1 file" if len(paths) == 1 else f"{len(paths):,} files"
    source = f"{inputs}: {number}, {sum(p.stat().st_size for p in paths):,} bytes"
    texts = [p for p in paths if _kind(p) not in READERS]
    if len(paths) == len(texts) == 1:
        characters = sum(map(len, _read(paths[0])))
        return _running(partial(_read, paths[0]), characters, val_fraction, source)
    splits = [_text_files(texts, val_fraction, at_least=int(texts == paths))] if texts else []
    for kind, reader in READERS.items():
        if of_kind := [p for p in paths if _kind(p) == kind]:
            try:
                table = _load(inputs, reader, data_files=[str(p) for p in of_kind])
                rows = _rows(table, field, val_fraction)
            except (ValueError, OSError) as error:
                bad_line = _line_that_is_not_json(of_kind, field) if kind in (".jsonl", ".ndjson") else ""
                raise type(error)(f"{error}{bad_line}") from None
            splits.append((_without_marks(rows[0]), _without_marks(rows[1])))
    train, val = map(_joined, zip(*splits))
    return Corpus(train, val, source)


def hub(path: str, part: str | None, val_fraction: float, processes: int) -> Corpus:
    """The column `text` of a data set of the Hugging Face hub, or of its configuration `part`."""
    table = _load(path, path, part, num_proc=processes)
    source = f"{path}{f' ({part})' if part else ''}, {len(table):,} documents"
    return Corpus(*_rows(table, "text", val_fraction), source)


def find(inputs: str) -> list[Path]:
    """The files that `inputs` names, sorted, each once. Raises OSError."""
    paths: dict[Path, None] = {}
    for name in [inputs] if Path(inputs).exists() else map(cli.read_path, inputs.split(",")):
        here: list[Path] = []
        for path in map(Path, [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))):
            here += _inside(path) if path.is_dir() else [regular(path)]
        paths |= dict.fromkeys(here)
        if not here:
            what = ".txt, .jsonl or .parquet in" if Path(name).is_dir() else "file"
            raise FileNotFoundError(f"there is no {what} {name}")
    return list(paths)


def _inside(folder: Path) -> list[Path]:
    """The files of a folder that are read, sorted; prints which others are left out."""
    # A Mac leaves a file ._NAME of its own beside each that it copies.
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("._"))
    others = Counter(_kind(p) for p in paths if _kind(p) not in KINDS and not p.name.startswith("."))
    if others:
        counts = ", ".join(f"{n:,} {kind or 'without an ending'}" for kind, n in others.most_common())
        print(
            f"{folder}: of a folder only .txt, .jsonl and .parquet are read; left out: {counts} "
            f"(a glob takes them: '{folder}/**/*{next(iter(others))}')",
            file=sys.stderr,
        )
    return [p for p in paths if _kind(p) in KINDS]


def cut(chunks: Iterable[str], look_back: int = 1 << 16) -> Iterator[str]:
    """The same text in pieces that, encoded one by one, give the ids of the whole.

    That needs a seam (see SEAM) in the last `look_back` characters of each; a text without is cut where it
    stands, and there alone its ids may be others.
    """
    rest = ""
    for chunk in chunks:
        whole = rest + chunk
        at = len(whole) if len(whole) >= look_back else 0
        for match in SEAM.finditer(whole, max(0, len(whole) - look_back)):
            at = match.end()
        if whole[:at]:
            yield whole[:at]
        rest = whole[at:]
    if rest:
        yield rest


def _running(
    read: Callable[[int, int], Iterator[str]], characters: int, val_fraction: float, source: str
) -> Corpus:
    """One text, of which `read` gives the characters from a first one up to a last one, in chunks."""
    if characters < 2:
        raise ValueError(f"the text has {characters} characters: nothing to train on")
    at = max(1, min(characters - 1, int(characters * (1 - val_fraction))))

    def split(start: int, stop: int) -> Split:
        return Split(lambda: cut(read(start, stop)), stop - start, documents=1)

    return Corpus(split(0, at), split(at, characters), source)


def _text_files(paths: list[Path], val_fraction: float, at_least: int) -> tuple[Split, Split]:
    """Files of text, a document each, `at_least` so many of them for validation."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(paths))
    in_val = set(order[: max(at_least, round(len(paths) * val_fraction))].tolist())

    def split(chosen: list[Path]) -> Split:
        def pieces() -> Pieces:
            for path in chosen:
                yield from cut(_read(path))
                yield None

        return Split(pieces, sum(p.stat().st_size for p in chosen), len(chosen))

    return (
        split([p for i, p in enumerate(paths) if i not in in_val]),
        split([p for i, p in enumerate(paths) if i in in_val]),
    )


def _rows(table: Any, field: str, val_fraction: float) -> tuple[Split, Split]:
    """Rows of a datasets.Dataset, a document each; those without a text are left out. Raises ValueError."""
    if field not in table.column_names:
        raise ValueError(
            f"there is no column {field!r}; choose by --field among {', '.join(table.column_names)}"
        )
    if getattr(table.features[field], "dtype", "") not in ("string", "large_string"):
        raise ValueError(f"the column {field!r} is not text but {table.features[field]}")
    if len(table) < 2:
        raise ValueError(
            f"there are {len(table)} rows, and at least 2 are needed: to train on and to validate"
        )
    table = table.select_columns([field])
    bytes_of_row = table.data.nbytes / len(table)
    parts = table.train_test_split(test_size=val_fraction, seed=SPLIT_SEED, shuffle=True)

    def split(part: Any) -> Split:
        def pieces() -> Pieces:
            for batch in part.iter(max(1, round(PIECE / bytes_of_row))):
                for document in batch[field]:
                    if document is not None:
                        yield document
                        yield None

        return Split(pieces, round(bytes_of_row * len(part)), len(part))

    return split(parts["train"]), split(parts["test"])


def _without_marks(rows: Split) -> Split:
    """Without a byte-order mark at the front of a document. What is on the hub stays as it is there."""

    def pieces() -> Pieces:
        for piece in rows.pieces():
            yield piece and piece.removeprefix("\ufeff")

    return replace(rows, pieces=pieces)


def _joined(splits: tuple[Split, ...]) -> Split:
    def pieces() -> Pieces:
        for split in splits:
            yield from split.pieces()

    return Split(pieces, sum(s.size for s in splits), sum(s.documents for s in splits))


def _kind(path: Path) -> str:
    """The ending in small letters, without .gz: ".txt" of A.TXT and of a.txt.gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _read(path: Path, start: int = 0, stop: float = math.inf) -> Iterator[str]:
    """Characters `start` to `stop` of a text file, a bounded number at a time. Raises ValueError."""
    at = 0
    try:
        with _open(path) as f:
            try:
                while chunk := f.read(int(min(PIECE, (start if at < start else stop) - at))):
                    if at >= start:
                        yield chunk
                    at += len(chunk)
            except UnicodeDecodeError as error:
                byte = f.buffer.tell() - len(error.object) + error.start
                raise ValueError(
                    f"{path} is not {encoding_name(f.encoding)} text: byte {byte:,} cannot be read; "
                    "convert it to UTF-8"
                ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a whole .gz file: {error}") from None


def _open(path: Path) -> TextIO:
    """A text in UTF-8, or by its byte-order mark in UTF-16 or 32; the mark is left out. Raises ValueError."""

    def open_bytes() -> BinaryIO:
        return cast(BinaryIO, gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")

    with open_bytes() as f:
        head = f.read(1 << 12)
    if how := next((how for how, magic in MAGIC.items() if head.startswith(magic)), None):
        raise ValueError(f"{path} is compressed ({how}): decompress it first, or compress it as FILE.txt.gz")
    encoding = text_encoding(head)
    if encoding == "utf-8-sig" and head.count(0) > len(head) // 4:
        # Of text in Latin letters, half of the bytes are 0 in UTF-16, three quarters in UTF-32.
        bits = 32 if head.count(0) > 5 * len(head) // 8 else 16
        raise ValueError(
            f"{path} is not UTF-8 text: {head.count(0):,} of its first {len(head):,} bytes are 0, as in "
            f"UTF-{bits}; convert it: iconv -f UTF-{bits}{'BE' if head[:1] == bytes(1) else 'LE'} -t UTF-8"
        )
    return TextIOWrapper(open_bytes(), encoding)


def _line_that_is_not_json(paths: list[Path], field: str) -> str:
    """Which line of these .jsonl files cannot be read, or has no text in `field`, as the end of a sentence.

    "" where all can be read.
    """
    for path in paths:
        number, line = 0, ""
        try:
            with _open(path) as f:
                if (encoding := encoding_name(f.encoding)) != "UTF-8":
                    return f"; {path} is {encoding}: convert it by iconv -f {encoding} -t UTF-8"
                for number, line in enumerate(f, start=1):
                    row = json.loads(line) if line.strip() else {}
                    if not isinstance(row, dict):
                        return f"; {path}, line {number:,}: it is not an object, such as {{{field!r}: ...}}"
                    if not isinstance(row.get(field), str | None):
                        return f"; {path}, line {number:,}: {field!r} is {row[field]!r:.40}, not text"
        except json.JSONDecodeError as error:
            last = "" if line.endswith("\n") else ", the last one (the file may be cut short)"
            return f"; {path}, line {number:,}{last}: {error.msg} at column {error.colno}"
        except (ValueError, OSError, EOFError) as error:
            return f"; {error}"
    return ""


def _load(what: str, path: str, part: str | None = None, **options: Any) -> Any:
    """datasets.load_dataset; of whatever kind its errors are, an OSError about `what`."""
    try:
        # A folder called datasets in the working folder imports too, as an empty package: ask for a name.
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            ".jsonl, .parquet and the Hugging Face hub are read by the package datasets: "
            "pip install -e '.[data]'"
        ) from None
    try:
        return load_dataset(path, part, split="train", **options)
    except Exception as error:
        reason = error.__cause__ or error
        if isinstance(reason, StopIteration):
            raise ValueError(f"{what} has no rows") from None
        line = (str(reason).splitlines() or [""])[0]
        raise OSError(f"{what} could not be loaded ({type(reason).__name__}: {line})") from None
