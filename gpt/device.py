"""Where the model runs and in which precision: resolves "auto", and refuses what the machine cannot do."""

import importlib.util
import os
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str, local_rank: int = 0) -> str:
    """Resolves "auto" to cuda, mps or cpu, and "cuda" to the GPU of this rank. Raises ValueError."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
    try:
        kind, index = torch.device(device).type, torch.device(device).index
    except RuntimeError:
        kind, index = "unknown", None
    if kind not in ("cuda", "mps", "cpu"):
        raise ValueError(f"device={device!r} must be auto, cpu, mps, cuda, cuda:0, cuda:1, ...")
    if kind == "mps" and not torch.mps.is_available():
        raise ValueError("device='mps' is not available: PyTorch sees no Apple GPU; try --device=auto")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("device='cuda' is not available: PyTorch sees no GPU; try --device=auto")
        number = local_rank if index is None else index
        if number >= torch.cuda.device_count():
            raise ValueError(
                f"device='cuda:{number}' is not available: this machine has {torch.cuda.device_count()} GPUs"
            )
        return f"cuda:{number}"
    return device


def resolve_dtype(dtype: str, device: str) -> str:
    """Resolves "auto" to bfloat16 on a GPU that supports it, float16 on an older GPU, float32 elsewhere."""
    on_gpu = torch.device(device).type == "cuda"
    native_bf16 = on_gpu and torch.cuda.get_device_capability(device) >= (8, 0)
    if dtype == "auto":
        return "bfloat16" if native_bf16 else "float16" if on_gpu else "float32"
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be auto, {', '.join(DTYPES)}")
    if dtype == "bfloat16" and on_gpu and not native_bf16:
        raise ValueError(
            f"dtype='bfloat16' needs a GPU of sm_80 or newer, but {torch.cuda.get_device_name(device)} is "
            f"older; try --dtype=float16"
        )
    return dtype


def resolve_compile(compile: bool | str, device: str) -> bool:
    """Resolves "auto" to True on a GPU that torch.compile supports."""
    reason = _no_compile(device)
    if compile == "auto":
        return torch.device(device).type == "cuda" and reason is None
    if compile and reason is not None:
        raise ValueError(f"compile=True is not possible here: {reason}; try --compile=False")
    return bool(compile)


def _no_compile(device: str) -> str | None:
    """Why torch.compile cannot generate code for `device`, or None."""
    if torch.device(device).type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        capability = torch.cuda.get_device_capability(device)
        return None if capability >= (7, 0) else f"{device} is older than sm_70"
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    return None if shutil.which(compiler.split()[-1]) else f"the C++ compiler {compiler!r} is missing"


def autocast(device: str, dtype: str) -> AbstractContextManager:
    """Mixed precision as in nanoGPT: parameters stay in float32, matrix products run in `dtype`."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, DTYPES[dtype])
