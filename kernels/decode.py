# mypy: allow-untyped-defs, allow-incomplete-defs
# (a Triton kernel's arguments have no Python types)
"""Attention of one new token against a cache of keys and values: a step of generation.

    s = q k^T / sqrt(D) over the keys that the sequence has        o = softmax(s) v        per head

There is one query, so nothing is reused and no tensor core is of use: the time is that of reading the cache
once. A batch of few sequences has fewer heads than a GPU has multiprocessors, so the keys of a head are split
over several programs. Each gives its own normalised output and log-sum-exp (base 2, fp32), and a second
kernel weighs them in a fixed order: the same bits every run.

Within a program every row of the tile keeps an online softmax of its own, merged after the last tile: the
loop has no reduction across warps. How a sequence is cut depends on its length, which stays on the device:
the launch is the same for every token, so that a CUDA graph can replay it. A program without keys gives
weight 0.

Inference only: there is no backward.

Source: Vaswani et al., 2017, https://arxiv.org/abs/1706.03762; Dao et al., 2023 (Flash-Decoding),
https://pytorch.org/blog/flash-decoding/
"""

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

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

MIN_D, MAX_D = 16, 128
MAX_SPLITS = 32
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e38)  # below every score, and finite: the difference of two is no NaN


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None = None) -> Tensor:
    """q (B, H, D) against the first lengths[b] keys, or all, of caches (B, H, T, D) -> (B, H, D).

    lengths (B,) is int64 and stays on the device, so it is not checked: each is to be at least 1, and beyond
    T it counts as T. What the caches hold from lengths[b] on is never read. D from 16 to 128. Under autocast
    everything is cast to the autocast dtype, and that is the dtype of the result; otherwise q and the caches
    must share a dtype, which the result has. There is no gradient. Raises ValueError for what it cannot do.
    """
    _check("decode_attention", q, k_cache, v_cache, lengths)
    if not MIN_D <= q.shape[-1] <= MAX_D:
        raise ValueError(
            f"decode_attention: q {tuple(q.shape)} has D={q.shape[-1]}; D from {MIN_D} to {MAX_D} is allowed"
        )
    dtype = autocast_dtype(q)
    return _forward_op(q.to(dtype), k_cache.to(dtype), v_cache.to(dtype), lengths)


def decode_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """q (B, H, D), caches (B, H, T, D), lengths (B,) int64 -> (B, H, D), by `F.scaled_dot_product_attention`.

    Sequence b attends to the first lengths[b] of its T keys, at least one, without lengths to all; what lies
    beyond must be finite.
    """
    mask = None
    if lengths is not None:
        mask = (torch.arange(k_cache.size(2), device=q.device) < lengths[:, None])[:, None, None]
    out = F.scaled_dot_product_attention(q[:, :, None], k_cache, v_cache, attn_mask=mask)
    return out[:, :, 0]


