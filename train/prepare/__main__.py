"""python -m train.prepare NAME: a corpus becomes data/NAME/train.bin and val.bin, as nanoGPT writes them.

{corpora}

Those called _char get an id for each character, the others GPT-2's byte-pair encoding.

text                a text of your own: --input=FILES --name=NAME --tokenizer=gpt2|char|PATH
tokenizer           trains one on your own text: --input=FILES --vocab_size=N --output=PATH
inspect NAME        shows a data set

text, tokenizer and each corpus take --help.
"""

import difflib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt import cli
from gpt.cli import UserPath
from train.prepare import documents
from train.prepare.corpora import CORPORA
from train.prepare.encode import check_free, encode, is_complete
from train.prepare.inspect import inspect
from train.prepare.train_tokenizer import train_tokenizer


@dataclass
class CorpusConfig:
    """Prepare a corpus that is known by name."""

    workers: int = 0  # threads that encode, processes that load from the hub; 0: one for each core


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
    workers: int = 0  # threads that encode; 0: one for each core


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
        prepare(folder, corpus, config.tokenizer, config.workers, config.endoftext)
    elif name in CORPORA:
        workers = cli.parse(CorpusConfig, args, prog).workers
        prepare_by_name(name, workers)
    else:
        close = difflib.get_close_matches(name, [*CORPORA, "text", "tokenizer", "inspect"], n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        known = f"{', '.join(CORPORA)}, and text --input=FILES --name=NAME takes your own"
        raise ValueError(f"no corpus is called {name!r}{hint}; the corpora are {known}")


def prepare_by_name(name: str, workers: int) -> None:
    """Leaves data alone that is there. Prints a line when nanoGPT's counts are of another corpus."""
    folder, entry = Path("data", name), CORPORA[name]
    if is_complete(folder):
        print(f"{folder} is there already")
        return
    meta = prepare(folder, entry.load(workers or _cores()), entry.tokenizer, workers)
    counts = meta["train"]["tokens"], meta["val"]["tokens"]
    if entry.nanogpt and counts != entry.nanogpt:
        train, val = entry.nanogpt
        print(f"nanoGPT counted {train:,} and {val:,}: the corpus is not the one it was")


def prepare(
    folder: Path, corpus: documents.Corpus, kind: str, workers: int, endoftext: bool = False
) -> dict[str, Any]:
    """`encode`, and the counts printed. Returns the content of meta.json."""
    meta = encode(folder, corpus, kind, workers or _cores(), endoftext)
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
