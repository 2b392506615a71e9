"""A corpus to token files: encoded by several processes, continued after an interrupt, shown when complete.

While it is written, a split is data/NAME/train.bin.partial, and data/NAME/preparing.json says how much of it
is on the disk and of what corpus. At the end all get their names, train.bin last.
"""

import datetime
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpt import tokenizer
from gpt.tokenizer import Tokenizer
from train import shards
from train.prepare.documents import PIECE, Batch, Corpus

JOURNAL = "preparing.json"
JOURNAL_SECONDS = 1.0  # what an interrupt can lose
WORTH_A_PROCESS = 8 << 20  # bytes of text: starting a process takes as long as encoding some

Encoded = Iterator[tuple[NDArray[np.uint32], int]]  # the ids of a batch, and the bytes of its text


def describe_tokenizer(kind: str, corpus: Corpus) -> dict[str, Any]:
    """`kind` is gpt2, char (an id for each symbol of the corpus) or the path of a tokenizer.json, or of a
    Hugging Face folder that has a tokenizer."""
    if kind == "gpt2":
        return {"kind": "gpt2"}
    if kind == "char":
        symbols: set[str] = set()
        for batch in chain(corpus.train.batches(), corpus.val.batches()):
            for piece in batch():
                symbols.update("\n" if piece is None else piece)  # a new line ends a document
        return tokenizer.CharTokenizer(sorted(symbols)).to_dict()
    if Path(kind).is_dir():
        described = tokenizer.describe_folder(Path(kind))
        if described["kind"] == "unknown":
            raise ValueError(described["why"])
        return described
    if not Path(kind).is_file():
        raise FileNotFoundError(f"tokenizer={kind!r} is neither gpt2, char, nor the path of a tokenizer.json")
    return tokenizer.describe_json(Path(kind))


def check_free(folder: Path) -> None:
    """Raises ValueError when there is data in `folder` already."""
    if is_complete(folder):
        raise ValueError(f"{folder} is there already; remove it, or choose another --name")


def is_complete(folder: Path) -> bool:
    try:
        return bool(shards.find(folder / "train.bin"))
    except FileNotFoundError:
        return False


