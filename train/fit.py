"""Find the micro-batch that fits into memory (--batch_size=auto); explain out-of-memory errors."""

import gc
import math
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch

from gpt.model import GPT
from train.config import TrainConfig
from train.distributed import Ranks, same_random_numbers

MARGIN = 0.07  # of the memory: for NCCL, for fragments, for whoever else uses the GPU
SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed")


def micro_batch(
    config: TrainConfig, model: GPT, ranks: Ranks, trial: Callable[[int, GPT], None]
) -> tuple[TrainConfig, str]:
    """`config` with the micro-batch that fits on every rank, and a line that says so: --batch_size=auto.

    It begins with all of this rank's sequences of a step at once, and halves them until they fit. The step
    has as many sequences as before. `trial(size, model)` makes steps on a copy of `model`; neither weights
    nor random numbers of the run change. Raises ValueError.
    """
    total = device_memory(ranks)
    if config.strategy == "fsdp":
        raise ValueError(
            "batch_size=auto tries sizes on each rank alone, which strategy=fsdp cannot: give a number"
        )
    sequences, accumulation = config.sequences, config.gradient_accumulation_steps
    share = size = sequences // ranks.world_size
    model.cpu()
    release(ranks.device)
    with same_random_numbers(ranks):
        # The smallest GPU decides.
        while ranks.any((peak := peak_bytes(trial, size, model, ranks)) > (1 - MARGIN) * total):
            if size == 1:
                raise ValueError(
                    f"batch_size=auto: not one sequence of block_size={config.model.block_size} can be "
                    f"trained on in the {total / 2**30:.1f} GiB of {ranks.device}; "
                    f"{_ways_out(config, smaller_batch=False)}"
                )
            # A divisor, so that every micro-batch of the step is full.
            size = max(n for n in range(1, size // 2 + 1) if share % n == 0)
    model.to(ranks.device)
    fitted = replace(config, batch_size=size, gradient_accumulation_steps=sequences // size)
    return fitted, (
        f"batch_size=auto: {size} x {sequences // size} accumulation steps = {sequences} sequences a step "
        f"({config.batch_size} x {accumulation} was asked); "
        f"peak {peak / 2**30:.1f} of {total / 2**30:.1f} GiB"
    )


def device_memory(ranks: Ranks) -> int:
    """Bytes of this rank's GPU. Raises ValueError where there is none."""
    if ranks.device_type != "cuda":
        raise ValueError(
            f"batch_size=auto asks a GPU for its memory, and {ranks.device} cannot be asked: give a number, "
            "such as --batch_size=12"
        )
    return torch.cuda.mem_get_info(ranks.device)[1]


def peak_bytes(trial: Callable[[int, GPT], None], size: int, model: GPT, ranks: Ranks) -> float:
    """The memory that was taken from the GPU in a trial of this size; infinity where it ended."""
    peak = math.inf
    # Else the second size makes a graph for any size, which no training runs.
    torch.compiler.reset()
    try:
        trial(size, deepcopy(model).to(ranks.device))
        torch.cuda.synchronize(ranks.device)
        peak = torch.cuda.max_memory_reserved(ranks.device)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    # Here the exception holds no tensors any more.
    release(ranks.device)
    torch.compiler.reset()
    return peak


def release(device: str) -> None:
    """Gives back the memory that nobody holds any more, and begins a new peak."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ended: of a GPU, of the host, or of numpy."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


def explain(error: BaseException, config: TrainConfig) -> str:
    """One sentence on an error that is `out_of_memory`: what to lower, and what the run can go on from."""
    request = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    amount = f" ({request[1]} more were wanted)" if request else ""
    latest = Path(config.out_dir, "ckpt.pt")
    saved = f"--init_from=resume goes on from {latest}" if latest.exists() else "nothing is saved yet"
    return f"out of memory{amount}: {_ways_out(config)}; {saved}"


def _ways_out(config: TrainConfig, smaller_batch: bool = True) -> str:
    ways, model = [], config.model
    if smaller_batch:
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
