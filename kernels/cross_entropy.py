# mypy: allow-untyped-defs, allow-incomplete-defs
# (a Triton kernel's arguments have no Python types)
"""Cross-entropy of logits against class indices.

    loss_i = logsumexp(logits_i) - logits_i[target_i]        0 where the target is `ignore_index`

Backward: dlogits_i = dloss_i * (softmax(logits_i) - one_hot(target_i)).

A program takes rows one by one: a first pass keeps a running maximum and sum of exponentials (online
softmax), a second writes the gradient while the row is still in the L2 cache, which is why there are few
programs. The public operation is functional: forward saves the log-sum-exp and backward reads the logits once
more. `loss_and_gradient_` writes the gradient over the logits, for a caller who owns them. It goes from the
last row to the first, because the last were written last and are in the cache.

A row of 50257 logits in half precision starts at any multiple of two bytes. So its interior is that between
its first and last 16-byte boundary, read and written 16 bytes at a time; the up to 14 bytes before and after
are its fringe. A private chunk is laid out without one.

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
    UNTUNED,
    Cost,
    Op,
    Slot,
    check_tensors,
    jit,
    launch,
    multiprocessors,
    operator,
    round_to,
    tiles_for,
    tl,
)

REDUCTIONS = ("mean", "sum", "none")
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def cross_entropy(
    input: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """`F.cross_entropy` of input (N, V) and target (N,) int64: () or, for "none", (N,).

    The loss is fp32 whatever the logits are, with or without autocast; their gradient has their dtype. The
    mean is over the targets that are not ignored: NaN when all of them are. A target that is no class and
    not `ignore_index` raises ValueError on a CPU and gives NaN on a GPU, where a check would wait for the
    GPU. torch's weight and label_smoothing are not accepted. Raises ValueError for what it cannot do.
    """
    check_tensors("cross_entropy", input=input)
    if input.dim() != 2 or input.shape[1] == 0:
        raise ValueError(f"cross_entropy: input {tuple(input.shape)} must be (N, V) with V at least 1")
    check_targets("cross_entropy", input, target, reduction)
    losses, _ = _forward_op(input, target, ignore_index)
    return losses if reduction == "none" else reduce(losses.sum(), target, ignore_index, reduction)


def cross_entropy_reference(
    input: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """`F.cross_entropy`: input (N, V) logits, target (N,) int64; the loss is () or, for "none", (N,).

    As torch has it, the mean is over the targets that are not ignored: NaN when all of them are.
    """
    return F.cross_entropy(input, target, ignore_index=ignore_index, reduction=reduction)


def reduce(total: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The sum of the losses, or their mean over the valid targets; the count stays on the device."""
    return total / (target != ignore_index).sum() if reduction == "mean" else total


def check_targets(name: str, input: Tensor, target: Tensor, reduction: str) -> None:
    """ValueError unless the arguments that cross_entropy and linear_cross_entropy share are right."""
    if target.shape != input.shape[:1] or target.dtype != torch.int64:
        raise ValueError(
            f"{name}: target is {tuple(target.shape)} {target.dtype}; "
            f"input {tuple(input.shape)} needs ({input.shape[0]},) torch.int64"
        )
    if target.device != input.device:
        raise ValueError(f"{name}: target is on {target.device} and input on {input.device}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction={reduction!r} must be one of {', '.join(REDUCTIONS)}")


