# mypy: allow-untyped-defs, allow-incomplete-defs
# (a Triton kernel's arguments have no Python types)
"""Attention of one new token against a cache of keys and values: a step of generation.

For each head, over the keys of the sequence:

    s = q k^T / sqrt(D)        o = softmax(s) v        lse = logsumexp(s)

Several programs share the keys of a head. From the o_i and lse_i of program i, a second kernel computes

    o = sum_i(w_i o_i) / sum_i(w_i)        w_i = exp(lse_i - max_j(lse_j))

There is no backward: this operation is for inference only.

Source: Vaswani et al., 2017, https://arxiv.org/abs/1706.03762; Dao et al., 2023 (Flash-Decoding),
https://pytorch.org/blog/flash-decoding/
"""

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import check_head_size, head_constants
from kernels.op import (
    INTERPRETER,
    LOG2E,
    UNTUNED,
    Cost,
    Op,
    Slot,
    autocast_dtype,
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

MAX_SPLITS = 32
LOWEST = tl.constexpr(-1e38)  # below every score, but finite: -inf - -inf would be NaN


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None = None) -> Tensor:
    """q (B, H, D), caches (B, H, T, D), lengths (B,) int64 -> (B, H, D), for D from 16 to 128.

    Sequence b attends to its first lengths[b] keys, or to all T without lengths. Positions beyond are never
    read. Values in lengths are not checked, because that would wait for the GPU: each must be at least 1, and
    more than T counts as T. q and the caches must have one dtype. Under autocast they are first cast to the
    autocast dtype; the result has the same dtype. Raises ValueError for bad arguments.
    """
    _check("decode_attention", q, k_cache, v_cache, lengths)
    check_head_size("decode_attention", "q", q)
    dtype = autocast_dtype(q)
    return _forward_op(q.to(dtype), k_cache.to(dtype), v_cache.to(dtype), lengths)


def decode_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """`decode_attention` by PyTorch's `F.scaled_dot_product_attention`. Unused keys must be finite too."""
    mask = None
    if lengths is not None:
        mask = (torch.arange(k_cache.size(2), device=q.device) < lengths[:, None])[:, None, None]
    out = F.scaled_dot_product_attention(q[:, :, None], k_cache, v_cache, attn_mask=mask)
    return out[:, :, 0]


