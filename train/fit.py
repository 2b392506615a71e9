"""Find the micro-batch that fits into memory (--batch_size=auto); explain out-of-memory errors."""

import gc
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch

from gpt.model import GPT
from train.config import TrainConfig
from train.distributed import Ranks, same_random_numbers

MARGIN = 0.07  # share of the memory left free: for NCCL, fragments, and other programs on the GPU
SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed")
MEMORY_ADVICE = "--activation_checkpointing=True, --strategy=fsdp on several GPUs, or a smaller model"


def micro_batch(
    config: TrainConfig, model: GPT, ranks: Ranks, trial: Callable[[int, GPT], None]
) -> tuple[TrainConfig, str]:
    """Finds the micro-batch that fits on every rank. Returns `config` with it, and a line to print.

    Starts with all sequences that a rank computes in a step, and halves their number until they fit. The step
    keeps its number of sequences. `trial(size, model)` makes steps on a copy of `model`, so that the weights
    and the random numbers of the run do not change. Raises ValueError.
    """
    check_supported(config, ranks)
    sequences, accumulation = config.sequences_per_step, config.gradient_accumulation_steps
    per_rank = size = max(1, sequences // ranks.world_size)
    model.cpu()
    release(ranks.device)
    with same_random_numbers(ranks):
        # All ranks take the size that fits on the smallest GPU.
        while ranks.any(not fits(trial, size, model, ranks)):
            if size == 1:
                raise ValueError(
                    f"batch_size=auto: one sequence of block_size={config.model.block_size} does not fit "
                    f"into {1 - MARGIN:.0%} of the memory of {ranks.device}; try {MEMORY_ADVICE}"
                )
            # A divisor, so that all micro-batches of a step are full.
            size = max(n for n in range(1, size // 2 + 1) if per_rank % n == 0)
    model.to(ranks.device)
    fitted = replace(config, batch_size=size, gradient_accumulation_steps=sequences // size)
    return fitted, (
        f"batch_size=auto: {size} x {sequences // size} accumulation steps = {sequences} sequences a step "
        f"(set to {config.batch_size} x {accumulation})"
    )


def check_supported(config: TrainConfig, ranks: Ranks) -> None:
    """Raises ValueError for a device or a strategy that batch_size=auto does not support."""
    if ranks.device_type != "cuda":
        raise ValueError(
            f"batch_size=auto needs a GPU, and this run is on {ranks.device}: give a number, such as "
            "--batch_size=12"
        )
    if config.strategy == "fsdp":
        raise ValueError(
            "batch_size=auto tries sizes on each rank alone, which strategy=fsdp cannot: give a number"
        )


def fits(trial: Callable[[int, GPT], None], size: int, model: GPT, ranks: Ranks) -> bool:
    """Whether a trial of this size needs at most 1 - MARGIN of the GPU's memory."""
    is_enough = True
    # Otherwise the second size would compile a graph for all sizes, which training does not use.
    torch.compiler.reset()
    # Above this limit PyTorch's allocator frees its unused blocks, and then raises OutOfMemoryError.
    torch.cuda.set_per_process_memory_fraction(1 - MARGIN, ranks.device)
    try:
        trial(size, deepcopy(model).to(ranks.device))
        torch.cuda.synchronize(ranks.device)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        is_enough = False
    # After the except block, no exception holds tensors any more.
    release(ranks.device)
    torch.cuda.set_per_process_memory_fraction(1.0, ranks.device)
    torch.compiler.reset()
    return is_enough


def release(device: str) -> None:
    """Frees unused memory and starts a new peak measurement."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def out_of_memory(error: BaseException) -> bool:
    """Whether the error means that memory ran out: that of a GPU or of the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


def explain(error: BaseException, out_dir: str) -> str:
    """A sentence for an `out_of_memory` error: what to lower, and whether the run can resume."""
    request = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    amount = f" ({request[1]} more were needed)" if request else ""
    latest = Path(out_dir, "ckpt.pt")
    saved = f"--init_from=resume continues from {latest}" if latest.exists() else "nothing is saved yet"
    return (
        f"out of memory{amount}: halve batch_size and double gradient_accumulation_steps, which makes the "
        f"same step, or try --batch_size=auto on a GPU, {MEMORY_ADVICE}; {saved}"
    )
