"""GELU beyond what every operation is held to: before rounding, in the tails, at infinity, at any size."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.gelu import APPROXIMATIONS, GELU
from kernels.op import DTYPES, launch, record


def both(function: Any, x: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """(result, derivative)"""
    x = x.clone().requires_grad_()
    y = function(x, approximate=approximate)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach(), dx


def unrounded(x: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """What the kernels compute for half-precision x, in fp32."""
    y, dx = (torch.empty_like(x, dtype=torch.float32) for _ in range(2))
    sizes = {"TANH": approximate == "tanh", "BLOCK": 256, "num_warps": 2}
    grid = (-(-x.numel() // 256),)
    (forward, *_), (backward, *_) = GELU.launches
    launch(forward, grid, x, y, x.numel(), **sizes)
    launch(backward, grid, torch.ones_like(x), x, dx, x.numel(), **sizes)
    return y, dx


def every(dtype: torch.dtype, low: float, high: float, device: str) -> Tensor:
    """Every number of the half-precision dtype from low to high."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype)
    return x[(x >= low) & (x <= high)].to(device)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_before_rounding_half_precision_is_within_a_millionth(
    approximate: str, dtype: torch.dtype, device: str
) -> None:
    """A wrong digit of a coefficient, the fifth say, is far below a half-precision result's own rounding."""
    x = every(dtype, -12, 12, device)[::7].contiguous()
    for ours, exact in zip(unrounded(x, approximate), both(F.gelu, x.double(), approximate)):
        assert ((ours - exact).abs() / x.double().abs().clamp(min=1)).max() < 1e-6


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_the_left_tail_keeps_its_digits(approximate: str, device: str) -> None:
    """PyTorch's (1 + erf) / 2 cancels: at -5 its result in bf16 is off by far more than the rounding."""
    x = every(torch.bfloat16, -5.5, -1, device)
    exact = both(F.gelu, x.double(), approximate)
    ours, theirs = both(kernels.gelu, x, approximate), both(F.gelu, x, approximate)
    for found, peer, expected in zip(ours, theirs, exact):
        error, worse = ((t - expected).div(expected).abs().max() for t in (found, peer))
        assert error < 2**-9 + 0.005
        assert error < 0.3 * worse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_numbers_of_any_size(approximate: str, dtype: torch.dtype, device: str) -> None:
    """As PyTorch has it: gelu(-inf) and both derivatives at infinity are NaN, 0 times infinity."""
    large = 6e4 if dtype == torch.float16 else 1e19
    values = [-torch.inf, -large, -100, -10, -0.0, 0.0, 10, 100, large, torch.inf, torch.nan]
    x = torch.tensor(values, device=device).to(dtype)
    for ours, theirs in zip(both(kernels.gelu, x, approximate), both(F.gelu, x, approximate)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-20, equal_nan=True)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 127, 128, 130, 256 + 16, 256 + 31])
def test_every_size_is_covered_once(n: int, device: str, poisoned: None) -> None:
    """Whole groups of 16 in one launch, so that loads have 16 bytes, and what is left over in another."""
    x = torch.randn(n, device=device).bfloat16()
    with record() as launches:
        y, dx = both(kernels.gelu, x, "none")
    sizes = [launched.arguments["n"] for launched in launches]
    parts = [size for size in (n - n % 16, n % 16) if size]
    assert sizes == parts * 2
    exact = both(F.gelu, x.double(), "none")
    torch.testing.assert_close(y.double(), exact[0], rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(dx.double(), exact[1], rtol=2**-7, atol=1e-6)


@pytest.mark.gpu
def test_elements_beyond_int32(device: str) -> None:
    x = torch.randn(2**31 + 48, device=device, dtype=torch.float16)
    with torch.no_grad():
        y = kernels.gelu(x)
    for part in (slice(0, 4096), slice(2**31 - 4096, None)):
        torch.testing.assert_close(y[part], F.gelu(x[part]))


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_the_dtype_alone(dtype: torch.dtype, backend: str | None, device: str) -> None:
    torch._dynamo.reset()

    def step(function: Any, x: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return function(x)

    ours = step if backend is None else torch.compile(step, backend=backend, fullgraph=True)
    x = torch.randn(5, 32, device=device).to(dtype).requires_grad_()
    y = ours(kernels.gelu, x)
    assert y.dtype == step(F.gelu, x).dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == dtype


def test_only_the_input_is_saved(device: str) -> None:
    """The next product saves the output anyway."""
    saved: list[Tensor] = []
    x = torch.randn(4, 32, device=device).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kernels.gelu(x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]
