# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"
# (a Triton kernel's arguments have no Python types)
# ruff: noqa: RUF005
# (Triton has no starred tuples)
"""The embedding of token ids, with a gradient that has the same bits every run.

Forward:

    y[i] = weight[id[i]]

Backward:

    dweight[v] = sum of dy[i] over all i with id[i] = v, in the order of i

Forward is PyTorch's gather, so torch.compile can fuse it with the operations that follow. Only backward is a
custom operator. PyTorch and Inductor would add the rows with atomics, in a different order every run, and a
sum of floats depends on the order.

Source: PyTorch's deterministic `index_put_`, which sorts the ids too, but has one warp for each id.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.op import (
    INTERPRETER,
    UNTUNED,
    Cost,
    Op,
    check_tensors,
    jit,
    launch,
    operator,
    round_to,
    tiles_for,
    tl,
)


def embedding(input: Tensor, weight: Tensor) -> Tensor:
    """`F.embedding`: input (...) of int64 or int32 ids from 0 to V - 1, weight (V, C) -> (..., C).

    The result and the gradient have the dtype of weight, also under autocast, as in PyTorch. The gradient is
    summed in fp32, always in the same order. Raises ValueError for bad arguments.
    """
    check_tensors("embedding", weight=weight)
    if input.dtype not in (torch.int64, torch.int32) or input.device != weight.device:
        raise ValueError(
            f"embedding: input is {input.dtype} on {input.device}; "
            f"it must be torch.int64 or torch.int32 on {weight.device}, where weight is"
        )
    if weight.dim() != 2:
        raise ValueError(f"embedding: weight {tuple(weight.shape)} must be (V, C)")
    return _Embedding.apply(input, weight)


def embedding_reference(input: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's `F.embedding`."""
    return F.embedding(input, weight)


