# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
# (a Triton kernel's arguments have no Python types)
# ruff: noqa: RUF005, SIM102
# (Triton has no starred tuples, and a condition that is known when it compiles stands alone)
"""LayerNorm over the last dimension, alone and fused with the residual add before it.

Forward, with x the input or the sum of input and residual, rounded to the residual's dtype:

    xhat = (x - mean(x)) * rstd        rstd = 1 / sqrt(var(x) + eps), var the biased estimate
    y = xhat * weight + bias

Backward, with g = dy * weight and dsummed the gradient that reaches the sum by the residual stream:

    dx = (g - mean(g) - xhat * mean(g * xhat)) * rstd + dsummed
    dweight = sum_rows(dy * xhat)      dbias = sum_rows(dy)

`add_layer_norm_mixed` moves fewer bytes. Its residual stream is fp32 forward, as above, but the gradient of
the stream is rounded to bfloat16, and backward takes xhat from the output, which the next layer saves anyway:
xhat = y / weight. So backward reads and writes 8 bytes an element where fp32 takes 16, and the sum need not
be saved. There is no bias: subtracting it from y would cancel the digits of a small xhat.

Both directions are limited by memory, so each tensor is read and written once. A program holds whole rows in
registers, which makes the variance a second pass over registers. Statistics are fp32, and saved so. Backward
is a persistent grid: each program walks many rows and keeps its own dweight and dbias, which one small kernel
then adds up; without atomics the bits are the same every run.

Source: Ba, Kiros and Hinton, 2016, https://arxiv.org/abs/1607.06450
"""

from collections.abc import Iterator, Sequence
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
    autocast_dtype,
    check_tensors,
    jit,
    launch,
    multiprocessors,
    operator,
    round_to,
    tiles_for,
    tl,
)

MAX_C = 8192  # elements a program can hold
SUM_COLUMNS = 32  # a program of the last sum: 128 bytes of each partial one


