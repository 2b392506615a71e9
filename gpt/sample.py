"""python -m gpt.sample: continues a prompt with a trained model. The flags are nanoGPT's."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt import cli, tokenizer
from gpt.device import autocast, resolve_compile, resolve_device, resolve_dtype
from gpt.model import GPT
from gpt.pretrained import best_or_latest, from_checkpoint, from_hugging_face, is_hugging_face


@dataclass
class SampleConfig:
    """Sample from a trained model."""

    init_from: str = (
        "resume"  # resume (the checkpoint in out_dir), a path to a ckpt.pt, or gpt2, ..., gpt2-xl
    )
    out_dir: str = "out"  # where the checkpoint is
    start: str = "\n"  # the prompt, or FILE:path to read it from a file
    num_samples: int = 10  # samples to draw
    max_new_tokens: int = 500  # tokens in each
    temperature: float = 0.8  # 1 as the model has it, less is less random, 0 takes the likeliest token
    top_k: int = 200  # sample among the k likeliest tokens
    seed: int = 1337  # of the random draws
    device: str = "auto"  # auto, cpu, mps, cuda, cuda:1, ...
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    compile: bool = False  # torch.compile the model
    kernels: str = "auto"  # who computes: auto, triton, torch, or with exceptions


def load(config: SampleConfig, device: str) -> tuple[GPT, tokenizer.Tokenizer]:
    """The model in eval mode on `device`, and the tokenizer it was trained with."""
    if config.init_from != "resume" and is_hugging_face(config.init_from):
        model = from_hugging_face(config.init_from, {"kernels": config.kernels}, device)
        return model.eval(), tokenizer.GPT2Tokenizer()
    path = best_or_latest(Path(config.out_dir)) if config.init_from == "resume" else Path(config.init_from)
    model, checkpoint = from_checkpoint(path, device, dropout=0.0, kernels=config.kernels)
    described = checkpoint.get("tokenizer")
    if described is None:  # nanoGPT's: it looks for the data set by name
        folder = Path("data", checkpoint.get("config", {}).get("dataset", ""))
        described = tokenizer.describe_dataset(folder)
        if described["kind"] == "gpt2" and (model.config.vocab_size or 0) < tokenizer.GPT2_VOCAB_SIZE:
            raise ValueError(
                f"{path} knows {model.config.vocab_size} symbols and does not say which, and there is no "
                f"{folder / 'meta.pkl'} to tell"
            )
    return model.eval(), tokenizer.from_dict(described)


def generate(
    model: GPT,
    tokens: tokenizer.Tokenizer,
    prompt: Sequence[int],
    config: SampleConfig,
    generator: torch.Generator | None = None,
) -> str:
    """One sample: the text of the prompt's ids and of those that follow. Raises ValueError."""
    vocab_size = model.config.vocab_size or 0
    if not prompt:
        raise ValueError("the prompt is empty: give at least one symbol to go on from, such as --start='A'")
    if max(prompt) >= vocab_size:
        raise ValueError(f"the prompt has token id {max(prompt)}, and the model knows {vocab_size} symbols")
    idx = torch.tensor([prompt], device=model.lm_head.weight.device)
    out = model.generate(idx, config.max_new_tokens, config.temperature, config.top_k, generator)
    return tokens.decode(out[0].tolist())


def main() -> None:
    config = cli.parse(SampleConfig, sys.argv[1:], prog="python -m gpt.sample")
    for name, least in (("temperature", 0), ("top_k", 1), ("num_samples", 1), ("max_new_tokens", 1)):
        if (value := getattr(config, name)) < least:
            raise ValueError(f"{name}={value} must be >= {least}")
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    prompt = Path(config.start[5:]).read_text() if config.start.startswith("FILE:") else config.start
    torch.manual_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    model, tokens = load(config, device)
    ids = tokens.encode(prompt)
    if resolve_compile(config.compile, device):
        model.compile(dynamic=True)  # the context grows by one at each step
    with autocast(device, dtype):
        for _ in range(config.num_samples):
            print(generate(model, tokens, ids, config))
            print("---------------", flush=True)


if __name__ == "__main__":
    cli.run(main)
