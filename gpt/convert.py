"""python -m gpt.convert FROM TO: converts a trained model between ckpt.pt and a Hugging Face folder.

FROM is a ckpt.pt of this project or of nanoGPT, the folder of a run or of a GPT2LMHeadModel, or gpt2,
gpt2-medium, gpt2-large or gpt2-xl. TO is a file if its name ends in .pt, and otherwise a new folder. It gets
the weights and the tokenizer, but not the optimizer.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from gpt import cli, tokenizer
from gpt.pretrained import load, resize_vocabulary, save_checkpoint, save_hugging_face


@dataclass
class ConvertConfig:
    """Convert a trained model: python -m gpt.convert FROM TO, each a ckpt.pt or a Hugging Face folder."""

    vocab_size: int | None = None  # rows of the embedding; 50257 drops the padding of 50304


def main() -> None:
    config, paths = cli.parse_with_paths(ConvertConfig, sys.argv[1:], prog="python -m gpt.convert FROM TO")
    if len(paths) != 2:
        raise ValueError("python -m gpt.convert FROM TO [--vocab_size=N] takes two paths")
    convert(paths[0], Path(paths[1]), config.vocab_size)


def convert(source: str, target: Path, vocab_size: int | None = None) -> None:
    """Converts and prints what changed. Raises ValueError, OSError; never overwrites a file."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists already; remove it, or choose another name")
    with cli.IfSlow(f"reading {source}"):
        model, described = load(source)
    symbols = tokenizer.vocab_size(described)
    rows = model.config.vocab_size
    is_unknown = described["kind"] == "unknown"
    if is_unknown and vocab_size is not None and vocab_size < symbols:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: the tokenizer of {source} is unknown, so all of its "
            f"{symbols} rows may be in use"
        )
    if vocab_size is not None and vocab_size != rows:
        model = resize_vocabulary(model, vocab_size, symbols)
        purpose = "" if is_unknown else f", for {symbols} symbols"
        print(f"vocabulary: {rows} rows in {source}, {vocab_size} in {target}{purpose}")
    elif rows != symbols:
        is_padded = rows == tokenizer.padded_vocab_size(described)
        hint = f"--vocab_size={symbols} leaves the padding out" if is_padded else "all rows are kept"
        print(f"vocabulary: {rows} rows for the tokenizer's {symbols} symbols; {hint}")
    to_checkpoint = target.suffix == ".pt"
    with cli.IfSlow(f"writing {target}"):
        (save_checkpoint if to_checkpoint else save_hugging_face)(model, described, target)
    if to_checkpoint and model.config.activation != "gelu":
        print(
            "this model has the tanh GELU, nanoGPT's model.py the erf GELU: its logits differ slightly there"
        )
    if is_unknown:
        print(f"the tokenizer is unknown: {described['why']}")
    print(f"{target}: {model.get_num_params() / 1e6:.2f}M parameters, tokenizer {described['kind']}")


if __name__ == "__main__":
    cli.run(main)
