"""python -m gpt.sample: continues prompts with a trained model. nanoGPT's flags, and more."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gpt import cli, pretrained, tokenizer
from gpt.cli import UserPath
from gpt.device import autocast, resolve_compile, resolve_device, resolve_dtype
from gpt.generate import stream
from gpt.model import GPT
from gpt.reading import read_text
from gpt.sampling import Sampling, check_drawn

SEPARATOR = "---------------"
BOUNDS = {  # the least and the most that can be computed
    "num_samples": (1, 2**29), "max_new_tokens": (1, 2**29), "batch_size": (1, 2**29),
    "seed": (-(2**63), 2**64 - 1), "top_k": (1, 2**62),
}  # fmt: skip


@dataclass
class SampleConfig:
    """Sample from a trained model: python -m gpt.sample FOLDER, that of a run.

    Flags are shown with their defaults; --interactive alone means True.
    """

    # model
    init_from: UserPath = "resume"  # resume (the checkpoint in out_dir), a ckpt.pt or its folder, gpt2, ...
    out_dir: UserPath = "out"  # where the checkpoint is

    # prompts and samples
    start: str = "\n"  # the prompt, or FILE:path to read it from a file
    prompts: UserPath = ""  # a file of prompts, one a line, to be continued together instead of start
    interactive: bool = False  # ask for prompts, and continue each once
    num_samples: int = 10  # samples of each prompt
    max_new_tokens: int = 500  # tokens in each
    stop: str = ""  # end a sample before this text

    # how a token is drawn
    temperature: float = 0.8  # 1 as the model has it, less is less random, 0 takes the likeliest token
    top_k: int = 200  # sample among the k likeliest tokens
    top_p: float = 1.0  # sample among the fewest likeliest tokens whose probabilities reach p together
    seed: int = 1337  # of the random draws

    # machine
    batch_size: int = 32  # samples drawn at once
    device: str = "auto"  # auto, cpu, mps, cuda, cuda:1, ...
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    compile: bool = False  # torch.compile the model
    kernels: str = "auto"  # who computes: auto, triton, torch, or with exceptions

    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)


def load(config: SampleConfig, device: str) -> tuple[GPT, tokenizer.Tokenizer]:
    """The model in eval mode on `device`, and the tokenizer it was trained with."""
    source = pretrained.source_of(config.init_from, config.out_dir)
    dtype = resolve_dtype(config.dtype, device)
    with cli.IfSlow(f"reading {source}"):
        model, described = pretrained.load(source, device, dtype, dropout=0.0, kernels=config.kernels)
    return model.eval(), tokenizer.from_dict(described)


class Continuation:
    """What follows a prompt, as text: whole characters only, and only what comes before the stop text."""

    def __init__(self, tokens: tokenizer.Tokenizer, stop: str):
        self.tokens = tokens
        self.stop = stop
        self.text = ""
        self.unread: list[int] = []  # ids that end within a character
        self.stopped = False

    def add(self, token: int) -> None:
        if self.stopped:
            return
        self.unread.append(token)
        if not self.tokens.decode(self.unread).endswith("\ufffd"):
            self.finish()

    def finish(self) -> None:
        """Takes what is unread as it is: no more tokens will complete it."""
        self.text += self.tokens.decode(self.unread)
        self.unread = []
        if self.stop and self.stop in self.text:
            self.text = self.text[: self.text.index(self.stop)]
            self.stopped = True

    @property
    def certain(self) -> int:
        """How many characters of the text cannot become part of the stop text."""
        longest = 0 if self.stopped else min(len(self.stop) - 1, len(self.text))
        begun = (n for n in range(longest, 0, -1) if self.text.endswith(self.stop[:n]))
        return len(self.text) - next(begun, 0)


def encode(model: GPT, tokens: tokenizer.Tokenizer, prompt: str) -> list[int]:
    """The ids of a prompt that the model can go on from; says so where it sees only their end.

    Raises ValueError.
    """
    ids = tokens.encode(prompt)
    vocab_size, block_size = model.config.vocab_size or 0, model.config.block_size
    if not ids:
        raise ValueError("the prompt is empty: give at least one symbol to go on from, such as --start='A'")
    if max(ids) >= vocab_size:
        raise ValueError(f"the prompt has token id {max(ids)}, and the model knows {vocab_size} symbols")
    if len(ids) > block_size:
        note = f"the prompt has {len(ids)} tokens and the model sees the last {block_size} of them"
        print(note, file=sys.stderr)
    return ids


def continuations(
    model: GPT,
    tokens: tokenizer.Tokenizer,
    prompts: Sequence[Sequence[int]],
    config: SampleConfig,
    samples: int,
    generator: torch.Generator | None = None,
) -> Iterator[list[Continuation]]:
    """`samples` continuations of each prompt, those of the first prompt first, after every token.

    Raises ValueError where the logits are not finite.
    """
    texts = [Continuation(tokens, config.stop) for _ in prompts for _ in range(samples)]
    rows = [torch.tensor(prompt, device=model.lm_head.weight.device) for prompt in prompts]
    for ids in stream(model, rows, config.max_new_tokens, config.sampling(), samples, generator):
        check_drawn(ids)
        for text, token in zip(texts, ids.tolist(), strict=True):
            text.add(token)
        yield texts
        if all(text.stopped for text in texts):
            break
    for text in texts:
        text.finish()
    yield texts


def generate(
    model: GPT,
    tokens: tokenizer.Tokenizer,
    prompt: Sequence[int],
    config: SampleConfig,
    generator: torch.Generator | None = None,
) -> str:
    """One sample: the text of the prompt's ids and of those that follow. Raises ValueError."""
    *_, (text,) = continuations(model, tokens, [prompt], config, 1, generator)
    return tokens.decode(prompt) + text.text