@jit
def _columns(BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """0 to BLOCK - 1 as a tile whose rows are 16 bytes: what a thread reads at once."""
    return tl.arange(0, BLOCK // ALIGN)[:, None] * ALIGN + tl.arange(0, ALIGN)[None, :]


@jit
def _between(lead, end, ALIGN: tl.constexpr):
    """The columns lead to end from their first 16-byte boundary to their last: (first, last + 1)."""
    first = tl.where(lead > 0, ALIGN, 0)
    return first, tl.maximum(end // ALIGN * ALIGN, first)


@jit
def _fringe(lead, end, ALIGN: tl.constexpr):
    """(columns, which of them count): those before the first 16-byte boundary and after the last."""
    first, last = _between(lead, end, ALIGN)
    i = tl.arange(0, 2 * ALIGN)[None, :]
    col = tl.where(i < ALIGN, i, last + i - ALIGN)
    return col, (col < end) & tl.where(i < ALIGN, (col >= lead) & (col < first), True)


@jit
def _accumulate(x, top, total):
    """Adds a tile to its rows' maximum of x log2(e) and sum of 2^(x log2(e) - maximum)."""
    x = x.to(tl.float32)
    new = tl.maximum(top, tl.max(x, 1) * LOG2E)
    base = tl.where(new == -float("inf"), 0.0, new)  # of -inf alone: 2^(-inf - -inf) would be NaN
    # One instruction, x * LOG2E - base. The rounding of base does not matter: all terms share it.
    return new, total * tl.exp2(top - base) + tl.sum(tl.exp2(x * LOG2E - base[:, None]), 1)


@jit
def _log2sum(X, lead, end, BLOCK: tl.constexpr, ALIGN: tl.constexpr, FRINGE: tl.constexpr):
    """log2 of the sum of exponentials of the row in columns lead to end of X.

    A thread keeps the maximum and the sum of what it reads: nothing waits for other threads in the loop.
    """
    col = _columns(BLOCK, ALIGN)
    top = tl.full((BLOCK // ALIGN,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK // ALIGN,), tl.float32)
    first, last = 0, end
    if FRINGE:
        first, last = _between(lead, end, ALIGN)
        at, is_fringe = _fringe(lead, end, ALIGN)
        fringe = tl.load(X + at, mask=is_fringe, other=-float("inf"))
        nothing = tl.full((1,), -float("inf"), tl.float32)
        zero = tl.zeros((1,), tl.float32)
        fringe_top, fringe_total = _accumulate(fringe, nothing, zero)
        here = tl.arange(0, BLOCK // ALIGN) == 0
        top = tl.maximum(top, tl.max(fringe_top, 0))
        total = tl.where(here, tl.sum(fringe_total, 0), total)
    rest = first + (last - first) // BLOCK * BLOCK
    for start in range(first, rest, BLOCK):
        x = tl.load(X + start + col)
        top, total = _accumulate(x, top, total)
    if rest < last:
        x = tl.load(X + rest + col, mask=rest + col < last, other=-float("inf"))
        top, total = _accumulate(x, top, total)
    highest = tl.max(top, 0)
    base = tl.where(highest == -float("inf"), 0.0, highest)
    return highest + tl.log2(tl.sum(total * tl.exp2(top - base), 0))


@jit
def _write(X, DX, col, inside, log2sum, g, ZERO: tl.constexpr):
    """A tile of g softmax, or of zeros: also where the logits are NaN."""
    if ZERO:
        dx = tl.zeros(col.shape, tl.float32)
    else:
        x = tl.load(X + col, mask=inside).to(tl.float32)
        dx = g * tl.exp2(x * LOG2E - log2sum)
    tl.store(DX + col, round_to(dx, DX.dtype.element_ty), mask=inside)


@jit
def _rows_gradient(
    X,
    DX,
    lead,
    end,
    log2sum,
    g,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    FRINGE: tl.constexpr,
    ZERO: tl.constexpr,
):
    col = _columns(BLOCK, ALIGN)
    first, last = 0, end
    if FRINGE:
        first, last = _between(lead, end, ALIGN)
        at, is_fringe = _fringe(lead, end, ALIGN)
        _write(X, DX, at, is_fringe, log2sum, g, ZERO)
    rest = first + (last - first) // BLOCK * BLOCK
    for start in range(first, rest, BLOCK):
        _write(X, DX, start + col, None, log2sum, g, ZERO)
    if rest < last:
        _write(X, DX, rest + col, rest + col < last, log2sum, g, ZERO)


@jit
def _gradient(
    X,
    DX,
    lead,
    end,
    hot,
    valid,
    x_target,
    log2sum,
    nothing,
    g,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    FRINGE: tl.constexpr,
):
    """A row's gradient for the upstream gradient g: zeros where that is `nothing`, NaN logits or not.

    The target, in column `hot`, is set right afterwards: a comparison for every element would cost more.
    """
    tl.debug_barrier()  # every warp has read its part of the row, and the target's logit
    if nothing:
        _rows_gradient(X, DX, lead, end, log2sum, g, BLOCK, ALIGN, FRINGE, True)
    else:
        _rows_gradient(X, DX, lead, end, log2sum, g, BLOCK, ALIGN, FRINGE, False)
        tl.debug_barrier()  # the target's column is written twice, by different warps
        dx = g * (tl.exp2(x_target * LOG2E - log2sum) - 1)
        tl.store(DX + hot, round_to(dx, DX.dtype.element_ty), mask=valid)


@jit
def _loss_kernel(
    X,  # (rows, V) in
    TARGET,  # (rows,) in, int64
    LOSS,  # (rows,) out, fp32
    LSE,  # (rows,) out, fp32; 0 for an ignored row
    DX,  # X itself, out: its gradient for dloss = 1 takes its place; or None
    rows,
    V,
    x_stride,
    target_stride,
    ignore_index,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    FRINGE: tl.constexpr,
):
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.zeros((), tl.int64) + (rows - 1 - i)
        aligned = row * x_stride // ALIGN * ALIGN
        lead = (row * x_stride - aligned).to(tl.int32)
        x, end = X + aligned, lead + V
        target = tl.load(TARGET + row * target_stride)
        ignored = target == ignore_index
        valid = (target >= 0) & (target < V) & (target != ignore_index)
        # Read before the gradient takes its place. A target out of range poisons the loss and the gradient.
        x_target = tl.load(x + lead + target, mask=valid, other=float("nan")).to(tl.float32)
        log2sum = tl.where(ignored, 0.0, float("nan"))
        if valid:
            log2sum = _log2sum(x, lead, end, BLOCK, ALIGN, FRINGE)
        lse = log2sum * LN2
        tl.store(LOSS + row, tl.where(ignored, 0.0, lse - x_target))
        tl.store(LSE + row, lse)
        if DX is not None:
            _gradient(
                x, DX + aligned, lead, end, lead + target, valid, x_target, log2sum, ignored, 1.0,
                BLOCK, ALIGN, FRINGE,
            )  # fmt: skip


@jit
def _gradient_kernel(
    X,  # (rows, V) in
    TARGET,  # (rows,) in, int64
    LSE,  # (rows,) in, fp32
    DLOSS,  # (rows,) in
    DX,  # (rows, V) out; X itself is allowed
    rows,
    V,
    x_stride,
    dx_stride,
    target_stride,
    dloss_stride,
    ignore_index,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    FRINGE: tl.constexpr,
    SAME_STRIDE: tl.constexpr,
    LAST_FIRST: tl.constexpr,
):
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.zeros((), tl.int64) + (rows - 1 - i if LAST_FIRST else i)
        aligned = row * x_stride // ALIGN * ALIGN
        lead = (row * x_stride - aligned).to(tl.int32)
        x, end = X + aligned, lead + V
        dx = DX + (aligned if SAME_STRIDE else row * dx_stride - lead)
        target = tl.load(TARGET + row * target_stride)
        valid = (target >= 0) & (target < V)
        x_target = tl.load(x + lead + target, mask=valid, other=0).to(tl.float32)
        g = tl.load(DLOSS + row * dloss_stride).to(tl.float32)
        log2sum = tl.load(LSE + row) * LOG2E
        _gradient(
            x, dx, lead, end, lead + target, valid, x_target, log2sum, (target == ignore_index) | (g == 0), g,
            BLOCK, ALIGN, FRINGE,
        )  # fmt: skip


# Widest row -> (BLOCK, warps, programs a multiprocessor). A program has one row in flight, and the rows of
# all resident programs must stay in the L2 cache until they are read again: 26 MB of 50304 columns in half
# precision with two programs on each of 132 multiprocessors, 34 MB of 128256 with one.
A_ROW_EACH = 1024  # programs a multiprocessor: a grid of one program a row, up to 135,168 rows
_UNTUNED = {2048: (1024, 4, 16), 65536: (16384, 16, 2), sys.maxsize: (16384, 32, 1)}
TILES = {
    INTERPRETER: {2048: (32, 1, 1), 65536: (4096, 1, 1), sys.maxsize: (4096, 1, 1)},
    UNTUNED: _UNTUNED,
    90: _UNTUNED | {65536: (32768, 32, A_ROW_EACH)},  # tuned on H200, V=50304, 8192 rows in place
}


def _width(V: int) -> int:
    """The key of V columns in a table of tiles."""
    return next(widest for widest in _UNTUNED if widest >= V)


def _plan(logits: Tensor, *outputs: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """The grid, and the constants that both kernels share."""
    N, V = logits.shape
    block, warps, programs = tiles_for(logits, TILES)[_width(V)]
    align = 16 // logits.element_size()
    fringe = any(n % align for n in (V, *(t.stride(0) for t in (logits, *outputs))))
    constants = {"BLOCK": block, "ALIGN": align, "FRINGE": fringe, "num_warps": warps}
    return (min(N, programs * multiprocessors(logits)),), constants


def loss_and_gradient_(
    logits: Tensor, target: Tensor, ignore_index: int, gradient: bool
) -> tuple[Tensor, Tensor]:
    """(N, V) logits -> losses and log-sum-exps, both (N,) fp32 and 0 where the target is ignored.

    With `gradient`, that of the sum of the losses is written over the logits.
    """
    losses, lse = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))
    _check_range(target, logits.shape[1], ignore_index)
    grid, constants = _plan(logits)
    if logits.shape[0]:
        launch(
            _loss_kernel, grid,
            logits, target, losses, lse, logits if gradient else None,
            *logits.shape, logits.stride(0), target.stride(0), ignore_index, **constants,
        )  # fmt: skip
    return losses, lse


def write_gradient(
    dlosses: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int, out: Tensor
) -> None:
    """The gradient of the logits for upstream `dlosses` (N,), into `out` (N, V), which may be the logits."""
    grid, constants = _plan(logits, out)
    if logits.shape[0]:
        launch(
            _gradient_kernel, grid,
            logits, target, lse, dlosses, out,
            *logits.shape, logits.stride(0), out.stride(0), target.stride(0), dlosses.stride(0),
            ignore_index, SAME_STRIDE=logits.stride(0) == out.stride(0),
            # Logits of which these are the gradient's memory were just formed, and the last rows last; else
            # the loss was the last to read them, and the first rows last.
            LAST_FIRST=out is logits, **constants,
        )  # fmt: skip


def _check_range(target: Tensor, V: int, ignore_index: int) -> None:
    """On a CPU, where it costs no synchronisation; a GPU answers a target out of range with NaN."""
    if target.device.type == "cpu":
        wrong = target[(target != ignore_index) & ((target < 0) | (target >= V))]
        if wrong.numel():
            raise ValueError(
                f"cross_entropy: target {int(wrong[0])} is neither a class from 0 to {V - 1} "
                f"nor ignore_index {ignore_index}"
            )


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _launch_forward(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    return loss_and_gradient_(_rows(logits), target, ignore_index, gradient=False)


def _launch_backward(
    dlosses: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int
) -> Tensor:
    dlogits = logits.new_empty(logits.shape)
    write_gradient(dlosses, _rows(logits), target, lse, ignore_index, out=dlogits)
    return dlogits


def _fake_forward(logits, target, ignore_index):
    return tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))


def _fake_backward(dlosses, logits, target, lse, ignore_index):
    return logits.new_empty(logits.shape)


_forward_op = operator("cross_entropy", _launch_forward, _fake_forward)
_backward_op = operator("cross_entropy_backward", _launch_backward, _fake_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, target, output[1])
    ctx.set_materialize_grads(False)  # the log-sum-exps have no gradient: don't fill one with zeros


def _backward(ctx: Any, dlosses: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return _backward_op(dlosses, *ctx.saved_tensors, ctx.ignore_index), None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def random_target(N: int, V: int, device: str, ignore_index: int) -> Tensor:
    """Random classes, a third of them ignored."""
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


def _run_all(input, target, ignore_index=-100, **_):
    losses, lse = _launch_forward(input, target, ignore_index)
    _launch_backward(losses, input, target, lse, ignore_index)


def _slots(input: Tensor, **_: Any) -> Iterator[Slot]:
    if input.shape[1] <= 2048:
        return
    sizes = product((4096, 8192, 16384, 32768), (4, 8, 16, 32), (1, 2, 3, 4, A_ROW_EACH))
    tiles = tuple(
        (block, warps, programs)
        for block, warps, programs in sizes
        if 8 <= block // (32 * warps) <= 32 and (programs == A_ROW_EACH or 16 <= warps * programs <= 64)
    )
    yield Slot("(BLOCK, warps, programs)", tiles_for(input, TILES), _width(input.shape[1]), tiles)


CROSS_ENTROPY = Op(
    name="cross_entropy",
    family="cross_entropy",
    implementations={"triton": cross_entropy, "torch": cross_entropy_reference},
    reference=cross_entropy_reference,
    make=_inputs,
    cost=_cost,
    run_all=_run_all,
    samples=(
        {"N": 7, "V": 65, "reduction": "none", "ignore_index": -1},
        {"N": 1, "V": 1},
        {"N": 5, "V": 2, "reduction": "sum"},
        {"N": 4, "V": 128},
        {"N": 3, "V": 333, "reduction": "none"},
        {"N": 4, "V": 9001},
        {"N": 3, "V": 8208, "reduction": "sum"},
    ),
    launches=([_loss_kernel], [_gradient_kernel]),
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
