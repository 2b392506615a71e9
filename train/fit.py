"""What fits into memory: the largest micro-batch (--batch_size=auto), and the sentence where nothing does."""

import gc
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch

from gpt.model import GPT
from train.config import TrainConfig
from train.distributed import Ranks, random_numbers_kept

MARGIN = 0.07  # of the memory that is free: for NCCL, for fragments, for whoever else uses the GPU
SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed")


def micro_batches(sequences: int, ranks: int = 1) -> list[int]:
    """The micro-batches, ascending, that deal a step's `sequences` out to `ranks` without a remainder."""
    share = sequences // ranks
    return [size for size in range(1, share + 1) if share % size == 0]


def largest(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of the ascending `sizes` that fits, by bisection; None where not even the first does."""
    too_large = bisect_left(sizes, True, key=lambda size: not fits(size))
    return sizes[too_large - 1] if too_large else None


def micro_batch(
    config: TrainConfig, asked: int, model: GPT, ranks: Ranks, trial: Callable[[int, GPT], None]
) -> tuple[TrainConfig, str]:
    """`config` with the largest micro-batch that fits on every rank, in a step of as many sequences as
    micro-batches of `asked` would make; and a line that says so.

    `trial(size, model)` makes steps of this run on a copy of `model`, alone on this rank, and raises where
    memory ends. The model waits on the host meanwhile; nothing of the run is changed, random numbers neither.
    Raises ValueError where a device cannot be asked for its memory, and where not one sequence fits.
    """
    accumulation = config.gradient_accumulation_steps
    sequences = asked * accumulation
    peaks: dict[int, int] = {}

    def fits(size: int) -> bool:
        if config.compile:
            torch.compiler.reset()  # else the second size makes a graph for any size, which no training runs
        try:
            trial(size, deepcopy(model).to(ranks.device))
            peaks[size] = peak_bytes(ranks)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        fitted = size in peaks
        release(ranks.device)  # here, where the exception holds no tensors any more
        return not ranks.any(not fitted)

    with with_margin(ranks) as total, random_numbers_kept(ranks):
        model.cpu()
        found = largest(micro_batches(sequences, ranks.world_size), fits)
        model.to(ranks.device)
    if config.compile:
        torch.compiler.reset()
    if found is None:
        raise ValueError(
            f"batch_size=auto: not one sequence of block_size={config.model.block_size} can be trained on in "
            f"the {total / 2**30:.1f} GiB of {ranks.device}; {_ways_out(config, smaller_batch=False)}"
        )
    config = replace(config, batch_size=found, gradient_accumulation_steps=sequences // found)
    return config, (
        f"batch_size=auto: {found} x {sequences // found} accumulation steps = {sequences} sequences a step "
        f"({asked} x {accumulation} was asked); peak {peaks[found] / 2**30:.1f} of {total / 2**30:.1f} GiB"
    )


@contextmanager
def with_margin(ranks: Ranks) -> Iterator[int]:
    """Inside, memory ends MARGIN before it does. Yields the bytes that the device has. Raises ValueError."""
    if ranks.device_type != "cuda":
        raise ValueError(
            f"batch_size=auto asks a GPU for its memory, and {ranks.device} cannot be asked: give a number, "
            "such as --batch_size=12"
        )
    release(ranks.device)
    free, total = torch.cuda.mem_get_info(ranks.device)
    ours = free + torch.cuda.memory_reserved(ranks.device)
    before = torch.cuda.get_per_process_memory_fraction(ranks.device)
    torch.cuda.set_per_process_memory_fraction(min(before, (1 - MARGIN) * ours / total), ranks.device)
    try:
        yield total
    finally:
        torch.cuda.set_per_process_memory_fraction(before, ranks.device)


def peak_bytes(ranks: Ranks) -> int:
    """The most that tensors have held since the last `release`. Waits for the device, whose errors show."""
    torch.cuda.synchronize(ranks.device)
    return torch.cuda.max_memory_allocated(ranks.device)


def release(device: str) -> None:
    """Gives back what nobody holds any more, and begins a new peak."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ended: of a GPU, of the host, or of numpy."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


def explain(error: BaseException, config: TrainConfig) -> str:
    """One sentence on an error that is `out_of_memory`: what to lower, and what the run can go on from."""
    wanted = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    amount = f" ({wanted[1]} more were wanted)" if wanted else ""
    latest = Path(config.out_dir, "ckpt.pt")
    saved = f"--init_from=resume goes on from {latest}" if latest.exists() else "nothing is saved yet"
    return f"out of memory{amount}: {_ways_out(config)}; {saved}"


def _ways_out(config: TrainConfig, smaller_batch: bool = True) -> str:
    ways, model = [], config.model
    if smaller_batch and config.batch_size == "auto":
        ways.append("a batch_size below the one that auto has found")
    elif smaller_batch:
        ways.append(
            f"a smaller batch_size than {config.batch_size}, with gradient_accumulation_steps="
            f"{config.gradient_accumulation_steps} raised as much, which makes the same step"
        )
        if torch.cuda.is_available():
            ways.append("--batch_size=auto, which finds both")
    if not model.activation_checkpointing:
        ways.append("--activation_checkpointing=True")
    if config.strategy == "ddp" and torch.cuda.is_available():
        ways.append("--strategy=fsdp on several GPUs")
    if config.init_from in ("scratch", "auto"):
        sizes = f"block_size={model.block_size}, n_layer={model.n_layer}, n_embd={model.n_embd}"
        ways.append(f"a model smaller than {sizes}")
    return f"try {', or '.join(ways) or 'a larger device'}"
