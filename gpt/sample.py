"""python -m gpt.sample: continues prompts with a trained model. Has nanoGPT's flags, and more."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from gpt import cli, pretrained
from gpt.cli import UserPath
from gpt.device import autocast, resolve_compile, resolve_device, resolve_dtype
from gpt.generate import stream
from gpt.model import GPT
from gpt.reading import read_text
from gpt.sampling import Sampling, check_drawn
from gpt.tokenizer import Tokenizer, from_dict

SEPARATOR = "---------------"
SIZE = (1, 2**29)
BOUNDS = {"num_samples": SIZE, "max_new_tokens": SIZE, "batch_size": SIZE, "seed": (-(2**63), 2**64 - 1)}


@dataclass
class SampleConfig:
    """Sample from a trained model: python -m gpt.sample FOLDER, where FOLDER is the out_dir of a run.

    Flags are shown with their defaults. A switch needs no value: --interactive.
    """

    # model
    init_from: UserPath = "resume"  # resume (the checkpoint in out_dir), a ckpt.pt or its folder, gpt2, ...
    out_dir: UserPath = "out"  # the folder of the checkpoint

    # prompts and samples
    start: str = "\n"  # the prompt, or FILE:path to read it from a file
    prompts: UserPath = ""  # a file with one prompt per line, to use instead of start
    interactive: bool = False  # ask for prompts, and continue each once
    num_samples: int = 10  # samples of each prompt
    max_new_tokens: int = 500  # tokens in each sample
    stop: str = ""  # end a sample before this text

    # how a token is drawn
    sampling: Sampling = field(default_factory=lambda: Sampling(0.8, 200, 1.0))
    seed: int = 1337  # of the random draws

    # machine
    batch_size: int = 32  # samples drawn at once
    device: str = "auto"  # auto, cpu, mps, cuda, cuda:1, ...
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    compile: bool = False  # torch.compile the model
    kernels: str = "auto"  # implementation: auto, triton, torch, or with exceptions: triton,attention=torch


def main() -> None:
    config = cli.parse(SampleConfig, sys.argv[1:], prog="python -m gpt.sample", path_flag="init_from")
    cli.check_bounds(vars(config), BOUNDS)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    torch.manual_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    model, tokenizer = load(config, device)
    if resolve_compile(config.compile, device):
        model.transformer.compile(dynamic=True)  # prompts differ in length
    with autocast(device, dtype):
        if config.interactive:
            converse(model, tokenizer, config)
        else:
            show(model, tokenizer, _encoded(model, tokenizer, config), config)


def load(config: SampleConfig, device: str) -> tuple[GPT, Tokenizer]:
    """The model in eval mode on `device`, and its tokenizer. Raises ValueError, OSError."""
    source = pretrained.source_of(config.init_from, config.out_dir)
    dtype = resolve_dtype(config.dtype, device)
    with cli.IfSlow(f"reading {source}"):
        model, description = pretrained.load(source, device, dtype, dropout=0.0, kernels=config.kernels)
    return model.eval(), from_dict(description)


def _prompts(config: SampleConfig) -> list[str]:
    if config.prompts:
        lines = _read(Path(config.prompts)).removesuffix("\n").split("\n")
        if lines == [""]:
            raise ValueError(f"{config.prompts} holds no prompts: write one per line")
        return lines
    if config.start.startswith("FILE:"):
        return [_read(Path(os.path.expanduser(config.start[5:])))]
    return [config.start]


def _read(path: Path) -> str:
    if not path.is_fifo():
        return read_text(path)
    # A pipe, such as <(command), can be read only once. read_text looks at the encoding first.
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"{path} is not UTF-8 text: byte {error.start:,} cannot be read"
        raise ValueError(f"{problem}; convert it to UTF-8") from None


def _encoded(model: GPT, tokenizer: Tokenizer, config: SampleConfig) -> list[list[int]]:
    """The ids of each prompt. An error names the line of the file."""
    prompts = []
    for number, prompt in enumerate(_prompts(config), start=1):
        try:
            prompts.append(encode(model, tokenizer, prompt))
        except ValueError as error:
            place = f"{config.prompts}, line {number}: " if config.prompts else ""
            raise ValueError(f"{place}{error}") from None
    return prompts


def encode(model: GPT, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of a prompt. Prints a note if the prompt is longer than the context. Raises ValueError."""
    ids = tokenizer.encode(prompt)
    vocab_size, block_size = model.config.vocab_size or 0, model.config.block_size
    if not ids:
        raise ValueError("the prompt is empty: give at least one symbol to continue, such as --start='A'")
    if max(ids) >= vocab_size:
        raise ValueError(f"the prompt has the token id {max(ids)}, but the model has vocab_size={vocab_size}")
    if len(ids) > block_size:
        note = f"the prompt has {len(ids)} tokens, and the model sees only the last {block_size} of them"
        print(note, file=sys.stderr)
    return ids


