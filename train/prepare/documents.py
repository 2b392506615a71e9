"""Read texts, files and data sets as a corpus, in pieces, of which only a few are in memory at a time.

A corpus is one running text or many documents. nanoGPT splits Shakespeare as a running text, whose end is for
validation, and OpenWebText as documents, some of which are drawn at random for validation.
"""

import csv
import glob
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gpt import cli
from gpt.reading import open_text, parse_json, regular

PIECE = 1 << 20  # characters that are encoded at a time
ROWS_AT_ONCE = 1000  # of a .parquet file, or of a data set on the hub
SPLIT_SEED = 2357  # nanoGPT's
KINDS = (".txt", ".jsonl", ".ndjson", ".parquet")  # the endings that are read from a folder
ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")  # files whose rows are documents
# A text may be cut after a lone line end and before a lone space: GPT-2 encodes each word alone, and no word
# goes across these places. So the ids of the pieces are those of the whole text. A tokenizer.json that puts a
# space before each text it encodes (add_prefix_space, Metaspace) may get a different token at each seam.
SEAM = re.compile(r"(?<=\S)(?:\n(?=\S)|(?= \S))")

Pieces = Iterator[str | None]  # None ends a document


@dataclass
class Part:
    """The training or the validation part of a corpus. Each call of `pieces` reads it from the start."""

    pieces: Callable[[], Pieces]
    size: int  # in bytes of UTF-8, roughly


@dataclass
class Corpus:
    train: Part
    val: Part
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
    if len(paths) == 1 and _kind(paths[0]) not in ROWS:
        return _running(partial(_read, paths[0]), val_fraction, source)
    with cli.IfSlow(f"counting the documents of {inputs}"):
        return _documents(paths, field, val_fraction, source)


def hub(path: str, configuration: str | None, val_fraction: float, processes: int) -> Corpus:
    """The column `text` of a data set on the Hugging Face hub, or of its `configuration`."""
    table = load(path, path, configuration, split="train", num_proc=processes).select_columns(["text"])
    source = f"{path}{f' ({configuration})' if configuration else ''}, {len(table):,} documents"
    parts = table.train_test_split(test_size=val_fraction, seed=SPLIT_SEED, shuffle=True)

    def part_of(rows: Any) -> Part:
        def pieces() -> Pieces:
            for batch in rows.iter(ROWS_AT_ONCE):
                for document in batch["text"]:
                    if document is not None:
                        yield document
                        yield None

        return Part(pieces, round(table.data.nbytes * len(rows) / len(table)))

    return Corpus(part_of(parts["train"]), part_of(parts["test"]), source)


def load(source: str, path: str, configuration: str | None = None, **options: Any) -> Any:
    """datasets.load_dataset. Any of its errors becomes an OSError about `source`.

    Raises ValueError if the package is missing.
    """
    try:
        # `import datasets` would also find an empty folder called datasets, so import a name from it.
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"{source} needs the package datasets: {cli.install('data')}") from None
    try:
        return load_dataset(path, configuration, **options)
    except Exception as error:
        reason = error.__cause__ or error
        line = (str(reason).splitlines() or [""])[0]
        raise OSError(f"{source} could not be loaded ({type(reason).__name__}: {line})") from None


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

    def part_of(start: int, stop: int) -> Part:
        return Part(lambda: cut(_between(read(), start, stop)), stop - start)

    return Corpus(part_of(0, n_train), part_of(n_train, n_characters), source)


def _between(chunks: Iterator[str], start: int, stop: int) -> Iterator[str]:
    """Characters `start` to `stop` of a text."""
    position = 0
    for chunk in chunks:
        if part := chunk[max(0, start - position) : max(0, stop - position)]:
            yield part
        position += len(chunk)


