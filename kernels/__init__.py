# ruff: noqa: F401
# (the operations are imported for others)
"""The operations a GPT is made of, and the choice of who computes them.

`kernels.<name>` is the Triton operation, also where a file has the same name: `kernels.gelu` is the function,
and `from kernels.gelu import TILES` takes something else from its file.

`load(spec)` is called once, when a model is built, and returns the operations it will use:

    "auto"                       Triton on an NVIDIA GPU of sm_80 or newer, PyTorch elsewhere; attention is
                                 PyTorch's where Triton's would be slower (`attention.pays_off`)
    "triton"                     the kernels of this folder
    "torch"                      PyTorch's own operations
    "triton,attention=torch"     a default, then exceptions by family: layer_norm, attention,
                                 activation, cross_entropy, embedding
    "triton,attention=flash_attn"    attention by the flash-attn package

An explicit request is met or refused, never silently replaced.

Under autocast PyTorch casts the arguments of its own operations, and custom operations go unnoticed. So the
public functions apply the rule themselves, each says which, and it holds under torch.compile too: attention
and the products of linear_cross_entropy run in the autocast dtype; the normalised output of both norms has
the autocast dtype, which the linear layer after it would cast it to (add_layer_norm_mixed takes that of its
carrier); embeddings, gelu and the residual
stream keep their dtype; losses are fp32.
"""

import difflib
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from kernels.attention import CAUSAL_ATTENTION, MAX_D, MIN_D, causal_attention, pays_off
from kernels.cross_entropy import CROSS_ENTROPY, cross_entropy
from kernels.decode import DECODE_ATTENTION, decode_attention
from kernels.embedding import EMBEDDING, embedding
from kernels.gelu import GELU, gelu
from kernels.layer_norm import (
    ADD_LAYER_NORM,
    ADD_LAYER_NORM_MIXED,
    LAYER_NORM,
    add_layer_norm,
    add_layer_norm_mixed,
    layer_norm,
)
from kernels.linear_cross_entropy import LINEAR_CROSS_ENTROPY, linear_cross_entropy
from kernels.op import Op, architecture_of, unavailable

# A new operation is its file, an import above and its entry here.
OPS: tuple[Op, ...] = (
    LAYER_NORM,
    ADD_LAYER_NORM,
    ADD_LAYER_NORM_MIXED,
    CAUSAL_ATTENTION,
    CROSS_ENTROPY,
    LINEAR_CROSS_ENTROPY,
    EMBEDDING,
    DECODE_ATTENTION,
    GELU,
)

# family -> implementation -> operation -> function
FAMILIES: dict[str, dict[str, dict[str, Callable[..., Any]]]] = {}
for _op in OPS:
    for _implementation, _function in _op.implementations.items():
        FAMILIES.setdefault(_op.family, {}).setdefault(_implementation, {})[_op.name] = _function


class Kernels(SimpleNamespace):
    """The operations a model calls, each an attribute by its name, and `spec`, who computes each of them."""

    spec: str


def load(
    spec: str = "auto", device: str = "cpu", head_size: int = 64, dtype: torch.dtype = torch.bfloat16
) -> Kernels:
    """The operations named by `spec`, for tensors on `device` ("cpu", "cuda:0", ...).

    `head_size` and `dtype` are those that attention will have. Raises ValueError for a spec that names an
    unknown implementation or family, or one that cannot run there.
    """
    default, *exceptions = spec.split(",")
    why_not = unavailable(torch.device(device))
    on_gpu = torch.device(device).type == "cuda" and why_not is None
    if default == "auto":
        chosen = dict.fromkeys(FAMILIES, "triton" if on_gpu else "torch")
        if on_gpu and not pays_off(architecture_of(torch.device(device)), head_size, dtype):
            chosen["attention"] = "torch"
    else:
        chosen = dict.fromkeys(FAMILIES, default)
    for exception in exceptions:
        family, _, implementation = exception.partition("=")
        if family not in FAMILIES:
            raise ValueError(_unknown(spec, "operation", family, FAMILIES))
        chosen[family] = implementation
    operations: dict[str, Callable[..., Any]] = {}
    for family, implementation in chosen.items():
        if implementation not in FAMILIES[family]:
            raise ValueError(_unknown(spec, f"implementation of {family}", implementation, FAMILIES[family]))
        if implementation == "triton" and why_not is not None:
            raise ValueError(f"kernels={spec!r}: {family} cannot be Triton's here: {why_not}")
        if (family, implementation) == ("attention", "triton") and not MIN_D <= head_size <= MAX_D:
            raise ValueError(
                f"kernels={spec!r}: attention takes head sizes n_embd / n_head from {MIN_D} to {MAX_D}, not "
                f"{head_size}; choose another n_head, or --kernels={_canonical(chosen | {family: 'torch'})}"
            )
        if implementation == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
            raise ValueError(f"kernels={spec!r}: the package is not installed (pip install flash-attn)")
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
