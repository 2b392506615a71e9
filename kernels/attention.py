# mypy: allow-untyped-defs, allow-incomplete-defs
# (a Triton kernel's arguments have no Python types)
"""Causal multi-head attention over the packed projection of queries, keys and values.

Forward, for each batch element and head, with z = 1 / (1 - dropout_p) or, for a dropped weight, 0:

    s = q k^T / sqrt(D)        p = softmax(s) over the keys up to the query's own position
    o = (p * z) v              lse = logsumexp(s)

Backward, from the upstream gradient do:

    p = exp(s - lse)           dp = (do v^T) * z        delta = rowsum(do * o) = rowsum(dp * p)
    ds = p * (dp - delta)      dq = ds k / sqrt(D)      dk = ds^T q / sqrt(D)      dv = (p * z)^T do

`qkv` is the output of one `nn.Linear(C, 3C)`, viewed as (B, T, 3, H, D). The kernels read it by its strides,
without a transpose or a copy, and write its gradient in the same layout. The T x T matrices s and p exist
only tile by tile: forward saves lse, and backward computes p again. The kernels work in base 2, so the value
they save is lse / ln 2.

Source: Vaswani et al., 2017, https://arxiv.org/abs/1706.03762; Dao, 2023 (FlashAttention-2),
https://arxiv.org/abs/2307.08691; Salmon et al., 2011 (Philox), https://doi.org/10.1145/2063384.2063405
"""

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.op import (
    INTERPRETED,
    INTERPRETER,
    LOG2E,
    Cost,
    Op,
    Slot,
    TensorDescriptor,
    architecture,
    autocast_dtype,
    check_tensors,
    dot,
    jit,
    key_for,
    launch,
    operator,
    round_to,
    tl,
)

MIN_D, MAX_D = 16, 128


def causal_attention(qkv: Tensor, dropout_p: float = 0.0) -> Tensor:
    """qkv (B, T, 3, H, D) -> (B, T, H, D): each position attends to itself and to all earlier ones.

    T can be any length, and D from 16 to 128. `dropout_p` is the probability of dropping an attention weight.
    Each call with dropout draws one seed from the device's torch generator. Under autocast qkv is first
    cast to the autocast dtype; the result has the same dtype. Raises ValueError for bad arguments.
    """
    _check("causal_attention", qkv, dropout_p)
    check_head_size("causal_attention", "qkv", qkv)
    seed = torch.randint(1 << 62, (1,), device=qkv.device) if dropout_p else None
    return _forward_op(qkv.to(autocast_dtype(qkv)), seed, float(dropout_p))[0]


def causal_attention_reference(qkv: Tensor, dropout_p: float = 0.0) -> Tensor:
    """`causal_attention` with PyTorch's `F.scaled_dot_product_attention`, for any D."""
    q, k, v = qkv.transpose(1, 3).unbind(2)  # each (B, H, T, D), a view
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
    return out.transpose(1, 2)


def causal_attention_flash(qkv: Tensor, dropout_p: float = 0.0) -> Tensor:
    """`causal_attention` with the flash-attn package, in fp16 or bf16 on a GPU."""
    from flash_attn import flash_attn_qkvpacked_func

    _check("causal_attention", qkv, dropout_p)
    qkv = qkv.to(autocast_dtype(qkv))
    return flash_attn_qkvpacked_func(qkv, dropout_p, causal=True)


def _check(name: str, qkv: Tensor, dropout_p: float) -> None:
    check_tensors(name, qkv=qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"{name}: qkv {tuple(qkv.shape)} must be (B, T, 3, H, D)")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{name}: dropout_p={dropout_p} must be at least 0 and less than 1")


def check_head_size(name: str, argument: str, tensor: Tensor) -> None:
    D = tensor.shape[-1]
    if not MIN_D <= D <= MAX_D:
        raise ValueError(
            f"{name}: {argument} {tuple(tensor.shape)} has D={D}; D must be from {MIN_D} to {MAX_D}"
        )


