"""A file is there whole or not at all, whatever happens while it is written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`, for the code inside to write to; at the end it becomes `path`.

    Where the code inside fails, the temporary file is removed, and what `path` was before stays.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    # What a crash has left may be a second name of another file, which writing into it would change.
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Makes what a file holds, or the names that a folder holds, outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
