"""A corpus to token files: encoded by several threads, written under other names, renamed when complete."""

import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
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

Batch = list[str | None]  # pieces of documents; None ends one
Ids = NDArray[np.uint32]  # (tokens,)


def describe_tokenizer(kind: str, corpus: Corpus) -> dict[str, Any]:
    """`kind` is gpt2, char (an id for each symbol of the corpus) or the path of a tokenizer.json, or of a
    Hugging Face folder that has a tokenizer."""
    if kind == "gpt2":
        return {"kind": "gpt2"}
    if kind == "char":
        symbols: set[str] = set()
        for split in (corpus.train, corpus.val):
            for piece in split.pieces():
                symbols.update("\n" if piece is None else piece)  # a new line ends a document
        return tokenizer.CharTokenizer(sorted(symbols)).to_dict()
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
    """Raises ValueError when there is data in `folder` already."""
    if is_complete(folder):
        raise ValueError(f"{folder} is there already; remove it, or choose another --name")


def encode(folder: Path, corpus: Corpus, kind: str, workers: int, endoftext: bool = False) -> dict[str, Any]:
    """Writes train.bin, val.bin, what the tokenizer needs and meta.json, which is returned.

    With `endoftext`, the tokenizer's mark for the end of a document, such as `<|endoftext|>`, becomes its one
    id where the text has it; without, it is text like any other, and a line says how often it is there.
    Raises ValueError when there is data in `folder` already.
    """
    check_free(folder)
    described = describe_tokenizer(kind, corpus)
    mark, names_end = tokenizer.mark_of_end(described)
    if endoftext and not names_end:
        raise ValueError(
            f"endoftext=True needs a tokenizer that has a token for the end of a document; "
            f"{tokenizer.name(described)} has none"
        )
    tokenizer.from_dict(described)  # which says what is wrong with it
    vocab_size = tokenizer.vocab_size(described)
    dtype = shards.dtype_for(vocab_size)
    meta: dict[str, Any] = {
        "tokenizer": {"json": "tokenizer.json"}.get(described["kind"], described["kind"]),
        "vocab_size": vocab_size,
        "dtype": np.dtype(dtype).name,
    }
    marks = byte_order_marks = 0

    def count_marks(pieces: Pieces) -> Pieces:
        nonlocal marks, byte_order_marks
        for piece in pieces:
            marks += (piece or "").count(mark)
            byte_order_marks += (piece or "").count("\ufeff")
            yield piece

    encode_batch = _encoder(described, endoftext)
    with _removed_if_it_fails(folder), ThreadPoolExecutor(workers) as pool:
        for name, split in (("train", corpus.train), ("val", corpus.val)):
            pieces = progress_bar(count_marks(split.pieces()), str(folder / name), split.size, _size)
            ids = _map_in_order(pool, encode_batch, _batches(pieces), ahead=2 * workers)
            tokens, sha256 = _write(folder / f"{name}.bin.partial", ids, dtype)
            if tokens == 0:
                raise ValueError(
                    f"{corpus.source}: the split {name} would have no token, so nothing is written; add "
                    "text, or choose another val_fraction"
                )
            meta[name] = {"tokens": tokens, "documents": split.documents, "sha256": sha256}
    meta |= {"source": corpus.source, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    _finish(folder, described, meta)
    if marks:
        way_out = (
            ". Where it ends a document, remove the data and prepare it with --endoftext=True: one token"
        )
        length = len(tokenizer.from_dict(described).encode_ordinary(mark))
        ordinary = f"text of {length} tokens each{way_out if names_end else ''}"
        print(f"the text has {mark} {marks:,} times: {'one token each' if endoftext else ordinary}")
    if byte_order_marks:
        print(
            f"the text has a byte-order mark (U+FEFF) in {byte_order_marks:,} places, as where files were "
            "joined: it is kept; where it is not meant, remove it from the text and prepare the data again"
        )
    return meta


@contextmanager
def _removed_if_it_fails(folder: Path) -> Iterator[None]:
    """Makes `folder`; where the code inside fails, its unfinished files go, and the folder if it is empty."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for partial in folder.glob("*.bin.partial"):
            partial.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
        raise


def _encoder(described: dict[str, Any], endoftext: bool) -> Callable[[Batch], Ids]:
    """A function from a batch of pieces to their ids, for several threads at once.

    GPT-2's and Hugging Face's encodings compute without Python's lock, so that threads do share the work.
    """
    # Two threads cannot use one tokenizer of Hugging Face's at the same time: each thread has its own.
    local = threading.local()

    def encode_batch(batch: Batch) -> Ids:
        if not hasattr(local, "tokenizer"):
            local.tokenizer = tokenizer.from_dict(described)
        by = local.tokenizer.encode if endoftext else local.tokenizer.encode_ordinary
        end = local.tokenizer.end
        return np.concatenate([np.array(end if piece is None else by(piece), np.uint32) for piece in batch])

    return encode_batch


def _batches(pieces: Pieces) -> Iterator[Batch]:
    """Pieces together, up to PIECE characters: a short document is not worth a task of its own."""
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
    pool: ThreadPoolExecutor,
    function: Callable[[Batch], Ids],
    batches: Iterable[Batch],
    ahead: int,
) -> Iterator[Ids]:
    """`function` of each batch, in order. At most `ahead` batches wait, which bounds the memory."""
    waiting: deque[Future[Ids]] = deque()
    for batch in batches:
        waiting.append(pool.submit(function, batch))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _write(path: Path, arrays: Iterable[Ids], dtype: DTypeLike) -> tuple[int, str]:
    """Writes a token file -> (tokens, its sha256)."""
    tokens = 0
    with path.open("w+b") as f:
        f.write(shards.header(dtype, 0))
        for ids in arrays:
            f.write(ids.astype(dtype).data)
            tokens += len(ids)
        # The header has the count, which is known now.
        f.seek(0)
        f.write(shards.header(dtype, tokens))
        f.flush()
        os.fsync(f.fileno())
        f.seek(0)
        return tokens, hashlib.file_digest(f, "sha256").hexdigest()


def _size(piece: str | None) -> int:
    """Bytes of text that were read."""
    return len((piece or "").encode())


def _finish(folder: Path, described: dict[str, Any], meta: dict[str, Any]) -> None:
    """Gives everything its name; train.bin, by which data is known to be there, is the last."""
    # What another tokenizer left would be taken for this one's.
    (folder / "meta.pkl").unlink(missing_ok=True)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    if described["kind"] == "json":
        atomic.write(folder / "tokenizer.json", described["json"])
    if described["kind"] == "char":
        tokenizer.write_meta(folder / "meta.pkl", described["symbols"])
    atomic.write(folder / "meta.json", json.dumps(meta, indent=1) + "\n")
    for name in ("val", "train"):
        (folder / f"{name}.bin.partial").replace(folder / f"{name}.bin")