def layer_norm_reference(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`F.layer_norm`: input (..., C), weight and bias (C,) or None, result (..., C)."""
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


def add_layer_norm_reference(
    input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Adds `input` (..., C) to the residual stream (..., C) and normalises the sum.

    Returns (normed, summed): what the next layer reads, and the new residual stream.
    """
    summed = residual + input
    return F.layer_norm(summed, summed.shape[-1:], weight, bias, eps), summed


def add_layer_norm_mixed_reference(
    input: Tensor | None, residual: Tensor, carrier: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for a stream whose gradient travels in half precision, beside it in `carrier` (..., C).

    Autograd gives a gradient the dtype of its tensor. So `residual` gets none, and the gradient of the stream
    goes to `carrier`. `input` is None before the first layer. Returns (normed, summed, the next carrier).
    """
    # A zero whose gradient goes to the carrier and to the input.
    zero, summed = carrier - carrier.detach(), residual.detach()
    if input is not None:
        zero, summed = zero + (input - input.detach()), summed + input.detach()
    normed = F.layer_norm(summed + zero, summed.shape[-1:], weight, None, eps)
    return normed.to(carrier.dtype), summed, zero


@jit
def _inside(row, rows, i: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr):
    """The mask of tile i: only the last may reach beyond the row."""
    inside = (row < rows)[:, None]
    if (i + 1) * COLUMNS > C:
        inside = inside & (i * COLUMNS + tl.arange(0, COLUMNS) < C)[None, :]
    return inside


@jit
def _load(X, row, stride, rows, i: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr):
    col = i * COLUMNS + tl.arange(0, COLUMNS)
    inside = _inside(row, rows, i, C, COLUMNS)
    return tl.load(X + row[:, None] * stride + col[None, :], mask=inside, other=0).to(tl.float32)


@jit
def _store(X, x, row, rows, i: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr):
    col = i * COLUMNS + tl.arange(0, COLUMNS)
    inside = _inside(row, rows, i, C, COLUMNS)
    tl.store(X + row[:, None] * C + col[None, :], round_to(x, X.dtype.element_ty), mask=inside)


@jit
def _load_parameter(P, i: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """A tile of it for every row: each warp reads its own from the L1 cache, and none waits for another."""
    return _load(P, tl.zeros((ROWS,), tl.int32), 0, 1, i, C, COLUMNS)


@jit
def _away_from_zero(w):
    """With a weight of 0, xhat could not be recovered from the output, and dweight and dx need it. 2^-100 is
    too small to change any sum, and bfloat16 has fp32's exponents: xhat * 2^-100 keeps its digits."""
    return tl.where(tl.abs(w) < 2.0**-100, 2.0**-100, w)


@jit
def _norm_forward_kernel(
    X,  # (rows, C) in
    RESIDUAL,  # (rows, C) in, or None
    W,  # (C,) in, or None
    B,  # (C,) in, or None
    Y,  # (rows, C) out
    SUMMED,  # (rows, C) out, when there is a residual
    MEAN,  # (rows,) out, fp32, or None: backward takes xhat from Y
    RSTD,  # (rows,) out, fp32
    CARRIER,  # (1,) out, or None
    rows,
    x_stride,
    residual_stride,
    eps,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tiles: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    xs = ()
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in tl.static_range(tiles):
        x = _load(X, row, x_stride, rows, i, C, COLUMNS)
        if RESIDUAL is not None:
            x += _load(RESIDUAL, row, residual_stride, rows, i, C, COLUMNS)
            summed = round_to(x, SUMMED.dtype.element_ty)
            _store(SUMMED, summed, row, rows, i, C, COLUMNS)
            x = summed.to(tl.float32)  # normalise what backward will read
        total += x
        xs = xs + (x,)
    mean = tl.sum(total, 1) / C
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in tl.static_range(tiles):
        centred = xs[i] - mean[:, None]
        if (i + 1) * COLUMNS > C:
            centred = tl.where((i * COLUMNS + tl.arange(0, COLUMNS) < C)[None, :], centred, 0)
        squares += centred * centred
    rstd = 1 / tl.sqrt_rn(tl.sum(squares, 1) / C + eps)
    for i in tl.static_range(tiles):
        y = (xs[i] - mean[:, None]) * rstd[:, None]
        if W is not None:
            w = _load_parameter(W, i, C, COLUMNS, ROWS)
            y *= _away_from_zero(w) if MEAN is None else w
        if B is not None:
            y += _load_parameter(B, i, C, COLUMNS, ROWS)
        _store(Y, y, row, rows, i, C, COLUMNS)
    if MEAN is not None:
        tl.store(MEAN + row, mean, mask=row < rows)
    tl.store(RSTD + row, rstd, mask=row < rows)
    if CARRIER is not None:
        if tl.program_id(0) == 0:
            tl.store(CARRIER, 0.0)


@jit
def _norm_backward_kernel(
    DY,  # (rows, C) in
    DSUMMED,  # (rows, C) in, or None
    X,  # (rows, C) in: what was normalised, or without MEAN the normalised output
    W,  # (C,) in, or None
    MEAN,  # (rows,) in, fp32, or None
    RSTD,  # (rows,) in, fp32
    DX,  # (rows, C) out
    DRESIDUAL,  # (rows, C) out when its dtype is not that of dx, else None
    DW,  # (programs, C) out, fp32, or None
    DB,  # (programs, C) out, fp32, or None
    rows,
    dy_stride,
    dsummed_stride,
    x_stride,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    tiles: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    ws, inverses = (), ()
    dws, dbs = (), ()  # sums for each row of a tile, so that no warp waits for another's
    for i in tl.static_range(tiles):
        if W is not None:
            w = _load_parameter(W, i, C, COLUMNS, ROWS)
            if MEAN is None:
                w = _away_from_zero(w)
                inverses = inverses + (1 / w,)
            ws = ws + (w,)
        dws = dws + (tl.zeros((ROWS, COLUMNS), tl.float32),)
        dbs = dbs + (tl.zeros((ROWS, COLUMNS), tl.float32),)
    # With two stages the next rows travel to shared memory while these are computed.
    for first in tl.range(program * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = tl.arange(0, ROWS).to(tl.int64) + first
        if MEAN is not None:
            mean = tl.load(MEAN + row, mask=row < rows, other=0)
        rstd = tl.load(RSTD + row, mask=row < rows, other=0)
        dys, xhats = (), ()
        for i in tl.static_range(tiles):
            dys = dys + (_load(DY, row, dy_stride, rows, i, C, COLUMNS),)
            x = _load(X, row, x_stride, rows, i, C, COLUMNS)
            # Beyond C xhat is not 0, but dy is.
            xhats = xhats + (x * inverses[i] if MEAN is None else (x - mean[:, None]) * rstd[:, None],)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        total_xhat = tl.zeros((ROWS, COLUMNS), tl.float32)
        next_dws, next_dbs = (), ()
        for i in tl.static_range(tiles):
            g = dys[i]
            next_dws = next_dws + (dws[i] + g * xhats[i],)
            next_dbs = next_dbs + (dbs[i] + g,)
            if W is not None:
                g *= ws[i]
            total += g
            total_xhat += g * xhats[i]
        dws, dbs = next_dws, next_dbs
        along_mean = tl.sum(total, 1) / C
        along_xhat = tl.sum(total_xhat, 1) / C
        for i in tl.static_range(tiles):
            g = dys[i]
            if W is not None:
                g *= ws[i]
            dx = (g - along_mean[:, None] - xhats[i] * along_xhat[:, None]) * rstd[:, None]
            if DSUMMED is not None:
                dx += _load(DSUMMED, row, dsummed_stride, rows, i, C, COLUMNS)
            _store(DX, dx, row, rows, i, C, COLUMNS)
            if DRESIDUAL is not None:
                _store(DRESIDUAL, dx, row, rows, i, C, COLUMNS)
    for i in tl.static_range(tiles):
        col = i * COLUMNS + tl.arange(0, COLUMNS)
        if DW is not None:
            tl.store(DW + program * C + col, tl.sum(dws[i], 0), mask=col < C)
        if DB is not None:
            tl.store(DB + program * C + col, tl.sum(dbs[i], 0), mask=col < C)


@jit
def _norm_sum_kernel(
    PARTS,  # (n, programs, C) in, fp32
    DW,  # (C,) out: the sum of the first, or None
    DB,  # (C,) out: the sum of the last, or None
    programs,
    C,
    COLUMNS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """One launch for both sums and for rounding them, where PyTorch would need four."""
    col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    which = tl.program_id(1)
    total = tl.zeros((PROGRAMS, COLUMNS), tl.float32)
    for first in range(0, programs, PROGRAMS):
        program = first + tl.arange(0, PROGRAMS)
        at = (which * programs + program[:, None]) * C + col[None, :]
        total += tl.load(PARTS + at, mask=(program < programs)[:, None] & (col < C)[None, :], other=0)
    gradient = tl.sum(total, 0)
    # Branches, not masks: the interpreter of Triton 3.9 makes an int32 of a scalar condition in a mask.
    if DW is not None:
        if which == 0:
            tl.store(DW + col, round_to(gradient, DW.dtype.element_ty), mask=col < C)
    if DB is not None:
        if which == tl.num_programs(1) - 1:
            tl.store(DB + col, round_to(gradient, DB.dtype.element_ty), mask=col < C)


# Widest row -> (rows a program, warps, columns a tile) forward, and the same with programs a multiprocessor
# and stages backward. A row is cut into tiles of columns, not padded to a power of two: 768 is three of 256.
# A tile of 256 columns is 16 bytes for each lane of a warp in half precision, so that a warp has a row to
# itself and its sums need no shared memory. What is not tuned was chosen for at least 48 KiB in flight a
# multiprocessor and no spills; no tensor core is involved, so all architectures start alike.
_UNTUNED = {
    512: ((4, 4, 256), (4, 4, 256, 4, 1)),
    1024: ((4, 4, 256), (4, 4, 256, 3, 1)),
    1280: ((4, 4, 256), (2, 4, 512, 2, 1)),
    2048: ((4, 4, 256), (2, 4, 512, 2, 1)),
    4096: ((1, 4, 1024), (1, 4, 1024, 2, 1)),
    8192: ((1, 8, 2048), (1, 8, 2048, 1, 1)),
}
TILES = {
    INTERPRETER: {widest: ((8, 4, 256), (8, 4, 256, 1, 1)) for widest in _UNTUNED},
    UNTUNED: _UNTUNED,
    90: _UNTUNED | {1024: ((2, 4, 1024), (1, 1, 256, 8, 1))},  # tuned on H200, C=768, 65536 rows
}


def _rows(x: Tensor) -> Tensor:
    """(..., C) -> (rows, C) whose rows are contiguous: a view wherever that is possible."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _dense(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def _width(C: int) -> int:
    """The key of C columns in a table of tiles."""
    return next(widest for widest in _UNTUNED if widest >= C)


def _launch_forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    carrier: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> normed in `dtype`, summed (empty without a residual), mean and rstd (rows,), the next carrier.

    mean is empty with a carrier; the next carrier is empty without one.
    """
    outputs = _fake_forward(input, residual, weight, bias, eps, dtype, carrier)
    normed, summed, mean, rstd, next_carrier = outputs
    x, r = _rows(input), None if residual is None else _rows(residual)
    rows, C = x.shape
    tile, warps, columns = tiles_for(x, TILES)[_width(C)][0]
    if rows:
        launch(
            _norm_forward_kernel, (-(-rows // tile),),
            x, r, _dense(weight), _dense(bias), normed, None if r is None else summed,
            mean if carrier is None else None, rstd, None if carrier is None else next_carrier,
            rows, x.stride(0), 0 if r is None else r.stride(0), eps,
            C=C, COLUMNS=columns, ROWS=tile, num_warps=warps,
        )  # fmt: skip
    return outputs


def _launch_backward(
    dnormed: Tensor,
    dsummed: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias_dtype: torch.dtype | None,
    mean: Tensor | None,
    rstd: Tensor,
    input_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dinput, dresidual (empty when dinput serves for both), dweight and dbias (empty without one).

    x is what was normalised; without a mean it is the output.
    """
    dinput, dresidual, dweight, dbias = _fake_backward(
        dnormed, dsummed, x, weight, bias_dtype, mean, rstd, input_dtype, residual_dtype
    )
    dy, x = _rows(dnormed), _rows(x)
    ds = None if dsummed is None else _rows(dsummed)
    rows, C = x.shape
    tile, warps, columns, programs, stages = tiles_for(x, TILES)[_width(C)][1]
    programs = max(1, min(programs * multiprocessors(x), -(-rows // tile)))
    sums = [out if out.numel() else None for out in (dweight, dbias)]
    parts = x.new_empty(sum(out is not None for out in sums), programs, C, dtype=torch.float32)
    launch(
        _norm_backward_kernel, (programs,),
        dy, ds, x, _dense(weight), mean, rstd, dinput,
        dresidual if dresidual.numel() else None,
        None if sums[0] is None else parts[0], None if sums[1] is None else parts[-1],
        rows, dy.stride(0), 0 if ds is None else ds.stride(0), x.stride(0),
        C=C, COLUMNS=columns, ROWS=tile, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    if parts.numel():
        launch(
            _norm_sum_kernel, (-(-C // SUM_COLUMNS), len(parts)),
            parts, *sums, programs, C, COLUMNS=SUM_COLUMNS, PROGRAMS=128, num_warps=8,
        )  # fmt: skip
    return dinput, dresidual, dweight, dbias


def _fake_forward(input, residual, weight, bias, eps, dtype, carrier=None):
    rows = input.numel() // input.shape[-1]
    summed = input.new_empty(0)
    if residual is not None:
        summed = input.new_empty(input.shape, dtype=torch.promote_types(input.dtype, residual.dtype))
    mean = input.new_empty(rows if carrier is None else 0, dtype=torch.float32)
    rstd = input.new_empty(rows, dtype=torch.float32)
    # A carrier is a single 0, expanded to the full shape: only its gradient has full size.
    next_carrier = input.new_empty(0) if carrier is None else carrier.new_empty(1).expand(carrier.shape)
    return input.new_empty(input.shape, dtype=dtype), summed, mean, rstd, next_carrier


def _fake_backward(dnormed, dsummed, x, weight, bias_dtype, mean, rstd, input_dtype, residual_dtype):
    dinput = x.new_empty(x.shape, dtype=input_dtype)
    dresidual = x.new_empty(0 if input_dtype == residual_dtype else x.shape, dtype=residual_dtype)
    C = x.shape[-1]
    dweight = x.new_empty(0) if weight is None else x.new_empty(C, dtype=weight.dtype)
    dbias = x.new_empty(0) if bias_dtype is None else x.new_empty(C, dtype=bias_dtype)
    return dinput, dresidual, dweight, dbias


_forward_op = operator("layer_norm_forward", _launch_forward, _fake_forward)
_backward_op = operator("layer_norm_backward", _launch_backward, _fake_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, residual, weight, bias, _, _, carrier = inputs
    normed, summed, mean, rstd, _ = output
    if carrier is None:
        ctx.save_for_backward(input if residual is None else summed, weight, mean, rstd)
    else:
        ctx.save_for_backward(normed, weight, None, rstd)
    ctx.dtypes = [None if t is None else t.dtype for t in (input, residual, bias, carrier)]
    ctx.set_materialize_grads(False)  # the last sum of a network has no gradient of its own: don't read zeros


def _backward(
    ctx: Any,
    dnormed: Tensor | None,
    dsummed: Tensor | None,
    _mean: None,
    _rstd: None,
    dcarrier: Tensor | None,
) -> tuple[Tensor | None, ...]:
    x, weight, mean, rstd = ctx.saved_tensors
    input_dtype, residual_dtype, bias_dtype, carrier_dtype = ctx.dtypes
    if dnormed is None:
        dnormed = torch.zeros_like(x)
    if carrier_dtype is not None:
        dx, _, dweight, _ = _backward_op(
            dnormed, dcarrier, x, weight, None, None, rstd, carrier_dtype, carrier_dtype
        )
        # Without a residual the input is the stream, whose gradient is the carrier's.
        return (None if residual_dtype is None else dx), None, dweight, None, None, None, dx
    has_residual = residual_dtype is not None
    dinput, dresidual, dweight, dbias = _backward_op(
        dnormed, dsummed if has_residual else None, x, weight, bias_dtype, mean, rstd,
        input_dtype, residual_dtype if has_residual else input_dtype,
    )  # fmt: skip
    if has_residual and residual_dtype == input_dtype:
        dresidual = dinput
    return (
        dinput,
        dresidual if has_residual else None,
        None if weight is None else dweight,
        None if bias_dtype is None else dbias,
        None,
        None,
        None,
    )


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`F.layer_norm` over the last dimension: input (..., C), weight and bias (C,) or None -> (..., C).

    C is at most 8192. The result has the input's dtype, under autocast the autocast dtype (fp32 inside the
    kernel either way); weight and bias may have another dtype than the input. Raises ValueError for what it
    cannot do.
    """
    if tuple(normalized_shape) != tuple(input.shape[-1:]):
        raise ValueError(
            f"layer_norm: normalized_shape is {tuple(normalized_shape)} and input {tuple(input.shape)}; "
            "only the last dimension can be normalised"
        )
    _check("layer_norm", input, weight, bias)
    return _forward_op(input, None, weight, bias, eps, autocast_dtype(input), None)[0]


def add_layer_norm(
    input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Adds `input` (..., C) to the residual stream (..., C) and normalises the sum: (normed, summed).

    `summed` has the dtype that input and residual promote to, and so has `normed`, but under autocast
    `normed` has the autocast dtype. Raises ValueError for what it cannot do.
    """
    if input.shape != residual.shape:
        raise ValueError(
            f"add_layer_norm: input {tuple(input.shape)} and residual {tuple(residual.shape)} "
            "must have one shape"
        )
    _check("add_layer_norm", input, weight, bias, residual)
    dtype = torch.promote_types(input.dtype, residual.dtype)
    if torch.is_autocast_enabled(input.device.type):
        dtype = autocast_dtype(input)
    return _forward_op(input, residual, weight, bias, eps, dtype, None)[:2]


def add_layer_norm_mixed(
    input: Tensor | None, residual: Tensor, carrier: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_layer_norm` on a fp32 stream whose gradient is bfloat16: -> (normed, summed, the next carrier).

    Autograd gives a gradient the dtype of its tensor. So residual (..., C), which is fp32, is detached, and
    the gradient of the stream flows through `carrier` (..., C) instead, in its dtype: bfloat16 or fp32, which
    `input` and `normed` share, autocast or not. Its values are never used; those of the next are all zeros.
    `input` is None before the first layer, which adds nothing. Raises ValueError for what it cannot do.
    """
    name = "add_layer_norm_mixed"
    _check(name, residual, weight, None)
    if residual.dtype != torch.float32:
        raise ValueError(f"{name}: residual is {residual.dtype}; it must be float32")
    if carrier.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"{name}: carrier is {carrier.dtype}; bfloat16 and float32 are allowed")
    for argument, tensor in (("input", input), ("carrier", carrier)):
        if tensor is not None and (tensor.shape, tensor.dtype) != (residual.shape, carrier.dtype):
            raise ValueError(
                f"{name}: {argument} is {tuple(tensor.shape)} {tensor.dtype}; it must have the shape of "
                f"residual, {tuple(residual.shape)}, and the dtype of carrier, {carrier.dtype}"
            )
    residual = residual.detach()
    if input is None:
        normed, _, _, _, carrier = _forward_op(residual, None, weight, None, eps, carrier.dtype, carrier)
        return normed, residual, carrier
    normed, summed, _, _, carrier = _forward_op(input, residual, weight, None, eps, carrier.dtype, carrier)
    return normed, summed.detach(), carrier


def _check(
    name: str, input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None = None
) -> None:
    check_tensors(name, input=input, residual=residual, weight=weight, bias=bias)
    if input.dim() == 0 or not 1 <= input.shape[-1] <= MAX_C:
        raise ValueError(f"{name}: input {tuple(input.shape)} must be (..., C) with C from 1 to {MAX_C}")
    for argument, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != input.shape[-1:]:
            raise ValueError(
                f"{name}: {argument} is {tuple(parameter.shape)}; input {tuple(input.shape)} "
                f"needs ({input.shape[-1]},)"
            )


def _inputs(
    dtype: torch.dtype,
    device: str,
    shape: tuple[int, ...],
    weight: bool = True,
    bias: bool = True,
    add: bool = False,
    mixed: bool = False,
) -> dict[str, Any]:
    """With `mixed`, the residual stream and the parameters are fp32, as in a training under autocast."""

    def random(*size: int, mean: float = 0.0) -> Tensor:
        return (torch.randn(*size, device=device) + mean).to(torch.float32 if mixed else dtype)

    call: dict[str, Any] = {"input": random(*shape, mean=0.5).to(dtype)}
    call |= {"residual": random(*shape)} if add else {"normalized_shape": shape[-1:]}
    if weight:
        call["weight"] = random(shape[-1], mean=1.0)
    if bias:
        call["bias"] = random(shape[-1])
    return call


def _add_inputs(dtype: torch.dtype, device: str, **sample: Any) -> dict[str, Any]:
    return _inputs(dtype, device, add=True, **sample)


def _mixed_inputs(
    dtype: torch.dtype, device: str, shape: tuple[int, ...], add: bool = True, zeros: bool = False
) -> dict[str, Any]:
    """With `zeros`, every third weight is 0 or so small that it counts as 0."""
    dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
    call = _inputs(dtype, device, shape, bias=False, add=True, mixed=True)
    call["carrier"] = torch.zeros(shape, device=device, dtype=dtype)
    if zeros:
        call["weight"][::3] = 0
        call["weight"][1::9], call["weight"][4::9] = -1e-35, 1e-30
    return call if add else call | {"input": None}


def _cost(input: Tensor, weight: Tensor | None = None, residual: Tensor | None = None, **_: Any) -> Cost:
    n, size = input.numel(), input.element_size()
    # forward: input (residual) -> normed (summed); backward: dnormed, x (dsummed) -> dinput (dresidual)
    forward, backward = 2 * size, 3 * size
    if residual is not None:
        stream = residual.element_size()
        forward = 2 * size + 2 * stream
        # one gradient serves both where they have one dtype
        backward = size + 3 * stream + (0 if stream == size else size)
    return Cost(forward * n, backward * n, 8 * n, 12 * n)


def _mixed_cost(residual: Tensor, carrier: Tensor, **_: Any) -> Cost:
    n, half = residual.numel(), carrier.element_size()
    # forward: input residual -> normed summed; backward: dnormed normed dcarrier -> dcarrier
    return Cost((2 * half + 8) * n, 4 * half * n, 8 * n, 12 * n)


def _mixed_run_all(input, residual, carrier, weight, eps=1e-5):
    normed, _, _, rstd, _ = _launch_forward(input, residual, weight, None, eps, carrier.dtype, carrier)
    _launch_backward(normed, normed, normed, weight, None, None, rstd, carrier.dtype, carrier.dtype)


def _run_all(input, residual=None, weight=None, bias=None, eps=1e-5, normalized_shape=None):
    normed, summed, mean, rstd, _ = _launch_forward(input, residual, weight, bias, eps, input.dtype)
    x, ds = (input, None) if residual is None else (summed, summed)
    residual_dtype = input.dtype if residual is None else residual.dtype
    bias_dtype = None if bias is None else bias.dtype
    _launch_backward(normed, ds, x, weight, bias_dtype, mean, rstd, input.dtype, residual_dtype)


def _slots(input: Tensor, **_: Any) -> Iterator[Slot]:
    C, table = input.shape[-1], tiles_for(input, TILES)
    yield Slot("forward (rows, warps, columns)", table, _width(C), tuple(_candidates(C, 64)), 0)
    # Backward holds six values for each of a lane's columns, so a warp has 256 columns of one row. It waits
    # for both sums of a row. Either many programs fill that time, 8 to 16 warps, or the second stage does.
    lean = [tile for tile in _candidates(C, 56) if tile[0] * tile[2] == 256 * tile[1] and tile[0] <= 2]
    resident = tuple(
        (*t, p, s) for t, p, s in product(lean, (1, 2, 3, 4, 6, 8), (1, 2)) if 8 <= t[1] * p <= 16
    )
    yield Slot("backward (rows, warps, columns, programs, stages)", table, _width(C), resident, 1)


def _candidates(C: int, most: int) -> Iterator[tuple[int, int, int]]:
    """(rows, warps, columns) with up to `most` values of a row or two in a lane, a quarter of them idle."""
    for rows, warps, columns in product((1, 2, 4), (1, 2, 4, 8), (256, 512, 1024, 2048)):
        tiles = -(-C // columns)
        values = rows * columns * tiles // (32 * warps)
        if warps <= rows * columns // 256 and 8 <= values <= most and tiles * columns <= max(256, 1.34 * C):
            yield rows, warps, columns


_SAMPLES = (
    {"shape": (2, 5, 111)},
    {"shape": (1, 1)},
    {"shape": (300, 59), "bias": False},  # a program has several rows one after another
    {"shape": (7, 768)},
    {"shape": (2, 1600)},
    {"shape": (0, 64)},
)
_LAUNCHES = [_norm_forward_kernel], [_norm_backward_kernel, _norm_sum_kernel]
_BENCHMARK_SHAPES = tuple(
    {"shape": (rows, C)} for rows in (65536, 16384) for C in (768, 1024, 1280, 1600, 2048, 4096, 8192)
)

LAYER_NORM = Op(
    name="layer_norm",
    family="layer_norm",
    implementations={"triton": layer_norm, "torch": layer_norm_reference},
    reference=layer_norm_reference,
    make=_inputs,
    cost=_cost,
    run_all=_run_all,
    samples=(*_SAMPLES, {"shape": (5, 33), "weight": False, "bias": False}),
    launches=_LAUNCHES,
    large_sample={"shape": (4099, 1600)},
    benchmark_shapes=_BENCHMARK_SHAPES,
    # One width shows that the absence of the add, which needs more registers, changes nothing.
    production_shapes=({"shape": (65536, 768)},),
    slots=_slots,
)
ADD_LAYER_NORM = Op(
    name="add_layer_norm",
    family="layer_norm",
    implementations={"triton": add_layer_norm, "torch": add_layer_norm_reference},
    reference=add_layer_norm_reference,
    make=_add_inputs,
    cost=_cost,
    run_all=_run_all,
    samples=(*_SAMPLES, {"shape": (5, 111), "mixed": True}),
    launches=_LAUNCHES,
    large_sample={"shape": (4099, 1600)},
    benchmark_shapes=({"shape": (65536, 768), "mixed": True}, *_BENCHMARK_SHAPES),
    # The dtypes of a training, then a width for each tile.
    production_shapes=(
        {"shape": (65536, 768), "mixed": True, "bias": False},
        *({"shape": (65536, C)} for C in (512, 768, 1024, 1600, 4096, 8192)),
    ),
    slots=_slots,
)
ADD_LAYER_NORM_MIXED = Op(
    name="add_layer_norm_mixed",
    family="layer_norm",
    implementations={"triton": add_layer_norm_mixed, "torch": add_layer_norm_mixed_reference},
    reference=add_layer_norm_mixed_reference,
    make=_mixed_inputs,
    cost=_mixed_cost,
    run_all=_mixed_run_all,
    samples=(
        {"shape": (2, 5, 111)},
        {"shape": (1, 1)},
        {"shape": (7, 768), "zeros": True},
        {"shape": (2, 5, 111), "add": False},
        {"shape": (2, 1600)},
        {"shape": (0, 64)},
    ),
    launches=_LAUNCHES,
    large_sample={"shape": (4099, 1600)},
    benchmark_shapes=_BENCHMARK_SHAPES,
    production_shapes=tuple({"shape": (65536, C)} for C in (768, 512, 1024, 1600, 4096, 8192)),
    slots=_slots,
)
