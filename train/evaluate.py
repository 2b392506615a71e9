"""python -m train.evaluate: what a trained model is worth, as one JSON object; under torchrun by all ranks.
A figure that is not finite is null; where a loss is not, the exit code is 1.

On a token file: the mean loss of every token but the first, in order, each once; perplexity; bits per byte.
A window's tokens have at least block_size - stride tokens before them, but at the start of the file: a
smaller stride is a fairer figure, and costs block_size / stride times as much.

On HellaSwag: of four endings the one with the least loss a token is the model's choice (acc_norm; acc is by
the least sum), tokenized and scored as build-nanogpt and llm.c do.
Source: Zellers et al., 2019, https://arxiv.org/abs/1905.07830; https://github.com/karpathy/build-nanogpt
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpt import atomic, cli, pretrained, tokenizer
from gpt.checkpoint import read
from gpt.cli import UserPath
from gpt.device import autocast, resolve_dtype
from gpt.model import GPT
from gpt.reading import parse_json, read_text
from gpt.tokenizer import CharTokenizer, GPT2Tokenizer, Tokenizer
from train import distributed, fit
from train.data import Split, preflight, to_device
from train.distributed import Ranks
from train.metrics import to_json
from train.view import progress_bar


@dataclass
class EvaluateConfig:
    """Evaluate a trained model on tokens, on HellaSwag, or on both: python -m train.evaluate FOLDER

    FOLDER is that of a run. Of tokens: loss in nats, perplexity, bits a byte.
    """

    # model
    init_from: UserPath = "resume"  # resume (the checkpoint in out_dir), a ckpt.pt or its folder, gpt2, ...
    out_dir: UserPath = "out"  # where the checkpoint is

    # what to evaluate
    data: UserPath = ""  # a token file, such as data/openwebtext/val.bin; without, the val.bin of the run
    stride: int = 0  # tokens from one window to the next; 0 is block_size, and the fastest
    hellaswag: UserPath = ""  # a jsonl file of ctx, endings and label; or hub, Hugging Face's validation set
    result: UserPath = ""  # a file for the JSON, beside printing it

    # machine
    batch_size: int = 8  # windows, or examples of HellaSwag, at once on each rank
    backend: str = "auto"  # of torch.distributed: auto, nccl, gloo
    device: str = "auto"  # auto, cpu, mps, cuda, cuda:1, ...
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    kernels: str = "auto"  # who computes: auto, triton, torch, or with exceptions


class Row(NamedTuple):
    """A sequence, and where in it the targets that count begin."""

    ids: Sequence[int]
    first: int  # ids[first] is the first token whose loss counts, at least 1


def main() -> None:
    config = cli.parse(EvaluateConfig, sys.argv[1:], prog="python -m train.evaluate", path_flag="init_from")
    if not config.data and not config.hellaswag:
        config.data = _own_data(pretrained.source_of(config.init_from, config.out_dir))
    cli.check_bounds(vars(config), {"batch_size": (1, 2**29), "stride": (0, 2**62)})
    ranks = distributed.start(config.backend, config.device)
    try:
        result = evaluate(config, ranks)
    except (RuntimeError, MemoryError) as error:
        if not fit.out_of_memory(error):
            raise
        raise ValueError(f"out of memory: try a smaller batch_size than {config.batch_size}") from error
    if ranks.is_main:
        print(to_json(_rounded(result) if sys.stdout.isatty() else result, indent=1))
        if config.result:
            atomic.write(Path(config.result), to_json(result, indent=1) + "\n")
        figures = (result.get("tokens", {}).get("loss", 0), result.get("hellaswag", {}).get("acc", 0))
        if not all(map(math.isfinite, figures)):
            raise ValueError(
                f"the losses of {result['model']} are not finite: a weight is NaN, or a number is too large "
                "for float16; try --dtype=float32, or an earlier checkpoint"
            )
    distributed.stop(ranks)


def evaluate(config: EvaluateConfig, ranks: Ranks) -> dict[str, Any]:
    """The figures on `data` and on `hellaswag`, the same on every rank. Raises ValueError, OSError."""
    source = pretrained.source_of(config.init_from, config.out_dir)
    torch.backends.cuda.matmul.allow_tf32 = True
    dtype = resolve_dtype(config.dtype, ranks.device)
    with cli.IfSlow(f"reading {source}", ranks.is_main):
        model, described = pretrained.load(source, ranks.device, dtype, dropout=0.0, kernels=config.kernels)
    model.eval()
    result: dict[str, Any] = {"model": source, "dtype": dtype}
    with torch.no_grad(), autocast(ranks.device, dtype):
        if config.data:
            result["tokens"] = on_tokens(model, described, config, ranks)
        if config.hellaswag:
            tokens = tokenizer.from_dict(described)
            result["hellaswag"] = on_hellaswag(model, tokens, config, ranks)
    return result


def _own_data(source: str) -> str:
    """The val.bin of the data that a model was trained on. Raises ValueError where it does not say."""
    path = pretrained.checkpoint_in(source)
    dataset = "" if pretrained.is_hugging_face(path) else read(Path(path)).config.get("dataset")
    if not dataset:
        raise ValueError("nothing to evaluate on: give --data=FILE.bin, --hellaswag=FILE.jsonl, or both")
    return str(Path("data", dataset, "val.bin"))


def _rounded(value: Any) -> Any:
    """Five digits of each number, for a reader; programs get all."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def on_tokens(model: GPT, described: dict[str, Any], config: EvaluateConfig, ranks: Ranks) -> dict[str, Any]:
    """Loss in nats, perplexity and bits per byte over all tokens of a file but the first."""
    path = Path(config.data)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {path}; {cli.command('train.prepare')} lists what prepares data"
        )
    theirs = tokenizer.describe_dataset(path.parent)
    # GPT-2's leaves no trace beside the file.
    if not tokenizer.fits(described, theirs) and theirs["kind"] != "gpt2":
        raise ValueError(f"{path} was prepared with another tokenizer or alphabet than the model's")
    file = Split(path, model.config.vocab_size or 0)
    preflight({path.stem: file}, {})
    if len(file) < 2:
        raise ValueError(f"{path} has {len(file)} tokens: a loss needs two, a token and the one before it")
    block_size = model.config.block_size
    stride = config.stride or block_size
    if not 1 <= stride <= block_size:
        raise ValueError(f"stride={stride} must be from 1 to block_size={block_size}")
    sizes = None if described["kind"] == "unknown" else _bytes_of_ids(tokenizer.from_dict(described))

    def rows() -> Iterator[Row]:
        for index, start in enumerate(_starts(len(file), block_size, stride)):
            if index // config.batch_size % ranks.world_size == ranks.rank:
                ids = file.read(np.array([start]), min(block_size + 1, len(file) - start))[0]
                file.check_ids(int(ids.max()))
                yield Row(ids.tolist(), 1 if start == 0 else block_size - stride + 1)

    nats, count, size = 0.0, 0.0, 0.0
    windows = sum(1 for _ in _starts(len(file), block_size, stride))
    batches = _batches(rows(), config.batch_size)
    for batch in _shown(batches, str(path), windows, config, ranks):
        nats += _losses(model, batch, ranks.device).cpu().double().sum().item()
        scored = [i for row in batch for i in row.ids[row.first :]]
        count += len(scored)
        size += sizes[scored].sum() if sizes is not None else 0
    nats, count, size = _sum(ranks, nats, count, size)
    assert count == len(file) - 1
    loss = nats / count
    return {
        "file": str(path), "tokens": int(count), "block_size": block_size, "stride": stride,
        # exp(710) is more than a float holds
        "loss": loss, "perplexity": math.exp(loss) if loss < 709 else math.inf,
        "bytes": int(size) or None, "bits_per_byte": nats / math.log(2) / size if size else None,
    }  # fmt: skip


