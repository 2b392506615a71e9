"""From texts, files and data sets to documents in batches: of a corpus, never more than a batch is in memory.

A corpus is one running text, split as nanoGPT splits Shakespeare (the first characters are for training), or
many documents, split as nanoGPT splits OpenWebText (some of them, drawn at random, are for validation).
"""

import glob
import gzip
import hashlib
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from io import StringIO, TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

from gpt import cli

PIECE = 1 << 20  # characters that are encoded at a time
SPLIT_SEED = 2357  # nanoGPT's
# Where a text can be cut and its pieces encoded one by one to the same ids: no match of GPT-2's pattern goes
# on after a lone line end, or over the front of a lone space.
KINDS = (".txt", ".jsonl", ".ndjson", ".parquet")  # what is read of a folder, in any case of its letters
READERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
MAGIC = {
    "gzip": b"\x1f\x8b",
    "zstd": b"\x28\xb5\x2f\xfd",
    "xz": b"\xfd7zXZ",
    "bzip2": b"BZh",
    "zip": b"PK\3\4",
}
SEAM = re.compile(r"(?<=\S)(?:\n(?=\S)|(?= \S))")

Batch = list[str | None]  # pieces of documents in order; None ends one
Batches = Iterator[Callable[[], Batch]]  # one that is skipped is not read, where that can be


@dataclass
class Split:
    """`batches()` starts from the first; `size` in bytes of UTF-8, about; `documents` in all."""

    batches: Callable[[], Batches]
    size: int
    documents: int


@dataclass
class Corpus:
    """`source` says for people where it is from; `identity` is another when a file or a split is."""

    train: Split
    val: Split
    source: str
    identity: str


def text(content: str, source: str, val_fraction: float = 0.1) -> Corpus:
    """One running text that is in memory. Raises ValueError when there is nothing to split."""
    identity = hashlib.sha256(content.encode()).hexdigest()
    return _running(partial(StringIO, content), len(content), val_fraction, source, identity)


def files(inputs: str, field: str = "text", val_fraction: float = 0.1) -> Corpus:
    """What `inputs` names: files, folders and globs, separated by commas. Raises ValueError and OSError.

    A single file of text is a running text; else each file of text is a document, and so is the column
    `field` of each row of a .jsonl, .ndjson, .json, .csv or .parquet file. Any but .parquet may be compressed
    as .gz.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} must be above 0 and below 1")
    paths = find(inputs)
    stats = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    identity = json.dumps([stats, field, val_fraction])
    source = f"{inputs}: {len(paths):,} files, {sum(size for _, size, _ in stats):,} bytes"
    kinds = {kind: [p for p in paths if _kind(p) == kind] for kind in READERS}
    plain = [p for p in paths if _kind(p) not in kinds]
    if len(paths) == len(plain) == 1:
        characters = sum(map(len, _read(partial(_open, paths[0]), 0, None)))
        return _running(partial(_open, paths[0]), characters, val_fraction, source, identity)
    parts = [_text_files(plain, val_fraction, at_least=int(plain == paths))] if plain else []
    for kind, of_kind in kinds.items():
        if of_kind:
            try:
                table = _load(inputs, READERS[kind], data_files=[str(p) for p in of_kind])
            except OSError as error:
                raise OSError(
                    f"{error}{_not_json(of_kind) if kind in ('.jsonl', '.ndjson') else ''}"
                ) from None
            parts.append(_rows(table, field, val_fraction))
    train, val = (_joined(list(splits)) for splits in zip(*parts))
    return Corpus(train, val, source, identity)


def hub(path: str, field: str, val_fraction: float, processes: int, part: str | None = None) -> Corpus:
    """A data set of the Hugging Face hub, or its configuration `part`. Raises OSError, ValueError."""
    try:
        table = _load(path, path, part, num_proc=processes)
    except OSError as error:
        raise OSError(
            f"{error}; files of it that you have can be prepared by: "
            "python -m train.prepare text --input=FOLDER"
        ) from None
    source = f"{path}{f' ({part})' if part else ''}, {len(table):,} documents"
    train, val = _rows(table, field, val_fraction)
    return Corpus(train, val, source, identity=source)


def find(inputs: str) -> list[Path]:
    """The files that `inputs` names, sorted, each once. Raises FileNotFoundError."""
    found: dict[Path, None] = {}
    for name in [inputs] if Path(inputs).exists() else map(cli.read_path, inputs.split(",")):
        matches = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
        here: list[Path] = []
        for path in map(Path, matches):
            here += _inside(path) if path.is_dir() else [path]
        found |= dict.fromkeys(here)
        if not here:
            what = ".txt, .jsonl or .parquet in" if Path(name).is_dir() else "file"
            raise FileNotFoundError(f"there is no {what} {name}")
    return list(found)


def _inside(folder: Path) -> list[Path]:
    """The files of a folder that are read, sorted; says which others are left out."""
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


def pieces(batches: Iterable[Callable[[], Batch]]) -> Iterator[str]:
    """All the text, without its division into documents."""
    for batch in batches:
        yield from (piece for piece in batch() if piece is not None)


def _running(
    open_text: Callable[[], TextIO], characters: int, val_fraction: float, source: str, identity: str
) -> Corpus:
    if characters < 2:
        raise ValueError(f"the text has {characters} characters: nothing to train on")
    at = max(1, min(characters - 1, int(characters * (1 - val_fraction))))

    def split(start: int, stop: int) -> Split:
        def batches() -> Batches:
            for piece in cut(_read(open_text, start, stop)):
                yield partial(list, [piece])

        return Split(batches, stop - start, 1)

    return Corpus(split(0, at), split(at, characters), source, identity)


def _kind(path: Path) -> str:
    """The ending in small letters, without .gz: ".txt" of A.TXT and of a.txt.gz."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _open_bytes(path: Path) -> BinaryIO:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _open(path: Path) -> TextIO:
    """A text in UTF-8, or by its byte-order mark in UTF-16; the mark is left out. Raises ValueError."""
    try:
        with _open_bytes(path) as f:
            head = f.read(1 << 12)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a whole .gz file: {error}") from None
    if how := next((how for how, magic in MAGIC.items() if head.startswith(magic)), None):
        raise ValueError(f"{path} is compressed ({how}): decompress it first, or compress it as FILE.txt.gz")
    encoding = cli.text_encoding(head)
    if encoding != "utf-16" and head.count(0) > len(head) // 4:
        raise ValueError(
            f"{path} is not UTF-8 text: {head.count(0):,} of its first {len(head):,} bytes are 0, as in "
            f"UTF-16; convert it: iconv -f UTF-16{'LE' if head[1:2] == bytes(1) else 'BE'} -t UTF-8"
        )
    return TextIOWrapper(_open_bytes(path), encoding)


