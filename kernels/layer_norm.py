# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
# (a Triton kernel's arguments have no Python types)
# ruff: noqa: RUF005
# (Triton has no starred tuples)
"""LayerNorm over the last dimension, alone or fused with the residual add before it.

A block of a GPT adds each branch to the residual stream and normalises the sum for the next branch:

    x = residual + input               or x = input, without a residual
    xhat = (x - mean(x)) * rstd        rstd = 1 / sqrt(var(x) + eps), with the biased variance
    y = xhat * weight + bias

Backward, with g = dy * weight and dsummed the gradient of x through the residual stream:

    dx = (g - mean(g) - xhat * mean(g * xhat)) * rstd + dsummed
    dweight = sum_rows(dy * xhat)      dbias = sum_rows(dy)

Memory limits the speed, so each tensor is read or written only once: a program keeps whole rows in registers.
Statistics are fp32.

`add_layer_norm_mixed` moves 8 bytes per element in backward instead of 16. It rounds the gradient of the fp32
residual stream to bfloat16, and it computes xhat from y, which the next layer saves anyway, instead of x.

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
    autocast_enabled,
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

MAX_C = 8192  # the longest row that fits into a program's registers


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`F.layer_norm` over the last dimension: input (..., C), weight and bias (C,) or None -> (..., C).

    C is at most 8192. The kernel computes in fp32. The result has the input's dtype, or under autocast the
    autocast dtype. weight and bias may have a different dtype. Raises ValueError for bad arguments.
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
    """Adds `input` (..., C) to the residual stream (..., C) and normalises the sum -> (normed, summed).

    `normed` goes to the next layer, and `summed` is the new residual stream. Both have the dtype that input
    and residual promote to, except that `normed` has the autocast dtype under autocast. Raises ValueError for
    bad arguments.
    """
    if input.shape != residual.shape:
        raise ValueError(
            f"add_layer_norm: input {tuple(input.shape)} and residual {tuple(residual.shape)} "
            "must have the same shape"
        )
    _check("add_layer_norm", input, weight, bias, residual)
    dtype = torch.promote_types(input.dtype, residual.dtype)
    if autocast_enabled(input):
        dtype = autocast_dtype(input)
    return _forward_op(input, residual, weight, bias, eps, dtype, None)[:2]


def add_layer_norm_reference(
    input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` by PyTorch."""
    summed = residual + input
    return F.layer_norm(summed, summed.shape[-1:], weight, bias, eps), summed


