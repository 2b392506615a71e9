# mypy: allow-untyped-defs, allow-incomplete-defs
# (a Triton kernel's arguments have no Python types)
"""Cross-entropy of logits against class indices.

    loss_i = logsumexp(logits_i) - logits_i[target_i]        with label smoothing s, the target is
    (1 - s) one_hot(target_i) + s / V; rows whose target is `ignore_index` count for nothing

Backward: dlogits_i = dloss_i * (softmax(logits_i) - (1 - s) one_hot(target_i) - s / V).

One program a row: a first pass keeps a running maximum and sum of exponentials (online softmax), a second
writes the gradient while the row is still in cache. The public operation is functional: forward saves the
log-sum-exp and backward reads the logits once more. `loss_and_gradient_` writes the gradient over the
logits, for a caller who owns them. Rows go from the last to the first, because the last were written last
and are in the L2 cache.

A row of 50257 logits in half precision starts at any multiple of two bytes. So a row is read in blocks from
the 16-byte boundary at or before its start; only the first and the last block need a mask, and all the
others are read and written 16 bytes at a time.

Source: Milakov and Gimelshein, 2018, https://arxiv.org/abs/1805.02867 (online softmax)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.op import INTERPRETER, Cost, Op, architecture, check_tensors, jit, launch, round_to, tl

REDUCTIONS = ("mean", "sum", "none")
LOG2E = tl.constexpr(1.4426950408889634)


def cross_entropy_reference(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`F.cross_entropy`: input (N, V) logits, target (N,) int64; the loss is () or, for "none", (N,).

    As torch has it, the mean is over the targets that are not ignored: NaN when all of them are.
    """
    return F.cross_entropy(
        input, target, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )


@jit
def _load(X, col, lead, end, EDGE: tl.constexpr):
    mask = (col >= lead) & (col < end)
    x = tl.load(X + col, mask=mask, other=-float("inf")) if EDGE else tl.load(X + col)
    return x.to(tl.float32)


@jit
def _accumulate(x, col, lead, end, top, total, plain, SMOOTH: tl.constexpr):
    """Adds a block to (running maximum, sum of exp(x - maximum), sum of x)."""
    new = tl.maximum(top, tl.max(x, 0))
    base = tl.where(new == -float("inf"), 0.0, new)  # a block of -inf alone: exp(-inf - -inf) would be NaN
    total = total * tl.exp2((top - base) * LOG2E) + tl.sum(tl.exp2((x - base) * LOG2E), 0)
    if SMOOTH:
        plain += tl.sum(tl.where((col >= lead) & (col < end), x, 0.0), 0)
    return new, total, plain


@jit
def _statistics(X, lead, end, BLOCK: tl.constexpr, SMOOTH: tl.constexpr):
    """(log-sum-exp, sum) of the row in columns lead to end of X."""
    col = tl.arange(0, BLOCK)
    last = (end - 1) // BLOCK * BLOCK
    x = _load(X, col, lead, end, True)
    top, total, plain = _accumulate(x, col, lead, end, -float("inf"), 0.0, 0.0, SMOOTH)
    for start in range(BLOCK, last, BLOCK):
        x = _load(X, start + col, lead, end, False)
        top, total, plain = _accumulate(x, start + col, lead, end, top, total, plain, SMOOTH)
    if last > 0:
        x = _load(X, last + col, lead, end, True)
        top, total, plain = _accumulate(x, last + col, lead, end, top, total, plain, SMOOTH)
    return top + tl.log(total), plain


@jit
def _write(X, DX, col, lead, end, hot, lse, g, keep, smooth, EDGE: tl.constexpr):
    """One block of the gradient; `hot` is the target's column, `keep` and `smooth` are 1 - s and s / V."""
    p = tl.exp2((_load(X, col, lead, end, EDGE) - lse) * LOG2E)
    dx = tl.where(g == 0, 0.0, g * (p - tl.where(col == hot, keep, 0.0) - smooth))
    if EDGE:
        tl.store(DX + col, round_to(dx, DX.dtype.element_ty), mask=(col >= lead) & (col < end))
    else:
        tl.store(DX + col, round_to(dx, DX.dtype.element_ty))


@jit
def _gradient(X, DX, lead, end, hot, lse, g, smoothing, BLOCK: tl.constexpr):
    col = tl.arange(0, BLOCK)
    last = (end - 1) // BLOCK * BLOCK
    keep = 1 - smoothing
    smooth = smoothing / (end - lead)
    _write(X, DX, col, lead, end, hot, lse, g, keep, smooth, True)
    for start in range(BLOCK, last, BLOCK):
        _write(X, DX, start + col, lead, end, hot, lse, g, keep, smooth, False)
    if last > 0:
        _write(X, DX, last + col, lead, end, hot, lse, g, keep, smooth, True)


