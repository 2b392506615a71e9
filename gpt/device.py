"""Where the model runs and in which precision: resolves "auto", and refuses what the machine cannot do."""

import importlib.util
from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str, local_rank: int = 0) -> str:
    """Resolves "auto" to cuda, mps or cpu, and "cuda" to the GPU of this rank. Raises ValueError."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(kind for kind in available if available[kind])
    try:
        kind, index = torch.device(device).type, torch.device(device).index
    except RuntimeError:
        kind, index = "unknown", None
    if kind not in available:
        raise ValueError(f"device={device!r} must be auto, cpu, mps, cuda, cuda:0, cuda:1, ...")
    if not available[kind]:
        raise ValueError(f"device={device!r} is not available: PyTorch sees no such GPU; try --device=auto")
    if kind != "cuda":
        return device
    number, count = local_rank if index is None else index, torch.cuda.device_count()
    if number >= count:
        raise ValueError(f"device='cuda:{number}' is not available: this machine has {count} GPUs")
    return f"cuda:{number}"


def resolve_dtype(dtype: str, device: str) -> str:
    """Resolves "auto" to bfloat16 on a GPU that supports it, float16 on an older GPU, float32 elsewhere."""
    on_gpu = torch.device(device).type == "cuda"
    has_bfloat16 = on_gpu and torch.cuda.get_device_capability(device) >= (8, 0)
    if dtype == "auto":
        return "bfloat16" if has_bfloat16 else "float16" if on_gpu else "float32"
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be auto, {', '.join(DTYPES)}")
    if dtype == "bfloat16" and on_gpu and not has_bfloat16:
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"dtype='bfloat16' needs a GPU of sm_80 or newer, not {name}; try --dtype=float16")
    return dtype


def resolve_compile(compile: bool | str, device: str) -> bool:
    """Resolves "auto" to True on a GPU that torch.compile supports. Raises ValueError."""
    if torch.device(device).type != "cuda":
        return compile is True
    has_triton = importlib.util.find_spec("triton") is not None
    is_possible = has_triton and torch.cuda.get_device_capability(device) >= (7, 0)
    if compile is True and not is_possible:
        raise ValueError("compile=True needs Triton and a GPU of sm_70 or newer; try --compile=False")
    return is_possible if compile == "auto" else bool(compile)


def autocast(device: str, dtype: str) -> AbstractContextManager:
    """Mixed precision as in nanoGPT: parameters stay in float32, matrix products run in `dtype`."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, DTYPES[dtype])
