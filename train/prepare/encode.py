"""Encode a corpus as token files. Several threads share the work; files appear when they are complete."""

import json
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from gpt import atomic, tokenizer
from train import shards
from train.prepare import documents
from train.prepare.documents import Corpus, Pieces
from train.view import progress_bar

BYTE_ORDER_MARK = "\ufeff"

Batch = list[str | None]  # pieces of documents; None ends one
Ids = NDArray[np.uint32]  # (tokens,)


def describe_tokenizer(kind: str, corpus: Corpus) -> dict[str, Any]:
    """The description of the tokenizer that `kind` names. Raises ValueError and OSError.

    `kind` is gpt2, char (an id for each symbol of the corpus), the path of a tokenizer.json, or a Hugging
    Face folder that has a tokenizer.
    """
    if kind == "gpt2":
        return {"kind": "gpt2"}
    if kind == "char":
        symbols: set[str] = set()
        for part in (corpus.train, corpus.val):
            for piece in part.pieces():
                symbols.update("\n" if piece is None else piece)  # a new line ends a document
        return {"kind": "char", "symbols": sorted(symbols)}
    if Path(kind, "config.json").is_file():  # the model's vocabulary may be smaller than its tokenizer's
        return tokenizer.describe_hugging_face(kind)
    if Path(kind).is_dir():
        return tokenizer.describe_folder(Path(kind))
    if not Path(kind).is_file():
        raise FileNotFoundError(f"tokenizer={kind!r} is neither gpt2, char, nor the path of a tokenizer.json")
    return tokenizer.describe_json(Path(kind))


def is_complete(folder: Path) -> bool:
    try:
        return bool(shards.find(folder / "train.bin"))
    except FileNotFoundError:
        return False


def check_free(folder: Path) -> None:
    """Raises ValueError when `folder` already has data."""
    if is_complete(folder):
        raise ValueError(f"{folder} exists already; remove it, or choose another --name")


def encode(folder: Path, corpus: Corpus, kind: str, workers: int, endoftext: bool = False) -> dict[str, Any]:
    """Writes train.bin, val.bin, the tokenizer's files and meta.json, and returns the content of meta.json.

    The text itself may contain `<|endoftext|>`, or the token with which a tokenizer.json ends a document.
    With `endoftext` it becomes that one token, otherwise it is text. Raises ValueError and OSError.
    """
    check_free(folder)
    description = describe_tokenizer(kind, corpus)
    end_mark, is_token = tokenizer.end_mark(description)
    if endoftext and not is_token:
        problem = "endoftext=True needs a tokenizer that has a token for the end of a document"
        raise ValueError(f"{problem}; {tokenizer.name(description)} has none")
    encode_batch = _encoder(description, endoftext)
    vocab_size = tokenizer.vocab_size(description)
    dtype = shards.dtype_for(vocab_size)
    meta: dict[str, Any] = {
        "tokenizer": {"json": "tokenizer.json"}.get(description["kind"], description["kind"]),
        "vocab_size": vocab_size,
        "dtype": np.dtype(dtype).name,
    }
    marks: Counter[str] = Counter()  # how often the text has each

    def count_marks(pieces: Pieces) -> Pieces:
        for piece in pieces:
            for mark in (end_mark, BYTE_ORDER_MARK):
                marks[mark] += (piece or "").count(mark)
            yield piece

    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack, ThreadPoolExecutor(workers) as pool:
        for name, part in (("train", corpus.train), ("val", corpus.val)):
            # The stack renames the first file last: once train.bin is there, everything is.
            path = stack.enter_context(atomic.replacing(folder / f"{name}.bin"))
            pieces = progress_bar(count_marks(part.pieces()), str(folder / name), part.size, _size)
            ids = _map_in_order(pool, encode_batch, _batches(pieces), ahead=2 * workers)
            n_tokens = _write(path, ids, dtype)
            if n_tokens == 0:
                problem = f"{corpus.source}: the split {name} would have no token"
                raise ValueError(f"{problem}; add text, or choose another val_fraction")
            meta[name] = {"tokens": n_tokens}
        meta |= {"source": corpus.source, "date": datetime.now(UTC).isoformat(timespec="seconds")}
        _write_tokenizer(folder, description)
        atomic.write(folder / "meta.json", json.dumps(meta, indent=1) + "\n")
    counts = f"train {meta['train']['tokens']:,} tokens, val {meta['val']['tokens']:,}"
    print(f"{folder}: {counts}, vocabulary {vocab_size}")
    if n_marks := marks[end_mark]:
        length = len(tokenizer.from_dict(description).encode_ordinary(end_mark))
        form = "one token each" if endoftext else f"text of {length} tokens each"
        print(f"the text has {end_mark} {n_marks:,} times: {form}")
        if is_token and not endoftext:
            print("if it ends documents, remove the data and prepare it with --endoftext=True")
    if n_marks := marks[BYTE_ORDER_MARK]:
        print(f"the text has a byte-order mark (U+FEFF) in {n_marks:,} places, as where files were joined")
    return meta


def _encoder(description: dict[str, Any], endoftext: bool) -> Callable[[Batch], Ids]:
    """A function from a batch of pieces to their ids, for several threads. Raises ValueError."""
    tokenizer.from_dict(description)  # raises now, not in a thread
    # tiktoken and Hugging Face's tokenizers release Python's lock while they encode: threads share the work.
    # Each thread has its own tokenizer, since two threads cannot use one of Hugging Face's at the same time.
    local = threading.local()

    def encode_batch(batch: Batch) -> Ids:
        if not hasattr(local, "tokenizer"):
            local.tokenizer = tokenizer.from_dict(description)
        to_ids = local.tokenizer.encode if endoftext else local.tokenizer.encode_ordinary
        end = local.tokenizer.end
        return np.concatenate([np.array(end if p is None else to_ids(p), np.uint32) for p in batch])

    return encode_batch


def _batches(pieces: Pieces) -> Iterator[Batch]:
    """Batches of about PIECE characters, since a task for each short document would be slow."""
    batch: Batch = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece or "")
        if size >= documents.PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _map_in_order(
    pool: ThreadPoolExecutor, function: Callable[[Batch], Ids], batches: Iterable[Batch], ahead: int
) -> Iterator[Ids]:
    """`pool.map(function, batches)` that reads at most `ahead` batches ahead, to bound the memory."""
    waiting: deque[Future[Ids]] = deque()
    for batch in batches:
        waiting.append(pool.submit(function, batch))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    for future in waiting:
        yield future.result()


def _write(path: Path, arrays: Iterable[Ids], dtype: DTypeLike) -> int:
    """Writes a token file. Returns the number of tokens."""
    n_tokens = 0
    with path.open("wb") as f:
        f.write(shards.header(dtype, 0))
        for ids in arrays:
            f.write(ids.astype(dtype).data)
            n_tokens += len(ids)
        # The header contains the number of tokens, which is only known now.
        f.seek(0)
        f.write(shards.header(dtype, n_tokens))
        f.flush()
        os.fsync(f.fileno())
    return n_tokens


def _size(piece: str | None) -> int:
    return len((piece or "").encode())


def _write_tokenizer(folder: Path, description: dict[str, Any]) -> None:
    """Writes the tokenizer's own files and removes those of another tokenizer."""
    (folder / "meta.pkl").unlink(missing_ok=True)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    if description["kind"] == "json":
        atomic.write(folder / "tokenizer.json", description["json"])
    if description["kind"] == "char":
        tokenizer.write_meta(folder / "meta.pkl", description["symbols"])