@jit
def _loss_kernel(
    X,  # (N, V) in
    TARGET,  # (N,) in, int64
    LOSS,  # (N,) out, fp32
    LSE,  # (N,) out, fp32
    DX,  # X itself, out: its gradient for dloss = 1 takes its place; or None
    V,
    x_stride,
    target_stride,
    ignore_index,
    smoothing,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    aligned = row * x_stride // ALIGN * ALIGN
    lead = (row * x_stride - aligned).to(tl.int32)
    target = tl.load(TARGET + row * target_stride)
    ignored = target == ignore_index
    valid = (target >= 0) & (target < V)
    # Read before the gradient takes its place. A target out of range poisons the loss and the gradient.
    x_target = tl.load(X + row * x_stride + target, mask=valid, other=float("nan")).to(tl.float32)
    lse, plain = _statistics(X + aligned, lead, lead + V, BLOCK, SMOOTH)
    lse = tl.where(valid | ignored, lse, float("nan"))
    loss = lse - x_target
    if SMOOTH:
        loss = (1 - smoothing) * loss + smoothing * (lse - plain / V)
    tl.store(LOSS + row, tl.where(ignored, 0.0, loss))
    tl.store(LSE + row, lse)
    if DX is not None:
        g = tl.where(ignored, 0.0, 1.0)
        tl.debug_barrier()  # every warp has read its part of the row, and the target's logit
        hot = lead + target.to(tl.int32)
        _gradient(X + aligned, DX + aligned, lead, lead + V, hot, lse, g, smoothing, BLOCK)


@jit
def _gradient_kernel(
    X,  # (N, V) in
    TARGET,  # (N,) in, int64
    LSE,  # (N,) in, fp32
    DLOSS,  # (N,) in
    DX,  # (N, V) out; X itself is allowed
    V,
    x_stride,
    dx_stride,
    target_stride,
    dloss_stride,
    ignore_index,
    smoothing,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    SAME_STRIDE: tl.constexpr,
):
    row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    aligned = row * x_stride // ALIGN * ALIGN
    lead = (row * x_stride - aligned).to(tl.int32)
    dx_aligned = aligned if SAME_STRIDE else row * dx_stride - lead
    target = tl.load(TARGET + row * target_stride)
    g = tl.load(DLOSS + row * dloss_stride).to(tl.float32)
    g = tl.where(target == ignore_index, 0.0, g)
    lse = tl.load(LSE + row)
    hot = lead + target.to(tl.int32)
    _gradient(X + aligned, DX + dx_aligned, lead, lead + V, hot, lse, g, smoothing, BLOCK)


# (BLOCK, warps) for V up to 2048, and beyond
TILES = {
    INTERPRETER: ((32, 1), (4096, 1)),
    80: ((512, 2), (4096, 8)),  # not yet tuned
    89: ((512, 2), (4096, 8)),  # not yet tuned
    90: ((512, 2), (4096, 8)),  # not yet tuned
    100: ((512, 2), (4096, 8)),  # not yet tuned
}


def _tile(logits: Tensor) -> tuple[int, int]:
    return TILES[architecture(logits)][logits.shape[1] > 2048]


def loss_and_gradient_(
    logits: Tensor, target: Tensor, ignore_index: int, smoothing: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """(N, V) logits -> losses and log-sum-exps, both (N,) fp32.

    With `gradient`, that of the sum of the losses is written over the logits.
    """
    losses, lse = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))
    _check_range(target, logits.shape[1], ignore_index)
    block, warps = _tile(logits)
    if logits.shape[0]:
        launch(
            _loss_kernel, (logits.shape[0],),
            logits, target, losses, lse, logits if gradient else None,
            logits.shape[1], logits.stride(0), target.stride(0), ignore_index, smoothing,
            BLOCK=block, ALIGN=16 // logits.element_size(), SMOOTH=smoothing > 0, num_warps=warps,
        )  # fmt: skip
    return losses, lse