def show(
    model: GPT, tokens: tokenizer.Tokenizer, prompts: Sequence[Sequence[int]], config: SampleConfig
) -> None:
    """Prints the samples of every prompt; the first of a batch appears as it is drawn."""
    at_once = max(1, config.batch_size // config.num_samples)
    for i in range(0, len(prompts), at_once):
        batch = prompts[i : i + at_once]
        for drawn in range(0, config.num_samples, config.batch_size):
            samples = min(config.batch_size, config.num_samples - drawn)
            print(tokens.decode(batch[0]), end="", flush=True)
            shown = 0
            for texts in continuations(model, tokens, batch, config, samples):
                print(texts[0].text[shown : texts[0].certain], end="", flush=True)
                shown = max(shown, texts[0].certain)
            print(texts[0].text[shown:])
            for row, text in enumerate(texts[1:], start=1):
                print(SEPARATOR, tokens.decode(batch[row // samples]) + text.text, sep="\n")
            print(SEPARATOR, flush=True)


def converse(model: GPT, tokens: tokenizer.Tokenizer, config: SampleConfig) -> None:
    """Reads prompts from stdin until EOF and continues each; prints an error for an invalid one."""
    with suppress(ImportError):  # `input` edits lines by it
        import readline  # noqa: F401
    print("Each line is a prompt that stands alone. Ctrl-D leaves.", file=sys.stderr)
    config = replace(config, num_samples=1)
    while True:
        try:
            show(model, tokens, [encode(model, tokens, cli.ask("> "))], config)
        except EOFError:
            return print()
        except ValueError as error:
            print(error, file=sys.stderr)


def main() -> None:
    config = cli.parse(SampleConfig, sys.argv[1:], prog="python -m gpt.sample", path_flag="init_from")
    config.sampling()
    cli.check_bounds(vars(config), BOUNDS)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    torch.manual_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    model, tokens = load(config, device)
    if resolve_compile(config.compile, device):
        model.transformer.compile(dynamic=True)  # a prompt has any length
    with autocast(device, dtype):
        if config.interactive:
            converse(model, tokens, config)
        else:
            show(model, tokens, _encoded(model, tokens, config), config)


def _encoded(model: GPT, tokens: tokenizer.Tokenizer, config: SampleConfig) -> list[list[int]]:
    prompts = []
    for number, prompt in enumerate(_prompts(config), start=1):
        try:
            prompts.append(encode(model, tokens, prompt))
        except ValueError as error:
            raise ValueError(
                f"{config.prompts}, line {number}: {error}" if config.prompts else error
            ) from None
    return prompts


def _prompts(config: SampleConfig) -> list[str]:
    if config.prompts:
        lines = read_text(Path(config.prompts)).removesuffix("\n").split("\n")
        if lines == [""]:
            raise ValueError(f"{config.prompts} holds no prompts: write one a line")
        return lines
    from_file = config.start.startswith("FILE:")
    return [read_text(Path(cli.read_path(config.start[5:]))) if from_file else config.start]


if __name__ == "__main__":
    cli.run(main)
