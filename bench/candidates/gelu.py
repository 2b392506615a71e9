# mypy: allow-untyped-defs, allow-incomplete-defs
# (a Triton kernel's arguments have no Python types)
"""GELU and the linear layer after it, without the GELU's output being kept.

    y = gelu(h)        out = y @ weight.T

Forward is PyTorch's. Backward needs dh = (dout @ weight) * gelu'(h), dweight = dout.T @ y, and the layer
before needs dbias = sum_rows(dh). One kernel reads dy = dout @ weight and h, writes dh over dy, and y anew,
and keeps the column sums of dh: four times (N, F) in memory's traffic. What torch.compile generates reads
dy and h, writes dh and reads it again for dbias: four as well with a bias, three without. So what the
candidate must win is memory, 2 F bytes a token and layer, which is a larger micro-batch; in time it may
gain a launch, and without a bias it loses a pass. The GELU is nanoGPT's, by erf: gelu(h) = h Phi(h),
gelu'(h) = Phi(h) + h phi(h).

Source: Hendrycks and Gimpel, 2016, https://arxiv.org/abs/1606.08415
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.op import (
    INTERPRETER,
    Cost,
    Op,
    architecture,
    jit,
    launch,
    multiprocessors,
    round_to,
    tl,
)


def gelu_linear_reference(h: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    """h (N, F), bias (F,), weight (C, F): `F.linear(F.gelu(h + bias), weight)`, (N, C)."""
    return F.linear(F.gelu(h + bias), weight)


@jit
def _backward_kernel(
    H,  # (N, F) in
    BIAS,  # (F,) in
    DY,  # (N, F) in
    Y,  # (N, F) out: gelu(h + bias) anew
    DH,  # (N, F) out; DY itself is allowed
    PARTS,  # (programs, F) out, fp32: column sums of dh
    N,
    F,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    columns = tl.zeros((ROWS, 1), tl.int32) + col
    bias = tl.load(BIAS + columns, mask=columns < F, other=0).to(tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS):
        row = tl.arange(0, ROWS).to(tl.int64)[:, None] + first
        inside = (row < N) & (col < F)
        at = row * F + col
        # As PyTorch has it: the sum is rounded before the activation.
        h = tl.load(H + at, mask=inside, other=0).to(tl.float32) + bias
        h = round_to(h, H.dtype.element_ty).to(tl.float32)
        dy = tl.load(DY + at, mask=inside, other=0).to(tl.float32)
        phi = 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)
        density = 0.3989422804014327 * tl.exp2(h * h * -0.7213475204444817)
        dh = round_to(dy * (phi + h * density), DH.dtype.element_ty)
        tl.store(Y + at, round_to(h * phi, Y.dtype.element_ty), mask=inside)
        tl.store(DH + at, dh, mask=inside)
        total += dh.to(tl.float32)
    tl.store(PARTS + tl.program_id(0) * F + col, tl.sum(total, 0)[None, :], mask=col < F)


# (rows, columns, warps, programs a multiprocessor and column of tiles)
TILES = {
    INTERPRETER: {"backward": ((2, 32, 1, 1),)},
    80: {"backward": ((4, 256, 4, 1),)},
    89: {"backward": ((4, 256, 4, 1),)},
    90: {"backward": ((4, 256, 4, 1),)},
    100: {"backward": ((4, 256, 4, 1),)},
}


def backward_(dy: Tensor, h: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(h + bias) anew and the bias's gradient in fp32; h's gradient is written over dy. All (N, F)."""
    N, width = h.shape
    rows, columns, warps, programs = TILES[architecture(h)]["backward"][0]
    tiles = -(-width // columns)
    programs = max(1, min(-(-N // rows), programs * multiprocessors(h) * 8 // tiles))
    y = torch.empty_like(h)
    parts = h.new_empty(programs, width, dtype=torch.float32)
    launch(
        _backward_kernel, (programs, tiles),
        h, bias, dy, y, dy, parts, N, width, ROWS=rows, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip
    return y, parts.sum(0)


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(h, bias, weight)
        return gelu_linear_reference(h, bias, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        h, bias, weight = ctx.saved_tensors
        (dout,) = gradients
        dh = dout @ weight
        y, dbias = backward_(dh, h, bias)
        return dh, dbias.to(bias.dtype), dout.t() @ y


def gelu_linear(h: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    """As the reference; h must be contiguous, all three of one dtype."""
    return _GeluLinear.apply(h, bias, weight)


def _inputs(dtype: torch.dtype, device: str, N: int, C: int, F: int) -> dict[str, Any]:
    def random(*size: int) -> Tensor:
        return torch.randn(*size, device=device)

    return {
        "h": random(N, F).to(dtype),
        "bias": random(F).to(dtype),
        "weight": (random(C, F) * F**-0.5).to(dtype),
    }


def _cost(h: Tensor, weight: Tensor, **_: Any) -> Cost:
    tensor, product = h.numel() * h.element_size(), 2 * h.numel() * weight.shape[0]
    return Cost(2 * tensor, 4 * tensor, product, 2 * product)


def _launchers(h: Tensor, bias: Tensor, weight: Tensor) -> None:
    backward_(torch.empty_like(h), h, bias)


OP = Op(
    name="gelu_linear, a candidate",
    family="gelu",
    implementations={"triton": gelu_linear, "torch": gelu_linear_reference},
    reference=gelu_linear_reference,
    make=_inputs,
    cost=_cost,
    samples=({"N": 5, "C": 3, "F": 37}, {"N": 7, "C": 8, "F": 64}),
    shipped=({"N": 65536, "C": 768, "F": 3072},),
    launchers=_launchers,
)
