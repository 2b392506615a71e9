"""python -m train.prepare NAME: a corpus becomes data/NAME/train.bin and val.bin, as nanoGPT writes them.

plays_char         Shakespeare's 38 plays by character: the quickstart's corpus
shakespeare_char   tiny-shakespeare by character
stdlib_char        the Python standard library by character: needs no network
text               a text of your own: --input=FILE --tokenizer=char|gpt2 --name=NAME
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from gpt import cli, tokenizer
from train.prepare import corpora

CORPORA: dict[str, Callable[[], str]] = {
    "plays_char": corpora.plays,
    "shakespeare_char": corpora.shakespeare,
    "stdlib_char": corpora.stdlib,
}


@dataclass
class PrepareConfig:
    """Prepare a text of your own: data/NAME/train.bin is its first nine tenths, val.bin the rest."""

    input: str  # file of UTF-8 text
    name: str  # of the data set, for --dataset
    tokenizer: Literal["char", "gpt2"] = "gpt2"  # an id for each character, or GPT-2's byte-pair encoding


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
    elif name == "text":
        config = cli.parse(PrepareConfig, sys.argv[2:], prog="python -m train.prepare text")
        write(Path("data", config.name), _read(Path(config.input)), config.tokenizer)
    elif name not in CORPORA:
        raise ValueError(
            f"no corpus is called {name!r}: {', '.join(CORPORA)} or text --input=FILE --name=NAME"
        )
    elif is_complete(folder := Path("data", name)):
        print(f"{folder} is there already")
    else:
        write(folder, CORPORA[name](), "char")


def is_complete(folder: Path) -> bool:
    return (folder / "train.bin").exists()  # the last file to appear


def write(folder: Path, text: str, kind: str) -> None:
    """Writes meta.pkl (for characters), val.bin and, last, train.bin: each appears when it is whole.

    The split is nanoGPT's: the first 90% of the characters are for training.
    """
    if is_complete(folder):
        raise ValueError(f"{folder} is there already; remove it, or choose another --name")
    if len(text) < 2:
        raise ValueError(f"the text has {len(text)} characters: nothing to train on")
    tokens = tokenizer.GPT2Tokenizer() if kind == "gpt2" else tokenizer.CharTokenizer(sorted(set(text)))
    split = int(len(text) * 0.9)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(tokens, tokenizer.CharTokenizer):
        tokenizer.write_meta(folder / "meta.pkl", tokens.symbols)
    counts = {}
    for part, piece in (("val", text[split:]), ("train", text[:split])):
        ids = np.array(tokens.encode(piece), np.uint16)
        counts[part] = len(ids)
        partial = folder / f"{part}.bin.partial"
        with partial.open("wb") as f:
            ids.tofile(f)
            f.flush()
            os.fsync(f.fileno())
        partial.rename(folder / f"{part}.bin")
    print(
        f"{folder}: train {counts['train']:,} tokens, val {counts['val']:,}, vocabulary {tokens.vocab_size}"
    )


def _read(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start:,} cannot be read") from None


if __name__ == "__main__":
    cli.run(main)