def write_gradient(
    dlosses: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    smoothing: float,
    out: Tensor,
) -> None:
    """The gradient of the logits for upstream `dlosses` (N,), into `out` (N, V), which may be the logits."""
    block, warps = _tile(logits)
    if logits.shape[0]:
        launch(
            _gradient_kernel, (logits.shape[0],),
            logits, target, lse, dlosses, out,
            logits.shape[1], logits.stride(0), out.stride(0), target.stride(0), dlosses.stride(0),
            ignore_index, smoothing,
            BLOCK=block, ALIGN=16 // logits.element_size(), SAME_STRIDE=logits.stride(0) == out.stride(0),
            num_warps=warps,
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


def _forward(logits: Tensor, target: Tensor, ignore_index: int, smoothing: float) -> tuple[Tensor, Tensor]:
    return loss_and_gradient_(_rows(logits), target, ignore_index, smoothing, gradient=False)


def _backward(
    dlosses: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int, smoothing: float
) -> Tensor:
    dlogits = logits.new_empty(logits.shape)
    write_gradient(dlosses, _rows(logits), target, lse, ignore_index, smoothing, out=dlogits)
    return dlogits


_forward_op = torch.library.custom_op("tritongpt::cross_entropy", _forward, mutates_args=())
_backward_op = torch.library.custom_op("tritongpt::cross_entropy_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(logits, target, ignore_index, smoothing):
    return tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))


@_backward_op.register_fake
def _(dlosses, logits, target, lse, ignore_index, smoothing):
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, ctx.ignore_index, ctx.smoothing = inputs
    ctx.save_for_backward(logits, target, output[1])
    ctx.set_materialize_grads(False)  # the log-sum-exps have no gradient: don't fill one with zeros


def _call(ctx: Any, dlosses: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return _backward_op(dlosses, *ctx.saved_tensors, ctx.ignore_index, ctx.smoothing), None, None, None


_forward_op.register_autograd(_call, setup_context=_save)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`F.cross_entropy` of input (N, V) and target (N,) int64: () or, for "none", (N,).

    The loss is fp32 whatever the logits are, with or without autocast; their gradient has their dtype. The
    mean is over the targets that are not ignored: NaN when all of them are. A target that is no class and
    not `ignore_index` raises ValueError on a CPU and gives NaN on a GPU, where a check would wait for the
    GPU. Raises ValueError for what it cannot do.
    """
    check_tensors("cross_entropy", input=input)
    if input.dim() != 2 or input.shape[1] == 0:
        raise ValueError(f"cross_entropy: input {tuple(input.shape)} must be (N, V) with V at least 1")
    check_targets("cross_entropy", input, target, reduction, label_smoothing)
    losses, _ = _forward_op(input, target, ignore_index, float(label_smoothing))
    return losses if reduction == "none" else reduce(losses.sum(), target, ignore_index, reduction)


def reduce(total: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The sum of the losses, or their mean over the valid targets; the count stays on the device."""
    return total / (target != ignore_index).sum() if reduction == "mean" else total


def check_targets(name: str, input: Tensor, target: Tensor, reduction: str, label_smoothing: float) -> None:
    """ValueError unless the arguments that cross_entropy and linear_cross_entropy share are right."""
    if target.shape != input.shape[:1] or target.dtype != torch.int64:
        raise ValueError(
            f"{name}: target is {tuple(target.shape)} {target.dtype}; "
            f"input {tuple(input.shape)} needs ({input.shape[0]},) torch.int64"
        )
    if target.device != input.device:
        raise ValueError(f"{name}: target is on {target.device} and input on {input.device}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction={reduction!r} is none of {', '.join(REDUCTIONS)}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing={label_smoothing} must be from 0 to 1")


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


def _launchers(input, target, ignore_index=-100, label_smoothing=0.0, **_):
    losses, lse = _forward(input, target, ignore_index, label_smoothing)
    _backward(losses, input, target, lse, ignore_index, label_smoothing)


OP = Op(
    name="cross_entropy",
    family="cross_entropy",
    implementations={"triton": cross_entropy, "torch": cross_entropy_reference},
    reference=cross_entropy_reference,
    make=_inputs,
    cost=_cost,
    samples=(
        {"N": 1, "V": 1},
        {"N": 5, "V": 2, "reduction": "sum"},
        {"N": 7, "V": 65, "reduction": "none", "ignore_index": -1},
        {"N": 4, "V": 128, "label_smoothing": 0.1},
        {"N": 3, "V": 333, "label_smoothing": 0.3, "reduction": "none"},
        {"N": 4, "V": 50257},
        {"N": 3, "V": 50304, "reduction": "sum"},
    ),
    shipped=(
        {"N": 8192, "V": 256},
        {"N": 8192, "V": 50304},
        {"N": 8192, "V": 50257},
        {"N": 8192, "V": 50304, "label_smoothing": 0.1},
    ),
    launchers=_launchers,
)