def decode_attention_flash(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """The same by the flash-attn package: fp16 or bf16 on a GPU."""
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
    if v_cache.shape != k_cache.shape or len({t.dtype for t in (q, k_cache, v_cache)}) > 1:
        raise ValueError(
            f"{name}: v_cache {tuple(v_cache.shape)} {v_cache.dtype} must be as k_cache "
            f"{tuple(k_cache.shape)} {k_cache.dtype}, and q, {q.dtype}, of their dtype"
        )
    if lengths is None:
        return
    if lengths.shape != (B,) or lengths.dtype != torch.int64 or lengths.device != q.device:
        raise ValueError(
            f"{name}: lengths is {tuple(lengths.shape)} {lengths.dtype} on {lengths.device}; "
            f"q {tuple(q.shape)} needs ({B},) torch.int64 on {q.device}"
        )


@jit
def _load(X, row, d, stride, last, D: tl.constexpr):
    """X[row, d] in fp32, zero from row `last` and from column D on; rows from `last` on are never touched."""
    mask = (row < last)[:, None]
    if d.shape[0] != D:
        mask = mask & (d < D)[None, :]
    return tl.load(X + row.to(tl.int64)[:, None] * stride + d[None, :], mask=mask, other=0).to(tl.float32)


@jit
def _split_kernel(
    Q,  # (B, H, D) in
    K,  # (B, H, T, D) in
    V,  # (B, H, T, D) in
    LENGTHS,  # (B,) in, int64, or None where all are T
    OUT,  # (B, H, splits, D) out, contiguous: fp32 parts, or with one split the result
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
    length = T if LENGTHS is None else tl.minimum(tl.load(LENGTHS + batch), T).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    last = tl.minimum((split + 1) * share, length)

    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    q = tl.load(Q + batch * q_batch_stride + head * q_head_stride + d, mask=d < D, other=0)
    q = q.to(tl.float32)[None, :] * (scale * LOG2E)
    K += batch * k_batch_stride + head * k_head_stride
    V += batch * v_batch_stride + head * v_head_stride
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    top = tl.full((BLOCK_N,), LOWEST, tl.float32)
    for first in tl.range(split * share, last, BLOCK_N, num_stages=STAGES):
        k = _load(K, first + n, d, k_stride, last, D)
        v = _load(V, first + n, d, v_stride, last, D)
        s = tl.where(first + n < last, tl.sum(q * k, 1), -float("inf"))
        new = tl.maximum(top, s)
        p = tl.exp2(s - new)
        fade = tl.exp2(top - new)
        total = total * fade + p
        acc = acc * fade[:, None] + p[:, None] * v
        top = new

    highest = tl.max(top, 0)
    weight = tl.exp2(top - highest)
    total = tl.sum(total * weight, 0)
    total = tl.where(total == 0, 1.0, total)
    out = tl.sum(acc * weight[:, None], 0) / total
    tl.store(OUT + program.to(tl.int64) * D + d, round_to(out, OUT.dtype.element_ty), mask=d < D)
    tl.store(LSE + program, highest + tl.log2(total))


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
    """Keys a tile; programs that a multiprocessor should have, where the heads alone are too few."""

    n: int
    warps: int
    stages: int
    programs: int


# architecture -> D padded to 16 to 64 and to 128
#
# sm_90's are not tuned: they are predicted. On an H200, 32 x 12 x 1024 x 64, the tile (32, 4, 3, 4) took
# 0.033 ms and SDPA 0.029. It cut each of the 384 heads in two, and the second kernel costs about 0.003 ms
# (predicted). With 2 programs a multiprocessor the heads stay whole. Each of these few has to load more: two
# tiles of 16 KiB are on their way, 64 KiB a multiprocessor, and bandwidth times latency is 23 KiB.
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
    tile = tiles_for(q, TILES)[64 if D <= 64 else 128]
    wanted = -(-tile.programs * multiprocessors(q) // (B * H)) if B * H else 1
    splits = min(wanted, -(-T // tile.n), MAX_SPLITS)
    parts = out if splits == 1 else q.new_empty(B, H, splits, D, dtype=torch.float32)
    lse = q.new_empty(B, H, splits, dtype=torch.float32)
    sizes = {"D": D, "BLOCK_D": max(16, 1 << (D - 1).bit_length())}
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
    """Sequences of any length from 1 to T, of which the first has all; or all have all."""
    q, k, v = (torch.randn(B, H, n, D, device=device).to(dtype) for n in (1, T, T))
    call = {"q": q[:, :, 0], "k_cache": k, "v_cache": v, **options}
    if ragged:
        call["lengths"] = torch.randint(1, T + 1, (B,), device=device)
        call["lengths"][:1] = T
    return call


def _cost(q: Tensor, k_cache: Tensor, v_cache: Tensor, **_: Any) -> Cost:
    """With every sequence as long as the cache."""
    return Cost(2 * q.nbytes + k_cache.nbytes + v_cache.nbytes, 0, 4 * k_cache.numel(), 0)


def _run_all(q, k_cache, v_cache, lengths=None):
    _launch_forward(q, k_cache, v_cache, lengths)


def _slots(q: Tensor, **_: Any) -> Iterator[Slot]:
    width = 64 if q.shape[-1] <= 64 else 128
    # 16 or 32 values of a tile in a lane: more spill or fill the registers, fewer load too little ahead.
    settings = product((16, 32), (2, 4, 8), (3, 4), (2, 3, 4))
    tiles = tuple(
        Tile(values * 32 * warps // width, warps, stages, programs)
        for values, warps, stages, programs in settings
    )
    yield Slot("(n, warps, stages, programs)", tiles_for(q, TILES), width, tiles)


DECODE_ATTENTION = Op(
    name="decode_attention",
    family="attention",
    implementations={
        "triton": decode_attention,
        "torch": decode_attention_reference,
        "flash_attn": decode_attention_flash,
    },
    reference=decode_attention_reference,
    make=_inputs,
    cost=_cost,
    run_all=_run_all,
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
