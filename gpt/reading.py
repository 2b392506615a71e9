"""Read files that others have written. A bad file raises an error of one plain sentence."""

import codecs
import gzip
import json
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

# The first bytes of compressed files.
MAGIC = {
    "gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "xz": b"\xfd7zXZ", "bzip2": b"BZh", "zip": b"PK\3\4",
}  # fmt: skip


def regular(path: Path) -> Path:
    """Returns `path`. Raises OSError for a folder, a pipe and a device.

    Reading a pipe may wait forever, and a device may have no end.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise OSError(f"{path} is {kind}, not a file; give the path of a file")
    return path


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Opens a text in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark. Decompresses .gz.

    Raises OSError, and ValueError for bytes that are not such a text, also while the code inside reads.
    """
    open_file: Any = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with open_file(path, "rb") as f:
            encoding = _encoding(path, f.read(1 << 12))
        with TextIOWrapper(open_file(path, "rb"), encoding) as f:
            try:
                yield f
            except UnicodeDecodeError as error:
                byte = f.buffer.tell() - len(error.object) + error.start
                raise ValueError(
                    f"{path} is not {encoding_name(f.encoding)} text: byte {byte:,} cannot be read; "
                    "convert it to UTF-8"
                ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is an incomplete .gz file: {error}") from None


def _encoding(path: Path, head: bytes) -> str:
    """The encoding of a text file that begins with `head`. Raises ValueError for what is not a text."""
    for kind, magic in MAGIC.items():
        if head.startswith(magic):
            raise ValueError(f"{path} is compressed ({kind}): decompress it, or compress it as FILE.txt.gz")
    encoding = text_encoding(head)
    n_zeros = head.count(0)
    if encoding == "utf-8-sig" and n_zeros > len(head) // 4:
        # Latin text has a 0 in half of its bytes in UTF-16, and in three quarters in UTF-32.
        name = ("UTF-32" if n_zeros > 5 * len(head) // 8 else "UTF-16") + ("LE" if head[0] else "BE")
        raise ValueError(
            f"{path} is not UTF-8 text: {n_zeros:,} of its first {len(head):,} bytes are 0, as in {name}; "
            f"convert it: iconv -f {name} -t UTF-8"
        )
    return encoding


def text_encoding(head: bytes) -> str:
    """The encoding of a text that begins with `head`: by its byte-order mark, or UTF-8.

    Editors on Windows write the mark. Reading with these encodings leaves it out of the text.
    """
    # UTF-32's mark in little-endian order begins with UTF-16's.
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    return "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def encoding_name(encoding: str) -> str:
    return encoding.upper().removesuffix("-SIG")


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
