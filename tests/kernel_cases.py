"""How every operation of `kernels.OPS` is run and judged, whatever its arguments are."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import OPS
from kernels.op import DTYPES, Op

BY_NAME = {op.name: op for op in OPS}
TRAINED = [op for op in OPS if op.differentiable]
# fp16 needs nothing that bf16 does not need: one sample shows that nothing is bf16 by mistake.
CASES = [
    (op, sample, dtype)
    for op in OPS
    for i, sample in enumerate(op.samples)
    for dtype in ((torch.float32, torch.bfloat16) if i else DTYPES)
]
CASE_IDS = [f"{op.name}-{'-'.join(f'{k}={v}' for k, v in s.items())}-{dtype}" for op, s, dtype in CASES]


def make(op: Op, dtype: torch.dtype, device: str, sample: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    return op.make(dtype=dtype, device=device, **sample)


def leaves(call: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The same call, in which every floating tensor is a leaf that requires a gradient."""
    return {
        k: (v if dtype is None else v.to(dtype)).detach().requires_grad_() if floating(v) else v
        for k, v in call.items()
    }


def floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def upstream(op: Op, call: dict[str, Any]) -> tuple[Tensor, ...]:
    """Random gradients of the reference's outputs, in fp64, none of them 1; () for inference only."""
    if not op.differentiable:
        return ()
    results = outputs(op.reference(**call))
    return tuple(torch.randn(r.shape, device=r.device, dtype=torch.float64) + 1.5 for r in results)


def backpropagate(results: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """`torch.autograd.backward` from those results that have a gradient."""
    pairs = [(r, g.to(r.dtype)) for r, g in zip(results, gradients) if r.requires_grad and g is not None]
    torch.autograd.backward([r for r, _ in pairs], [g for _, g in pairs])


def run(
    function: Callable[..., Any], call: dict[str, Any], gradients: Sequence[Tensor | None]
) -> dict[str, Tensor]:
    """Every output and, with upstream gradients, the gradient of every argument that has one, by name."""
    call = leaves(call) if gradients else call
    results = outputs(function(**call))
    if gradients:
        backpropagate(results, gradients)
    return by_name(results, call)


def by_name(results: Sequence[Tensor], call: dict[str, Any]) -> dict[str, Tensor]:
    named = {f"output {i}": r.detach() for i, r in enumerate(results)}
    return named | {f"d{k}": v.grad for k, v in call.items() if floating(v) and v.grad is not None}


def judge(
    op: Op,
    ours: dict[str, Tensor],
    call: dict[str, Any],
    gradients: Sequence[Tensor],
    gradient_slack: float = 0.0,
) -> None:
    """error(ours) <= 2 error(PyTorch in the same dtype) + small, both against PyTorch in fp64."""
    exact = run(op.reference, leaves(call, torch.float64), gradients)
    peer = run(op.reference, call, gradients)
    assert ours.keys() == exact.keys(), f"{op.name}: gradients are missing"
    for name, expected in exact.items():
        tensor = ours[name]
        assert tensor.shape == expected.shape, f"{op.name}: {name} is {tensor.shape}, not {expected.shape}"
        if not expected.numel():
            continue
        error, allowed = distance(tensor, expected), 2 * distance(peer[name], expected)
        small = torch.finfo(tensor.dtype).eps * expected.abs().max().item() + 1e-6
        small += gradient_slack if name.startswith("d") else 0
        limit = f"allowed {allowed:.2e} + {small:.2e}"
        assert error <= allowed + small, f"{op.name}: {name} is off by {error:.2e}, {limit}"


def distance(tensor: Tensor, expected: Tensor) -> float:
    return (tensor.double() - expected).abs().max().item()