def _documents(paths: list[Path], field: str, val_fraction: float, source: str) -> Corpus:
    """Text files, each a document, and files of rows, each row a document. Raises ValueError and OSError.

    The rows are read once to count the documents, and once for each split. In memory are a few documents and
    the size of each.
    """

    def sized_documents() -> Iterator[tuple[int, Iterable[str]]]:
        """(size in bytes, pieces) of each document. A text file is opened when its first piece is taken."""
        for path in paths:
            if _kind(path) in ROWS:
                yield from ((len(row.encode()), [row]) for row in _texts(path, field))
            else:
                yield path.stat().st_size, cut(_read(path))

    sizes = np.fromiter((size for size, _ in sized_documents()), np.int64)
    n_documents = len(sizes)
    if n_documents < 2:
        raise ValueError(f"{source}: training and validation need at least 2 documents, not {n_documents}")
    n_val = min(n_documents - 1, math.ceil(n_documents * val_fraction))  # rounded up, as in nanoGPT
    in_val = np.zeros(n_documents, bool)
    in_val[np.random.default_rng(SPLIT_SEED).permutation(n_documents)[:n_val]] = True

    def part_of(is_val: bool) -> Part:
        def pieces() -> Pieces:
            for (_, document), document_is_val in zip(sized_documents(), in_val):
                if document_is_val == is_val:
                    yield from document
                    yield None

        return Part(pieces, int(sizes[in_val == is_val].sum()))

    return Corpus(part_of(False), part_of(True), f"{source}, {n_documents:,} documents")


def _texts(path: Path, field: str) -> Iterator[str]:
    """The texts in the column `field` of a file of rows. Leaves out rows without one.

    Raises ValueError for another value in this column, and if there are rows but none has a text.
    """
    columns: Iterable[str] = ()
    n_texts = 0
    for number, row in enumerate(_rows(path, field), start=1):
        text = row.get(field) if isinstance(row, dict) else row
        if isinstance(text, str):
            n_texts += 1
            # Texts from Windows may each begin with a byte-order mark, and JSON may hold half of a surrogate
            # pair, which cannot be encoded.
            yield text.removeprefix("\ufeff").encode(errors="replace").decode()
        elif text is not None:
            raise ValueError(f"{path}, row {number:,}: {field!r} is {text!r:.40}, not text")
        else:
            columns = row or columns
    if columns and not n_texts:
        names = ", ".join(map(str, columns))
        raise ValueError(f"{path} has no text in a column {field!r}; choose by --field among {names}")


def _rows(path: Path, field: str) -> Iterator[Any]:
    """The rows of a file, each a dict from columns to values, or a value alone. Raises ValueError, OSError.

    A JSON file is one list of rows, which is read as a whole, or has a row on each line.
    """
    if _kind(path) == ".parquet":
        yield from _parquet_rows(path, field)
        return
    with open_text(path) as f:
        is_list = f.read(1000).lstrip().startswith("[")
        f.seek(0)
        if _kind(path) == ".csv":
            csv.field_size_limit(sys.maxsize)  # a text may be long
            for row in csv.DictReader(f):
                yield {column: cell or None for column, cell in row.items()}
        elif is_list:
            yield from parse_json(f.read(), path)
        else:
            for number, line in enumerate(f, start=1):
                yield parse_json(line, f"line {number:,} of {path}") if line.strip() else None


def _parquet_rows(path: Path, field: str) -> Iterator[dict[str, Any]]:
    """The column `field` of a .parquet file; if it has none, one row with the columns that it has."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{path} needs the package pyarrow: {cli.install('data')}") from None
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                yield dict.fromkeys(names)
                return
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=[field]):
                yield from batch.to_pylist()
    except (ArrowException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} cannot be read as .parquet: {error}") from None


def _kind(path: Path) -> str:
    """The ending in lower case without .gz: ".txt" for A.TXT and a.txt.gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _read(path: Path) -> Iterator[str]:
    """A text file in chunks."""
    with open_text(path) as f:
        while chunk := f.read(PIECE):
            yield chunk