def encode(
    folder: Path, corpus: Corpus, kind: str, processes: int, endoftext: bool = False
) -> dict[str, Any]:
    """Writes train.bin, val.bin, what the tokenizer needs and meta.json, which is returned.

    With `endoftext`, the tokenizer's mark for the end of a document, such as `<|endoftext|>`, becomes its one
    id where the text has it; without, it is text like any other, and a line says how often it is there. Goes
    on where an earlier call for the same corpus and tokenizer was interrupted. Raises ValueError when
    there is data in `folder` already.
    """
    check_free(folder)
    described = describe_tokenizer(kind, corpus)
    mark, names_end = tokenizer.mark_of_end(described)
    if endoftext and not names_end:
        raise ValueError(
            f"endoftext=True needs a tokenizer that has a token for the end of a document; "
            f"{tokenizer.name(described)} has none"
        )
    dtype = shards.dtype_for(tokenizer.vocab_size(described))
    folder.mkdir(parents=True, exist_ok=True)
    splits = {"val": corpus.val, "train": corpus.train}
    total = sum(split.size for split in splits.values())
    settings = _digest([corpus.identity, described, PIECE, *(["endoftext"] if endoftext else [])])
    done = _read_journal(folder, settings, dtype)

    marks, resumed = 0, any(state["batches"] for state in done.values())

    def count_marks(batch: Callable[[], Batch]) -> Batch:
        nonlocal marks
        pieces = batch()
        marks += sum(piece.count(mark) for piece in pieces if piece is not None)
        return pieces

    def save(f: BinaryIO) -> None:
        _flush(f)
        _write_whole(folder / JOURNAL, json.dumps({"of": settings, "done": done}))

    with (
        _encoder(described, max(1, min(processes, total // WORTH_A_PROCESS)), endoftext) as in_order,
        _progress(folder, total, sum(state["bytes"] for state in done.values())) as show,
    ):
        for name, split in splits.items():
            state = done[name]
            _partial(folder, name).touch()
            with _partial(folder, name).open("r+b") as f:
                f.truncate(_size(dtype, state["tokens"]))
                f.seek(0, os.SEEK_END)
                saved = time.monotonic()
                batches = islice(split.batches(), state["batches"], None)
                for ids, size in in_order(partial(count_marks, batch) for batch in batches):
                    f.write(ids.astype(dtype).data)
                    state["batches"] += 1
                    state["tokens"] += len(ids)
                    state["bytes"] += size
                    show(size, len(ids))
                    if time.monotonic() - saved > JOURNAL_SECONDS:
                        save(f)
                        saved = time.monotonic()
                f.seek(0)
                f.write(shards.header(dtype, state["tokens"]))
                save(f)
    meta = _finish(folder, corpus, described, dtype, {name: done[name]["tokens"] for name in splits})
    if marks:
        _tell_of_marks(described, mark, f"{'at least ' * resumed}{marks:,}", endoftext, names_end)
    return meta


def _tell_of_marks(
    described: dict[str, Any], mark: str, count: str, endoftext: bool, names_end: bool
) -> None:
    """Says what became of the ends of documents that stand in the text itself."""
    if endoftext:
        return print(f"the text has {mark} {count} times: one token each")
    length = len(tokenizer.from_dict(described).encode_ordinary(mark))
    way_out = ""
    if names_end:
        way_out = (
            ". Where it ends a document, remove the data and prepare it with --endoftext=True: one token"
        )
    print(f"the text has {mark} {count} times: text of {length} tokens each{way_out}")


def _finish(
    folder: Path, corpus: Corpus, described: dict[str, Any], dtype: Any, tokens: dict[str, int]
) -> dict[str, Any]:
    """Gives everything its name; train.bin, by which data is known to be there, is the last."""
    meta: dict[str, Any] = {
        "tokenizer": {"json": "tokenizer.json"}.get(described["kind"], described["kind"]),
        "vocab_size": tokenizer.vocab_size(described),
        "dtype": np.dtype(dtype).name,
    }
    for name in ("train", "val"):
        with _partial(folder, name).open("rb") as f:
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
        meta[name] = {"tokens": tokens[name], "documents": getattr(corpus, name).documents, "sha256": sha256}
    meta["source"] = corpus.source
    meta["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    # What another tokenizer left would be taken for this one's.
    (folder / "meta.pkl").unlink(missing_ok=True)
    if described["kind"] == "json":
        _write_whole(folder / "tokenizer.json", described["json"])
    else:
        (folder / "tokenizer.json").unlink(missing_ok=True)
    if described["kind"] == "char":
        tokenizer.write_meta(folder / "meta.pkl", described["symbols"])
    _write_whole(folder / "meta.json", json.dumps(meta, indent=1) + "\n")
    for name in ("val", "train"):
        _partial(folder, name).replace(folder / f"{name}.bin")
    (folder / JOURNAL).unlink()
    return meta


@contextmanager
def _encoder(
    described: dict[str, Any], processes: int, endoftext: bool = False
) -> Iterator[Callable[[Iterable[Callable[[], Batch]]], Encoded]]:
    """A function from batches to their ids, in order; in this process when `processes` is 1."""
    if processes == 1:
        tokens = tokenizer.from_dict(described)
        yield lambda batches: (_encode_by(tokens, batch(), endoftext) for batch in batches)
        return
    # Not forked: the threads of the libraries that read data sets do not survive that.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, (described, endoftext))

    def in_order(batches: Iterable[Callable[[], Batch]]) -> Encoded:
        waiting: deque = deque()
        for batch in batches:
            waiting.append(pool.submit(_encode, batch()))
            if len(waiting) > 2 * processes:  # what bounds the memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield in_order
    except BrokenProcessPool:
        raise OSError(
            f"one of the {processes} processes that encode was ended, as happens when memory runs out; the "
            "same command goes on from here, with fewer --processes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker: Callable[[Batch], tuple[NDArray[np.uint32], int]]  # of a process of the pool


def _start_worker(described: dict[str, Any], endoftext: bool) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process is interrupted, and ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    _worker = partial(_encode_by, tokenizer.from_dict(described), endoftext=endoftext)


def _end_with_parent() -> None:
    """A pool does not notice that the process which made it was killed."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(batch: Batch) -> tuple[NDArray[np.uint32], int]:
    return _worker(batch)


def _encode_by(tokens: Tokenizer, batch: Batch, endoftext: bool) -> tuple[NDArray[np.uint32], int]:
    end = np.array(tokens.end, np.uint32)
    by = tokens.encode if endoftext else tokens.encode_ordinary
    ids = [end if piece is None else np.array(by(piece), np.uint32) for piece in batch]
    size = sum(len(piece.encode()) for piece in batch if piece is not None)
    return np.concatenate(ids) if ids else end[:0], size


@contextmanager
def _progress(folder: Path, total: int, done: int) -> Iterator[Callable[[int, int], None]]:
    """On a terminal a bar of bytes of text, with time left and tokens/s: to be told of each batch."""
    if not sys.stderr.isatty():
        yield lambda size, tokens: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(None, complete_style="cyan", finished_style="green"),
        progress.DownloadColumn(),
        progress.TextColumn("{task.fields[rate]:,.0f} tokens/s"),
        progress.TimeRemainingColumn(),
    )
    started, encoded = time.monotonic(), 0
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(str(folder), total=max(total, done), completed=done, rate=0.0)

        def show(size: int, tokens: int) -> None:
            nonlocal encoded
            encoded += tokens
            bar.update(task, advance=size, rate=encoded / (time.monotonic() - started + 1e-9))

        yield show


def _partial(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin.partial"


def _read_journal(folder: Path, settings: str, dtype: Any) -> dict[str, dict[str, int]]:
    """What an earlier attempt at the same had done of each split; zeros when it was at something else."""
    nothing = {"batches": 0, "tokens": 0, "bytes": 0}
    done = {name: dict(nothing) for name in ("val", "train")}
    try:
        journal = json.loads((folder / JOURNAL).read_text("utf-8"))
    except (OSError, ValueError):
        return done
    if journal["of"] != settings:
        print("an earlier attempt was at another text, or with another tokenizer: starting anew")
        return done
    for name, state in journal["done"].items():
        path, size = _partial(folder, name), _size(dtype, state["tokens"])
        if path.exists() and path.stat().st_size >= size:
            done[name] = state
    print(f"going on after {sum(state['tokens'] for state in done.values()):,} tokens of an earlier attempt")
    return done


def _size(dtype: Any, tokens: int) -> int:
    return len(shards.header(dtype, tokens)) + tokens * np.dtype(dtype).itemsize


def _write_whole(path: Path, content: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as f:
        f.write(content)
        _flush(f)
    temporary.replace(path)


def _flush(f: Any) -> None:
    f.flush()
    os.fsync(f.fileno())


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
