"""The kernels that wait for a GPU to choose among them are as right as the shipped ones."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.candidates import attention as candidates
from kernels import OPS
from kernels.attention import Tile
from tests.kernel_cases import judge, make, upstream

OP = next(op for op in OPS if op.name == "causal_attention")
SMALL, WIDE = Tile(32, 32, 4, 1), Tile(32, 64, 4, 1)
TILES: dict[str, tuple[Any, ...]] = {
    "two_kernels": (candidates.Pair(Tile(64, 32, 4, 1), WIDE),),
    "head_owned": (WIDE, SMALL),
    "atomic": (WIDE, SMALL),
}


def results(
    call: dict[str, Tensor],
    gradient: Tensor,
    name: str,
    tile: Any,
    descriptors: bool,
    scale: float | None = None,
) -> dict[str, Tensor]:
    """The output of the candidates' forward, and the gradient by one of their backwards."""
    qkv = call["qkv"]
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    out, lse = candidates.forward(qkv, None, 0.0, scale, Tile(64, 32, 4, 1), descriptors)
    backward = getattr(candidates, name)
    dqkv = backward(gradient, qkv, out, lse, None, 0.0, scale, tile, descriptors)
    return {"output 0": out, "dqkv": dqkv}


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("name", TILES)
def test_candidates_against_fp64(name: str, descriptors: bool, device: str, poisoned: None) -> None:
    """Lengths that fill no tile, more heads than programs, a length of one; every dtype."""
    cases = [
        (2, 1, 2, 64, torch.float16),
        (1, 2, 5, 64, torch.bfloat16),  # the interpreter has 3 multiprocessors
        (1, 97, 1, 64, torch.bfloat16),
        (1, 130, 1, 128, torch.float16),
        (4, 33, 2, 80, torch.float32),
    ]
    for case, (B, T, H, D, dtype) in enumerate(cases):
        call = make(OP, dtype, device, {"B": B, "T": T, "H": H, "D": D})
        (gradient,) = gradients = upstream(OP, call)
        tile = TILES[name][case % len(TILES[name])]
        judge(OP, results(call, gradient.to(dtype), name, tile, descriptors), call, gradients)


@pytest.mark.parametrize("name", TILES)
def test_candidates_take_strides(name: str, device: str, poisoned: None) -> None:
    """A qkv in the middle of wider rows, and a gradient that is one number expanded."""
    call = make(OP, torch.float32, device, {"B": 2, "T": 37, "H": 2, "D": 16})
    wide = torch.full((2, 37, 4, 2, 16), torch.nan, device=device)
    wide[:, :, :3] = call["qkv"]
    gradient = torch.full((), 1.5, device=device).expand(2, 37, 2, 16)
    found = results({"qkv": wide[:, :, :3]}, gradient, name, TILES[name][-1], False)
    judge(OP, found, call, (gradient.double(),))


@pytest.mark.parametrize("name", ["two_kernels", "head_owned"])
def test_candidates_that_give_the_same_bits(name: str, device: str) -> None:
    call = make(OP, torch.float16, device, {"B": 2, "T": 70, "H": 3, "D": 16})
    gradient = torch.randn(2, 70, 3, 16, device=device).half()
    first, second = (results(call, gradient, name, TILES[name][0], False)["dqkv"] for _ in range(2))
    assert torch.equal(first, second)