def add_layer_norm_mixed(
    input: Tensor | None, residual: Tensor, carrier: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_layer_norm` for an fp32 stream with a bfloat16 gradient -> (normed, summed, next carrier).

    In autograd, a gradient has the dtype of its tensor, and `residual` (..., C) is fp32. So `residual` is
    detached and gets no gradient. Instead the gradient of the stream flows from the next carrier to `carrier`
    (..., C). Only the gradients of carriers matter; their values are never read. `carrier`, `input` and
    `normed` have the same dtype, bfloat16 or fp32, also under autocast. Before the first layer `input` is
    None, and nothing is added. Raises ValueError for bad arguments.
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


def add_layer_norm_mixed_reference(
    input: Tensor | None, residual: Tensor, carrier: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_layer_norm_mixed` by PyTorch."""
    # zero is all zeros. Its gradient is the gradient of the stream, and goes to both carrier and input.
    zero, summed = carrier - carrier.detach(), residual.detach()
    if input is not None:
        zero, summed = zero + (input - input.detach()), summed + input.detach()
    normed = F.layer_norm(summed + zero, summed.shape[-1:], weight, None, eps)
    return normed.to(carrier.dtype), summed, zero


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


# A row is C columns in tiles of COLUMNS, and a program has ROWS rows at once. Triton has no arrays of tiles,
# so the kernels build tuples in loops that are unrolled at compile time.
@jit
def _mask(row, rows, i: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr):
    """The mask of tile i. Only the last tile can extend beyond the row."""
    mask = (row < rows)[:, None]
    if (i + 1) * COLUMNS > C:
        mask = mask & (i * COLUMNS + tl.arange(0, COLUMNS) < C)[None, :]
    return mask


@jit
def _load(X, row, stride, rows, i: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr):
    col = i * COLUMNS + tl.arange(0, COLUMNS)
    mask = _mask(row, rows, i, C, COLUMNS)
    return tl.load(X + row[:, None] * stride + col[None, :], mask=mask, other=0).to(tl.float32)


@jit
def _store(X, x, row, rows, i: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr):
    col = i * COLUMNS + tl.arange(0, COLUMNS)
    mask = _mask(row, rows, i, C, COLUMNS)
    tl.store(X + row[:, None] * C + col[None, :], round_to(x, X.dtype.element_ty), mask=mask)


@jit
def _load_parameter(P, i: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Tile i of weight or bias, repeated for each row of the program."""
    # Each warp loads the parameters of its rows from the L1 cache. To broadcast one row, warps would have to
    # wait for each other.
    return _load(P, tl.zeros((ROWS,), tl.int32), 0, 1, i, C, COLUMNS)


@jit
def _away_from_zero(w):
    """w, or 2^-100 if w is almost 0."""
    # Backward recovers xhat = y / weight, which a weight of 0 would make impossible. 2^-100 is too small to
    # change any sum that y enters. But bfloat16 has the exponents of fp32, so y = xhat * 2^-100 keeps the
    # digits of xhat.
    return tl.where(tl.abs(w) < 2.0**-100, 2.0**-100, w)


# The residual add is fused into the norm to save memory traffic. Separately, the add reads two tensors and
# writes the sum, then the norm reads the sum and writes y. Fused, the norm has the sum in registers: it moves
# four tensors instead of five. In backward, which adds dsummed, it is four instead of six.
@jit
def _norm_forward_kernel(
    X,  # (rows, C) in
    RESIDUAL,  # (rows, C) in, or None
    W,  # (C,) in, or None
    B,  # (C,) in, or None
    Y,  # (rows, C) out
    SUMMED,  # (rows, C) out, or None without RESIDUAL
    MEAN,  # (rows,) out, fp32, or None if backward recovers xhat from Y
    RSTD,  # (rows,) out, fp32
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
    sum_x = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in tl.static_range(tiles):
        x = _load(X, row, x_stride, rows, i, C, COLUMNS)
        if RESIDUAL is not None:
            x += _load(RESIDUAL, row, residual_stride, rows, i, C, COLUMNS)
            summed = round_to(x, SUMMED.dtype.element_ty)
            _store(SUMMED, summed, row, rows, i, C, COLUMNS)
            # Normalise the rounded sum, because backward reads the rounded sum.
            x = summed.to(tl.float32)
        sum_x += x
        xs = xs + (x,)
    mean = tl.sum(sum_x, 1) / C
    # The row is in registers, so a second pass for the variance costs little. var = mean(x^2) - mean(x)^2
    # would need only one pass, but it cancels if the mean is large.
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


# dweight and dbias are sums over all rows. One program per row would need atomics, whose order changes from
# run to run. So the grid is persistent: each program walks over many rows and keeps its sums in registers,
# and at the end torch.sum adds up the sums of the programs. The bits are the same every run.
@jit
def _norm_backward_kernel(
    DY,  # (rows, C) in
    DSUMMED,  # (rows, C) in, or None
    X,  # (rows, C) in: x or, without MEAN, y
    W,  # (C,) in, or None
    MEAN,  # (rows,) in, fp32, or None
    RSTD,  # (rows,) in, fp32
    DX,  # (rows, C) out
    DRESIDUAL,  # (rows, C) out: dx in a different dtype, or None if both have the same
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
    ws, inverse_ws = (), ()
    # Each of the ROWS rows has a separate sum, so warps do not wait for each other in the loop.
    dws, dbs = (), ()
    for i in tl.static_range(tiles):
        if W is not None:
            w = _load_parameter(W, i, C, COLUMNS, ROWS)
            if MEAN is None:
                w = _away_from_zero(w)
                inverse_ws = inverse_ws + (1 / w,)
            ws = ws + (w,)
        dws = dws + (tl.zeros((ROWS, COLUMNS), tl.float32),)
        dbs = dbs + (tl.zeros((ROWS, COLUMNS), tl.float32),)
    # With two stages, the next rows are loaded into shared memory during the arithmetic for these.
    for first in tl.range(program * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = tl.arange(0, ROWS).to(tl.int64) + first
        if MEAN is not None:
            mean = tl.load(MEAN + row, mask=row < rows, other=0)
        rstd = tl.load(RSTD + row, mask=row < rows, other=0)
        dys, xhats = (), ()
        for i in tl.static_range(tiles):
            dys = dys + (_load(DY, row, dy_stride, rows, i, C, COLUMNS),)
            x = _load(X, row, x_stride, rows, i, C, COLUMNS)
            # Without MEAN, xhat = y / weight. There must be no bias: to subtract one from y would cancel the
            # digits of a small xhat. Beyond column C xhat may not be 0, but dy is 0.
            xhats = xhats + (x * inverse_ws[i] if MEAN is None else (x - mean[:, None]) * rstd[:, None],)
        sum_g = tl.zeros((ROWS, COLUMNS), tl.float32)
        sum_g_xhat = tl.zeros((ROWS, COLUMNS), tl.float32)
        next_dws, next_dbs = (), ()
        for i in tl.static_range(tiles):
            g = dys[i]
            next_dws = next_dws + (dws[i] + g * xhats[i],)
            next_dbs = next_dbs + (dbs[i] + g,)
            if W is not None:
                g *= ws[i]
            sum_g += g
            sum_g_xhat += g * xhats[i]
        dws, dbs = next_dws, next_dbs
        mean_g = tl.sum(sum_g, 1) / C
        mean_g_xhat = tl.sum(sum_g_xhat, 1) / C
        for i in tl.static_range(tiles):
            g = dys[i]
            if W is not None:
                g *= ws[i]
            # xhat does not change if x is shifted or scaled. So dx is orthogonal to (1, ..., 1) and to xhat.
            dx = (g - mean_g[:, None] - xhats[i] * mean_g_xhat[:, None]) * rstd[:, None]
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


# Widest row -> forward:  (rows per program, warps, columns per tile)
#               backward: (the same three, programs per multiprocessor, stages)
#
# A row is cut into tiles rather than padded to a power of 2: 768 columns are three tiles of 256. In half
# precision a tile of 256 columns is 16 bytes for each thread of a warp. So one warp can have a whole row, and
# its sums need no shared memory. Tiles that are not tuned have no spills and at least 48 KiB of loads in
# flight per multiprocessor. They are the same on all architectures, because a norm does not use tensor cores.
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
    """(..., C) -> (rows, C) with contiguous rows: a view if possible."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _dense(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def _launch_forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    carrier: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> normed in `dtype`, summed, mean (rows,), rstd (rows,), next carrier.

    summed is empty without a residual, mean with a carrier, and next carrier without a carrier.
    """
    outputs = _fake_forward(input, residual, weight, bias, eps, dtype, carrier)
    normed, summed, mean, rstd, _ = outputs
    x, r = _rows(input), None if residual is None else _rows(residual)
    rows, C = x.shape
    tiles = tiles_for(x, TILES)
    tile, warps, columns = tiles[key_for(tiles, C)][0]
    if rows:
        launch(
            _norm_forward_kernel, (-(-rows // tile),),
            x, r, _dense(weight), _dense(bias), normed, None if r is None else summed,
            mean if carrier is None else None, rstd,
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
    """-> dinput, dresidual (empty if dinput is both), dweight and dbias (empty without weight and bias).

    x is the input of the norm or, without a mean, its output.
    """
    dinput, dresidual, dweight, dbias = _fake_backward(
        dnormed, dsummed, x, weight, bias_dtype, mean, rstd, input_dtype, residual_dtype
    )
    dy, x = _rows(dnormed), _rows(x)
    ds = None if dsummed is None else _rows(dsummed)
    rows, C = x.shape
    tiles = tiles_for(x, TILES)
    tile, warps, columns, programs, stages = tiles[key_for(tiles, C)][1]
    programs = max(1, min(programs * multiprocessors(x), -(-rows // tile)))
    dweights, dbiases = (
        x.new_empty(programs, C, dtype=torch.float32) if out.numel() else None for out in (dweight, dbias)
    )
    launch(
        _norm_backward_kernel, (programs,),
        dy, ds, x, _dense(weight), mean, rstd, dinput,
        dresidual if dresidual.numel() else None, dweights, dbiases,
        rows, dy.stride(0), 0 if ds is None else ds.stride(0), x.stride(0),
        C=C, COLUMNS=columns, ROWS=tile, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    if dweights is not None:
        dweight = dweights.sum(0).to(dweight.dtype)
    if dbiases is not None:
        dbias = dbiases.sum(0).to(dbias.dtype)
    return dinput, dresidual, dweight, dbias


def _fake_forward(input, residual, weight, bias, eps, dtype, carrier=None):
    rows = input.numel() // input.shape[-1]
    summed = input.new_empty(0)
    if residual is not None:
        summed = input.new_empty(input.shape, dtype=torch.promote_types(input.dtype, residual.dtype))
    mean = input.new_empty(rows if carrier is None else 0, dtype=torch.float32)
    rstd = input.new_empty(rows, dtype=torch.float32)
    # A carrier is one 0, expanded to the full shape. Only its gradient uses memory.
    next_carrier = input.new_empty(0) if carrier is None else carrier.new_zeros(1).expand(carrier.shape)
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
    # The last sum of a model gets no gradient. Do not make zeros for it, which the kernel would read.
    ctx.set_materialize_grads(False)


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
        # Without a residual, the input is the stream, and its gradient goes to the carrier alone.
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


def _inputs(
    dtype: torch.dtype,
    device: str,
    shape: tuple[int, ...],
    weight: bool = True,
    bias: bool = True,
    add: bool = False,
    mixed: bool = False,
) -> dict[str, Any]:
    """With `mixed`, the residual stream and the parameters are fp32, as in training under autocast."""

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
    """With `zeros`, every third weight is 0, and some are near the limit of `_away_from_zero`."""
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
        # If input and residual have the same dtype, they share one gradient.
        backward = size + 3 * stream + (0 if stream == size else size)
    return Cost(forward * n, backward * n, 8 * n, 12 * n)


def _mixed_cost(residual: Tensor, carrier: Tensor, **_: Any) -> Cost:
    n, half = residual.numel(), carrier.element_size()
    # forward: input residual -> normed summed; backward: dnormed normed dcarrier -> dcarrier
    return Cost((2 * half + 8) * n, 4 * half * n, 8 * n, 12 * n)


def _slots(input: Tensor, **_: Any) -> Iterator[Slot]:
    C, table = input.shape[-1], tiles_for(input, TILES)
    key = key_for(table, C)
    yield Slot("forward (rows, warps, columns)", table, key, tuple(_candidates(C, 64)), 0)
    # Backward needs six registers for each column of a thread, so a warp has 256 columns of one row. It waits
    # for two sums per row. To fill that time, 8 to 16 warps share a multiprocessor, or there are two stages.
    shapes = [tile for tile in _candidates(C, 56) if tile[0] * tile[2] == 256 * tile[1] and tile[0] <= 2]
    tiles = tuple(
        (*t, p, s) for t, p, s in product(shapes, (1, 2, 3, 4, 6, 8), (1, 2)) if 8 <= t[1] * p <= 16
    )
    yield Slot("backward (rows, warps, columns, programs, stages)", table, key, tiles, 1)


def _candidates(C: int, max_values: int) -> Iterator[tuple[int, int, int]]:
    """(rows, warps, columns) with 8 to `max_values` values per thread, at most a quarter of them unused."""
    for rows, warps, columns in product((1, 2, 4), (1, 2, 4, 8), (256, 512, 1024, 2048)):
        tiles = -(-C // columns)
        values = rows * columns * tiles // (32 * warps)
        if (
            warps <= rows * columns // 256
            and 8 <= values <= max_values
            and tiles * columns <= max(256, 1.34 * C)
        ):
            yield rows, warps, columns


_SAMPLES = (
    {"shape": (2, 5, 111)},
    {"shape": (1, 3)},
    {"shape": (300, 59), "bias": False},  # a program has several rows one after another
    {"shape": (7, 768)},
    {"shape": (2, 1600)},
    {"shape": (0, 64)},
)
_LAUNCHES = [_norm_forward_kernel], [_norm_backward_kernel]
_BENCHMARK_SHAPES = tuple(
    {"shape": (rows, C)} for rows in (65536, 16384) for C in (768, 1024, 1280, 1600, 2048, 4096, 8192)
)

LAYER_NORM = Op(
    name="layer_norm",
    family="layer_norm",
    implementations={"triton": layer_norm, "torch": F.layer_norm},
    make=_inputs,
    cost=_cost,
    samples=(*_SAMPLES, {"shape": (5, 33), "weight": False, "bias": False}),
    launches=_LAUNCHES,
    large_sample={"shape": (4099, 1600)},
    benchmark_shapes=_BENCHMARK_SHAPES,
    # The add needs more registers, so its shapes are the harder test: here one width is enough.
    production_shapes=({"shape": (65536, 768)},),
    slots=_slots,
)
ADD_LAYER_NORM = Op(
    name="add_layer_norm",
    family="layer_norm",
    implementations={"triton": add_layer_norm, "torch": add_layer_norm_reference},
    make=_add_inputs,
    cost=_cost,
    samples=(*_SAMPLES, {"shape": (5, 111), "mixed": True}),
    launches=_LAUNCHES,
    large_sample={"shape": (4099, 1600)},
    benchmark_shapes=({"shape": (65536, 768), "mixed": True}, *_BENCHMARK_SHAPES),
    # First the dtypes of training, then one width for each tile.
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
    make=_mixed_inputs,
    cost=_mixed_cost,
    samples=(
        {"shape": (2, 5, 111)},
        {"shape": (1, 3)},
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