def _not_json(paths: list[Path]) -> str:
    """Which line of these .jsonl files is not JSON, as the end of a sentence; "" where all are."""
    for path in paths:
        number, line = 0, ""
        try:
            with _open(path) as f:
                if f.encoding == "utf-16":
                    return f"; {path} is UTF-16: convert it by iconv -f UTF-16 -t UTF-8"
                for line in f:
                    number += 1
                    if line.strip():
                        json.loads(line)
        except json.JSONDecodeError as error:
            cut = "" if line.endswith("\n") else ", the last one (the file may be cut short)"
            return f"; {path}, line {number:,}{cut}: {error.msg} at column {error.colno}"
        except (ValueError, OSError) as error:
            return f"; {error}"
    return ""


def _read(open_text: Callable[[], TextIO], start: int, stop: int | None) -> Iterator[str]:
    """Characters `start` to `stop`, a bounded number at a time."""
    with open_text() as f:
        at = 0
        while stop is None or at < stop:
            n = PIECE if stop is None else min(PIECE, stop - at)
            try:
                chunk = f.read(n if at >= start else min(n, start - at))
            except UnicodeDecodeError as error:
                byte = f.buffer.tell() - len(error.object) + error.start
                encoding = f.encoding.upper().removesuffix("-SIG")
                raise ValueError(f"{f.name} is not {encoding} text: byte {byte:,} cannot be read") from None
            except (EOFError, zlib.error) as error:
                raise ValueError(f"{f.name} is not a whole .gz file: {error}") from None
            if not chunk:
                return
            if at >= start:
                yield chunk
            at += len(chunk)


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


def _text_files(paths: list[Path], val_fraction: float, at_least: int) -> tuple[Split, Split]:
    """Files of text, a document each, `at_least` so many of them for validation."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(paths))
    in_val = set(order[: max(at_least, round(len(paths) * val_fraction))].tolist())

    def split(chosen: list[Path]) -> Split:
        def batches() -> Batches:
            batch: Batch = []
            size = 0
            for path in chosen:
                for piece in cut(_read(partial(_open, path), 0, None)):
                    batch.append(piece)
                    size += len(piece)
                    if size >= PIECE:
                        yield partial(list, batch)
                        batch, size = [], 0
                batch.append(None)
            yield partial(list, batch)

        return Split(batches, sum(p.stat().st_size for p in chosen), len(chosen))

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
        raise ValueError(f"the column {field!r} is no text but {table.features[field]}")
    if len(table) < 2:
        raise ValueError(
            f"there are {len(table)} rows: at least one to train on and one to validate are needed"
        )
    table = table.select_columns([field])
    row_bytes = table.data.nbytes / len(table)
    rows = max(1, round(PIECE / row_bytes))
    parts = table.train_test_split(test_size=val_fraction, seed=SPLIT_SEED, shuffle=True)

    def split(part: Any) -> Split:
        def batch(start: int) -> Batch:
            texts = (t for t in part[start : start + rows][field] if t is not None)
            return [item for t in texts for item in (t, None)]

        def batches() -> Batches:
            return (partial(batch, start) for start in range(0, len(part), rows))

        return Split(batches, round(row_bytes * len(part)), len(part))

    return split(parts["train"]), split(parts["test"])


def _joined(splits: list[Split]) -> Split:
    def batches() -> Batches:
        for split in splits:
            yield from split.batches()

    return Split(batches, sum(s.size for s in splits), sum(s.documents for s in splits))


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
        line = (str(reason).splitlines() or [""])[0]
        raise OSError(f"{what} could not be loaded ({type(reason).__name__}: {line})") from None
