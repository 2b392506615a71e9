"""python -m gpt.convert FROM TO: a trained model between ckpt.pt and a folder of Hugging Face's.

FROM is a ckpt.pt, this project's or nanoGPT's, the folder of a run or of a GPT2LMHeadModel, or gpt2, ...,
gpt2-xl. TO is a name that ends in .pt, or else a folder to be made. Weights and tokenizer go over, the
optimizer does not.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from gpt import cli, tokenizer
from gpt.pretrained import load, resize_vocabulary, save_checkpoint, save_hugging_face


@dataclass
class ConvertConfig:
    """Convert a trained model: python -m gpt.convert FROM TO, each a ckpt.pt or a Hugging Face folder."""

    vocab_size: int | None = None  # rows of embedding to have: 50257 leaves the padding of 50304 out


def main() -> None:
    config, paths = cli.parse_with_paths(ConvertConfig, sys.argv[1:], prog="python -m gpt.convert FROM TO")
    if len(paths) != 2:
        raise ValueError("python -m gpt.convert FROM TO [--vocab_size=N] takes two paths")
    convert(paths[0], Path(paths[1]), config.vocab_size)


def convert(source: str, target: Path, vocab_size: int | None = None) -> None:
    """Prints what was written, and what differs. Raises ValueError, OSError; never writes over anything."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} is there already; remove it, or choose another name")
    with cli.IfSlow(f"reading {source}"):
        model, described = load(source)
    symbols = tokenizer.vocab_size(described)
    had = model.config.vocab_size
    is_unknown = described["kind"] == "unknown"
    if is_unknown and vocab_size is not None and vocab_size < symbols:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: the tokenizer of {source} is unknown, so all of its "
            f"{symbols} rows may be in use"
        )
    if vocab_size is not None and vocab_size != had:
        model = resize_vocabulary(model, vocab_size, symbols)
        purpose = "" if is_unknown else f", for {symbols} symbols"
        print(f"vocabulary: {had} rows in {source}, {vocab_size} in {target}{purpose}")
    elif had == tokenizer.padded_vocab_size(described) != symbols:
        print(f"vocabulary: {had} rows for {symbols} symbols; --vocab_size={symbols} leaves the padding out")
    elif had != symbols:
        print(f"vocabulary: {had} rows for the {symbols} symbols of the tokenizer; all rows are kept")
    save = save_checkpoint if target.suffix == ".pt" else save_hugging_face
    with cli.IfSlow(f"writing {target}"):
        save(model, described, target)
    if target.suffix == ".pt" and model.config.activation != "gelu":
        print("nanoGPT's model.py has the erf GELU, this model tanh: its logits there are a little off")
    if is_unknown:
        print(f"the tokenizer is unknown: {described['why']}")
    print(f"{target}: {model.get_num_params() / 1e6:.2f}M parameters, tokenizer {described['kind']}")


if __name__ == "__main__":
    cli.run(main)