def on_hellaswag(model: GPT, tokens: Tokenizer, config: EvaluateConfig, ranks: Ranks) -> dict[str, Any]:
    """Shares of the examples where the right ending has the least loss: a token (acc_norm), in sum (acc)."""
    examples = list(_hellaswag(config.hellaswag))
    right, right_norm = 0.0, 0.0
    batches = _batches(iter(examples[ranks.rank :: ranks.world_size]), config.batch_size)
    for batch in _shown(batches, "HellaSwag", len(examples), config, ranks):
        rows = [row for context, endings, _ in batch for row in _endings(model, tokens, context, endings)]
        losses = _losses(model, rows, ranks.device).sum(1).tolist()
        if any(map(math.isnan, losses)):
            right = right_norm = math.nan
        for _, endings, label in batch:
            of_each, losses = losses[: len(endings)], losses[len(endings) :]
            lengths, rows = [len(r.ids) - r.first for r in rows[: len(endings)]], rows[len(endings) :]
            right += min(range(len(endings)), key=of_each.__getitem__) == label
            right_norm += min(range(len(endings)), key=lambda i: of_each[i] / lengths[i]) == label
    right, right_norm = _sum(ranks, right, right_norm)
    n = len(examples)
    return {"source": config.hellaswag, "examples": n, "acc": right / n, "acc_norm": right_norm / n}


