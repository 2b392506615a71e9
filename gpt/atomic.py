"""A file is there whole or not at all, whatever happens while it is written."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt.reading import regular


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`, for the code inside to write to; at the end it becomes `path`.

    Where the code inside fails, the temporary file is removed, and what `path` was before stays. It may be a
    folder, where `path` is an empty one or not there. Raises OSError for a device and a pipe.
    """
    if path.exists() and not path.is_dir():
        regular(path)
    temporary = path.with_name(f"{path.name}.tmp")
    # What a crash has left may be a second name of another file, which writing into it would change.
    _remove(temporary)
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        _remove(temporary)
        raise


def write(path: Path, content: str | bytes) -> None:
    """Replaces `path` by a file of this content; text is UTF-8."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Makes what a file holds, or the names that a folder holds, outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