def show(model: GPT, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], config: SampleConfig) -> None:
    """Prints the samples of every prompt.

    Without a stop text, the first sample of a batch appears token by token.
    """
    prompts_at_once = max(1, config.batch_size // config.num_samples)
    for i in range(0, len(prompts), prompts_at_once):
        batch = prompts[i : i + prompts_at_once]
        for n_drawn in range(0, config.num_samples, config.batch_size):
            samples = min(config.batch_size, config.num_samples - n_drawn)
            n_printed = first = n_decoded = 0  # characters, ids
            for rows in draw(model, tokenizer, batch, config, samples):
                if config.stop:  # a sample may end earlier, so it is printed as a whole
                    continue
                # Decode the new ids after those printed last, which decide whether a space follows.
                old, text = (tokenizer.decode(ids) for ids in (rows[0][first:n_decoded], rows[0][first:]))
                # The bytes of an unfinished character decode to U+FFFD.
                if len(text) > len(old) and not text.endswith("\ufffd"):
                    print(text[len(old) :], end="", flush=True)
                    n_printed += len(text) - len(old)
                    first, n_decoded = n_decoded, len(rows[0])
            texts = [text_of(tokenizer, batch[i // samples], row, config.stop) for i, row in enumerate(rows)]
            print(texts[0][n_printed:], *texts[1:], sep=f"\n{SEPARATOR}\n")
            print(SEPARATOR, flush=True)


def converse(model: GPT, tokenizer: Tokenizer, config: SampleConfig) -> None:
    """Reads prompts from stdin until EOF and continues each; prints an error for an invalid one."""
    with suppress(ImportError):  # with readline, `input` can edit a line
        import readline  # noqa: F401
    print("Each prompt stands alone. Ctrl-D ends.", file=sys.stderr)
    config = replace(config, num_samples=1)
    while True:
        try:
            show(model, tokenizer, [encode(model, tokenizer, cli.ask("> "))], config)
        except EOFError:
            return print()
        except ValueError as error:
            print(error, file=sys.stderr)


def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    config: SampleConfig,
    generator: torch.Generator | None = None,
) -> str:
    """One sample: the text of the prompt and its continuation. Raises ValueError."""
    *_, rows = draw(model, tokenizer, [prompt], config, 1, generator)
    return text_of(tokenizer, prompt, rows[0], config.stop)


def draw(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    config: SampleConfig,
    samples: int,
    generator: torch.Generator | None = None,
) -> Iterator[list[list[int]]]:
    """Yields the ids of all samples, with their prompts: first the prompts alone, then after each token.

    These are the same lists each time, which grow. The `samples` of the first prompt come first. Ends early
    if each has the stop text. Raises ValueError if the logits are not finite.
    """
    rows = [list(prompt) for prompt in prompts for _ in range(samples)]
    lengths = [len(row) for row in rows]
    unstopped = set(range(len(rows)))
    inputs = [torch.tensor(prompt, device=model.lm_head.weight.device) for prompt in prompts]
    yield rows
    for ids in stream(model, inputs, config.max_new_tokens, config.sampling, samples, generator):
        check_drawn(ids)
        for row, id in zip(rows, ids.tolist(), strict=True):
            row.append(id)
        yield rows
        if config.stop:
            # A character has at most four tokens, so a stop text that is now complete lies in the last n - 1.
            # The token before these decides whether they begin with a space.
            n = 4 * len(config.stop) + 1
            for i in list(unstopped):
                start = max(0, len(rows[i]) - n)
                of_prompt = tokenizer.decode(rows[i][start : lengths[i]])
                if config.stop in tokenizer.decode(rows[i][start:])[len(of_prompt) :]:
                    unstopped.remove(i)
            if not unstopped:
                return


def text_of(tokenizer: Tokenizer, prompt: Sequence[int], row: Sequence[int], stop: str) -> str:
    """The text of a sample. The first stop text after the prompt ends it."""
    text, start = tokenizer.decode(row), len(tokenizer.decode(prompt))
    return text[:start] + text[start:].split(stop)[0] if stop else text


if __name__ == "__main__":
    cli.run(main)
