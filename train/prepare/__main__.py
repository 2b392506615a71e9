"""python -m train.prepare NAME: writes a corpus as data/NAME/train.bin and val.bin, in nanoGPT's format.

{corpora}

In those called _char each character is a token. The others use GPT-2's byte-pair encoding.

text                your own text: --input=FILES --name=NAME --tokenizer=gpt2|char|PATH
tokenizer           trains a tokenizer on your own text: --input=FILES --vocab_size=N --output=PATH
inspect NAME        shows a data set

text, tokenizer and each corpus take --help.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from gpt import cli
from gpt.cli import UserPath
from train.prepare import documents
from train.prepare.corpora import CORPORA
from train.prepare.encode import check_free, encode, is_complete
from train.prepare.inspect import inspect
from train.prepare.train_tokenizer import train_tokenizer


@dataclass
class CorpusConfig:
    """Prepare a corpus by its name."""

    workers: int = 0  # threads that encode, and processes that load from the hub; 0: one for each core


@dataclass
class PrepareConfig:
    """Prepare your own text as data/NAME.

    A single text file is split at nine tenths of its length. Otherwise each text file is a document,
    and so is each row of a .jsonl, .json, .csv or .parquet file. A tenth of the documents, drawn at random,
    is for validation.
    """

    input: UserPath  # .txt, .jsonl, .json, .csv and .parquet files, folders or globs, separated by commas
    name: UserPath  # name of the data set, for --dataset
    tokenizer: UserPath = (
        "gpt2"  # gpt2, char (an id per character), a tokenizer.json, or the folder of a Hugging Face model
    )
    field: str = "text"  # the column that holds the text, in files of rows
    val_fraction: float = 0.1  # share for validation, of the characters or of the documents
    endoftext: bool = False  # read <|endoftext|> in the text as the token that ends a document
    workers: int = 0  # threads that encode; 0: one for each core


@dataclass
class TokenizerConfig:
    """Train a byte-pair encoding on your own text, which it splits into words as GPT-2's does."""

    input: UserPath  # .txt, .jsonl, .json, .csv and .parquet files, folders or globs, separated by commas
    vocab_size: int = 16384  # tokens, <|endoftext|> included
    output: UserPath = "tokenizer.json"  # for --tokenizer of `text`
    field: str = "text"  # the column that holds the text, in files of rows


def main() -> None:
    name, args = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    prog = f"python -m train.prepare {name}"
    if name in ("-h", "--help") or (name == "inspect" and {"-h", "--help"}.intersection(args)):
        rows = "\n".join(f"{corpus:20}{entry.help}" for corpus, entry in CORPORA.items())
        print((__doc__ or "").format(corpora=rows))
    elif name == "inspect":
        if len(args) != 1:
            raise ValueError(f"inspect takes the name of one data set, as in: {prog} plays_char")
        with cli.IfSlow("reading all of it"):
            inspect(Path("data", args[0]))
    elif name == "tokenizer":
        train = cli.parse(TokenizerConfig, args, prog, path_flag="input")
        corpus = documents.files(train.input, train.field)
        train_tokenizer(corpus, train.vocab_size, Path(train.output))
    elif name == "text":
        config = cli.parse(PrepareConfig, args, prog, path_flag="input")
        folder = Path("data", config.name)
        if folder == Path("data"):
            raise ValueError(f"name={config.name!r} names no data set: give one, such as --name=mine")
        check_free(folder)
        corpus = documents.files(config.input, config.field, config.val_fraction)
        encode(folder, corpus, config.tokenizer, config.workers or _cores(), config.endoftext)
    elif name in CORPORA:
        prepare_by_name(name, cli.parse(CorpusConfig, args, prog).workers or _cores())
    else:
        cli.choose(
            dict.fromkeys([*CORPORA, "text", "tokenizer", "inspect"]), name, "corpus or command"
        )  # raises


def prepare_by_name(name: str, workers: int) -> None:
    """Prepares a corpus unless it is there. Prints a line if nanoGPT counted other numbers of tokens."""
    folder, entry = Path("data", name), CORPORA[name]
    if is_complete(folder):
        print(f"{folder} exists already")
        return
    meta = encode(folder, entry.load(workers), entry.tokenizer, workers)
    if entry.nanogpt not in (None, (meta["train"]["tokens"], meta["val"]["tokens"])):
        train, val = entry.nanogpt
        print(f"nanoGPT counted {train:,} and {val:,} tokens: the corpus has changed since then")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    cli.run(main)