def _starts(length: int, block_size: int, stride: int) -> Iterator[int]:
    """Where the windows over a file of `length` tokens begin; the last is the first to reach its end."""
    start = 0
    while True:
        yield start
        if start + block_size + 1 >= length:
            return
        start += stride


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    return iter(lambda: list(islice(items, size)), [])


def _shown(
    batches: Iterator[Any], label: str, items: int, config: EvaluateConfig, ranks: Ranks
) -> Iterator[Any]:
    """The batches of this rank, of so many items over all ranks, under a progress bar of the first."""
    total = -(-items // (config.batch_size * ranks.world_size))
    return progress_bar(batches, label, total) if ranks.is_main else batches


def _losses(model: GPT, rows: Sequence[Row], device: str) -> Tensor:
    """The loss in nats of every target that counts, 0 elsewhere: (len(rows), longest row - 1), fp32."""
    idx = torch.zeros(len(rows), max(len(row.ids) for row in rows) - 1, dtype=torch.int64)
    targets = torch.full_like(idx, -1)
    for row, inputs, labels in zip(rows, idx, targets):
        ids = torch.tensor(row.ids)
        inputs[: len(ids) - 1] = ids[:-1]  # filled up on the right, where what counts does not look
        labels[row.first - 1 : len(ids) - 1] = ids[row.first :]
    idx, targets = to_device((idx, targets), device)
    _, losses = model(idx, targets, reduction="none")
    return losses


def _endings(model: GPT, tokens: Tokenizer, context: str, endings: Sequence[str]) -> Iterator[Row]:
    """A row for each ending, after the context; what does not fit is taken from the context's beginning."""
    before = tokens.encode(context)
    vocab_size, room = model.config.vocab_size or 0, model.config.block_size + 1
    for ending in endings:
        after = tokens.encode(" " + ending)
        ids = (before + after)[-room:]
        if max(ids) >= vocab_size:
            raise ValueError(f"HellaSwag gives token id {max(ids)}, and the model knows {vocab_size} symbols")
        yield Row(ids, max(1, len(ids) - len(after)))


def _hellaswag(source: str) -> Iterator[tuple[str, list[str], int]]:
    """(context, endings, index of the right one). Raises ValueError, OSError."""
    if source == "hub":
        try:
            from datasets import load_dataset
        except ImportError:
            raise ValueError(f"--hellaswag=hub needs the package datasets: {cli.install('data')}") from None
        try:
            examples = list(load_dataset("Rowan/hellaswag", split="validation"))
        except Exception as error:  # whatever the hub and what reads it raise
            raise OSError(
                f"HellaSwag could not be fetched ({str(error).strip().splitlines()[0][:160]}); "
                "give its hellaswag_val.jsonl as --hellaswag=FILE"
            ) from None
    else:
        if not Path(source).exists():
            raise FileNotFoundError(f"there is no file {source}: give HellaSwag's jsonl, or --hellaswag=hub")
        lines = read_text(Path(source)).split("\n")
        examples = [_example(source, number, line) for number, line in enumerate(lines, start=1) if line]
    if not examples:
        raise ValueError(f"{source} holds no examples")
    for example in examples:
        yield example["ctx"], list(example["endings"]), int(example["label"])


def _example(source: str, number: int, line: str) -> dict[str, Any]:
    try:
        example = parse_json(line, source)
        assert isinstance(example["ctx"], str) and 0 <= int(example["label"]) < len(example["endings"])
        assert all(isinstance(ending, str) for ending in example["endings"])
    except (ValueError, KeyError, TypeError, OverflowError, AssertionError) as error:
        raise ValueError(
            f"{source}, line {number}, is no example of ctx, endings and label ({type(error).__name__})"
        ) from None
    return example


def _bytes_of_ids(tokens: Tokenizer) -> np.ndarray | None:
    """UTF-8 bytes of the text that each id stands for; the end of a document is no text. None: not known."""
    if isinstance(tokens, CharTokenizer):
        return np.array([len(symbol.encode()) for symbol in tokens.symbols])
    if isinstance(tokens, GPT2Tokenizer):
        sizes = [len(tokens.bpe.decode_single_token_bytes(i)) for i in range(tokenizer.GPT2_VOCAB_SIZE)]
        sizes[tokenizer.GPT2_END_OF_TEXT] = 0
        return np.array(sizes)
    return None


def _sum(ranks: Ranks, *values: float) -> list[float]:
    """Each value summed over the ranks."""
    device = ranks.device if ranks.backend else "cpu"
    return ranks.sum(torch.tensor(values, dtype=torch.float64, device=device)).tolist()


if __name__ == "__main__":
    cli.run(main)
