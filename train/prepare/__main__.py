"""python -m train.prepare NAME: a corpus becomes data/NAME/train.bin and val.bin, as nanoGPT writes them.

by GPT-2's byte-pair encoding
  openwebtext        8 million documents of the web, 9 billion tokens (needs the extra [data])
  fineweb_edu        10 billion tokens of FineWeb-Edu (needs the extra [data])
  shakespeare        tiny-shakespeare
  plays              Shakespeare's 38 plays
by character
  shakespeare_char   tiny-shakespeare
  plays_char         Shakespeare's 38 plays: the quickstart's corpus
  stdlib_char        the Python standard library: needs no network

text                 a text of your own: --input=FILES --name=NAME --tokenizer=gpt2|char|PATH
tokenizer            trains one on your own text: --input=FILES --vocab_size=N --output=PATH
inspect NAME         shows a data set

text, tokenizer and each corpus take --help. An interrupted preparation goes on when it is called again.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt import cli
from gpt.cli import UserPath
from train.prepare import corpora, documents
from train.prepare.encode import check_free, encode, is_complete
from train.prepare.inspect import inspect
from train.prepare.train_tokenizer import train_tokenizer

CORPORA = (
    "openwebtext", "fineweb_edu", "shakespeare", "plays", "shakespeare_char", "plays_char", "stdlib_char",
)  # fmt: skip


@dataclass
class CorpusConfig:
    """Prepare a corpus that is known by name."""

    processes: int = 0  # processes that encode; 0: one for each core


@dataclass
class PrepareConfig:
    """Prepare a text of your own as data/NAME.

    A single file of text is split where nine tenths of it end. Of many files, or rows of .jsonl or .parquet,
    each is a document; documents for validation are drawn at random.
    """

    input: UserPath  # a file, a folder or a glob of .txt, .jsonl or .parquet; several with commas between
    name: UserPath  # name of the data set, for --dataset
    tokenizer: UserPath = "gpt2"  # gpt2, char (an id a character), a tokenizer.json, or a model's folder
    field: str = "text"  # the column of .jsonl and .parquet that holds the text
    val_fraction: float = 0.1  # share for validation, of the characters or of the documents
    endoftext: bool = False  # make <|endoftext|> in the text the token that ends a document, not text
    processes: int = 0  # processes that encode; 0: one for each core


@dataclass
class TokenizerConfig:
    """Train a byte-pair encoding on a text of your own, split into words as GPT-2's is."""

    input: UserPath  # a file, a folder or a glob of .txt, .jsonl or .parquet; several with commas between
    vocab_size: int = 16384  # tokens, <|endoftext|> among them
    output: UserPath = "tokenizer.json"  # for --tokenizer of `text`
    field: str = "text"  # the column of .jsonl and .parquet that holds the text


def main() -> None:
    name, args = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    prog = f"python -m train.prepare {name}"
    if name in ("-h", "--help") or (name == "inspect" and {"-h", "--help"}.intersection(args)):
        print(__doc__)
    elif name == "inspect":
        if len(args) != 1:
            raise ValueError(f"inspect takes the name of one data set, as in: {prog} plays_char")
        inspect(Path("data", args[0]))
    elif name == "tokenizer":
        train = cli.parse(TokenizerConfig, args, prog)
        corpus = documents.files(train.input, train.field)
        train_tokenizer(corpus, train.vocab_size, Path(train.output))
    elif name == "text":
        config = cli.parse(PrepareConfig, args, prog)
        folder = Path("data", config.name)
        if folder == Path("data"):
            raise ValueError(f"name={config.name!r} names no data set: give one, such as --name=mine")
        check_free(folder)
        corpus = documents.files(config.input, config.field, config.val_fraction)
        prepare(folder, corpus, config.tokenizer, config.processes, config.endoftext)
    elif name not in CORPORA:
        raise ValueError(
            f"no corpus is called {name!r}: {', '.join(CORPORA)} or text --input=FILES --name=NAME"
        )
    elif is_complete(folder := Path("data", name)) and not {"-h", "--help"}.intersection(args):
        print(f"{folder} is there already")
    else:
        prepare_by_name(name, args)


def prepare_by_name(name: str, args: Sequence[str]) -> None:
    """Says so when the corpus is another than the one that nanoGPT's counts are of."""
    processes = cli.parse(CorpusConfig, args, f"python -m train.prepare {name}").processes or _cores()
    kind = "char" if name.endswith("_char") else "gpt2"
    meta = prepare(Path("data", name), corpora.load(name, processes), kind, processes)
    counts = meta["train"]["tokens"], meta["val"]["tokens"]
    expected = corpora.NANOGPT_COUNTS.get(name, counts)
    if counts != expected:
        print(f"nanoGPT counted {expected[0]:,} and {expected[1]:,}: the corpus is not the one it was")


def prepare(
    folder: Path, corpus: documents.Corpus, kind: str, processes: int, endoftext: bool = False
) -> dict[str, Any]:
    """`encode`, and what there is to say of it. Returns what meta.json says."""
    try:
        meta = encode(folder, corpus, kind, processes or _cores(), endoftext)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        raise
    counts = f"train {meta['train']['tokens']:,} tokens, val {meta['val']['tokens']:,}"
    print(f"{folder}: {counts}, vocabulary {meta['vocab_size']}")
    return meta


def write(folder: Path, text: str, kind: str) -> None:
    """Prepares a text that is in memory."""
    prepare(folder, documents.text(text, "a text in memory"), kind, 1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    cli.run(main)
