"""python -m bench.roofline: the least time that a training step can take on a GPU, and the time to expect.

    python -m bench.roofline                       the 124M, on the GPU that was measured last
    python -m bench.roofline --gpu=A100            on another GPU: a prediction
    python -m bench.roofline --size=350M --batch_size=16

A step has parts, and each part needs FLOPs and bytes: `Op.cost` counts them for our operations, `parts` for
the rest. The limits of the GPU turn them into a least time. A real step reaches a share of each limit, so
the time to expect is the least time over the share. The limits come from `bench.kernels`, the shares from a
`bench.throughput` with the step by part, both from JSON files in bench/results. Below the table stands the
memory, by what it holds.
"""

import sys
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from bench import timing
from gpt import cli
from gpt.cli import UserPath
from gpt.flops import peak_flops
from gpt.model import GPT, GPTConfig
from kernels import OPS
from kernels.linear_cross_entropy import ALIGN, chunk_rows
from kernels.op import Cost, record, triton

Result = dict[str, Any]
Limits = dict[str, float]  # the highest rates that a GPU reaches, as `timing.limits` measures them
Step = tuple[GPTConfig, int, int]  # (model, micro-batch, micro-batches in a step) on one GPU
SIZES: dict[str, tuple[int, int, int]] = {  # layers, heads, width
    "124M": (12, 12, 768),
    "350M": (24, 16, 1024),
    "774M": (36, 20, 1280),
    "1.5B": (48, 25, 1600),
    "tiny": (2, 2, 64),
}
TOKENS_PER_STEP = 1 << 19
PARTS = (
    "matrix products", "attention, forward", "attention, backward", "norms, forward", "norms, backward",
    "GELU, forward", "GELU, backward", "loss", "rest", "between kernels",
)  # fmt: skip
# Memory bytes/s and bytes of memory: the vendor's datasheets of the SXM parts.
DATASHEET = {
    "A100": (2.039e12, 80e9),
    "H100": (3.35e12, 80e9),
    "H200": (4.8e12, 141e9),
    "B200": (8.0e12, 180e9),
}


@dataclass(frozen=True)
class Part:
    """A part of the step, as (FLOPs, bytes, launches) of each kind of kernel."""

    name: str
    work: tuple[tuple[float, float, int], ...]

    @property
    def flops(self) -> float:
        return sum(flops * times for flops, _, times in self.work)

    @property
    def bytes(self) -> float:
        return sum(moved * times for _, moved, times in self.work)

    def least_time(self, limits: Limits) -> float:
        """Seconds. The slower of its two limits decides each kernel's time."""
        product, copy = limits["product_flops_per_s"], limits["copy_bytes_per_s"]
        return sum(max(f / product, b / copy) * times for f, b, times in self.work)


