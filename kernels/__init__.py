"""The operations a GPT is made of, and the choice of who computes them.

`load(spec)` is called once, when a model is built, and returns the operations it will use:

    "auto"                      the fastest that runs here
    "torch"                     PyTorch's own operations
    "torch,attention=torch"     a default, then exceptions by family: layer_norm, attention, cross_entropy

An explicit request is met or refused, never silently replaced.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kernels.attention import causal_attention_reference
from kernels.cross_entropy import cross_entropy_reference
from kernels.layer_norm import add_layer_norm_reference, layer_norm_reference
from kernels.linear_cross_entropy import linear_cross_entropy_reference

FAMILIES: dict[str, dict[str, dict[str, Callable[..., Any]]]] = {
    "layer_norm": {
        "torch": {"layer_norm": layer_norm_reference, "add_layer_norm": add_layer_norm_reference},
    },
    "attention": {
        "torch": {"causal_attention": causal_attention_reference},
    },
    "cross_entropy": {
        "torch": {
            "cross_entropy": cross_entropy_reference,
            "linear_cross_entropy": linear_cross_entropy_reference,
        },
    },
}


@dataclass(frozen=True)
class Kernels:
    """The operations a model calls, and the `spec` that names who computes each of them."""

    spec: str
    layer_norm: Callable[..., Tensor]
    add_layer_norm: Callable[..., tuple[Tensor, Tensor]]
    causal_attention: Callable[..., Tensor]
    cross_entropy: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., Tensor]


def load(spec: str = "auto", device: str = "cpu") -> Kernels:
    """The operations named by `spec`, for tensors on `device` ("cpu", "cuda:0", ...).

    Raises ValueError for a spec that names an unknown implementation or family.
    """
    default, *exceptions = spec.split(",")
    chosen = dict.fromkeys(FAMILIES, "torch" if default == "auto" else default)
    for exception in exceptions:
        family, _, implementation = exception.partition("=")
        if family not in FAMILIES:
            raise ValueError(_unknown(spec, "operation", family, FAMILIES))
        chosen[family] = implementation
    operations: dict[str, Callable[..., Any]] = {}
    for family, implementation in chosen.items():
        if implementation not in FAMILIES[family]:
            raise ValueError(_unknown(spec, f"implementation of {family}", implementation, FAMILIES[family]))
        operations |= FAMILIES[family][implementation]
    return Kernels(spec=_canonical(chosen), **operations)


def _canonical(chosen: dict[str, str]) -> str:
    """The shortest spec that makes this choice: the commonest implementation, then the exceptions."""
    used = list(chosen.values())
    default = max(used, key=used.count)
    return ",".join([default, *(f"{f}={i}" for f, i in chosen.items() if i != default)])


def _unknown(spec: str, kind: str, name: str, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
    return f"kernels={spec!r}: no {kind} is called {name!r}; {hint}"
