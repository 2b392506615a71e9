"""python -m gpt.convert FROM TO: converts a trained model between ckpt.pt and a Hugging Face folder.

FROM is a ckpt.pt of this project or of nanoGPT, the folder of a run or of a GPT2LMHeadModel, or gpt2,
gpt2-medium, gpt2-large or gpt2-xl. TO is a file if its name ends in .pt, and otherwise a new folder. It gets
the weights and the tokenizer, but not the optimizer.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from gpt import cli, tokenizer
from gpt.pretrained import cut_vocabulary, load, save_checkpoint, save_hugging_face


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
        model, description = load(source)
    symbols, rows = tokenizer.vocab_size(description), model.config.vocab_size
    if vocab_size is not None:
        model = cut_vocabulary(model, vocab_size, symbols)
    if model.config.vocab_size != rows:
        print(f"vocabulary: {rows} -> {model.config.vocab_size} rows, for {symbols} symbols")
    elif rows != symbols:
        print(f"vocabulary: {rows} rows, for {symbols} symbols; --vocab_size={symbols} drops the others")
    to_checkpoint = target.suffix == ".pt"
    with cli.IfSlow(f"writing {target}"):
        (save_checkpoint if to_checkpoint else save_hugging_face)(model, description, target)
    if to_checkpoint and model.config.activation != "gelu":
        print(
            "this model has the tanh GELU, nanoGPT's model.py the erf GELU: its logits differ slightly there"
        )
    if description["kind"] == "unknown":
        print(f"the tokenizer is unknown: {description['why']}")
    print(f"{target}: {model.get_num_params() / 1e6:.2f}M parameters, tokenizer {description['kind']}")


if __name__ == "__main__":
    cli.run(main)