def parts(config: GPTConfig, batch_size: int, accumulation: int) -> list[Part]:
    """The parts of a step with our kernels in bf16: all of PARTS except "between kernels"."""
    assert config.vocab_size is not None
    T, L, H, C, V = config.block_size, config.n_layer, config.n_head, config.n_embd, config.vocab_size
    rows, layers = batch_size * T, L * accumulation
    matrices = V * C + 12 * L * C * C
    params = matrices + T * C + (2 * L + 1) * C * (1 + config.bias) + 9 * L * C * config.bias
    ops = {op.name: op for op in OPS}

    def cost(name: str, **sample: Any) -> Cost:
        return ops[name].cost(**ops[name].make(dtype=torch.bfloat16, device="meta", **sample))

    def product(n: int, k: int, times: int) -> tuple[float, float, int]:
        return 2.0 * rows * n * k, 2.0 * (rows * n + rows * k + n * k), times

    attention = cost("causal_attention", B=batch_size, T=T, H=H, D=C // H)
    # Norms and losses do not use tensor cores. Memory limits them, so their FLOPs count as 0.
    if config.residual_dtype == "auto":
        raise ValueError("residual_dtype is 'auto': the roofline needs the value that a model has chosen")
    if config.residual_dtype == "mixed":
        norm = cost("add_layer_norm_mixed", shape=(rows, C))
    else:
        fp32 = config.residual_dtype == "float32"
        norm = cost("add_layer_norm", shape=(rows, C), bias=config.bias, mixed=fp32)
    norms = 2 * layers + accumulation
    hidden = 2.0 * 4 * C * rows  # bytes of the MLP's middle in bf16
    # c_attn, attn.c_proj, c_fc, mlp.c_proj: (inputs, outputs)
    linear = (C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)
    work: dict[str, list[tuple[float, float, int]]] = {
        # forward, and backward of input and weight
        "matrix products": [*(product(n, k, 3 * layers) for n, k in linear), product(C, V, 3 * accumulation)],
        "attention, forward": [(attention.forward_flops, attention.forward_bytes, layers)],
        "attention, backward": [(attention.backward_flops, attention.backward_bytes, layers)],
        "norms, forward": [(0, norm.forward_bytes, norms)],
        "norms, backward": [(0, norm.backward_bytes, norms)],
        "GELU, forward": [(0, 2 * hidden, layers)],  # x -> y
        "GELU, backward": [(0, 3 * hidden, layers)],  # dy, x -> dx
        "loss": [(0, 4.0 * rows * V, accumulation)],  # bf16 logits read, their gradient written over them
        "rest": [
            (0, 8.0 * C * rows, 2 * accumulation),  # rows of wte -> the stream; its gradient -> wte's
            (0, (6.0 + 10.0) * matrices, accumulation),  # fp32 -> bf16; a gradient added in fp32
            (0, (4.0 + 8.0 + 28.0) * params, 1),  # gradient's norm, clipping, AdamW: p, g, m, v -> p, m, v
        ],
    }
    return [Part(name, tuple(kernels)) for name, kernels in work.items()]


def memory(config: GPTConfig, batch_size: int, available: float | None = None) -> dict[str, float]:
    """Bytes by what they hold, at the end of a forward pass with our kernels in bf16, when memory is fullest.

    `available` is the memory of the GPU. The loss takes smaller chunks on a small GPU. Raises ValueError
    without Triton.
    """
    saved: dict[StorageWeakRef, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        saved[StorageWeakRef(tensor.untyped_storage())] = tensor
        return tensor

    # Tensors without data, which no kernel reads. A dry run accepts our kernels without a GPU.
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        with record(assume=90):
            model = GPT(replace(config, kernels="triton"))
        idx = torch.zeros(batch_size, config.block_size, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            model(idx, idx)
    weights = {StorageWeakRef(p.untyped_storage()) for p in model.parameters()}
    n, V = sum(p.numel() for p in model.parameters()), model.lm_head.weight.shape[0]
    rows = batch_size * config.block_size
    return {
        "weights, fp32": 4 * n,
        "gradients, fp32": 4 * n,
        "AdamW, fp32": 8 * n,
        # activations, weights in bf16, and the gradients that the loss has computed already
        "saved for the backward pass": sum(
            tensor.untyped_storage().nbytes() for storage, tensor in saved.items() if storage not in weights
        ),
        "logits, a chunk": 2 * chunk_rows(rows, V, 2, available) * -(-V // ALIGN) * ALIGN,
    }


def kind_of(gpu: str) -> str | None:
    """The name of a device in DATASHEET, such as "H100" for "NVIDIA H100 80GB HBM3"; None for others."""
    words = gpu.replace("-", " ").upper().split()
    if "PCIE" in words or "NVL" in words:  # the same names, slower parts
        return None
    return next((kind for kind in DATASHEET if kind in words), None)


def device_of(result: Result) -> str:
    return result["environment"]["device"]


def limits_of(gpu: str, results: list[Result]) -> tuple[Limits, str]:
    """The limits measured on a GPU of this kind, or else predicted from its datasheet; and their source.

    A prediction takes the share of the datasheet's rates that another GPU reached. Raises ValueError for a
    GPU without a datasheet, and where no limits were measured.
    """
    kind = kind_of(gpu)
    if kind is None:
        raise ValueError(f"there is no datasheet of {gpu!r}, only of {', '.join(DATASHEET)} (SXM)")
    measured = [r for r in results if r["benchmark"] == "kernels" and kind_of(device_of(r))]
    if not measured:
        raise ValueError("no limits were measured: run python -m bench.kernels --out=... on a GPU")
    result = max(reversed(measured), key=lambda r: kind_of(device_of(r)) == kind)
    other = kind_of(device_of(result)) or ""
    if other == kind:
        return result["limits"], f"measured, {result['file']}"
    copy = result["limits"]["copy_bytes_per_s"] / DATASHEET[other][0]
    product = result["limits"]["product_flops_per_s"] / (peak_flops(other, "bfloat16") or 0.0)
    predicted = {
        "copy_bytes_per_s": copy * DATASHEET[kind][0],
        "product_flops_per_s": product * (peak_flops(kind, "bfloat16") or 0.0),
    }
    shares = f"{copy:.0%} of the datasheet's bytes/s and {product:.0%} of its FLOP/s"
    return predicted, f"predicted: {shares}, as an {other} reached, {result['file']}"


def step_of(result: Result) -> Step:
    """The step that a result of `bench.throughput` on one GPU has measured."""
    names = {field.name for field in fields(GPTConfig)}
    config = GPTConfig(**{k: v for k, v in result["model"].items() if k in names})
    # Older results have no residual_dtype: it was always float32.
    config.residual_dtype = result["model"].get("residual_dtype", "float32")
    ours, batch_size = result["variants"]["tritongpt"], result["batch_size"]["tritongpt"]
    sequences = ours["tokens_per_s"] * ours["step_ms"] / 1e3 / config.block_size
    return config, batch_size, round(sequences / batch_size)


def measured_step(kind: str | None, step: Step | None, results: list[Result]) -> Result:
    """The newest step by part. One on this kind of GPU is preferred, and then one that is this very step.

    Raises ValueError if no step was measured by part.
    """
    steps = [r for r in results if r["benchmark"] == "throughput" and kind_of(device_of(r))]
    by_part = [r for r in steps if "tritongpt" in r.get("parts", {})]
    if not by_part:
        raise ValueError("no step was measured by part: run python -m bench.throughput --out=... on a GPU")
    return max(
        reversed(by_part),
        key=lambda r: (
            kind_of(device_of(r)) == kind,
            step is not None and parts(*step_of(r)) == parts(*step),
        ),
    )


def print_step(step: Step, gpu: str, results: list[Result]) -> None:
    """Prints the step by part, its total and its memory: measured if this very step was, else expected."""
    limits, source = limits_of(gpu, results)
    result = measured_step(kind_of(gpu), step, results)
    device, measured_ms = device_of(result), result["parts"]["tritongpt"]
    measured_limits, _ = limits_of(device, results)
    measured_parts = parts(*step_of(result))
    least_ms = {part.name: 1e3 * part.least_time(limits) for part in parts(*step)}
    # A part takes as many times its least time as in the measured step.
    expected_ms = {
        part.name: least_ms[part.name] * measured_ms[part.name] / (1e3 * part.least_time(measured_limits))
        for part in measured_parts
    }
    between = measured_ms["between kernels"] / sum(measured_ms[name] for name in expected_ms)
    same = kind_of(device) == kind_of(gpu) and measured_parts == parts(*step)
    copy, product = limits["copy_bytes_per_s"] / 1e9, limits["product_flops_per_s"] / 1e12
    print(f"limits: copy {copy:,.0f} GB/s, product {product:,.1f} TFLOP/s ({source})")
    print(f"shares: measured on {device}, {result['file']}\n")
    last = "measured" if same else "expected"
    print(f"{'part':20} {'TFLOP':>8} {'GB':>8} {'least ms':>9} {'share':>6} {last:>9}")
    for part in parts(*step):
        least, ms = least_ms[part.name], expected_ms[part.name]
        # The profiler may have found no kernel of a part, under a name that `bench.throughput` knows.
        share = f"{least / ms:.1%}" if ms else ""
        work = f"{part.flops / 1e12:8.2f} {part.bytes / 1e9:8.1f}"
        print(f"{part.name:20} {work} {least:9.2f} {share:>6} {ms:9.2f}")
    total = sum(expected_ms.values())
    print(f"{'between kernels':20} {'':26} {'':7}{between * total:10.2f}\n")
    config, batch_size, accumulation = step
    with torch.device("meta"):
        flops_per_token = GPT(config).flops_per_token()
    peak = peak_flops(gpu, "bfloat16") or float("nan")
    step_ms = result["variants"]["tritongpt"]["step_ms"] if same else (1 + between) * total
    for what, ms in (("at least", sum(least_ms.values())), (last, step_ms)):
        rate = 1e3 * accumulation * batch_size * config.block_size / ms
        mfu = rate * flops_per_token / peak
        print(f"{what:20} {ms:8.2f} ms a step, {rate:,.0f} tokens/s, MFU {mfu:.1%}")
    if triton is None:
        print("\nmemory: not predicted, since that takes a dry run of the kernels, which needs Triton")
        return
    available = DATASHEET[kind_of(gpu) or ""][1]
    sizes = memory(config, batch_size, available)
    needed = sum(sizes.values())
    fits = "fits" if needed < available else "does not fit"
    print(f"\nmemory, predicted: {needed / 1e9:.1f} GB, which {fits} into {available / 1e9:.0f} GB")
    if same:
        print(f"memory, measured: {result['variants']['tritongpt']['peak_bytes'] / 1e9:.1f} GB")
    print(*(f"  {what:30} {size / 1e9:8.2f} GB" for what, size in sizes.items()), sep="\n")


@dataclass
class RooflineConfig:
    """Predict the least time of a training step on a GPU, and the time that it will take."""

    gpu: str = ""  # A100, H100, H200 or B200; default: the one that was measured last
    size: str = "124M"  # of the model: 124M, 350M, 774M, 1.5B or tiny
    batch_size: int = 64  # sequences in a micro-batch
    block_size: int = 1024  # tokens in a sequence
    residual_dtype: Literal["", "mixed", "float32", "bfloat16"] = ""  # default: that of the measured step
    results: UserPath = "bench/results"  # folder of measurements


def main() -> None:
    options = cli.parse(RooflineConfig, sys.argv[1:], prog="python -m bench.roofline")
    batch_size, block_size = options.batch_size, options.block_size
    if min(batch_size, block_size) < 1:
        raise ValueError(f"--batch_size={batch_size} and --block_size={block_size} must be at least 1")
    results = timing.read(options.results)
    newest = measured_step(None, None, results)
    gpu = options.gpu or device_of(newest)
    layers, heads, width = cli.choose(SIZES, options.size, "size")
    config = GPTConfig(
        block_size, 50304, layers, heads, width,
        bias=False, kernels="torch",
        residual_dtype=options.residual_dtype or step_of(newest)[0].residual_dtype,
    )  # fmt: skip
    accumulation = max(1, round(TOKENS_PER_STEP / (batch_size * block_size)))
    print(
        f"{layers} layers, {width} wide, {accumulation} micro-batches of {batch_size} x {block_size} tokens "
        f"on one {gpu}"
    )
    print_step((config, batch_size, accumulation), gpu, results)


if __name__ == "__main__":
    cli.run(main)