# The ids are sorted, so equal ids form a run, and the rows of dy of a run add up to one row of dweight. The
# sorted list is cut into blocks of equal length, and each program sums the runs of one block. If a run
# crosses a border between blocks, each of its blocks leaves a partial sum, and `_embedding_combine_kernel`
# adds them up in order. So a frequent id costs no more than a rare one. All sizes depend on the number of ids
# alone, so nothing waits for the GPU.
@jit
def _embedding_sum_kernel(
    DY,  # (N, C) in
    IDS,  # (N,) in, int32, sorted
    ORDER,  # (N,) in, int64: the row of dy for each of IDS
    DW,  # (V, C) out: the rows of runs inside a block
    PARTS,  # (2, blocks, C) out, fp32: partial sums of the runs that enter and leave the block
    N,
    C,
    dy_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    block, blocks = tl.program_id(0), tl.num_programs(0)
    block_start = block * ROWS
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    previous_id = tl.load(IDS + tl.maximum(block_start - 1, 0))
    acc = tl.zeros((COLUMNS,), tl.float32)
    for start in range(block_start, tl.minimum(block_start + ROWS, N), AHEAD):
        # Load AHEAD rows before any is used: the addresses do not depend on where the runs end.
        dys = ()
        for j in tl.static_range(AHEAD):
            row = tl.load(ORDER + tl.minimum(start + j, N - 1))
            dys = dys + (tl.load(DY + row * dy_stride + col, mask=col < C, other=0).to(tl.float32),)
        for j in tl.static_range(AHEAD):
            i = start + j
            id = tl.load(IDS + tl.minimum(i, N - 1))
            run_ends = (i + 1 >= N) | (tl.load(IDS + tl.minimum(i + 1, N - 1)) != id)
            acc += dys[j]
            # Write the sum where the run ends or the block ends.
            if (i < N) & (run_ends | (i + 1 == block_start + ROWS)):
                enters = (block_start > 0) & (id == previous_id)
                if enters | (run_ends == 0):
                    part = tl.where(enters, block, blocks + block).to(tl.int64)
                    tl.store(PARTS + part * C + col, acc, mask=col < C)
                else:
                    gradient = round_to(acc, DW.dtype.element_ty)
                    tl.store(DW + id.to(tl.int64) * C + col, gradient, mask=col < C)
                acc = tl.zeros((COLUMNS,), tl.float32)


@jit
def _embedding_combine_kernel(
    IDS,  # (N,) in, int32, sorted
    PARTS,  # (2, blocks, C) in, fp32
    DW,  # (V, C) out: the rows of runs that cross a border
    N,
    C,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Adds up the run that leaves this block, if it starts in this block."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    border = (block + 1) * ROWS
    if border < N:
        id = tl.load(IDS + border)
        starts_here = (block == 0) | (tl.load(IDS + tl.maximum(block * ROWS - 1, 0)) != id)
        if starts_here & (tl.load(IDS + border - 1) == id):
            col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
            acc = tl.load(PARTS + (blocks + block).to(tl.int64) * C + col, mask=col < C, other=0)
            # The run enters the blocks that follow as long as their first id is the same.
            next_block = block + 1
            entered = BLOCKS
            while entered == BLOCKS:
                part = next_block + tl.arange(0, BLOCKS)
                same = tl.load(IDS + part.to(tl.int64) * ROWS, mask=part < blocks, other=-1) == id
                pointers = PARTS + part.to(tl.int64)[:, None] * C + col[None, :]
                acc += tl.sum(tl.load(pointers, mask=same[:, None] & (col < C)[None, :], other=0), 0)
                entered = tl.sum(same.to(tl.int32), 0)
                next_block += BLOCKS
            tl.store(DW + id.to(tl.int64) * C + col, round_to(acc, DW.dtype.element_ty), mask=col < C)


class Tile(NamedTuple):
    rows: int  # per block of ids
    columns: int  # per program
    ahead: int  # rows to load before they are used
    blocks: int  # partial sums to combine at once


# A warp has 256 columns, 16 bytes per thread in half precision and 32 in fp32. With 4 rows ahead and 32 warps
# per multiprocessor, 64 or 128 KiB of loads are in flight.
TILES = {INTERPRETER: {0: Tile(4, 64, 2, 2)}, UNTUNED: {0: Tile(32, 256, 4, 16)}}


def _launch_backward(dout: Tensor, ids: Tensor, rows: int) -> Tensor:
    """dout (..., C), ids (...) -> dweight (rows, C) in the dtype of dout."""
    C = dout.shape[-1]
    dweight = dout.new_zeros(rows, C)
    dy = dout.reshape(-1, C)
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    N = len(dy)
    if dweight.numel() and N:
        # Sorting 32 bits takes half the passes of 64 bits. Stable, so that equal ids keep the order of i.
        sorted_ids, order = torch.sort(ids.reshape(-1).to(torch.int32), stable=True)
        tile = tiles_for(dy, TILES)[0]
        grid = -(-N // tile.rows), -(-C // tile.columns)
        parts = dy.new_empty(2, grid[0], C, dtype=torch.float32)
        launch(
            _embedding_sum_kernel, grid, dy, sorted_ids, order, dweight, parts, N, C, dy.stride(0),
            ROWS=tile.rows, COLUMNS=tile.columns, AHEAD=tile.ahead, num_warps=1,
        )  # fmt: skip
        launch(
            _embedding_combine_kernel, grid, sorted_ids, parts, dweight, N, C,
            ROWS=tile.rows, COLUMNS=tile.columns, BLOCKS=tile.blocks, num_warps=4,
        )  # fmt: skip
    return dweight


def _fake_backward(dout, ids, rows):
    return dout.new_empty(rows, dout.shape[-1])


_backward_op = operator("embedding_backward", _launch_backward, _fake_backward)


class _Embedding(torch.autograd.Function):
    """An autograd.Function, because torch.compile traces into its forward, but not into a custom operator."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        ctx.rows = weight.shape[0]
        return F.embedding(input, weight)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        return None, _backward_op(dout, ids, ctx.rows)


def _inputs(
    dtype: torch.dtype, device: str, shape: tuple[int, ...], V: int, C: int, used: int | None = None
) -> dict[str, Any]:
    """With `used`, only that many different ids occur."""
    ids = torch.randperm(V)[: V if used is None else used]
    return {
        "input": ids[torch.randint(len(ids), shape)].to(device),
        "weight": torch.randn(V, C, device=device).to(dtype),
    }


def _cost(input: Tensor, weight: Tensor) -> Cost:
    """Forward reads and writes a row per id. Backward reads dy and writes all of dweight."""
    n, size = input.numel() * weight.shape[1], weight.element_size()
    return Cost(2 * n * size + input.nbytes, n * size + input.nbytes + weight.nbytes, 0, n)


def _run_all(input, weight):
    _launch_backward(weight.new_empty(*input.shape, weight.shape[1]), input, len(weight))


EMBEDDING = Op(
    name="embedding",
    family="embedding",
    implementations={"triton": embedding, "torch": embedding_reference},
    reference=embedding_reference,
    make=_inputs,
    cost=_cost,
    run_all=_run_all,
    samples=(
        {"shape": (3, 11), "V": 9, "C": 96, "used": 4},
        {"shape": (1,), "V": 1, "C": 1},
        {"shape": (2, 7), "V": 50, "C": 59},
        {"shape": (45,), "V": 5, "C": 33, "used": 1},
        {"shape": (5, 8), "V": 300, "C": 16},
        {"shape": (4,), "V": 3, "C": 64},
        {"shape": (0, 3), "V": 7, "C": 8},
    ),
    launches=([], [_embedding_sum_kernel, _embedding_combine_kernel]),
    large_sample={"shape": (16, 1000), "V": 50257, "C": 768, "used": 100},
    benchmark_shapes=tuple({"shape": (64, 1024), "V": 50304, "C": C} for C in (768, 1600)),
    production_shapes=(
        {"shape": (64, 1024), "V": 50304, "C": 768},
        {"shape": (64, 1024), "V": 50304, "C": 768, "dtype": torch.float32},
    ),
)
