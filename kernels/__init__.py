# ruff: noqa: F401
# (the imported operations are for users of this package)
"""The operations of a GPT, and the choice between their implementations.

`kernels.<name>` is the Triton operation, even if a file has the same name: `kernels.gelu` is the function,
and `from kernels.gelu import TILES` imports from the file. `kernels.embedding` is PyTorch's, with a gradient
that has the same bits every run.

A model calls `load(spec)` once and uses the operations that it returns:

    "auto"                       Triton on an NVIDIA GPU of sm_80 or newer, otherwise PyTorch. It uses
                                 PyTorch's attention where ours cannot run or is slower (see
                                 `attention.used_by_auto`). With TRITON_INTERPRET=1 it uses PyTorch
    "triton"                     the kernels of this folder
    "torch"                      PyTorch's operations
    "triton,attention=torch"     a default, then exceptions by family: layer_norm, attention,
                                 activation, cross_entropy
    "triton,attention=flash_attn"    attention of the flash-attn package

`load` never replaces an explicit choice. It raises ValueError if the chosen implementation cannot run.

Autocast does not cast the arguments of custom operations. So the public functions cast them, also under
torch.compile. Attention and the products of linear_cross_entropy run in the autocast dtype. The normalised
output of a norm has the autocast dtype, to which the next linear layer would cast it, or for
add_layer_norm_mixed the dtype of the carrier. Embeddings, gelu and the residual stream keep their dtype.
Losses are fp32.
"""

import difflib
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from kernels.attention import CAUSAL_ATTENTION, MAX_D, MIN_D, causal_attention, used_by_auto
from kernels.cross_entropy import CROSS_ENTROPY, cross_entropy
from kernels.decode import DECODE_ATTENTION, decode_attention
from kernels.embedding import embedding
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
from kernels.op import INTERPRETED, Op, architecture_of, unavailable

# To add an operation: write its file, import it above and list it here.
OPS: tuple[Op, ...] = (
    LAYER_NORM,
    ADD_LAYER_NORM,
    ADD_LAYER_NORM_MIXED,
    CAUSAL_ATTENTION,
    CROSS_ENTROPY,
    LINEAR_CROSS_ENTROPY,
    DECODE_ATTENTION,
    GELU,
)

# family -> implementation -> operation -> function
FAMILIES: dict[str, dict[str, dict[str, Callable[..., Any]]]] = {}
for _op in OPS:
    for _implementation, _function in _op.implementations.items():
        FAMILIES.setdefault(_op.family, {}).setdefault(_implementation, {})[_op.name] = _function


class Kernels(SimpleNamespace):
    """The operations of a model, each an attribute, and `spec`, which names their implementations."""

    spec: str


def load(
    spec: str = "auto", device: str = "cpu", head_size: int = 64, dtype: torch.dtype = torch.bfloat16
) -> Kernels:
    """The operations named by `spec`, for tensors on `device` ("cpu", "cuda:0", ...).

    `head_size` and `dtype` are those of the model's attention. Raises ValueError for an unknown
    implementation or family, and for an implementation that cannot run on `device`.
    """
    default, *exceptions = spec.split(",")
    obstacle = unavailable(torch.device(device))
    # The interpreter is far too slow for training, so only an explicit "triton" uses it.
    on_gpu = torch.device(device).type == "cuda" and obstacle is None and not INTERPRETED
    if default == "auto":
        choice = dict.fromkeys(FAMILIES, "triton" if on_gpu else "torch")
        if on_gpu and not used_by_auto(architecture_of(torch.device(device)), head_size, dtype):
            choice["attention"] = "torch"
    else:
        choice = dict.fromkeys(FAMILIES, default)
    for exception in exceptions:
        family, _, implementation = exception.partition("=")
        if family not in FAMILIES:
            raise ValueError(_unknown(spec, "operation", family, FAMILIES))
        choice[family] = implementation
    operations: dict[str, Callable[..., Any]] = {}
    for family, implementation in choice.items():
        if implementation not in FAMILIES[family]:
            raise ValueError(_unknown(spec, f"implementation of {family}", implementation, FAMILIES[family]))
        if implementation == "triton" and obstacle is not None:
            raise ValueError(f"kernels={spec!r}: {family} cannot use Triton: {obstacle}")
        if (family, implementation) == ("attention", "triton") and not MIN_D <= head_size <= MAX_D:
            raise ValueError(
                f"kernels={spec!r}: attention takes head sizes n_embd / n_head from {MIN_D} to {MAX_D}, not "
                f"{head_size}; choose another n_head, or --kernels={_canonical(choice | {family: 'torch'})}"
            )
        if implementation == "flash_attn" and (reason := _no_flash_attn(device, head_size, dtype)):
            raise ValueError(f"kernels={spec!r}: flash-attn {reason}")
        operations |= FAMILIES[family][implementation]
    return Kernels(spec=_canonical(choice), **operations)


def _no_flash_attn(device: str, head_size: int, dtype: torch.dtype) -> str | None:
    """The reason why the flash-attn package cannot run, or None."""
    if importlib.util.find_spec("flash_attn") is None:
        return "is not installed (pip install flash-attn)"
    if torch.device(device).type != "cuda":
        return f"needs a GPU, and the device is {device}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"computes in float16 or bfloat16, not in {str(dtype).removeprefix('torch.')}"
    if head_size > 256:
        return f"takes head sizes n_embd / n_head up to 256, not {head_size}"
    return None


def _canonical(choice: dict[str, str]) -> str:
    """The shortest spec for this choice: the most common implementation, then the exceptions."""
    implementations = list(choice.values())
    default = max(implementations, key=implementations.count)
    return ",".join([default, *(f"{f}={i}" for f, i in choice.items() if i != default)])


def _unknown(spec: str, kind: str, name: str, known: dict[str, Any]) -> str:
    matches = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {matches[0]!r}?" if matches else f"choose one of {', '.join(known)}"
    return f"kernels={spec!r}: no {kind} is called {name!r}; {hint}"
