# mypy: allow-untyped-defs, allow-incomplete-defs
# (a Triton kernel's arguments have no Python types)
"""GELU, exact or by the tanh approximation: the activation of GPT-2's MLP.

Forward, with the distribution function Phi and the density phi of the standard normal distribution:

    y = x Phi(x)                  or, for "tanh", y = x s(x)
                                  s(x) = (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u))
                                  u(x) = sqrt(2 / pi) (x + 0.044715 x^3)

Backward:

    dx = dy (Phi(x) + x phi(x))   or, for "tanh", dx = dy (s + x s (1 - s) 2u'(x))

GELU saves only x for backward. The linear layer after it saves y. To save the memory of y too, an operation
would have to contain that layer, and `activation_checkpointing` saves more. The bias of the layer before is
not fused: its matrix product adds the bias at no cost, before rounding to half precision.

Source: Hendrycks and Gimpel, 2016, https://arxiv.org/abs/1606.08415; Abramowitz and Stegun, 1964, Handbook of
Mathematical Functions, 26.2.17
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.op import (
    INTERPRETED,
    INTERPRETER,
    UNTUNED,
    Cost,
    Op,
    Slot,
    check_tensors,
    jit,
    launch,
    operator,
    round_to,
    tiles_for,
    tl,
)

APPROXIMATIONS = ("none", "tanh")
SQRT_HALF = tl.constexpr(0.7071067811865476)
# phi(x) = 2^(HALF_LOG2E x^2 + LOG2_PHI_0)
HALF_LOG2E = tl.constexpr(-0.7213475204444817)
LOG2_PHI_0 = tl.constexpr(-1.3257480647361592)
# 2u(x) = x (SLOPE + CUBIC x^2)
SLOPE = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.07135481627260025)
THREE_CUBIC = tl.constexpr(0.21406444881780076)
# exp(-2u(x)) = 2^(x (SLOPE_LOG2E + CUBIC_LOG2E x^2))
SLOPE_LOG2E = tl.constexpr(-2.302208198144325)
CUBIC_LOG2E = tl.constexpr(-0.1029432395800235)
# Abramowitz and Stegun 26.2.17: p, then b1 to b5
P = tl.constexpr(0.2316419)
B1 = tl.constexpr(0.319381530)
B2 = tl.constexpr(-0.356563782)
B3 = tl.constexpr(1.781477937)
B4 = tl.constexpr(-1.821255978)
B5 = tl.constexpr(1.330274429)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """`F.gelu`: input of any shape -> the same shape, contiguous. approximate is "none" (erf) or "tanh".

    The result has the dtype of input, also under autocast, as in PyTorch. Raises ValueError for bad
    arguments.
    """
    check_tensors("gelu", input=input)
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"gelu: approximate={approximate!r} must be one of {', '.join(APPROXIMATIONS)}")
    return _forward_op(input, approximate)


@jit
def _reciprocal(x, EXACT: tl.constexpr):
    """1 / x for x >= 1."""
    # rcp.approx is one instruction, with an error of at most one ulp. A division is several instructions.
    if EXACT or INTERPRETED:
        return 1 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


# Memory should limit the speed: each tensor is read and written once. At the full bandwidth of an H200 there
# is time for 27 instructions per element in forward and 41 in backward. With CUDA's erf the kernels have 36
# and 47 (SASS of sm_90). So half precision uses the polynomial of Abramowitz and Stegun:
#
#     Phi(-|x|) = phi(x) (b1 t + b2 t^2 + ... + b5 t^5)        t = 1 / (1 + 0.2316419 |x|)
#
# It needs one reciprocal and one exponential, which gives phi for backward too: 18 and 21 instructions. The
# error, up to 7.5e-8, is far below the rounding of the result. In the left tail erf has a larger error,
# because 1 + erf cancels. But 7.5e-8 is too much for fp32, which uses erf.
@jit
def _normal(x, EXACT: tl.constexpr):
    """(Phi(x), phi(x)) of the standard normal."""
    phi = tl.exp2(x * x * HALF_LOG2E + LOG2_PHI_0)
    if EXACT:
        return tl.erf(x * SQRT_HALF) * 0.5 + 0.5, phi
    else:
        t = _reciprocal(tl.abs(x) * P + 1, EXACT)
        tail = ((((t * B5 + B4) * t + B3) * t + B2) * t + B1) * t * phi
        return tl.where(x >= 0, 1 - tail, tail), phi


@jit
def _sigmoid(x, EXACT: tl.constexpr):
    """(s(x), 2u'(x)) of the tanh approximation."""
    # 1 / (1 + exp(-2u)) is (1 + tanh(u)) / 2, but does not cancel in the left tail. With one exponential and
    # one reciprocal, the kernels have 11 and 17 instructions per element.
    square = x * x
    s = _reciprocal(tl.exp2((square * CUBIC_LOG2E + SLOPE_LOG2E) * x) + 1, EXACT)
    return s, square * THREE_CUBIC + SLOPE


@jit
def _program_block(n, BLOCK: tl.constexpr):
    """(start of the program's block, offsets in the block, mask)."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    # Compare in int32: in int64 it takes two instructions.
    return start, i, i < tl.minimum(n - start, BLOCK).to(tl.int32)


@jit
def _gelu_forward_kernel(
    X,  # (n,) in
    Y,  # (n,) out
    n,
    TANH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    EXACT: tl.constexpr = X.dtype.element_ty == tl.float32
    start, i, inside = _program_block(n, BLOCK)
    x = tl.load(X + start + i, mask=inside).to(tl.float32)
    if TANH:
        share, _ = _sigmoid(x, EXACT)
    else:
        share, _ = _normal(x, EXACT)
    tl.store(Y + start + i, round_to(x * share, Y.dtype.element_ty), mask=inside)


@jit
def _gelu_backward_kernel(
    DY,  # (n,) in
    X,  # (n,) in
    DX,  # (n,) out
    n,
    TANH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    EXACT: tl.constexpr = X.dtype.element_ty == tl.float32
    start, i, inside = _program_block(n, BLOCK)
    x = tl.load(X + start + i, mask=inside).to(tl.float32)
    dy = tl.load(DY + start + i, mask=inside).to(tl.float32)
    if TANH:
        s, slope = _sigmoid(x, EXACT)
        # Multiply x (1 - s) first: for large x it is 0, but slope may be huge.
        derivative = s + x * (s - s * s) * slope
    else:
        Phi, phi = _normal(x, EXACT)
        derivative = Phi + x * phi
    tl.store(DX + start + i, round_to(dy * derivative, DX.dtype.element_ty), mask=inside)


class Tile(NamedTuple):
    block: int  # elements per program
    warps: int


# 16 elements per thread. With 8, addresses and masks cost one more instruction per element.
TILES = {
    INTERPRETER: {"forward": Tile(128, 1), "backward": Tile(128, 1)},
    UNTUNED: {"forward": Tile(2048, 4), "backward": Tile(2048, 4)},
}


def _run(kernel, direction: str, approximate: str, *tensors: Tensor) -> None:
    """Runs `kernel` over contiguous tensors of one shape."""
    # A masked load can be 16 bytes wide if Triton knows that n is a multiple of 16. In a real model it is.
    # For any other n each load has one element, which is slower.
    tile = tiles_for(tensors[0], TILES)[direction]
    n = tensors[0].numel()
    if n:
        launch(
            kernel, (-(-n // tile.block),), *tensors, n,
            TANH=approximate == "tanh", BLOCK=tile.block, num_warps=tile.warps,
        )  # fmt: skip


def _launch_forward(input: Tensor, approximate: str) -> Tensor:
    out = _fake_forward(input, approximate)
    _run(_gelu_forward_kernel, "forward", approximate, input.contiguous(), out)
    return out


def _launch_backward(dout: Tensor, input: Tensor, approximate: str) -> Tensor:
    dinput = _fake_backward(dout, input, approximate)
    tensors = dout.contiguous(), input.contiguous(), dinput
    _run(_gelu_backward_kernel, "backward", approximate, *tensors)
    return dinput


def _fake_forward(input, approximate):
    return input.new_empty(input.shape)


def _fake_backward(dout, input, approximate):
    return input.new_empty(input.shape)


_forward_op = operator("gelu", _launch_forward, _fake_forward)
_backward_op = operator("gelu_backward", _launch_backward, _fake_backward)


def _setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    input, ctx.approximate = inputs
    ctx.save_for_backward(input)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
    return _backward_op(dout, *ctx.saved_tensors, ctx.approximate), None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _inputs(dtype: torch.dtype, device: str, shape: tuple[int, ...], **options: Any) -> dict[str, Any]:
    """The standard deviation is 3, which reaches both tails."""
    return {"input": (torch.randn(*shape, device=device) * 3).to(dtype), **options}


def _cost(input: Tensor, **_: Any) -> Cost:
    # forward: input -> output; backward: doutput, input -> dinput
    return Cost(2 * input.nbytes, 3 * input.nbytes, 15 * input.numel(), 18 * input.numel())


def _slots(input: Tensor, **_: Any) -> Iterator[Slot]:
    per_thread = (8, 16, 32)
    tiles = tuple(Tile(32 * warps * n, warps) for warps in (2, 4, 8) for n in per_thread)
    for direction in ("forward", "backward"):
        yield Slot(f"{direction} (block, warps)", tiles_for(input, TILES), direction, tiles)


GELU = Op(
    name="gelu",
    family="activation",
    implementations={"triton": gelu, "torch": F.gelu},
    make=_inputs,
    cost=_cost,
    samples=(
        {"shape": (2, 5, 111)},
        {"shape": (1, 1)},
        {"shape": (7, 768)},
        {"shape": (3, 59), "approximate": "tanh"},
        {"shape": (4, 96), "approximate": "tanh"},
        {"shape": (1023,)},
        {"shape": (0, 64)},
    ),
    launches=([_gelu_forward_kernel], [_gelu_backward_kernel]),
    large_sample={"shape": (4001, 3071)},
    benchmark_shapes=(
        {"shape": (65536, 3072)},
        {"shape": (65536, 3072), "approximate": "tanh"},
        {"shape": (65536, 6400)},
    ),
    production_shapes=(
        {"shape": (65536, 3072)},
        {"shape": (65536, 3072), "approximate": "tanh"},
        {"shape": (65536, 3072), "dtype": torch.float16},
        {"shape": (65536, 3072), "dtype": torch.float32},
        {"shape": (65536, 3072), "dtype": torch.float32, "approximate": "tanh"},
    ),
    slots=_slots,
)