def decode_attention_flash(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """`decode_attention` by the flash-attn package, in fp16 or bf16 on a GPU."""
    from flash_attn import flash_attn_with_kvcache

    _check("decode_attention", q, k_cache, v_cache, lengths)
    dtype = autocast_dtype(q)
    k, v = (cache.to(dtype).transpose(1, 2) for cache in (k_cache, v_cache))
    sizes = k_cache.size(2) if lengths is None else lengths.int()
    out = flash_attn_with_kvcache(q.to(dtype)[:, None], k, v, cache_seqlens=sizes)
    return out[:, 0]


def _check(name: str, q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None) -> None:
    check_tensors(name, q=q, k_cache=k_cache, v_cache=v_cache)
    B, H, D = q.shape if q.dim() == 3 else (-1, -1, -1)
    if k_cache.dim() != 4 or k_cache.shape != (B, H, k_cache.shape[2], D) or k_cache.shape[2] < 1:
        raise ValueError(
            f"{name}: q {tuple(q.shape)} and k_cache {tuple(k_cache.shape)} must be (B, H, D) and "
            "(B, H, T, D) with T at least 1"
        )
    if v_cache.shape != k_cache.shape:
        raise ValueError(
            f"{name}: k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)} must have one shape"
        )
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(
            f"{name}: q is {q.dtype}, k_cache {k_cache.dtype} and v_cache {v_cache.dtype}; "
            "they must have one dtype"
        )
    if lengths is None:
        return
    if lengths.shape != (B,) or lengths.dtype != torch.int64 or lengths.device != q.device:
        raise ValueError(
            f"{name}: lengths is {tuple(lengths.shape)} {lengths.dtype} on {lengths.device}; "
            f"q {tuple(q.shape)} needs ({B},) torch.int64 on {q.device}"
        )


@jit
def _load(X, row, d, stride, end, D: tl.constexpr):
    """X[row, d] in fp32, masked to 0 from row `end` and column D on."""
    mask = (row < end)[:, None]
    if d.shape[0] != D:
        mask = mask & (d < D)[None, :]
    return tl.load(X + row.to(tl.int64)[:, None] * stride + d[None, :], mask=mask, other=0).to(tl.float32)


# One query reuses nothing, so tensor cores do not help: the time is the time of reading the cache once. A
# small batch has fewer heads than the GPU has multiprocessors. So the keys of a head are split over several
# programs, as in Flash-Decoding. With several splits, `_combine_kernel` averages their outputs in a fixed
# order: the bits are the same every run.
@jit
def _split_kernel(
    Q,  # (B, H, D) in
    K,  # (B, H, T, D) in
    V,  # (B, H, T, D) in
    LENGTHS,  # (B,) in, int64, or None if all are T
    OUT,  # (B, H, splits, D) out, contiguous: fp32, or with one split the result
    LSE,  # (B, H, splits) out, fp32, base 2
    q_batch_stride,
    q_head_stride,
    k_batch_stride,
    k_head_stride,
    k_stride,  # of T
    v_batch_stride,
    v_head_stride,
    v_stride,
    T,
    H,
    splits,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    split = program % splits
    batch = (program // splits // H).to(tl.int64)
    head = (program // splits % H).to(tl.int64)
    # The length stays on the device, and each program finds its keys here. So the launch is the same for
    # every token, and a CUDA graph can replay it.
    length = T if LENGTHS is None else tl.minimum(tl.load(LENGTHS + batch), T).to(tl.int32)
    keys_per_split = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    end = tl.minimum((split + 1) * keys_per_split, length)

    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    q = tl.load(Q + batch * q_batch_stride + head * q_head_stride + d, mask=d < D, other=0)
    q = q.to(tl.float32)[None, :] * (scale * LOG2E)
    K += batch * k_batch_stride + head * k_head_stride
    V += batch * v_batch_stride + head * v_head_stride
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    l_i = tl.zeros((BLOCK_N,), tl.float32)
    m_i = tl.full((BLOCK_N,), LOWEST, tl.float32)
    # The online softmax of attention.py, separately for each row of the tile, so that the loop has no
    # reduction across warps. The rows are merged after the loop.
    for start_n in tl.range(split * keys_per_split, end, BLOCK_N, num_stages=STAGES):
        k = _load(K, start_n + n, d, k_stride, end, D)
        v = _load(V, start_n + n, d, v_stride, end, D)
        s = tl.where(start_n + n < end, tl.sum(q * k, 1), -float("inf"))
        m_ij = tl.maximum(m_i, s)
        p = tl.exp2(s - m_ij)
        alpha = tl.exp2(m_i - m_ij)
        l_i = l_i * alpha + p
        acc = acc * alpha[:, None] + p[:, None] * v
        m_i = m_ij

    m = tl.max(m_i, 0)
    alpha = tl.exp2(m_i - m)
    denominator = tl.sum(l_i * alpha, 0)
    # A split may have no keys. Then out is 0 and lse is LOWEST, so `_combine_kernel` gives it weight 0.
    denominator = tl.where(denominator == 0, 1.0, denominator)
    out = tl.sum(acc * alpha[:, None], 0) / denominator
    tl.store(OUT + program.to(tl.int64) * D + d, round_to(out, OUT.dtype.element_ty), mask=d < D)
    tl.store(LSE + program, m + tl.log2(denominator))


@jit
def _combine_kernel(
    PARTS,  # (B, H, splits, D) in, fp32, contiguous
    LSE,  # (B, H, splits) in, fp32, base 2
    OUT,  # (B, H, D) out, contiguous
    splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    lse = tl.load(LSE + head * splits + s, mask=s < splits, other=-float("inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))
    mask = (s < splits)[:, None] & (d < D)[None, :]
    parts = tl.load(PARTS + (head * splits + s)[:, None] * D + d[None, :], mask=mask, other=0)
    out = tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(OUT + head * D + d, round_to(out, OUT.dtype.element_ty), mask=d < D)


class Tile(NamedTuple):
    n: int  # keys
    warps: int
    stages: int
    programs: int  # per multiprocessor: heads are split until there are as many


# architecture -> D up to 64, or up to 128 -> tile
#
# The tiles of sm_90 are predicted, not tuned. On an H200, with B=32, H=12, T=1024 and D=64, the tile (32, 4,
# 3, 4) took 0.033 ms, and PyTorch's attention took 0.029 ms. That tile split each of the 384 heads in two,
# and `_combine_kernel` costs about 0.003 ms (predicted). With 2 programs per multiprocessor the heads stay
# whole. But fewer programs must each have more loads in flight: two tiles of 16 KiB, which is 64 KiB per
# multiprocessor. Bandwidth times latency is 23 KiB.
TILES = {
    INTERPRETER: {64: Tile(16, 4, 1, 4), 128: Tile(16, 4, 1, 4)},
    UNTUNED: {64: Tile(32, 4, 3, 4), 128: Tile(16, 4, 3, 4)},
    90: {64: Tile(64, 4, 4, 2), 128: Tile(32, 4, 4, 2)},
}


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch_forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None) -> Tensor:
    out = _fake_forward(q, k_cache, v_cache, lengths)
    q, k, v = _dense(q), _dense(k_cache), _dense(v_cache)
    B, H, T, D = k.shape
    tiles = tiles_for(q, TILES)
    tile = tiles[key_for(tiles, D)]
    # Enough splits to fill the GPU, but each with at least one tile of keys.
    splits = -(-tile.programs * multiprocessors(q) // (B * H)) if B * H else 1
    splits = min(splits, -(-T // tile.n), MAX_SPLITS)
    parts = out if splits == 1 else q.new_empty(B, H, splits, D, dtype=torch.float32)
    lse = q.new_empty(B, H, splits, dtype=torch.float32)
    sizes = head_constants(D)
    if out.numel():
        launch(
            _split_kernel, (B * H * splits,),
            q, k, v, None if lengths is None else lengths.contiguous(), parts, lse,
            *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], T, H, splits, D**-0.5,
            **sizes, BLOCK_N=tile.n, STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if splits > 1:
            launch(
                _combine_kernel, (B * H,), parts, lse, out, splits, **sizes, BLOCK_S=MAX_SPLITS, num_warps=2
            )
    return out


def _fake_forward(q, k_cache, v_cache, lengths):
    return q.new_empty(q.shape)


_forward_op = operator("decode_attention", _launch_forward, _fake_forward)


def _inputs(
    dtype: torch.dtype, device: str, B: int, H: int, T: int, D: int, ragged: bool = True, **options: Any
) -> dict[str, Any]:
    """With `ragged`, sequence 0 has all T keys and the others a random number of them."""
    q, k, v = (torch.randn(B, H, n, D, device=device).to(dtype) for n in (1, T, T))
    call = {"q": q[:, :, 0], "k_cache": k, "v_cache": v, **options}
    if ragged:
        call["lengths"] = torch.randint(1, T + 1, (B,), device=device)
        call["lengths"][:1] = T
    return call


def _cost(q: Tensor, k_cache: Tensor, v_cache: Tensor, **_: Any) -> Cost:
    """If every sequence fills the cache."""
    return Cost(2 * q.nbytes + k_cache.nbytes + v_cache.nbytes, 0, 4 * k_cache.numel(), 0)


def _slots(q: Tensor, **_: Any) -> Iterator[Slot]:
    table = tiles_for(q, TILES)
    width = key_for(table, q.shape[-1])
    # A thread has 16 or 32 values of a tile. More would spill, and fewer leave too few loads in flight.
    settings = product((16, 32), (2, 4, 8), (3, 4), (2, 3, 4))
    tiles = tuple(
        Tile(values * 32 * warps // width, warps, stages, programs)
        for values, warps, stages, programs in settings
    )
    yield Slot("(n, warps, stages, programs)", table, width, tiles)


DECODE_ATTENTION = Op(
    name="decode_attention",
    family="attention",
    implementations={
        "triton": decode_attention,
        "torch": decode_attention_reference,
        "flash_attn": decode_attention_flash,
    },
    make=_inputs,
    cost=_cost,
    samples=(
        {"B": 2, "H": 2, "T": 97, "D": 24},
        {"B": 1, "H": 1, "T": 1, "D": 16},
        {"B": 3, "H": 4, "T": 17, "D": 64},
        {"B": 1, "H": 1, "T": 200, "D": 128},
        {"B": 5, "H": 3, "T": 64, "D": 80},
        {"B": 2, "H": 1, "T": 33, "D": 16, "ragged": False},
    ),
    launches=([_split_kernel, _combine_kernel], []),
    large_sample={"B": 16, "H": 12, "T": 1000, "D": 64},
    benchmark_shapes=tuple(
        dict(zip("BHTD", sizes)) | {"ragged": False}
        for sizes in (
            (32, 12, 1024, 64),
            (1, 12, 1024, 64),
            (8, 12, 1024, 64),
            (128, 12, 1024, 64),
            (32, 16, 1024, 128),
            (1, 12, 16384, 64),
            (8, 25, 1024, 64),
        )
    ),
    production_shapes=(
        {"B": 32, "H": 12, "T": 1024, "D": 64, "ragged": False},
        {"B": 1, "H": 12, "T": 1024, "D": 64},
        {"B": 128, "H": 12, "T": 1024, "D": 64},
        {"B": 8, "H": 20, "T": 1024, "D": 80},
        {"B": 8, "H": 16, "T": 1024, "D": 128},
        {"B": 128, "H": 16, "T": 1024, "D": 128},
        {"B": 8, "H": 12, "T": 1024, "D": 64, "dtype": torch.float32},
    ),
    slots=_slots,
    differentiable=False,
)
