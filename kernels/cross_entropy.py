# mypy: allow-untyped-defs, allow-incomplete-defs
# (a Triton kernel's arguments have no Python types)
"""Cross-entropy of logits against class indices.

Forward, for row i:

    lse_i = logsumexp(logits_i)
    loss_i = lse_i - logits_i[target_i]        or 0 if the target is `ignore_index`

Backward, from the upstream gradient dloss:

    dlogits_i = dloss_i * (softmax(logits_i) - one_hot(target_i))

One kernel does both. It reads a row for lse and the loss, and then again, from the L2 cache, for the
gradient. linear_cross_entropy.py lets it write the gradient over the logits. The backward pass of
`cross_entropy` runs it a second time and computes lse again.

Source: Milakov and Gimelshein, 2018, https://arxiv.org/abs/1805.02867 (online softmax)
"""

import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.op import (
    INTERPRETER,
    LOG2E,
    UNTUNED,
    Cost,
    Op,
    Slot,
    check_tensors,
    jit,
    key_for,
    launch,
    multiprocessors,
    operator,
    round_to,
    tiles_for,
    tl,
)

REDUCTIONS = ("mean", "sum", "none")
LN2 = tl.constexpr(0.6931471805599453)


def cross_entropy(
    input: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """`F.cross_entropy` of input (N, V) and target (N,) int64 -> () or, for "none", (N,).

    The loss is always fp32; the gradient has the dtype of input. The mean is over the targets that are not
    ignored, and NaN if all are. A target that is neither a class nor `ignore_index` raises ValueError on a
    CPU. On a GPU, where a check would have to wait for the GPU, it makes the loss and its gradient NaN.
    PyTorch's weight and label_smoothing are not supported. Raises ValueError for bad arguments.
    """
    check_tensors("cross_entropy", input=input)
    if input.dim() != 2 or input.shape[1] == 0:
        raise ValueError(f"cross_entropy: input {tuple(input.shape)} must be (N, V) with V at least 1")
    check_targets("cross_entropy", input, target, reduction)
    losses = _forward_op(input, target, ignore_index)
    return losses if reduction == "none" else reduce(losses.sum(), target, ignore_index, reduction)


def reduce(total: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """`total`, or the mean over the targets that are not ignored. Their count stays on the GPU."""
    return total / (target != ignore_index).sum() if reduction == "mean" else total


def check_targets(name: str, input: Tensor, target: Tensor, reduction: str) -> None:
    """Raises ValueError unless target and reduction fit. Shared with linear_cross_entropy."""
    if target.shape != input.shape[:1] or target.dtype != torch.int64:
        raise ValueError(
            f"{name}: target is {tuple(target.shape)} {target.dtype}; "
            f"input {tuple(input.shape)} needs ({input.shape[0]},) torch.int64"
        )
    if target.device != input.device:
        raise ValueError(f"{name}: target is on {target.device} and input on {input.device}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction={reduction!r} must be one of {', '.join(REDUCTIONS)}")


# A GPU is fastest when each thread loads 16 bytes from a 16-byte boundary. But a row of 50257 logits in half
# precision may start at any multiple of 2 bytes. So X points to the boundary at or before the row, and the
# row has the columns from `lead` to `end` - 1. Its interior, from the first to the last boundary inside the
# row, is read in tiles of BLOCK columns. Its fringe, up to 14 bytes at either end, is read separately. ALIGN
# is the number of elements in 16 bytes. Rows that all start and end on a boundary have lead = 0 and FRINGE =
# False.
@jit
def _columns(BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """0 to BLOCK - 1 as (BLOCK // ALIGN, ALIGN): a thread loads one or more rows of the tile."""
    return tl.arange(0, BLOCK // ALIGN)[:, None] * ALIGN + tl.arange(0, ALIGN)[None, :]


@jit
def _interior(lead, end, ALIGN: tl.constexpr):
    """The columns of the interior: (first, last + 1)."""
    start = tl.where(lead > 0, ALIGN, 0)
    return start, tl.maximum(end // ALIGN * ALIGN, start)


@jit
def _fringe(lead, end, ALIGN: tl.constexpr):
    """The columns of the fringe, and a mask: (1, 2 * ALIGN) each."""
    start, stop = _interior(lead, end, ALIGN)
    i = tl.arange(0, 2 * ALIGN)[None, :]
    col = tl.where(i < ALIGN, i, stop + i - ALIGN)
    return col, (col < end) & tl.where(i < ALIGN, (col >= lead) & (col < start), True)


@jit
def _accumulate(x, m_i, l_i):
    """Adds a tile to m_i = max(x LOG2E) and l_i = sum(2^(x LOG2E - m_i)) of each of its rows."""
    # Online softmax: when the maximum grows to m_ij, the old sum times 2^(m_i - m_ij) is relative to m_ij.
    x = x.to(tl.float32)
    m_ij = tl.maximum(m_i, tl.max(x, 1) * LOG2E)
    # Logits may be -inf. If all so far are, subtract 0, because -inf - -inf is NaN.
    base = tl.where(m_ij == -float("inf"), 0.0, m_ij)
    # x * LOG2E - base is one instruction. The rounding error of base cancels, because all terms share it.
    return m_ij, l_i * tl.exp2(m_i - base) + tl.sum(tl.exp2(x * LOG2E - base[:, None]), 1)


@jit
def _lse2(X, lead, end, BLOCK: tl.constexpr, ALIGN: tl.constexpr, FRINGE: tl.constexpr):
    """The log-sum-exp of a row in base 2: log2(sum(exp(x)))."""
    col = _columns(BLOCK, ALIGN)
    # Each row of the tile has a separate maximum and sum, so threads do not wait for each other in the loop.
    m_i = tl.full((BLOCK // ALIGN,), -float("inf"), tl.float32)
    l_i = tl.zeros((BLOCK // ALIGN,), tl.float32)
    start, stop = 0, end
    if FRINGE:
        start, stop = _interior(lead, end, ALIGN)
        fringe, mask = _fringe(lead, end, ALIGN)
        x_fringe = tl.load(X + fringe, mask=mask, other=-float("inf"))
        fringe_m = tl.full((1,), -float("inf"), tl.float32)
        fringe_m, fringe_l = _accumulate(x_fringe, fringe_m, tl.zeros((1,), tl.float32))
        # Add the fringe to row 0. The other rows may have a maximum that is too large.
        m_i = tl.maximum(m_i, tl.max(fringe_m, 0))
        l_i = tl.where(tl.arange(0, BLOCK // ALIGN) == 0, tl.sum(fringe_l, 0), l_i)
    tail = start + (stop - start) // BLOCK * BLOCK
    for first in range(start, tail, BLOCK):
        x = tl.load(X + first + col)
        m_i, l_i = _accumulate(x, m_i, l_i)
    if tail < stop:
        x = tl.load(X + tail + col, mask=tail + col < stop, other=-float("inf"))
        m_i, l_i = _accumulate(x, m_i, l_i)
    m = tl.max(m_i, 0)
    base = tl.where(m == -float("inf"), 0.0, m)
    return m + tl.log2(tl.sum(l_i * tl.exp2(m_i - base), 0))


@jit
def _write_tile(X, DX, col, mask, lse2, g, ZERO: tl.constexpr):
    """Writes g * softmax or, if ZERO, zeros without reading X, which may be NaN."""
    if ZERO:
        dx = tl.zeros(col.shape, tl.float32)
    else:
        x = tl.load(X + col, mask=mask).to(tl.float32)
        dx = g * tl.exp2(x * LOG2E - lse2)
    tl.store(DX + col, round_to(dx, DX.dtype.element_ty), mask=mask)


@jit
def _write_row(
    X,
    DX,
    lead,
    end,
    lse2,
    g,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    FRINGE: tl.constexpr,
    ZERO: tl.constexpr,
):
    col = _columns(BLOCK, ALIGN)
    start, stop = 0, end
    if FRINGE:
        start, stop = _interior(lead, end, ALIGN)
        fringe, mask = _fringe(lead, end, ALIGN)
        _write_tile(X, DX, fringe, mask, lse2, g, ZERO)
    tail = start + (stop - start) // BLOCK * BLOCK
    for first in range(start, tail, BLOCK):
        _write_tile(X, DX, first + col, None, lse2, g, ZERO)
    if tail < stop:
        _write_tile(X, DX, tail + col, tail + col < stop, lse2, g, ZERO)


@jit
def _gradient(
    X,
    DX,
    lead,
    end,
    target_col,
    valid,
    x_target,
    lse2,
    is_zero,
    g,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    FRINGE: tl.constexpr,
):
    """Writes a row's gradient, g * (softmax - one_hot), or zeros if `is_zero`."""
    # DX may be X. Wait until every warp has read its part of the row and the target's logit.
    tl.debug_barrier()
    if is_zero:
        _write_row(X, DX, lead, end, lse2, g, BLOCK, ALIGN, FRINGE, True)
    else:
        # First g * softmax in every column, then the target's column again: to compare each column with the
        # target would cost more. Different warps write that column, so the second write waits for the first.
        _write_row(X, DX, lead, end, lse2, g, BLOCK, ALIGN, FRINGE, False)
        tl.debug_barrier()
        dx = g * (tl.exp2(x_target * LOG2E - lse2) - 1)
        tl.store(DX + target_col, round_to(dx, DX.dtype.element_ty), mask=valid)


# The gradient overwrites the logits, so the largest tensor of a training step is not allocated twice. Each
# program writes it right after the loss, while the row is still in the L2 cache.
@jit
def _loss_kernel(
    X,  # (rows, V) in
    TARGET,  # (rows,) in, int64
    DLOSS,  # (rows,) in, or None if all are 1
    LOSS,  # (rows,) out, fp32; 0 for an ignored row
    DX,  # (rows, V) out, with the strides of X; may be X; or None
    rows,
    V,
    x_stride,
    target_stride,
    dloss_stride,
    ignore_index,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    FRINGE: tl.constexpr,
):
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        # Start with the last row: the matrix product wrote it last, so it is still in the L2 cache.
        row = tl.zeros((), tl.int64) + (rows - 1 - i)
        aligned = row * x_stride // ALIGN * ALIGN
        lead = (row * x_stride - aligned).to(tl.int32)
        x, end = X + aligned, lead + V
        target = tl.load(TARGET + row * target_stride)
        ignored = target == ignore_index
        valid = (target >= 0) & (target < V) & (target != ignore_index)
        # Read this logit before the gradient overwrites it. A target out of range makes both results NaN.
        x_target = tl.load(x + lead + target, mask=valid, other=float("nan")).to(tl.float32)
        lse2 = tl.where(ignored, 0.0, float("nan"))
        if valid:
            lse2 = _lse2(x, lead, end, BLOCK, ALIGN, FRINGE)
        tl.store(LOSS + row, tl.where(ignored, 0.0, lse2 * LN2 - x_target))
        if DX is not None:
            g = 1.0
            is_zero = ignored
            if DLOSS is not None:
                g = tl.load(DLOSS + row * dloss_stride).to(tl.float32)
                is_zero = ignored | (g == 0)
            _gradient(
                x, DX + aligned, lead, end, lead + target, valid, x_target, lse2, is_zero, g,
                BLOCK, ALIGN, FRINGE,
            )  # fmt: skip


# Widest row -> (BLOCK, warps, programs per multiprocessor). Each program works on one row, and the rows of
# all running programs must stay in the L2 cache until they are read again. In half precision, 50304 columns
# with two programs on each of 132 multiprocessors are 26 MB, and 128256 columns with one program 34 MB.
A_ROW_EACH = 1024  # programs per multiprocessor, so that up to 135,168 rows have one program each
_UNTUNED = {2048: (1024, 4, 16), 65536: (16384, 16, 2), sys.maxsize: (16384, 32, 1)}
TILES = {
    INTERPRETER: {2048: (32, 1, 1), 65536: (4096, 1, 1), sys.maxsize: (4096, 1, 1)},
    UNTUNED: _UNTUNED,
    90: _UNTUNED | {65536: (32768, 32, A_ROW_EACH)},  # tuned on H200, V=50304, 8192 rows in place
}


def loss_and_gradient_(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    gradient: Tensor | None,
    dlosses: Tensor | None = None,
) -> Tensor:
    """(N, V) logits -> losses (N,), fp32, and 0 for an ignored target.

    Into `gradient` it writes the gradient of (losses * dlosses).sum() or, without dlosses (N,), of
    losses.sum(). `gradient` has the strides of logits. If it is logits, they are overwritten.
    """
    N, V = logits.shape
    losses = logits.new_empty(N, dtype=torch.float32)
    tiles = tiles_for(logits, TILES)
    block, warps, programs = tiles[key_for(tiles, V)]
    align = 16 // logits.element_size()
    if N:
        launch(
            _loss_kernel, (min(N, programs * multiprocessors(logits)),),
            logits, target, dlosses, losses, gradient, N, V, logits.stride(0), target.stride(0),
            0 if dlosses is None else dlosses.stride(0), ignore_index, BLOCK=block, ALIGN=align,
            FRINGE=V % align > 0 or logits.stride(0) % align > 0, num_warps=warps,
        )  # fmt: skip
    return losses


def check_range(name: str, target: Tensor, V: int, ignore_index: int) -> None:
    """Raises ValueError for a target out of range on a CPU. On a GPU the check would synchronise."""
    if target.device.type == "cpu":
        invalid = target[(target != ignore_index) & ((target < 0) | (target >= V))]
        if invalid.numel():
            raise ValueError(
                f"{name}: target {int(invalid[0])} is neither a class from 0 to {V - 1} "
                f"nor ignore_index {ignore_index}"
            )


def _launch_forward(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    check_range("cross_entropy", target, logits.shape[1], ignore_index)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    return loss_and_gradient_(logits, target, ignore_index, gradient=None)


def _launch_backward(dlosses: Tensor, logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    dlogits = logits.new_empty(logits.shape)
    loss_and_gradient_(logits.contiguous(), target, ignore_index, dlogits, dlosses)
    return dlogits


def _fake_forward(logits, target, ignore_index):
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def _fake_backward(dlosses, logits, target, ignore_index):
    return logits.new_empty(logits.shape)


_forward_op = operator("cross_entropy", _launch_forward, _fake_forward)
_backward_op = operator("cross_entropy_backward", _launch_backward, _fake_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, target, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, target)


def _backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
    return _backward_op(dlosses, *ctx.saved_tensors, ctx.ignore_index), None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def random_target(N: int, V: int, device: str, ignore_index: int) -> Tensor:
    """Random classes, with a third of the targets ignored."""
    target = torch.randint(V, (N,), device=device)
    target[1::3] = ignore_index
    return target


def _inputs(
    dtype: torch.dtype, device: str, N: int, V: int, ignore_index: int = -100, **options: Any
) -> dict[str, Any]:
    logits = (torch.randn(N, V, device=device) * 2).to(dtype)
    target = random_target(N, V, device, ignore_index)
    return {"input": logits, "target": target, "ignore_index": ignore_index, **options}


def _cost(input: Tensor, **_: Any) -> Cost:
    tensor = input.numel() * input.element_size()
    return Cost(tensor, 2 * tensor, 4 * input.numel(), 4 * input.numel())


def _slots(input: Tensor, **_: Any) -> Iterator[Slot]:
    if input.shape[1] <= 2048:
        return
    sizes = product((4096, 8192, 16384, 32768), (4, 8, 16, 32), (1, 2, 3, 4, A_ROW_EACH))
    tiles = tuple(
        (block, warps, programs)
        for block, warps, programs in sizes
        if 8 <= block // (32 * warps) <= 32 and (programs == A_ROW_EACH or 16 <= warps * programs <= 64)
    )
    table = tiles_for(input, TILES)
    yield Slot("(BLOCK, warps, programs)", table, key_for(table, input.shape[1]), tiles)


CROSS_ENTROPY = Op(
    name="cross_entropy",
    family="cross_entropy",
    implementations={"triton": cross_entropy, "torch": F.cross_entropy},
    make=_inputs,
    cost=_cost,
    samples=(
        {"N": 7, "V": 65, "reduction": "none", "ignore_index": -1},
        {"N": 1, "V": 1},
        {"N": 5, "V": 2, "reduction": "sum"},
        {"N": 4, "V": 128},
        {"N": 3, "V": 333, "reduction": "none"},
        {"N": 4, "V": 9001},
        {"N": 3, "V": 8208, "reduction": "sum"},
        {"N": 0, "V": 65, "reduction": "sum"},
    ),
    launches=([_loss_kernel], [_loss_kernel]),
    large_sample={"N": 2048, "V": 50257},
    benchmark_shapes=tuple({"N": N, "V": V} for N in (8192, 32768) for V in (50304, 50257, 128256)),
    production_shapes=(
        {"N": 8192, "V": 50304},
        {"N": 8192, "V": 256},
        {"N": 8192, "V": 50257},
        {"N": 8192, "V": 50304, "dtype": torch.float32},
        {"N": 8192, "V": 128256},
    ),
    slots=_slots,
)
