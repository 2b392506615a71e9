"""Files that others have written: refused with a sentence where they cannot be read, and never waited for."""

import codecs
import json
import stat
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any


def regular(path: Path) -> Path:
    """Returns `path`, for every reader to open. Raises OSError for anything but a regular file.

    A pipe makes its reader wait, perhaps forever, and a device may never end.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise OSError(f"{path} is {kind}, not a file; give the path of a file")
    return path


def text_encoding(head: bytes) -> str:
    """How a text that begins with these bytes is read: by its byte-order mark, else as UTF-8.

    Editors on Windows put the mark there; all of these encodings leave it out of the text.
    """
    # UTF-32's mark in little-endian order begins with UTF-16's.
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    return "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def encoding_name(encoding: str) -> str:
    return encoding.upper().removesuffix("-SIG")


def read_text(path: Path) -> str:
    """The text of a file that somebody wrote, without a byte-order mark. Raises ValueError, OSError."""
    content = regular(path).read_bytes()
    encoding = text_encoding(content)
    try:
        return TextIOWrapper(BytesIO(content), encoding).read()
    except UnicodeError as error:
        where = f"byte {error.start:,}" if isinstance(error, UnicodeDecodeError) else "its beginning"
        raise ValueError(
            f"{path} is not {encoding_name(encoding)} text: {where} cannot be read; convert it to UTF-8"
        ) from None


def parse_json(text: str, where: str | Path) -> Any:
    """The value of a JSON text, which is from `where`. Raises ValueError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON that can be read: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, OSError."""
    content = parse_json(read_text(path), path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, and holds {str(content)[:40]!r}")
    return content
