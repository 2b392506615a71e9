# mypy: allow-untyped-defs, allow-incomplete-defs
# (the fake implementations repeat the signatures of the real ones)
"""The last linear layer and the cross-entropy of its logits, as one operation.

    loss = cross_entropy(input @ linear_weight.T, target)

The full (N, V) logits are never in memory. Forward splits the rows into chunks and computes the gradients
too, so no logits need to be saved or computed again. For each chunk:

    logits = input[chunk] @ linear_weight.T           a cuBLAS product
    G = softmax(logits) - one_hot(target[chunk])      written over the logits by cross_entropy.py
    dinput[chunk] = G @ linear_weight
    dlinear_weight += G.T @ input[chunk]              in fp32

Arguments as in PyTorch 2.13's `F.linear_cross_entropy`.

Source: Liger Kernel, https://arxiv.org/abs/2410.10989; Cut Cross-Entropy, https://arxiv.org/abs/2411.09009
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cross_entropy import (
    CROSS_ENTROPY,
    check_range,
    check_targets,
    loss_and_gradient_,
    random_target,
    reduce,
)
from kernels.op import Cost, Op, autocast_dtype, autocast_enabled, check_tensors, device_memory, operator

# The logits of a chunk use at most 2 GiB and at most 1/50 of the GPU's memory. In half precision, 65536 rows
# of 50304 logits are 6.1 GiB, so they become 4 chunks of 16384 rows. Large chunks are faster, because each
# chunk reads and writes the whole fp32 gradient of the weight. On an H200 with C = 768, these 4 chunks take
# 22.8 ms, 8 chunks 23.5 ms and 32 chunks 26.1 ms.
BUDGET = 2 << 30
SHARE = 50
# Rows of logits are padded to a multiple of 64 elements, so each one starts on a 128-byte line.
ALIGN = 64


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_size: int | None = None,
) -> Tensor:
    """cross_entropy(F.linear(input, linear_weight), target) without the (N, V) logits -> () or (N,), fp32.

    input (N, C), linear_weight (V, C), target (N,) int64. `chunk_size` is the number of rows per chunk; by
    default the logits of a chunk use at most 2 GiB, or 2% of the GPU's memory if that is less. Under autocast
    the products run in the autocast dtype, otherwise input and linear_weight must have the same dtype. A
    gradient has the dtype of its tensor: an fp32 weight gets the unrounded fp32 sum over the chunks.
    Gradients that are not needed are not computed. A target out of range raises ValueError on a CPU. On a GPU
    it makes the loss and the gradients NaN. PyTorch's linear_bias, weight, label_smoothing and options are
    not supported. Raises ValueError for bad arguments.
    """
    check_tensors("linear_cross_entropy", input=input, linear_weight=linear_weight)
    if input.dim() != 2 or linear_weight.dim() != 2 or input.shape[1:] != linear_weight.shape[1:]:
        raise ValueError(
            f"linear_cross_entropy: input {tuple(input.shape)} and linear_weight "
            f"{tuple(linear_weight.shape)} must be (N, C) and (V, C)"
        )
    if linear_weight.numel() == 0:
        raise ValueError(
            f"linear_cross_entropy: linear_weight {tuple(linear_weight.shape)} has no classes or no features"
        )
    check_targets("linear_cross_entropy", input, target, reduction)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"linear_cross_entropy: chunk_size={chunk_size} must be at least 1 row")
    dtype = autocast_dtype(input)
    if not autocast_enabled(input) and input.dtype != linear_weight.dtype:
        raise ValueError(
            f"linear_cross_entropy: input is {input.dtype} and linear_weight {linear_weight.dtype}; "
            "without autocast they must be the same"
        )
    if reduction == "none":
        options = None, ignore_index, chunk_size, dtype, False, False
        losses, *_ = _rows_op(input, linear_weight, target, *options)
        return losses
    needs_gradient = [torch.is_grad_enabled() and t.requires_grad for t in (input, linear_weight)]
    total, *_ = _sum_op(input, linear_weight, target, ignore_index, chunk_size, dtype, *needs_gradient)
    return reduce(total, target, ignore_index, reduction)


def linear_cross_entropy_reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_size: int | None = None,
) -> Tensor:
    """`linear_cross_entropy` by PyTorch. It computes all (N, V) logits at once and ignores `chunk_size`."""
    logits = F.linear(input, linear_weight)
    return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)


def chunk_rows(N: int, V: int, itemsize: int, memory: float | None = None) -> int:
    """Rows per chunk: N, or a multiple of 128. `memory` is the GPU's, in bytes."""
    budget = BUDGET if memory is None else min(BUDGET, int(memory) // SHARE)
    max_rows = max(128, budget // (-(-V // ALIGN) * ALIGN * itemsize) // 128 * 128)
    # Split into as few, equally large chunks as the budget allows.
    chunks = -(-N // max_rows)
    return N if chunks <= 1 else -(-N // chunks // 128) * 128


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Adds a @ b to the fp32 matrix `total`, or overwrites `total` if this is the `first` product."""
    if a.dtype == torch.float32 or not a.is_cuda:  # PyTorch has `out_dtype` on GPUs only
        total.addmm_(a.float(), b.float(), beta=0 if first else 1)
    elif first:
        torch.mm(a, b, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def _launch_rows(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    dlosses: Tensor | None,
    ignore_index: int,
    chunk_size: int | None,
    dtype: torch.dtype,
    needs_dinput: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> losses (N,) fp32, dinput, dweight in fp32. A gradient that is not needed is empty.

    The gradients are those of (losses * dlosses).sum() or, if dlosses is None, of losses.sum().
    """
    losses, dinput, dweight = _fake_rows(
        input, weight, target, dlosses, ignore_index, chunk_size, dtype, needs_dinput, needs_dweight
    )
    # Casting to `dtype` here makes autocast a no-op below.
    weight = weight.to(dtype)
    N, V = input.shape[0], weight.shape[0]
    check_range("linear_cross_entropy", target, V, ignore_index)
    rows = min(N, chunk_size or chunk_rows(N, V, dtype.itemsize, device_memory(input)))
    buffer = input.new_empty(rows, -(-V // ALIGN) * ALIGN, dtype=dtype)[:, :V]
    if not N:
        dweight.zero_()  # no chunk writes it
    for start in range(0, N, max(1, rows)):
        chunk = slice(start, start + rows)
        x = input[chunk].to(dtype)
        # The logits of all chunks share this memory, and their gradient overwrites them.
        logits = torch.mm(x, weight.t(), out=buffer[: len(x)])
        gradient = logits if needs_dinput or needs_dweight else None
        upstream = None if dlosses is None else dlosses[chunk]
        losses[chunk] = loss_and_gradient_(logits, target[chunk], ignore_index, gradient, upstream)
        if needs_dinput and dinput.dtype == dtype:
            torch.mm(logits, weight, out=dinput[chunk])
        elif needs_dinput:
            dinput[chunk] = torch.mm(logits, weight)
        if needs_dweight:
            add_product(dweight, logits.t(), x, first=start == 0)
    return losses, dinput, dweight


def _launch_sum(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    chunk_size: int | None,
    dtype: torch.dtype,
    needs_dinput: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> the sum of the losses () fp32, dinput, dweight in fp32. A gradient that is not needed is empty."""
    # The gradients here are those of the *sum* of the losses. `_backward_of_sum` multiplies them in fp32 by
    # the upstream gradient, which includes the 1 / N of a mean. In fp16, G / N would underflow.
    losses, dinput, dweight = _launch_rows(
        input, weight, target, None, ignore_index, chunk_size, dtype, needs_dinput, needs_dweight
    )
    return losses.sum(), dinput, dweight


def _fake_rows(input, weight, target, dlosses, ignore_index, chunk_size, dtype, needs_dinput, needs_dweight):
    losses = input.new_empty(input.shape[0], dtype=torch.float32)
    dinput = input.new_empty(input.shape if needs_dinput else 0)
    dweight = weight.new_empty(weight.shape if needs_dweight else 0, dtype=torch.float32)
    return losses, dinput, dweight


def _fake_sum(input, weight, target, *options):
    _, dinput, dweight = _fake_rows(input, weight, target, None, *options)
    return input.new_empty((), dtype=torch.float32), dinput, dweight


_sum_op = operator("linear_cross_entropy_sum", _launch_sum, _fake_sum)
_rows_op = operator("linear_cross_entropy_rows", _launch_rows, _fake_rows)
_rows_backward_op = operator("linear_cross_entropy_rows_backward", _launch_rows, _fake_rows)


def _setup_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.needs_gradient, ctx.weight_dtype = inputs[-2:], inputs[1].dtype
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)  # no gradients arrive for dinput and dweight: do not make zeros


def _backward_of_sum(ctx: Any, dtotal: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    dinput, dweight = ctx.saved_tensors
    needs_dinput, needs_dweight = ctx.needs_gradient
    return (
        _scaled(dinput, dtotal, dinput.dtype) if needs_dinput else None,
        _scaled(dweight, dtotal, ctx.weight_dtype) if needs_dweight else None,
        *(None,) * 6,
    )


def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x * factor, an fp32 scalar: computed in fp32 and rounded to `dtype`, in one pass over memory."""
    # PyTorch would round a 0-dim factor to x's dtype first. It does not round a tensor of one element.
    return torch.mul(x, factor.reshape(1), out=torch.empty_like(x, dtype=dtype))


# With reduction="none" every row has a different upstream gradient, which forward cannot know. So backward
# computes the logits of each chunk again.
def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, weight, target, _dlosses, *ctx.options, _needs_dinput, _needs_dweight = inputs
    ctx.save_for_backward(input, weight, target)


def _backward_of_rows(ctx: Any, dlosses: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    needs_dinput, needs_dweight = ctx.needs_input_grad[:2]
    _, dinput, dweight = _rows_backward_op(
        *ctx.saved_tensors, dlosses, *ctx.options, needs_dinput, needs_dweight
    )
    return (
        dinput if needs_dinput else None,
        dweight.to(ctx.saved_tensors[1].dtype) if needs_dweight else None,
        *(None,) * 7,
    )


_sum_op.register_autograd(_backward_of_sum, setup_context=_setup_sum)
_rows_op.register_autograd(_backward_of_rows, setup_context=_setup_rows)


def _inputs(
    dtype: torch.dtype, device: str, N: int, C: int, V: int, ignore_index: int = -100, **options: Any
) -> dict[str, Any]:
    return {
        "input": torch.randn(N, C, device=device).to(dtype),
        "linear_weight": (torch.randn(V, C, device=device) * C**-0.5).to(dtype),
        "target": random_target(N, V, device, ignore_index),
        "ignore_index": ignore_index,
        **options,
    }


def _cost(input: Tensor, linear_weight: Tensor, **_: Any) -> Cost:
    tensors = sum(t.numel() * t.element_size() for t in (input, linear_weight))
    product = 2 * input.numel() * linear_weight.shape[0]
    return Cost(tensors, 2 * tensors, product, 2 * product)


LINEAR_CROSS_ENTROPY = Op(
    name="linear_cross_entropy",
    family="cross_entropy",
    implementations={"triton": linear_cross_entropy, "torch": linear_cross_entropy_reference},
    make=_inputs,
    cost=_cost,
    samples=(
        {"N": 6, "C": 32, "V": 111, "chunk_size": 2, "reduction": "sum", "ignore_index": -1},
        {"N": 1, "C": 1, "V": 2},
        {"N": 7, "C": 59, "V": 65, "chunk_size": 3},
        {"N": 6, "C": 24, "V": 130, "chunk_size": 4, "reduction": "none"},
        {"N": 9, "C": 16, "V": 50, "ignore_index": 63},  # a column of the padding, which is 64 wide
        {"N": 4, "C": 8, "V": 5003, "chunk_size": 2},
        {"N": 0, "C": 8, "V": 50, "reduction": "sum"},
    ),
    # Forward launches one kernel for each of three chunks.
    launches=([*CROSS_ENTROPY.launches[0]] * 3, []),
    large_sample={"N": 2000, "C": 256, "V": 50257, "chunk_size": 512},
    benchmark_shapes=tuple(
        {"N": N, "C": C, "V": 50304} for N in (65536, 16384) for C in (768, 1024, 1280, 1600)
    ),
    production_shapes=(
        {"N": 65536, "C": 768, "V": 50304},
        {"N": 65536, "C": 768, "V": 50304, "reduction": "none"},
    ),
)
