"""python -m train.evaluate: evaluates a model on tokens and on HellaSwag, and prints the results as JSON.

On tokens: the mean loss over all tokens of a file except the first, its perplexity, and bits per byte. Each
token is scored once. It has at least block_size - stride tokens before it, except near the start of the file.
A smaller stride gives more context and a lower loss, and costs block_size / stride times as much.

On HellaSwag: the model chooses the ending with the lowest loss per token (acc_norm) or in total (acc), as in
build-nanogpt and llm.c.
Source: Zellers et al., 2019, https://arxiv.org/abs/1905.07830; https://github.com/karpathy/build-nanogpt
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpt import cli, pretrained
from gpt.checkpoint import read
from gpt.cli import UserPath
from gpt.device import autocast, resolve_dtype
from gpt.model import GPT
from gpt.reading import parse_json, read_text
from gpt.tokenizer import CharTokenizer, GPT2Tokenizer, Tokenizer, describe_dataset, fits, from_dict
from train import distributed, fit
from train.data import Split, preflight, to_device
from train.distributed import Ranks
from train.metrics import to_json
from train.prepare.documents import load
from train.view import progress_bar


@dataclass
class EvaluateConfig:
    """Evaluate a trained model on tokens, on HellaSwag, or on both: python -m train.evaluate FOLDER

    FOLDER is the out_dir of a run. On tokens: loss in nats, perplexity, and bits per byte.
    """

    # model
    init_from: UserPath = "resume"  # resume (the checkpoint in out_dir), a ckpt.pt or its folder, gpt2, ...
    out_dir: UserPath = "out"  # the folder of the checkpoint

    # what to evaluate
    data: UserPath = ""  # a token file, such as data/openwebtext/val.bin; the default is the run's val.bin
    stride: int = 0  # tokens from one window to the next; 0 is block_size, which is fastest
    hellaswag: UserPath = ""  # a jsonl file with ctx, endings and label, or hub for Hugging Face's copy

    # machine
    batch_size: int = 8  # windows, or examples of HellaSwag, at once on each rank
    backend: str = "auto"  # of torch.distributed: auto, nccl, gloo
    device: str = "auto"  # auto, cpu, mps, cuda, cuda:1, ...
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    kernels: str = "auto"  # implementation: auto, triton, torch, or with exceptions: triton,attention=torch


def main() -> None:
    config = cli.parse(EvaluateConfig, sys.argv[1:], prog="python -m train.evaluate", path_flag="init_from")
    cli.check_bounds(vars(config), {"batch_size": (1, 2**29), "stride": (0, 2**62)})
    # To choose between ckpt.pt and best.pt a checkpoint is read. Do it once.
    config.init_from = pretrained.source_of(config.init_from, config.out_dir)
    if not config.data and not config.hellaswag:
        config.data = _validation_data(config.init_from)
    ranks = distributed.start(config.backend, config.device)
    try:
        result = evaluate(config, ranks)
    except (RuntimeError, MemoryError) as error:
        if not fit.out_of_memory(error):
            raise
        raise ValueError(f"out of memory: try a smaller batch_size than {config.batch_size}") from error
    if ranks.is_main:
        print(to_json(result, indent=1))  # null for a perplexity that no float holds
    distributed.stop(ranks)


def _validation_data(source: str) -> str:
    """The val.bin of the data that a model was trained on. Raises ValueError if it is unknown."""
    dataset = "" if pretrained.is_hugging_face(source) else read(Path(source)).config.get("dataset")
    if not dataset:
        raise ValueError("nothing to evaluate on: give --data=FILE.bin, --hellaswag=FILE.jsonl, or both")
    return str(Path("data", dataset, "val.bin"))


def evaluate(config: EvaluateConfig, ranks: Ranks) -> dict[str, Any]:
    """The results on `data` and on `hellaswag`, the same on every rank. Raises ValueError, OSError."""
    source = pretrained.source_of(config.init_from, config.out_dir)
    torch.backends.cuda.matmul.allow_tf32 = True
    dtype = resolve_dtype(config.dtype, ranks.device)
    with cli.IfSlow(f"reading {source}", ranks.is_main):
        model, description = pretrained.load(source, ranks.device, dtype, dropout=0.0, kernels=config.kernels)
    model.eval()
    result: dict[str, Any] = {"model": source, "dtype": dtype}
    with torch.no_grad(), autocast(ranks.device, dtype):
        if config.data:
            result["tokens"] = on_tokens(model, description, config, ranks)
        if config.hellaswag:
            result["hellaswag"] = on_hellaswag(model, from_dict(description), config, ranks)
    return result


class Row(NamedTuple):
    """A sequence. Only its ids from `first` on, which is at least 1, are scored."""

    ids: Sequence[int]
    first: int


# ---- tokens


def on_tokens(
    model: GPT, description: dict[str, Any], config: EvaluateConfig, ranks: Ranks
) -> dict[str, Any]:
    """Loss in nats, perplexity and bits per byte over all tokens of a file except the first."""
    block_size = model.config.block_size
    stride = config.stride or block_size
    if stride > block_size:
        raise ValueError(f"stride={stride} must be from 1 to block_size={block_size}")
    path = Path(config.data)
    try:
        file = Split(path, model.config.vocab_size or 0)
    except FileNotFoundError as error:
        hint = f"{cli.command('train.prepare')} lists the commands that prepare data"
        raise FileNotFoundError(f"{error}; {hint}") from None
    # Without a tokenizer file the folder counts as GPT-2's; then we cannot compare.
    data_tokenizer = describe_dataset(path.parent)
    if data_tokenizer["kind"] != "gpt2" and not fits(description, data_tokenizer):
        raise ValueError(f"{path} was prepared with another tokenizer or alphabet than the model's")
    preflight({path.stem: file}, {})
    if len(file) < 2:
        raise ValueError(f"{path} has {len(file)} tokens, but a loss needs at least 2")
    bytes_per_id = None
    if description["kind"] != "unknown":
        bytes_per_id = _bytes_per_id(from_dict(description), file.vocab_size)
    nats, n_tokens, n_bytes = 0.0, 0.0, 0.0
    # The last window is the first to reach the end of the file.
    starts = range(0, max(0, len(file) - 1 - block_size) + stride, stride)
    for batch in _batches(starts, config.data, config, ranks):
        rows = []
        for start in batch:
            ids = file.read(np.array([start]), min(block_size + 1, len(file) - start))[0]
            file.check_ids(int(ids.max()))
            # Each window scores the tokens that the windows before it did not.
            rows.append(Row(ids.tolist(), 1 if start == 0 else block_size - stride + 1))
        nats += _losses(model, rows, ranks.device).cpu().double().sum().item()
        scored = [id for row in rows for id in row.ids[row.first :]]
        n_tokens += len(scored)
        n_bytes += bytes_per_id[scored].sum() if bytes_per_id is not None else 0
    nats, n_tokens, n_bytes = _sum(ranks, nats, n_tokens, n_bytes)
    assert n_tokens == len(file) - 1
    loss = nats / n_tokens
    return {
        "file": config.data,
        "tokens": int(n_tokens),
        "block_size": block_size,
        "stride": stride,
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 709 else math.inf,  # math.exp(710) overflows
        "bytes": int(n_bytes) or None,
        # Unlike the loss, this is comparable between tokenizers.
        "bits_per_byte": nats / math.log(2) / n_bytes if n_bytes else None,
    }


def _bytes_per_id(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray | None:
    """The length of each id's text in UTF-8: (vocab_size,). None if the tokenizer does not tell.

    The end of a document has no text, and neither has an id that only pads the model's vocabulary.
    """
    if isinstance(tokenizer, CharTokenizer):
        lengths = [len(symbol.encode()) for symbol in tokenizer.symbols]
    elif isinstance(tokenizer, GPT2Tokenizer):
        texts = map(tokenizer.bpe.decode_single_token_bytes, range(tokenizer.vocab_size))
        lengths = [0 if [id] == tokenizer.end else len(text) for id, text in enumerate(texts)]
    else:
        return None
    return np.array((lengths + vocab_size * [0])[:vocab_size])


# ---- HellaSwag


def on_hellaswag(model: GPT, tokenizer: Tokenizer, config: EvaluateConfig, ranks: Ranks) -> dict[str, Any]:
    """The shares of the examples for which the model chooses the right ending."""
    examples = list(_hellaswag(config.hellaswag))
    n_right, n_right_norm = 0.0, 0.0
    for batch in _batches(examples, "HellaSwag", config, ranks):
        rows = [row for ctx, endings, _ in batch for row in _endings(model, tokenizer, ctx, endings)]
        losses = _losses(model, rows, ranks.device).sum(1).cpu().double()
        means = losses / torch.tensor([len(row.ids) - row.first for row in rows])
        n_endings = [len(endings) for _, endings, _ in batch]
        for (_, _, label), sums, norms in zip(batch, losses.split(n_endings), means.split(n_endings)):
            n_right += int(sums.argmin()) == label
            n_right_norm += int(norms.argmin()) == label
    n_right, n_right_norm = _sum(ranks, n_right, n_right_norm)
    n = len(examples)
    return {"source": config.hellaswag, "examples": n, "acc": n_right / n, "acc_norm": n_right_norm / n}


def _endings(model: GPT, tokenizer: Tokenizer, context: str, endings: Sequence[str]) -> Iterator[Row]:
    """A row for each ending, after the context. A long row loses the beginning of its context."""
    context_ids = tokenizer.encode(context)
    vocab_size, block_size = model.config.vocab_size or 0, model.config.block_size
    for ending in endings:
        ending_ids = tokenizer.encode(" " + ending)
        ids = (context_ids + ending_ids)[-block_size - 1 :]
        if max(ids) >= vocab_size:
            raise ValueError(
                f"HellaSwag has the token id {max(ids)}, but the model has vocab_size={vocab_size}"
            )
        yield Row(ids, max(1, len(ids) - len(ending_ids)))


def _hellaswag(source: str) -> Iterator[tuple[str, list[str], int]]:
    """(context, endings, index of the right ending) of each example. Raises ValueError, OSError."""
    examples: list[Any]
    if source == "hub":
        examples = list(load("--hellaswag=hub", "Rowan/hellaswag", split="validation"))
    elif Path(source).exists():
        examples = list(filter(None, read_text(Path(source)).split("\n")))
    else:
        raise FileNotFoundError(f"there is no file {source}: give HellaSwag's jsonl, or --hellaswag=hub")
    if not examples:
        raise ValueError(f"{source} holds no examples")
    for number, example in enumerate(examples, start=1):
        try:
            if isinstance(example, str):
                example = parse_json(example, source)
            context, endings, label = example["ctx"], list(example["endings"]), int(example["label"])
            if not all(isinstance(text, str) for text in (context, *endings)):
                raise ValueError("ctx and endings must be text")
            if label not in range(len(endings)):
                raise ValueError(f"label={label} must be from 0 to {len(endings) - 1}")
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            problem = f"{source}, line {number}, is not an example with ctx, endings and label"
            raise ValueError(f"{problem} ({type(error).__name__}: {error})") from None
        yield context, endings, label


# ---- both


def _batches(items: Sequence[Any], label: str, config: EvaluateConfig, ranks: Ranks) -> Iterator[Any]:
    """The batches of this rank. The main rank shows a progress bar."""
    size = config.batch_size
    starts = range(ranks.rank * size, len(items), ranks.world_size * size)
    batches = (items[start : start + size] for start in starts)
    return progress_bar(batches, label, len(starts)) if ranks.is_main else batches


def _losses(model: GPT, rows: Sequence[Row], device: str) -> Tensor:
    """The loss in nats of every scored token, and 0 elsewhere: (len(rows), longest row - 1), fp32.

    Raises ValueError for a loss that is not finite.
    """
    idx = torch.zeros(len(rows), max(len(row.ids) for row in rows) - 1, dtype=torch.int64)
    targets = torch.full_like(idx, -1)
    # Rows are padded on the right, where causal attention does not see the padding.
    for row, inputs, labels in zip(rows, idx, targets):
        ids = torch.tensor(row.ids)
        inputs[: len(ids) - 1] = ids[:-1]
        labels[row.first - 1 : len(ids) - 1] = ids[row.first :]
    idx, targets = to_device((idx, targets), device)
    _, losses = model(idx, targets, reduction="none")
    if not losses.isfinite().all():
        raise ValueError(
            "the model's losses are not finite: a weight is NaN, or a number is too large for float16; try "
            "--dtype=float32, or an earlier checkpoint"
        )
    return losses


def _sum(ranks: Ranks, *values: float) -> list[float]:
    """Adds up each value over the ranks."""
    device = ranks.device if ranks.backend else "cpu"  # MPS has no float64
    return ranks.sum(torch.tensor(values, dtype=torch.float64, device=device)).tolist()


if __name__ == "__main__":
    cli.run(main)
