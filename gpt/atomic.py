"""Write files that appear complete or not at all, even after a crash."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt.reading import regular


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and renames it to `path` at the end.

    After an error inside, the temporary file is removed and `path` is as before. To survive a power failure
    too, `flush` what is written inside. The temporary path may be made a folder if `path` is an empty folder
    or not there. Raises OSError if `path` is a device or a pipe.
    """
    if path.exists() and not path.is_dir():
        regular(path)
    temporary = path.with_name(f"{path.name}.tmp")
    # A crash may have left it, even as a hard link to another file, which must not be written to.
    _remove(temporary)
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        _remove(temporary)
        raise


def write(path: Path, content: str | bytes) -> None:
    """Replaces `path` by a file with this content. Text is written as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        flush(temporary)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Makes the content of a file, or the names in a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
