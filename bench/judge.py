"""The judge of an operation: tests and benchmarks accept a result by the same rule.

PyTorch in fp64 says what is right. A result may be off by twice the error of PyTorch in the same dtype.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import timing
from kernels.op import Op

Function = Callable[..., Any]


def failures(op: Op, call: dict[str, Any], functions: dict[str, Function]) -> dict[str, str]:
    """{name: reason} of the functions that raise an exception, or have a result that `faults` refuses."""
    try:
        gradients = upstream(op, call)
        exact = run(op.reference, leaves(call, torch.float64), gradients)
        peer = run(op.reference, call, gradients)
    except Exception as error:
        return dict.fromkeys(functions, f"PyTorch's operation fails: {timing.reason(error)}")
    reasons = {}
    for name, function in functions.items():
        try:
            wrong = faults(run(function, copied(call), gradients), exact, peer)
        except Exception as error:  # whatever a compiler or a competitor raises is a result here
            reasons[name] = timing.reason(error)
        else:
            reasons |= {name: f"wrong: {wrong[0]}"} if wrong else {}
    return reasons


def faults(ours: dict[str, Tensor], exact: dict[str, Tensor], peer: dict[str, Tensor]) -> list[str]:
    """What is wrong with the results of `run`: by PyTorch in fp64 (exact) and in the same dtype (peer).

    The error may be twice PyTorch's and a rounding: the largest error, which shows one wrong element, and the
    norm of all errors, which shows many that are slightly wrong.
    """
    if ours.keys() != exact.keys():
        return [f"the results are {', '.join(ours)}, not {', '.join(exact)}"]
    sentences = []
    for name, expected in exact.items():
        if ours[name].shape != expected.shape:
            sentences.append(f"{name} is {tuple(ours[name].shape)}, not {tuple(expected.shape)}")
        elif expected.numel():
            eps = torch.finfo(ours[name].dtype).eps
            for order, rounding in ((math.inf, eps), (2, eps / 4 + 5e-7)):
                error, of_peer = distance(ours[name], expected, order), distance(peer[name], expected, order)
                if not error <= 2 * of_peer + rounding * expected.norm(order).item() + 1e-6:
                    what = "is off by" if order == math.inf else "has an error of norm"
                    sentences.append(f"{name} {what} {error:.1e}, and PyTorch's {of_peer:.1e}")
    return sentences


def run(function: Function, call: dict[str, Any], gradients: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """Every output and, with upstream gradients, the gradient of every argument that has one, by name."""
    call = leaves(call) if gradients else call
    results = outputs(function(**call))
    if gradients:
        backpropagate(results, gradients)
    return by_name(results, call)


def upstream(op: Op, call: dict[str, Any]) -> tuple[Tensor, ...]:
    """Random gradients of the reference's outputs, in fp64, none of them 1; () for inference only."""
    if not op.differentiable:
        return ()
    # They are contiguous, as the next layer's are. All functions get the same layout: PyTorch builds cuDNN's
    # backward of a shape for the layout of the first gradient, and misreads any other.
    results = outputs(op.reference(**call))
    return tuple(torch.randn(r.shape, device=r.device, dtype=torch.float64) + 1.5 for r in results)


def backpropagate(results: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """`torch.autograd.backward` from those results that have a gradient."""
    pairs = [(r, g.to(r.dtype)) for r, g in zip(results, gradients) if r.requires_grad and g is not None]
    torch.autograd.backward([r for r, _ in pairs], [g for _, g in pairs])


def by_name(results: Sequence[Tensor], call: dict[str, Any]) -> dict[str, Tensor]:
    named = {f"output {i}": r.detach() for i, r in enumerate(results)}
    return named | {f"d{k}": v.grad for k, v in call.items() if floating(v) and v.grad is not None}


def leaves(call: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The same call, in which every floating tensor is a leaf that requires a gradient."""
    return {
        k: (v if dtype is None else v.to(dtype)).detach().requires_grad_() if floating(v) else v
        for k, v in call.items()
    }


def copied(call: dict[str, Any]) -> dict[str, Any]:
    """The same call for a function that overwrites its inputs, as some competitors do."""
    return {
        k: v.detach().clone().requires_grad_(v.requires_grad) if floating(v) else v for k, v in call.items()
    }


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def distance(tensor: Tensor, expected: Tensor, order: float = math.inf) -> float:
    """The largest difference, or another norm of all differences."""
    return (tensor.double() - expected).norm(order).item()
