# mypy: allow-untyped-defs, allow-incomplete-defs
# (a Triton kernel's arguments have no Python types)
"""What may replace the kernels of kernels/attention.py: `python -m bench.sweep attention` chooses, on a GPU.

The winner moves there, the others are deleted. The mathematics, the layouts and the names are those of that
file; dropout is left out until one has won.

Forward (`forward`): the maximum is taken before the scores are scaled, a multiplication an element less; with
descriptors, tiles come through the tensor memory accelerator of sm_90.

Backward:

- `two_kernels` is what is shipped, 7 products, with descriptors or with other tiles.
- `head_owned`: a program owns a whole head, 5 products. It walks the blocks of keys and, for each, the
  queries from the diagonal on; dk and dv stay in registers. The dq of a head does not: at T=1024 and D=64 its
  256 KiB are more than a multiprocessor's shared memory, and the registers are taken. So dq is summed in
  memory that is the program's own and is used again for its next head: 35 MB at T=1024 with one program on
  each of 132 multiprocessors, which the L2 cache holds. The first block of keys stores, the next add (an
  addition that returns nothing does not wait), and the block on the diagonal, the last to reach its queries,
  writes the result. To every address one program adds, in the order of the keys, with a barrier after each
  block: the same bits every run.
- `atomic`: a program owns a block of keys, 5 products, and adds dq to fp32 zeros with atomics, in whatever
  order programs run: not the same bits every run. Zeros before and a conversion after cost a pass each.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.attention import (
    LOG2E,
    TILES,
    Tile,
    _backward,
    _constants,
    _dense,
    _finished,
    _forward,
    _forward_like,
    _load,
    _store,
    _where,
)
from kernels.op import INTERPRETER, architecture, dot, jit, launch, multiprocessors, round_to, tl

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # as in kernels.op: the rest of bench works without Triton
    TensorDescriptor = None


@jit
def _tile(X, ROWS, batch, part, head, first, rows, d, stride, T, D: tl.constexpr, MASK: tl.constexpr):
    """Rows from `first` of one head, by pointer (X is the head's) or by descriptor; zero from row T on."""
    if ROWS is None:
        x = _load(X + tl.cast(first, tl.int64) * stride, rows, d, stride, T - first, D, MASK)
    elif part is None:
        x = ROWS.load([batch, first, head, 0]).reshape(rows.shape[0], d.shape[0])
    else:
        x = ROWS.load([batch, first, part, head, 0]).reshape(rows.shape[0], d.shape[0])
    return x


@jit
def _forward_step(
    q, K, V, ROWS, batch, head, n, m, d, first, stride, acc, total, top, scale2, T,
    D: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    k = _tile(K, ROWS, batch, 1, head, first, n, d, stride, T, D, DIAGONAL)
    s = dot(q, tl.trans(k))
    if DIAGONAL:
        seen = m[:, None] >= first + n[None, :]
        new = tl.maximum(top, tl.max(tl.where(seen, s, -float("inf")), 1) * scale2)
        p = tl.where(seen, tl.exp2(s * scale2 - new[:, None]), 0.0)
    else:
        new = tl.maximum(top, tl.max(s, 1) * scale2)
        p = tl.exp2(s * scale2 - new[:, None])
    fade = tl.exp2(top - new)
    total = total * fade + tl.sum(p, 1)
    v = _tile(V, ROWS, batch, 2, head, first, n, d, stride, T, D, DIAGONAL)
    acc = dot(round_to(p, v.dtype), v, acc * fade[:, None])
    return acc, total, new


@jit
def _forward_kernel(
    QKV,  # (B, T, 3, H, D) in
    ROWS_M,  # descriptors of the same, BLOCK_M and BLOCK_N rows of a head, or None
    ROWS_N,
    OUT,  # (B, T, H, D) out, contiguous
    LSE,  # (B, H, T) out, fp32, base 2
    batch_stride,
    stride,
    part_stride,
    head_stride,
    T,
    H,
    blocks,
    scale,  # positive
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    batch, head, first_m = _where(blocks, H, BLOCK_M, True)
    Q = QKV + batch * batch_stride + head.to(tl.int64) * head_stride
    K = Q + part_stride
    V = K + part_stride
    m = first_m + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    scale2 = scale * LOG2E
    in_batch = batch.to(tl.int32)

    rows = tl.arange(0, BLOCK_M)
    q = _tile(Q, ROWS_M, in_batch, 0, head, first_m, rows, d, stride, T, D, True)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    for first in tl.range(0, first_m, BLOCK_N, num_stages=STAGES):
        acc, total, top = _forward_step(
            q, K, V, ROWS_N, in_batch, head, n, m, d, first, stride, acc, total, top, scale2, T, D, False
        )
    for first in tl.range(first_m, tl.minimum(first_m + BLOCK_M, T), BLOCK_N, num_stages=1):
        acc, total, top = _forward_step(
            q, K, V, ROWS_N, in_batch, head, n, m, d, first, stride, acc, total, top, scale2, T, D, True
        )
    out = OUT + (batch * T + first_m) * H * D + head * D
    _store(out, acc / total[:, None], rows, d, H * D, T - first_m, D)
    tl.store(LSE + (batch * H + head) * T + m, top + tl.log2(total), mask=m < T)


@jit
def _delta_kernel(
    OUT,  # (B, T, H, D) in, contiguous
    DOUT,  # (B, T, H, D) in
    DELTA,  # (B, H, T) out, fp32
    DQ,  # (B, H, blocks * BLOCK_M, BLOCK_D) out, fp32: zeros; or None
    dout_batch_stride,
    dout_stride,
    dout_head_stride,
    T,
    H,
    blocks,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    batch, head, first_m = _where(blocks, H, BLOCK_M, False)
    rows = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    left = T - first_m
    do = DOUT + batch * dout_batch_stride + head.to(tl.int64) * dout_head_stride
    do = _load(do + first_m.to(tl.int64) * dout_stride, rows, d, dout_stride, left, D, True)
    o = _load(OUT + (batch * T + first_m) * H * D + head * D, rows, d, H * D, left, D, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(DELTA + (batch * H + head) * T + first_m + rows, delta, mask=rows < left)
    if DQ is not None:
        DQ += ((batch * H + head) * blocks * BLOCK_M + first_m) * BLOCK_D
        zero = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        tl.store(DQ + rows[:, None] * BLOCK_D + d[None, :], zero)


@jit
def _convert_kernel(
    DQ,  # (B, H, blocks * BLOCK_M, BLOCK_D) in, fp32
    DQKV,  # (B, T, 3, H, D) out, contiguous: its q
    T,
    H,
    blocks,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    batch, head, first_m = _where(blocks, H, BLOCK_M, False)
    rows = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    DQ += ((batch * H + head) * blocks * BLOCK_M + first_m) * BLOCK_D
    dq = tl.load(DQ + rows[:, None] * BLOCK_D + d[None, :]) * scale
    _store(DQKV + (batch * T + first_m) * 3 * H * D + head * D, dq, rows, d, 3 * H * D, T - first_m, D)


@jit
def _rows_of(X, m, first, T, MASK: tl.constexpr):
    """X[first + m], fp32, zero from T on."""
    return tl.load(X + first + m, mask=m < T - first, other=0) if MASK else tl.load(X + first + m)


@jit
def _keys_step(
    k, v, Q, DO, ROWS_Q, ROWS_DO, batch, head, LSE, DELTA, m, n, d, first, stride, dout_stride, dk, dv,
    scale2, T, D: tl.constexpr, DIAGONAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One block of queries for a block of keys: dk, dv, and ds (keys, queries) for whoever wants dq."""
    q = _tile(Q, ROWS_Q, batch, 0, head, first, m, d, stride, T, D, MASK)
    do = _tile(DO, ROWS_DO, batch, None, head, first, m, d, dout_stride, T, D, MASK)
    p = tl.exp2(dot(k, tl.trans(q)) * scale2 - _rows_of(LSE, m, first, T, MASK)[None, :])
    if DIAGONAL:
        p = tl.where(first + m[None, :] >= n[:, None], p, 0.0)
    dv = dot(round_to(p, do.dtype), do, dv)
    dp = dot(v, tl.trans(do))
    ds = round_to(p * (dp - _rows_of(DELTA, m, first, T, MASK)[None, :]), q.dtype)
    dk = _finished(dot(ds, q, dk))
    return dk, dv, ds


@jit
def _dq_step(
    q, do, K, V, ROWS_N, batch, head, n, m, d, first, stride, dq, lse, delta, scale2, T,
    D: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    k = _tile(K, ROWS_N, batch, 1, head, first, n, d, stride, T, D, DIAGONAL)
    v = _tile(V, ROWS_N, batch, 2, head, first, n, d, stride, T, D, DIAGONAL)
    p = tl.exp2(dot(q, tl.trans(k)) * scale2 - lse[:, None])
    if DIAGONAL:
        p = tl.where(m[:, None] >= first + n[None, :], p, 0.0)
    dp = dot(do, tl.trans(v))
    return dot(round_to(p * (dp - delta[:, None]), k.dtype), k, dq)


@jit
def _dq_kernel(
    QKV,  # (B, T, 3, H, D) in
    ROWS_M,  # descriptors: BLOCK_M and BLOCK_N rows of a head of the same, BLOCK_M of DOUT
    ROWS_N,
    ROWS_DO,
    OUT,  # (B, T, H, D) in, contiguous
    DOUT,  # (B, T, H, D) in
    LSE,  # (B, H, T) in, fp32, base 2
    DELTA,  # (B, H, T) out, fp32
    DQKV,  # (B, T, 3, H, D) out, contiguous: its q
    batch_stride,
    stride,
    part_stride,
    head_stride,
    dout_batch_stride,
    dout_stride,
    dout_head_stride,
    T,
    H,
    blocks,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    batch, head, first_m = _where(blocks, H, BLOCK_M, True)
    K = QKV + batch * batch_stride + head.to(tl.int64) * head_stride + part_stride
    V = K + part_stride
    m = first_m + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    scale2 = scale * LOG2E
    in_batch = batch.to(tl.int32)

    rows = tl.arange(0, BLOCK_M)
    left = T - first_m
    q = _tile(K - part_stride, ROWS_M, in_batch, 0, head, first_m, rows, d, stride, T, D, True)
    DO = DOUT + batch * dout_batch_stride + head.to(tl.int64) * dout_head_stride
    do = _tile(DO, ROWS_DO, in_batch, None, head, first_m, rows, d, dout_stride, T, D, True)
    o = _load(OUT + (batch * T + first_m) * H * D + head * D, rows, d, H * D, left, D, True)
    lse = tl.load(LSE + (batch * H + head) * T + m, mask=m < T, other=0)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(DELTA + (batch * H + head) * T + m, delta, mask=m < T)

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in tl.range(0, first_m, BLOCK_N, num_stages=STAGES):
        dq = _dq_step(
            q, do, K, V, ROWS_N, in_batch, head, n, m, d, first, stride, dq, lse, delta, scale2, T, D, False
        )
    for first in tl.range(first_m, tl.minimum(first_m + BLOCK_M, T), BLOCK_N, num_stages=1):
        dq = _dq_step(
            q, do, K, V, ROWS_N, in_batch, head, n, m, d, first, stride, dq, lse, delta, scale2, T, D, True
        )
    _store(DQKV + (batch * T + first_m) * 3 * H * D + head * D, dq * scale, rows, d, 3 * H * D, left, D)


@jit
def _keys_kernel(
    QKV,  # (B, T, 3, H, D) in
    ROWS_M,  # descriptors: BLOCK_M and BLOCK_N rows of a head of the same, BLOCK_M of DOUT; or None
    ROWS_N,
    ROWS_DO,
    DOUT,  # (B, T, H, D) in
    LSE,  # (B, H, T) in, fp32, base 2
    DELTA,  # (B, H, T) in, fp32
    DQ,  # (B, H, T up to a multiple of BLOCK_M, BLOCK_D) in and out, fp32: added to; or None
    DQKV,  # (B, T, 3, H, D) out, contiguous: its k and v
    batch_stride,
    stride,
    part_stride,
    head_stride,
    dout_batch_stride,
    dout_stride,
    dout_head_stride,
    T,
    H,
    blocks,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,  # T is a multiple of BLOCK_N
):
    batch, head, first_n = _where(blocks, H, BLOCK_N, False)
    Q = QKV + batch * batch_stride + head.to(tl.int64) * head_stride
    K = Q + part_stride
    V = K + part_stride
    DO = DOUT + batch * dout_batch_stride + head.to(tl.int64) * dout_head_stride
    LSE += (batch * H + head) * T
    DELTA += (batch * H + head) * T
    m = tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    scale2 = scale * LOG2E
    in_batch = batch.to(tl.int32)

    rows = tl.arange(0, BLOCK_N)
    k = _tile(K, ROWS_N, in_batch, 1, head, first_n, rows, d, stride, T, D, True)
    v = _tile(V, ROWS_N, in_batch, 2, head, first_n, rows, d, stride, T, D, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    own = m[:, None] * BLOCK_D + d[None, :]
    if DQ is not None:
        DQ += (batch * H + head) * (tl.cdiv(T, BLOCK_M) * BLOCK_M) * BLOCK_D
    for first in tl.range(first_n, tl.minimum(first_n + BLOCK_N, T), BLOCK_M, num_stages=1):
        dk, dv, ds = _keys_step(
            k, v, Q, DO, ROWS_M, ROWS_DO, in_batch, head, LSE, DELTA, m, n, d, first, stride, dout_stride,
            dk, dv, scale2, T, D, True, not EVEN,
        )  # fmt: skip
        if DQ is not None:
            tl.atomic_add(DQ + first * BLOCK_D + own, dot(tl.trans(ds), k), sem="relaxed")
    for first in tl.range(first_n + BLOCK_N, T, BLOCK_M, num_stages=STAGES):
        dk, dv, ds = _keys_step(
            k, v, Q, DO, ROWS_M, ROWS_DO, in_batch, head, LSE, DELTA, m, n, d, first, stride, dout_stride,
            dk, dv, scale2, T, D, False, not EVEN,
        )  # fmt: skip
        if DQ is not None:
            tl.atomic_add(DQ + first * BLOCK_D + own, dot(tl.trans(ds), k), sem="relaxed")
    DK = DQKV + ((batch * T + first_n) * 3 + 1) * H * D + head * D
    _store(DK, dk * scale, rows, d, 3 * H * D, T - first_n, D)
    _store(DK + H * D, dv, rows, d, 3 * H * D, T - first_n, D)


@jit
def _head_kernel(
    QKV,  # (B, T, 3, H, D) in
    ROWS_M,  # descriptors: BLOCK_M and BLOCK_N rows of a head of the same, BLOCK_M of DOUT; or None
    ROWS_N,
    ROWS_DO,
    DOUT,  # (B, T, H, D) in
    LSE,  # (B, H, T) in, fp32, base 2
    DELTA,  # (B, H, T) in, fp32
    DQ,  # (programs, T up to a multiple of BLOCK_M, BLOCK_D) scratch, fp32
    DQKV,  # (B, T, 3, H, D) out, contiguous
    batch_stride,
    stride,
    part_stride,
    head_stride,
    dout_batch_stride,
    dout_stride,
    dout_head_stride,
    T,
    H,
    heads,  # B * H
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,  # T is a multiple of BLOCK_N
):
    m = tl.arange(0, BLOCK_M)
    rows = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    scale2 = scale * LOG2E
    own = m[:, None] * BLOCK_D + d[None, :]
    DQ += tl.program_id(0).to(tl.int64) * (tl.cdiv(T, BLOCK_M) * BLOCK_M) * BLOCK_D
    for index in tl.range(tl.program_id(0), heads, tl.num_programs(0), num_stages=1):
        in_batch = index // H
        head = index % H
        batch = tl.cast(in_batch, tl.int64)
        Q = QKV + batch * batch_stride + tl.cast(head, tl.int64) * head_stride
        K = Q + part_stride
        V = K + part_stride
        DO = DOUT + batch * dout_batch_stride + tl.cast(head, tl.int64) * dout_head_stride
        OF_HEAD = tl.cast(index, tl.int64) * T
        OUT = DQKV + batch * T * 3 * H * D + head * D
        for first_n in tl.range(0, T, BLOCK_N, num_stages=1):
            n = first_n + rows
            k = _tile(K, ROWS_N, in_batch, 1, head, first_n, rows, d, stride, T, D, True)
            v = _tile(V, ROWS_N, in_batch, 2, head, first_n, rows, d, stride, T, D, True)
            dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            for first in tl.range(first_n, tl.minimum(first_n + BLOCK_N, T), BLOCK_M, num_stages=1):
                dk, dv, ds = _keys_step(
                    k, v, Q, DO, ROWS_M, ROWS_DO, in_batch, head, LSE + OF_HEAD, DELTA + OF_HEAD, m, n, d,
                    first, stride, dout_stride, dk, dv, scale2, T, D, True, not EVEN,
                )  # fmt: skip
                dq = dot(tl.trans(ds), k)
                if first_n > 0:
                    # past the first level of cache, where nothing of an earlier head may be met
                    dq += tl.load(DQ + first * BLOCK_D + own, cache_modifier=".cg")
                at = OUT + tl.cast(first, tl.int64) * 3 * H * D
                _store(at, dq * scale, m, d, 3 * H * D, T - first, D)
            for first in tl.range(first_n + BLOCK_N, T, BLOCK_M, num_stages=STAGES):
                dk, dv, ds = _keys_step(
                    k, v, Q, DO, ROWS_M, ROWS_DO, in_batch, head, LSE + OF_HEAD, DELTA + OF_HEAD, m, n, d,
                    first, stride, dout_stride, dk, dv, scale2, T, D, False, not EVEN,
                )  # fmt: skip
                dq = dot(tl.trans(ds), k)
                # two masks, since Triton 3.6 cannot pipeline a loop with a branch
                tl.store(DQ + first * BLOCK_D + own, dq, mask=(own >= 0) & (first_n == 0))
                tl.atomic_add(DQ + first * BLOCK_D + own, dq, mask=(own >= 0) & (first_n > 0), sem="relaxed")
            DK = OUT + (tl.cast(first_n, tl.int64) * 3 + 1) * H * D
            _store(DK, dk * scale, rows, d, 3 * H * D, T - first_n, D)
            _store(DK + H * D, dv, rows, d, 3 * H * D, T - first_n, D)
            # What this block of keys added is in place before another thread, in the next, goes on from it.
            tl.debug_barrier()


class Pair(NamedTuple):
    """The tiles of dq, and of dk and dv."""

    dq: Tile
    keys: Tile


def _reach(qkv: Tensor, dout: Tensor | None, tile: Tile, descriptors: bool) -> tuple[Any, Any, Any]:
    """Descriptors of BLOCK_M rows of qkv, BLOCK_N rows of it, BLOCK_M rows of dout; or None each.

    Raises ValueError where the tensor memory accelerator cannot read: it wants 16 bytes of alignment.
    """
    if not descriptors:
        return None, None, None
    for name, x in (("qkv", qkv), ("dout", dout)):
        if x is not None and (x.data_ptr() % 16 or any(s * x.element_size() % 16 for s in x.stride()[:-1])):
            raise ValueError(f"{name} with strides {x.stride()} is not aligned to 16 bytes")
    D = _constants(qkv, tile)["BLOCK_D"]
    in_qkv = [
        TensorDescriptor(qkv, list(qkv.shape), list(qkv.stride()), [1, n, 1, 1, D]) for n in (tile.m, tile.n)
    ]
    of_dout = None
    if dout is not None:
        of_dout = TensorDescriptor(dout, list(dout.shape), list(dout.stride()), [1, tile.m, 1, D])
    return (*in_qkv, of_dout)


def forward(
    qkv: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    tile: Tile | None = None,
    descriptors: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `kernels.attention._forward`, without dropout and with a scale above 0."""
    assert seed is None and softmax_scale > 0
    tile = tile or _default(qkv)
    out, lse = _forward_like(qkv, None, 0.0, softmax_scale)
    qkv = _dense(qkv)
    B, T, _, H, _D = qkv.shape
    blocks = -(-T // tile.m)
    reach = _reach(qkv, None, tile, descriptors)[:2]
    launch(
        _forward_kernel, (B * blocks * H,),
        qkv, *reach, out, lse, *qkv.stride()[:4], T, H, blocks, softmax_scale, **_constants(qkv, tile),
    )  # fmt: skip
    return out, lse


def two_kernels(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    tile: Pair | None = None,
    descriptors: bool = True,
) -> Tensor:
    """As `kernels.attention._backward`, without dropout; so are the two below."""
    assert seed is None
    tile = tile or Pair(_default(qkv), _default(qkv, keys=True))
    dqkv, delta = qkv.new_empty(qkv.shape), torch.empty_like(lse)
    qkv, dout = _dense(qkv), _dense(dout)
    B, T, _, H, _D = qkv.shape
    strides = *qkv.stride()[:4], *dout.stride()[:3]
    blocks = -(-T // tile.dq.m)
    launch(
        _dq_kernel, (B * blocks * H,),
        qkv, *_reach(qkv, dout, tile.dq, descriptors), out, dout, lse, delta, dqkv, *strides,
        T, H, blocks, softmax_scale, **_constants(qkv, tile.dq),
    )  # fmt: skip
    blocks = -(-T // tile.keys.n)
    launch(
        _keys_kernel, (B * blocks * H,),
        qkv, *_reach(qkv, dout, tile.keys, descriptors), dout, lse, delta, None, dqkv, *strides,
        T, H, blocks, softmax_scale, **_constants(qkv, tile.keys), EVEN=T % tile.keys.n == 0,
    )  # fmt: skip
    return dqkv


def head_owned(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    tile: Tile | None = None,
    descriptors: bool = False,
) -> Tensor:
    assert seed is None
    tile = tile or _default(qkv, keys=True)
    dqkv, delta = qkv.new_empty(qkv.shape), torch.empty_like(lse)
    qkv, dout = _dense(qkv), _dense(dout)
    B, T, _, H, _D = qkv.shape
    constants = _constants(qkv, tile)
    _delta(out, dout, delta, None, tile, constants)
    # 4 warps with up to 255 registers a thread: two programs a multiprocessor; 8 warps: one
    programs = min(B * H, multiprocessors(qkv) * max(1, 8 // tile.warps))
    scratch = qkv.new_empty(programs, -(-T // tile.m) * tile.m, constants["BLOCK_D"], dtype=torch.float32)
    launch(
        _head_kernel, (programs,),
        qkv, *_reach(qkv, dout, tile, descriptors), dout, lse, delta, scratch, dqkv,
        *qkv.stride()[:4], *dout.stride()[:3], T, H, B * H, softmax_scale,
        **constants, EVEN=T % tile.n == 0,
    )  # fmt: skip
    return dqkv


def atomic(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    tile: Tile | None = None,
    descriptors: bool = False,
) -> Tensor:
    """Not the same bits every run."""
    assert seed is None
    tile = tile or _default(qkv, keys=True)
    dqkv, delta = qkv.new_empty(qkv.shape), torch.empty_like(lse)
    qkv, dout = _dense(qkv), _dense(dout)
    B, T, _, H, _D = qkv.shape
    constants = _constants(qkv, tile)
    rows = -(-T // tile.m) * tile.m
    dq = qkv.new_empty(B, H, rows, constants["BLOCK_D"], dtype=torch.float32)
    _delta(out, dout, delta, dq, tile, constants)
    blocks = -(-T // tile.n)
    launch(
        _keys_kernel, (B * blocks * H,),
        qkv, *_reach(qkv, dout, tile, descriptors), dout, lse, delta, dq, dqkv,
        *qkv.stride()[:4], *dout.stride()[:3], T, H, blocks, softmax_scale,
        **constants, EVEN=T % tile.n == 0,
    )  # fmt: skip
    sizes = {k: constants[k] for k in ("D", "BLOCK_D", "BLOCK_M")}
    blocks = rows // tile.m
    launch(_convert_kernel, (B * blocks * H,), dq, dqkv, T, H, blocks, softmax_scale, **sizes, num_warps=4)
    return dqkv


def _delta(
    out: Tensor, dout: Tensor, delta: Tensor, dq: Tensor | None, tile: Tile, constants: dict[str, Any]
) -> None:
    B, T, H, _D = out.shape
    sizes = {k: constants[k] for k in ("D", "BLOCK_D", "BLOCK_M")}
    blocks = -(-T // tile.m)
    launch(
        _delta_kernel, (B * blocks * H,),
        out, dout, delta, dq, *dout.stride()[:3], T, H, blocks, **sizes, num_warps=4,
    )  # fmt: skip


def _default(qkv: Tensor, keys: bool = False) -> Tile:
    """A tile that is right anywhere; the sweep gives others."""
    if architecture(qkv) == INTERPRETER:
        return Tile(16, 32, 4, 1) if keys else Tile(32, 16, 4, 1)
    return Tile(64, 64, 8 if qkv.shape[-1] > 64 else 4, 2)


class Candidate(NamedTuple):
    name: str
    function: Any  # as kernels.attention._forward or _backward, and `tile`, `descriptors`
    tile: Any
    descriptors: bool = False
    same_bits: bool = True

    def __str__(self) -> str:
        pairs = self.tile if isinstance(self.tile, Pair) else (self.tile,)
        sizes = " + ".join(f"{t.m}x{t.n} {t.warps}w {t.stages}s" for t in pairs)
        return f"{self.name}{', descriptors' if self.descriptors else ''}: {sizes}"

    def run(self, *tensors: Any) -> Any:
        return self.function(*tensors, tile=self.tile, descriptors=self.descriptors)


def _shipped_forward(*tensors: Any, tile: Any, descriptors: bool) -> tuple[Tensor, Tensor]:
    return _forward(*tensors)


def _shipped_backward(*tensors: Any, tile: Any, descriptors: bool) -> Tensor:
    return _backward(*tensors)


def forwards(qkv: Tensor) -> list[Candidate]:
    """What is shipped, then what compiles without spills in loops for its GPU (`python -m bench.aot`)."""
    return _table("forward", qkv)


def backwards(qkv: Tensor) -> list[Candidate]:
    return _table("backward", qkv)


def _table(direction: str, qkv: Tensor) -> list[Candidate]:
    arch, width = architecture(qkv), 64 if qkv.shape[-1] <= 64 else 128
    found = [
        Candidate(name, globals()[name], tile, descriptors, name != "atomic")
        for name, descriptors, tiles in CANDIDATES.get((direction, arch, width), ())
        for tile in tiles
    ]
    first, second, third = TILES[arch][width]
    if direction == "forward":
        return [Candidate("shipped", _shipped_forward, first), *found]
    return [Candidate("shipped", _shipped_backward, Pair(second, third)), *found]


def _tiles(*sizes: tuple[int, int, int, int]) -> tuple[Tile, ...]:
    return tuple(Tile(*s) for s in sizes)


def _pairs(dq: tuple[Tile, ...], keys: tuple[Tile, ...]) -> tuple[Pair, ...]:
    """One of the two kernels changes at a time, from the first of each: what wins is put together by hand."""
    return tuple(dict.fromkeys([Pair(q, keys[0]) for q in dq] + [Pair(dq[0], k) for k in keys]))


# (direction, architecture, D) -> (name, descriptors, tiles).
CANDIDATES: dict[tuple[str, int, int], tuple[tuple[str, bool, tuple[Any, ...]], ...]] = {
    ("forward", 90, 64): (
        ("forward", False, _tiles((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 3), (64, 128, 4, 2))),
        ("forward", True, _tiles(
            (128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 4, 4), (128, 128, 8, 2), (128, 64, 8, 3),
            (64, 64, 4, 3), (64, 32, 4, 3), (64, 128, 4, 2),
        )),
    ),
    ("backward", 90, 64): (
        ("two_kernels", False, _pairs(
            _tiles((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (64, 32, 4, 3)),
            _tiles((64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2), (64, 128, 8, 3)),
        )),
        ("two_kernels", True, _pairs(
            _tiles((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 128, 8, 2), (64, 32, 4, 3)),
            _tiles((64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2), (64, 128, 8, 3)),
        )),
        ("head_owned", False, _tiles((64, 64, 8, 2))),
        ("head_owned", True, _tiles((64, 128, 8, 2), (64, 64, 8, 2), (64, 64, 8, 3))),
        ("atomic", False, _tiles((64, 64, 4, 2), (64, 128, 8, 2))),
        ("atomic", True, _tiles((64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2), (64, 128, 8, 3))),
    ),
    ("forward", 80, 64): (
        ("forward", False, _tiles(
            (128, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 3),
        )),
    ),
    ("backward", 80, 64): (
        ("two_kernels", False, _pairs(
            _tiles((64, 32, 4, 2), (64, 64, 4, 2), (64, 32, 4, 3), (128, 32, 8, 2), (128, 64, 8, 2)),
            _tiles((32, 64, 4, 2), (64, 64, 8, 2), (32, 64, 4, 3), (32, 128, 8, 2), (64, 128, 8, 2)),
        )),
        ("atomic", False, _tiles((32, 64, 4, 2), (64, 64, 8, 2), (32, 128, 8, 2), (32, 128, 8, 3))),
    ),
}  # fmt: skip
