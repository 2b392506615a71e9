"""Read files that others have written. A bad file raises an error of one plain sentence."""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

# Byte-order marks and encodings. UTF-32 comes first: one of its marks begins with one of UTF-16's.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


def regular(path: Path) -> Path:
    """Returns `path`. Raises OSError for a folder, a pipe and a device.

    Reading a pipe may wait forever, and a device may have no end.
    """
    path.stat()  # raises if nothing is there
    if not path.is_file():
        raise OSError(f"{path} is a folder, a pipe or a device; give the path of a file")
    return path


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Opens a text in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark. Decompresses .gz.

    The mark, which editors on Windows write, is left out of the text. Raises OSError, and ValueError for
    bytes that are not such a text, also while the code inside reads.
    """
    open_file: Any = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with open_file(path, "rb") as f:
            head = f.read(4)
        encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), "utf-8-sig")
        if encoding == "utf-8-sig" and 0 in head:  # as in UTF-16 without a mark
            raise ValueError(f"{path} is not UTF-8 text: it begins with {head!r}; convert it to UTF-8")
        with open_file(path, "rt", encoding=encoding) as f:
            try:
                yield f
            except UnicodeDecodeError as error:
                byte = f.buffer.tell() - len(error.object) + error.start
                name = encoding.upper().removesuffix("-SIG")
                problem = f"{path} is not {name} text: byte {byte:,} cannot be read"
                raise ValueError(f"{problem}; convert it to UTF-8") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is an incomplete .gz file: {error}") from None


def read_text(path: Path) -> str:
    """The whole of a text file. Raises ValueError, OSError."""
    with open_text(regular(path)) as f:
        return f.read()


def parse_json(text: str, source: str | Path) -> Any:
    """The value of a JSON text from `source`. Raises ValueError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not JSON that can be read: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, OSError."""
    content = parse_json(read_text(path), path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, and holds {str(content)[:40]!r}")
    return content