def used_by_auto(arch: int, D: int, dtype: torch.dtype) -> bool:
    """Whether kernels="auto" uses these kernels for heads of size D.

    Only sm_90 was measured. Timed alone on an H200, these kernels are 1.33x as fast as PyTorch's (cuDNN) at
    D=64, T=1024, and 0.84x at D=128, T=2048. A compiled training step at D=64 takes the same time with both
    (bench/LOG.md). The fp32 tiles are meant for checking, not for speed.
    """
    return MIN_D <= D <= MAX_D and dtype != torch.float32 and not (arch == 90 and D > 64)


@jit
def _program_position(blocks, H, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """(batch, head, first row of the block) of this program."""
    # The heads of a batch element run side by side, so its keys and values stay in the L2 cache. Blocks
    # with the most work start first, and the rest fill the gaps at the end. The last queries see the most
    # keys, so blocks of queries start with the last. The first keys are seen by the most queries, so blocks
    # of keys start with the first.
    program = tl.program_id(0)
    batch = program // (blocks * H)
    block = program % (blocks * H) // H
    if LAST_FIRST:
        block = blocks - 1 - block
    return batch.to(tl.int64), program % H, block * BLOCK


@jit
def _load(X, row, d, stride, rows_left, D: tl.constexpr, MASK: tl.constexpr):
    """X[row, d], 0 from row rows_left and column D on. Without MASK, all rows are below rows_left."""
    pointers = X + row[:, None] * stride + d[None, :]
    if d.shape[0] != D:
        x = tl.load(pointers, mask=(row < rows_left)[:, None] & (d < D)[None, :], other=0)
    elif MASK:
        x = tl.load(pointers, mask=(row < rows_left)[:, None], other=0)
    else:
        x = tl.load(pointers)
    return x


@jit
def _store(X, x, row, d, stride, rows_left, D: tl.constexpr):
    mask = (row < rows_left)[:, None] & (d < D)[None, :]
    tl.store(X + row[:, None] * stride + d[None, :], round_to(x, X.dtype.element_ty), mask=mask)


@jit
def _dropout_factor(seed, m, n, flat_head, dropout_p):
    """0 with probability dropout_p, else 1 / (1 - dropout_p), for the weight of query m on key n."""
    # Philox is counter-based: the random number depends on (seed, m, n, flat_head) alone. So backward draws
    # the same mask with different tiles in a different order, and no T x T mask is stored.
    zero = (m + n) * 0  # gives every argument the shape of the tile
    random, _, _, _ = tl.philox(seed, m + zero, n + zero, flat_head + zero, zero, n_rounds=7)
    return tl.where(tl.uint_to_uniform_float(random) >= dropout_p, 1 / (1 - dropout_p), 0.0)


@jit
def _wait_for_product(x):
    """Returns the accumulator x once its product is complete."""
    # Triton overlaps a product with the next iteration. On sm_90 ptxas sometimes cannot track that (warning
    # C7515) and waits after every wgmma instruction. An empty instruction that reads x makes Triton wait only
    # once, at the end of the product.
    if not INTERPRETED:
        x = tl.inline_asm_elementwise("", "=f,0", [x], dtype=tl.float32, is_pure=True, pack=1)
    return x


@jit
def _load_tile(
    X, DESC, batch, part, head, start, rows, d, stride, T, D: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Rows start, start + 1, ... of one head's q, k or v (part 0, 1, 2): (rows, BLOCK_D).

    With MASK or a descriptor, rows from T on are 0.
    """
    # With the descriptor DESC, the tensor memory accelerator loads the tile. It computes the addresses, which
    # saves registers and instructions.
    if DESC is None:
        x = _load(X + tl.cast(start, tl.int64) * stride, rows, d, stride, T - start, D, MASK)
    else:
        x = DESC.load([batch, start, part, head, 0]).reshape(rows.shape[0], d.shape[0])
    return x


@jit
def _forward_step(
    q, K, V, DESC, batch, head, n, m, d, start_n, stride, acc, l_i, m_i, scale2, T,
    seed, flat_head, dropout_p, D: tl.constexpr, DIAGONAL: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Updates acc, l_i and m_i with one block of keys and values."""
    k = _load_tile(K, DESC, batch, 1, head, start_n, n, d, stride, T, D, DIAGONAL)
    s = dot(q, tl.trans(k))
    # Online softmax. s is not scaled yet. With t = s * scale2, each query has, over the keys so far,
    #     m_i = max(t)        l_i = sum(2^(t - m_i))        acc = sum(2^(t - m_i) v)
    # and at the end o = acc / l_i. No exponent is above 0, so nothing overflows. This block may raise the
    # maximum from m_i to m_ij. Since 2^(t - m_ij) = 2^(t - m_i) 2^(m_i - m_ij), multiplying both sums by
    # alpha = 2^(m_i - m_ij) is the same as having subtracted m_ij from the start.
    #
    # The scale is positive, so we can take the maximum before we scale. One multiply-add then computes the
    # exponent t - m_ij = s * scale2 - m_ij.
    if DIAGONAL:
        mask = m[:, None] >= start_n + n[None, :]
        m_ij = tl.maximum(m_i, tl.max(tl.where(mask, s, -float("inf")), 1) * scale2)
        p = tl.where(mask, tl.exp2(s * scale2 - m_ij[:, None]), 0.0)
    else:
        m_ij = tl.maximum(m_i, tl.max(s, 1) * scale2)
        p = tl.exp2(s * scale2 - m_ij[:, None])
    alpha = tl.exp2(m_i - m_ij)
    l_i = l_i * alpha + tl.sum(p, 1)
    # Dropout comes after the softmax: it changes acc, but not the denominator l_i.
    if DROPOUT:
        p *= _dropout_factor(seed, m[:, None], start_n + n[None, :], flat_head, dropout_p)
    v = _load_tile(V, DESC, batch, 2, head, start_n, n, d, stride, T, D, DIAGONAL)
    acc = _wait_for_product(dot(round_to(p, v.dtype), v, acc * alpha[:, None]))
    return acc, l_i, m_ij


# A program owns a block of queries of one head and walks over the keys.
#
# `blocks` is not specialised: with blocks = 1 the loop below the diagonal is empty, and the ptxas of Triton
# 3.6 crashes on that at D = 16.
@jit(do_not_specialize=("blocks",))
def _attention_forward_kernel(
    QKV,  # (B, T, 3, H, D) in
    DESC,  # a descriptor of QKV for tiles of BLOCK_M rows, which requires BLOCK_N = BLOCK_M; or None
    OUT,  # (B, T, H, D) out, contiguous
    LSE,  # (B, H, T) out, fp32, base 2
    SEED,  # (1,) in, int64, or None without dropout
    batch_stride,
    stride,  # from one position to the next
    part_stride,  # from q to k, and from k to v
    head_stride,
    T,
    H,
    blocks,
    scale,  # above 0
    dropout_p,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    batch, head, start_m = _program_position(blocks, H, BLOCK_M, True)
    Q = QKV + batch * batch_stride + head.to(tl.int64) * head_stride
    K = Q + part_stride
    V = K + part_stride
    m = start_m + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    seed = 0 if SEED is None else tl.load(SEED)
    # A descriptor needs 32-bit indices.
    batch32 = batch.to(tl.int32)
    flat_head = batch32 * H + head
    scale2 = scale * LOG2E  # exp(s * scale) = 2^(s * scale2)

    rows = tl.arange(0, BLOCK_M)
    q = _load_tile(Q, DESC, batch32, 0, head, start_m, rows, d, stride, T, D, True)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    m_i = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    # Blocks below the diagonal need no mask, so they have a separate loop, which Triton can pipeline.
    for start_n in tl.range(0, start_m, BLOCK_N, num_stages=STAGES):
        acc, l_i, m_i = _forward_step(
            q, K, V, DESC, batch32, head, n, m, d, start_n, stride, acc, l_i, m_i, scale2, T,
            seed, flat_head, dropout_p, D, False, SEED is not None,
        )  # fmt: skip
    for start_n in tl.range(start_m, tl.minimum(start_m + BLOCK_M, T), BLOCK_N, num_stages=1):
        acc, l_i, m_i = _forward_step(
            q, K, V, DESC, batch32, head, n, m, d, start_n, stride, acc, l_i, m_i, scale2, T,
            seed, flat_head, dropout_p, D, True, SEED is not None,
        )  # fmt: skip
    out = OUT + (batch * T + start_m) * H * D + head * D
    _store(out, acc / l_i[:, None], rows, d, H * D, T - start_m, D)
    # log2(sum(2^t)) is all that backward needs to compute p again.
    tl.store(LSE + (batch * H + head) * T + m, m_i + tl.log2(l_i), mask=m < T)


@jit
def _dq_step(
    q, do, K, V, n, m, d, start_n, stride, dq, lse, delta, scale2, T, seed, flat_head, dropout_p,
    D: tl.constexpr, DIAGONAL: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Adds one block of keys to dq."""
    k = _load(K + tl.cast(start_n, tl.int64) * stride, n, d, stride, T - start_n, D, DIAGONAL)
    v = _load(V + tl.cast(start_n, tl.int64) * stride, n, d, stride, T - start_n, D, DIAGONAL)
    p = tl.exp2(dot(q, tl.trans(k)) * scale2 - lse[:, None])
    if DIAGONAL:
        p = tl.where(m[:, None] >= start_n + n[None, :], p, 0.0)
    dp = dot(do, tl.trans(v))
    if DROPOUT:
        dp *= _dropout_factor(seed, m[:, None], start_n + n[None, :], flat_head, dropout_p)
    ds = p * (dp - delta[:, None])
    return dot(round_to(ds, k.dtype), k, dq)


# Backward is two kernels: dq is a sum over keys, but dk and dv are sums over queries. One kernel could keep
# one of these in registers. For the other it would need atomics, whose order changes from run to run. So a
# program of this kernel owns a block of queries, a program of the next kernel owns a block of keys, and the
# bits are the same every run. The price is 7 matrix products instead of 5, because both kernels compute q k^T
# and do v^T.
@jit(do_not_specialize=("blocks",))
def _attention_dq_kernel(
    QKV,  # (B, T, 3, H, D) in
    OUT,  # (B, T, H, D) in, contiguous
    DOUT,  # (B, T, H, D) in
    LSE,  # (B, H, T) in, fp32, base 2
    DELTA,  # (B, H, T) out, fp32
    DQKV,  # (B, T, 3, H, D) out, contiguous: only the q part is written
    SEED,  # (1,) in, int64, or None without dropout
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
    dropout_p,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    batch, head, start_m = _program_position(blocks, H, BLOCK_M, True)
    Q = QKV + batch * batch_stride + head.to(tl.int64) * head_stride
    K = Q + part_stride
    V = K + part_stride
    m = start_m + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    seed = 0 if SEED is None else tl.load(SEED)
    flat_head = batch.to(tl.int32) * H + head
    scale2 = scale * LOG2E

    rows = tl.arange(0, BLOCK_M)
    rows_left = T - start_m
    q = _load(Q + start_m.to(tl.int64) * stride, rows, d, stride, rows_left, D, True)
    do = DOUT + batch * dout_batch_stride + head.to(tl.int64) * dout_head_stride
    do = _load(do + start_m.to(tl.int64) * dout_stride, rows, d, dout_stride, rows_left, D, True)
    o = _load(OUT + (batch * T + start_m) * H * D + head * D, rows, d, H * D, rows_left, D, True)
    lse = tl.load(LSE + (batch * H + head) * T + m, mask=m < T, other=0)
    # The gradient of softmax is ds = p * (dp - sum_n p_n dp_n). That sum runs over all keys, but
    #     sum_n p_n dp_n = sum_n p_n z_n (do . v_n) = do . sum_n p_n z_n v_n = do . o
    # needs only the D elements of do and o. We compute it once here and save it for the next kernel.
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(DELTA + (batch * H + head) * T + m, delta, mask=m < T)

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start_n in tl.range(0, start_m, BLOCK_N, num_stages=STAGES):
        dq = _dq_step(
            q, do, K, V, n, m, d, start_n, stride, dq, lse, delta, scale2, T,
            seed, flat_head, dropout_p, D, False, SEED is not None,
        )  # fmt: skip
    for start_n in tl.range(start_m, tl.minimum(start_m + BLOCK_M, T), BLOCK_N, num_stages=1):
        dq = _dq_step(
            q, do, K, V, n, m, d, start_n, stride, dq, lse, delta, scale2, T,
            seed, flat_head, dropout_p, D, True, SEED is not None,
        )  # fmt: skip
    _store(DQKV + (batch * T + start_m) * 3 * H * D + head * D, dq * scale, rows, d, 3 * H * D, rows_left, D)


@jit
def _dkdv_step(
    k, v, Q, DO, LSE, DELTA, m, n, d, start_m, stride, dout_stride, dk, dv, scale2, T,
    seed, flat_head, dropout_p,
    D: tl.constexpr, DIAGONAL: tl.constexpr, DROPOUT: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Adds one block of queries to dk and dv."""
    rows_left = T - start_m
    q = _load(Q + tl.cast(start_m, tl.int64) * stride, m, d, stride, rows_left, D, MASK)
    do = _load(DO + tl.cast(start_m, tl.int64) * dout_stride, m, d, dout_stride, rows_left, D, MASK)
    # With MASK, rows from T on load as 0. There p is 1, but do and ds are 0, so dv and dk gain nothing.
    if MASK:
        lse = tl.load(LSE + start_m + m, mask=m < rows_left, other=0)
        delta = tl.load(DELTA + start_m + m, mask=m < rows_left, other=0)
    else:
        lse = tl.load(LSE + start_m + m)
        delta = tl.load(DELTA + start_m + m)
    # Here s, p and ds are transposed, (keys, queries), so dv = p do and dk = ds q need no transpose.
    p = tl.exp2(dot(k, tl.trans(q)) * scale2 - lse[None, :])
    if DIAGONAL:
        p = tl.where(start_m + m[None, :] >= n[:, None], p, 0.0)
    if DROPOUT:
        z = _dropout_factor(seed, start_m + m[None, :], n[:, None], flat_head, dropout_p)
        dv = dot(round_to(p * z, do.dtype), do, dv)
        dp = dot(v, tl.trans(do)) * z
    else:
        dv = dot(round_to(p, do.dtype), do, dv)
        dp = dot(v, tl.trans(do))
    ds = p * (dp - delta[None, :])
    dk = _wait_for_product(dot(round_to(ds, q.dtype), q, dk))
    return dk, dv


# A program owns a block of keys of one head and walks over the queries that see them.
@jit(do_not_specialize=("blocks",))
def _attention_dkdv_kernel(
    QKV,  # (B, T, 3, H, D) in
    DOUT,  # (B, T, H, D) in
    LSE,  # (B, H, T) in, fp32, base 2
    DELTA,  # (B, H, T) in, fp32
    DQKV,  # (B, T, 3, H, D) out, contiguous: only the k and v parts are written
    SEED,  # (1,) in, int64, or None without dropout
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
    dropout_p,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,  # T is a multiple of BLOCK_N
):
    batch, head, start_n = _program_position(blocks, H, BLOCK_N, False)
    Q = QKV + batch * batch_stride + head.to(tl.int64) * head_stride
    K = Q + part_stride
    V = K + part_stride
    DO = DOUT + batch * dout_batch_stride + head.to(tl.int64) * dout_head_stride
    LSE += (batch * H + head) * T
    DELTA += (batch * H + head) * T
    m = tl.arange(0, BLOCK_M)
    n = start_n + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    seed = 0 if SEED is None else tl.load(SEED)
    flat_head = batch.to(tl.int32) * H + head
    scale2 = scale * LOG2E

    rows = tl.arange(0, BLOCK_N)
    rows_left = T - start_n
    k = _load(K + start_n.to(tl.int64) * stride, rows, d, stride, rows_left, D, True)
    v = _load(V + start_n.to(tl.int64) * stride, rows, d, stride, rows_left, D, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start_m in tl.range(start_n, tl.minimum(start_n + BLOCK_N, T), BLOCK_M, num_stages=1):
        dk, dv = _dkdv_step(
            k, v, Q, DO, LSE, DELTA, m, n, d, start_m, stride, dout_stride, dk, dv, scale2, T,
            seed, flat_head, dropout_p, D, True, SEED is not None, not EVEN,
        )  # fmt: skip
    for start_m in tl.range(start_n + BLOCK_N, T, BLOCK_M, num_stages=STAGES):
        dk, dv = _dkdv_step(
            k, v, Q, DO, LSE, DELTA, m, n, d, start_m, stride, dout_stride, dk, dv, scale2, T,
            seed, flat_head, dropout_p, D, False, SEED is not None, not EVEN,
        )  # fmt: skip
    DK = DQKV + ((batch * T + start_n) * 3 + 1) * H * D + head * D
    _store(DK, dk * scale, rows, d, 3 * H * D, rows_left, D)
    _store(DK + H * D, dv, rows, d, 3 * H * D, rows_left, D)


class Tile(NamedTuple):
    """m queries by n keys.

    Programs of forward and dq own m queries and walk over keys, n at a time: m is a multiple of n. Programs
    of dk and dv own n keys and walk over queries, m at a time: n is a multiple of m.
    """

    m: int
    n: int
    warps: int
    stages: int


# TILES[architecture][64 or 128] = tiles of (forward, dq, dk and dv) for D up to 64 or 128, in half precision.
# Tiles that are not tuned were chosen by the registers and spills that bench.aot reports.
_SMALL = (Tile(32, 16, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1))
TILES = {
    INTERPRETER: {64: _SMALL, 128: _SMALL},
    80: {  # not tuned
        64: (Tile(128, 32, 4, 3), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
        128: (Tile(64, 64, 4, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    },
    89: {  # not tuned
        64: (Tile(128, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
        128: (Tile(64, 64, 4, 2), Tile(64, 32, 8, 1), Tile(32, 64, 8, 1)),
    },
    90: {
        64: (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),  # tuned on H200, D=64, T=1024
        128: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),  # not tuned
    },
    100: {  # not tuned
        64: (Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
        128: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
    },
}
# Tiles of forward with tensor descriptors. They are used up to D = 64, in half precision and without dropout.
# Tuned on H200: 0.314 ms instead of 0.349 with pointers (D=64, T=1024, 768 heads).
DESCRIPTOR_TILES = {INTERPRETER: Tile(16, 16, 4, 1), 90: Tile(64, 64, 4, 3)}
# Tiles of dk and dv up to D = 64, without dropout, if T is not a multiple of n or D not a power of 2. Then
# loads need masks, which need registers: a tile of 64 x 64 spills inside the loop with Triton 3.6, 3.8 and
# 3.9. Not tuned.
MASKED_TILES = {90: Tile(32, 64, 4, 3)}
# Dropout's random numbers need registers too, so it has its own tiles. They are the same on every
# GPU, and not tuned.
DROPOUT_TILES = {
    64: (Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
    128: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
}
# Tensor cores cannot multiply fp32 without rounding it to tf32, so fp32 is slow and only meant for checking.
FP32_TILES = (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1))


def _choose_tiles(qkv: Tensor, seed: Tensor | None) -> tuple[Tile, Tile, Tile]:
    """The tiles of (forward, dq, dk and dv)."""
    arch = architecture(qkv)
    if qkv.dtype == torch.float32 and arch != INTERPRETER:
        return FP32_TILES
    T, D = qkv.shape[1], qkv.shape[-1]
    tiles = TILES[arch] if seed is None or arch == INTERPRETER else DROPOUT_TILES
    forward, dq, dkdv = tiles[key_for(tiles, D)]
    masked = T % dkdv.n > 0 or D & (D - 1) > 0
    if seed is None and D <= 64 and masked:
        dkdv = MASKED_TILES.get(arch, dkdv)
    return forward, dq, dkdv


def head_constants(D: int) -> dict[str, int]:
    """D and its padding to a power of 2. `tl.dot` needs at least 16."""
    return {"D": D, "BLOCK_D": max(16, 1 << (D - 1).bit_length())}


def _constants(D: int, tile: Tile) -> dict[str, Any]:
    return head_constants(D) | {
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "STAGES": tile.stages,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _dense(x: Tensor) -> Tensor:
    """x, or a copy if the last dimension is strided or if offsets inside a tile could exceed 32 bits."""
    return x if x.stride(-1) == 1 and x.stride(1) < 1 << 24 else x.contiguous()


def descriptor(qkv: Tensor, seed: Tensor | None) -> tuple[Any, Tile] | None:
    """A descriptor of qkv and its tile for forward, or None if pointers are faster or required."""
    tile = DESCRIPTOR_TILES.get(architecture(qkv))
    D, size = qkv.shape[-1], qkv.element_size()
    if tile is None or seed is not None or qkv.dtype == torch.float32 or D > 64:
        return None
    # The tensor memory accelerator needs 16-byte aligned rows and strides, none of them 0.
    if qkv.data_ptr() % 16 or any(s <= 0 or s * size % 16 for s in qkv.stride()[:-1]):
        return None
    rows = [1, tile.m, 1, 1, head_constants(D)["BLOCK_D"]]
    return TensorDescriptor(qkv, list(qkv.shape), list(qkv.stride()), rows), tile


def _launch_forward(qkv: Tensor, seed: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor]:
    """-> out (B, T, H, D), lse (B, H, T): fp32, in base 2."""
    out, lse = _fake_forward(qkv, seed, dropout_p)
    qkv = _dense(qkv)
    B, T, _, H, D = qkv.shape
    if out.numel():
        desc, tile = descriptor(qkv, seed) or (None, _choose_tiles(qkv, seed)[0])
        blocks = -(-T // tile.m)
        launch(
            _attention_forward_kernel, (B * blocks * H,),
            qkv, desc, out, lse, seed, *qkv.stride()[:4], T, H, blocks, D**-0.5, dropout_p,
            **_constants(D, tile),
        )  # fmt: skip
    return out, lse


def _launch_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, seed: Tensor | None, dropout_p: float
) -> Tensor:
    """-> dqkv (B, T, 3, H, D)."""
    dqkv, delta = qkv.new_empty(qkv.shape), torch.empty_like(lse)
    qkv, dout = _dense(qkv), _dense(dout)
    B, T, _, H, D = qkv.shape
    _, tile, dkdv_tile = _choose_tiles(qkv, seed)
    strides = *qkv.stride()[:4], *dout.stride()[:3]
    if out.numel():
        blocks = -(-T // tile.m)
        launch(
            _attention_dq_kernel, (B * blocks * H,),
            qkv, out, dout, lse, delta, dqkv, seed, *strides, T, H, blocks, D**-0.5, dropout_p,
            **_constants(D, tile),
        )  # fmt: skip
        blocks = -(-T // dkdv_tile.n)
        launch(
            _attention_dkdv_kernel, (B * blocks * H,),
            qkv, dout, lse, delta, dqkv, seed, *strides, T, H, blocks, D**-0.5, dropout_p,
            **_constants(D, dkdv_tile), EVEN=T % dkdv_tile.n == 0,
        )  # fmt: skip
    return dqkv


def _fake_forward(qkv, seed, dropout_p):
    B, T, _, H, D = qkv.shape
    return qkv.new_empty(B, T, H, D), qkv.new_empty(B, H, T, dtype=torch.float32)


def _fake_backward(dout, qkv, out, lse, seed, dropout_p):
    return qkv.new_empty(qkv.shape)


_forward_op = operator("causal_attention", _launch_forward, _fake_forward)
_backward_op = operator("causal_attention_backward", _launch_backward, _fake_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, seed, ctx.dropout_p = inputs
    ctx.save_for_backward(qkv, *output, seed)
    ctx.set_materialize_grads(False)  # lse gets no gradient: do not make zeros for it


def _backward(ctx: Any, dout: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return _backward_op(dout, *ctx.saved_tensors, ctx.dropout_p), None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _inputs(
    dtype: torch.dtype, device: str, B: int, T: int, H: int, D: int, expanded: bool = False, **options: Any
) -> dict[str, Any]:
    """With `expanded`, the batch has a stride of 0, which rules out descriptors."""
    qkv = torch.randn(1 if expanded else B, T, 3, H, D, device=device).to(dtype)
    return {"qkv": qkv.expand(B, T, 3, H, D), **options}


def _cost(qkv: Tensor, **_: Any) -> Cost:
    B, T, _parts, H, D = qkv.shape
    out = B * T * H * D * qkv.element_size()
    product = 2 * B * H * D * T * (T + 1) // 2
    return Cost(4 * out, 8 * out, 2 * product, 5 * product)


def _slots(qkv: Tensor, dropout_p: float = 0.0) -> Iterator[Slot]:
    """The entries of the tile tables that this call uses, with the tiles that bench.sweep tries.

    FP32_TILES, DROPOUT_TILES and MASKED_TILES are left out: bench.sweep does not tune them.
    """
    if qkv.dtype == torch.float32 or dropout_p:
        return
    arch = architecture(qkv)
    width = key_for(TILES[arch], qkv.shape[-1])
    entries, used = TILES[arch][width], _choose_tiles(qkv, None)
    by_descriptor = descriptor(qkv, None) is not None
    if by_descriptor:  # q, k and v have one block size
        tiles = tuple(Tile(m, m, *rest) for m, *rest in product((32, 64, 128), (4, 8), (2, 3, 4)))
        yield Slot("forward by descriptor (m, n, warps, stages)", DESCRIPTOR_TILES, arch, tiles)
    for index, name in enumerate(("forward", "dq", "dk and dv")):
        if (by_descriptor and name == "forward") or used[index] is not entries[index]:
            continue
        sizes = product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
        # A program's own block (keys for dk and dv, otherwise queries) must be a multiple of the other.
        valid = (t for t in sizes if (t[1] % t[0] if name == "dk and dv" else t[0] % t[1]) == 0)
        tiles = tuple(Tile(*t) for t in valid)
        yield Slot(f"{name} (m, n, warps, stages)", TILES[arch], width, tiles, index)


CAUSAL_ATTENTION = Op(
    name="causal_attention",
    family="attention",
    implementations={
        "triton": causal_attention,
        "torch": causal_attention_reference,
        "flash_attn": causal_attention_flash,
    },
    make=_inputs,
    cost=_cost,
    samples=(
        {"B": 1, "T": 33, "H": 1, "D": 24},
        {"B": 1, "T": 1, "H": 1, "D": 16},
        {"B": 2, "T": 2, "H": 3, "D": 64},
        {"B": 1, "T": 64, "H": 1, "D": 128},
        {"B": 2, "T": 34, "H": 2, "D": 80},
        {"B": 1, "T": 70, "H": 1, "D": 32},
        {"B": 2, "T": 18, "H": 1, "D": 20},
        {"B": 2, "T": 35, "H": 1, "D": 32, "expanded": True},
    ),
    launches=([_attention_forward_kernel], [_attention_dq_kernel, _attention_dkdv_kernel]),
    large_sample={"B": 4, "T": 1000, "H": 12, "D": 64},
    benchmark_shapes=tuple(
        dict(zip("BTHD", sizes))
        for sizes in (
            (64, 1024, 12, 64),
            (16, 2048, 16, 128),
            (8, 4096, 12, 64),
            (32, 1024, 12, 64),
            (16, 2048, 12, 64),
            (2, 16384, 12, 64),
            (8, 4096, 16, 128),
        )
    ),
    production_shapes=(
        {"B": 64, "T": 1024, "H": 12, "D": 64},
        {"B": 8, "T": 1024, "H": 12, "D": 128},
        {"B": 8, "T": 1024, "H": 12, "D": 64, "expanded": True},
        {"B": 8, "T": 1000, "H": 12, "D": 64},
        {"B": 8, "T": 64, "H": 12, "D": 16},
        {"B": 8, "T": 64, "H": 12, "D": 16, "expanded": True},
        {"B": 8, "T": 1000, "H": 20, "D": 80},
        {"B": 8, "T": 1024, "H": 12, "D": 64, "dropout_p": 0.1},
        {"B": 8, "T": 1000, "H": 12, "D": 80, "dropout_p": 0.1},
        {"B": 8, "T": 1024, "H": 12, "D": 128, "dtype": torch.float32},
    ),
    slots=_slots,
)
