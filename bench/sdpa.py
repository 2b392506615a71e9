"""python -m bench.sdpa: does PyTorch's attention give the right gradient? A probe; delete it once we know.

`bench.kernels` refused the compiled F.scaled_dot_product_attention at two shapes on an H200. We suspect that
PyTorch keeps cuDNN's backward by the shapes and strides of q, k and v alone, although it is built for the
strides of the upstream gradient as well, so that it misreads a later gradient of another layout: (B, T, H, D)
after (B, H, T, D). Each story has a batch size of its own, so that nothing is left over from the one before.
"""

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import timing

BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
# One call after the other: how it runs, and the layout of the gradient that it gets.
CALLS = [(mode, layout) for mode in ("eager", "compiled", "donated") for layout in ("THD", "HTD")]
STORIES = [[call] for call in CALLS] + [[a, b] for a in CALLS for b in CALLS[:4] if a[1] != b[1]]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def errors(mode: str, layout: str, backend: SDPBackend, qkv: Tensor, upstream: Tensor) -> list[float]:
    """Relative errors of out, dq, dk and dv against fp64; qkv (B, T, 3, H, D), upstream (B, H, T, D)."""
    inputs = [x.detach().requires_grad_() for x in qkv.transpose(1, 3).unbind(2)]
    dout = upstream if layout == "HTD" else upstream.transpose(1, 2).contiguous().transpose(1, 2)
    function = attention if mode == "eager" else torch.compile(attention, dynamic=False)
    # What autograd's cache keeps on disk does not know which backend was allowed.
    settings = {"donated_buffer": mode == "donated", "enable_autograd_cache": False}
    with sdpa_kernel(backend), torch._functorch.config.patch(settings):
        out = function(*inputs)
        results = [x.detach().flatten(0, 1) for x in (out, *torch.autograd.grad(out, inputs, dout))]
    wrong = total = torch.zeros(4, dtype=torch.float64, device=qkv.device)
    for i, head in enumerate(zip(*(x.detach().flatten(0, 1) for x in (*inputs, upstream)))):
        *exact, dout = (x.double().requires_grad_() for x in head)
        out = attention(*(x[None] for x in exact))[0]
        for_head = [out, *torch.autograd.grad(out, exact, dout)]
        wrong = wrong + torch.stack([(r[i] - e).square().sum() for r, e in zip(results, for_head)]).detach()
        total = total + torch.stack([e.square().sum() for e in for_head]).detach()
    return (wrong / total).sqrt().tolist()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sdpa", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases: list[dict[str, Any]] = []
    for T, D in ((2048, 128), (4096, 64)) if device == "cuda" else ((48, 16),):
        for backend, (B, story) in product(BACKENDS[device == "cpu" :], enumerate(STORIES, start=1)):
            torch._dynamo.reset()
            qkv = torch.randn(B, T, 3, 2, D, device=device).bfloat16()
            upstream = torch.randn(B, 2, T, D, device=device).bfloat16() + 1.5
            print(f"T={T} D={D} {backend.name}")
            for mode, layout in story:
                try:
                    found: Any = errors(mode, layout, backend, qkv, upstream)
                except RuntimeError as failure:  # a backend that refuses is a result too
                    found = str(failure)[:100]
                said = found if isinstance(found, str) else " ".join(f"{e:.1e}" for e in found)
                print(f"    {mode:8} {layout} {said}", flush=True)
                case = {"T": T, "D": D, "backend": backend.name, "story": B, "mode": mode, "layout": layout}
                cases.append(case | {"errors": found})
            if options.out:
                timing.write(options.out, "sdpa", device, cases=cases)


if __name__ == "__main__":
    main()
