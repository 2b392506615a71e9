"""python -m bench.roofline: the least time of a training step on a GPU, and the time to expect.

    python -m bench.roofline                                     this GPU; measures its limits first
    python -m bench.roofline --gpu A100 --gpus 8 --tokens 10e9   another GPU: a prediction

The step is cut into parts. A part needs some FLOPs and some bytes: `Op.cost` counts those of our operations,
`parts` counts the rest. The GPU's limits turn them into a least time. In a real step a part reaches a share
of its limit. The newest result of `bench.throughput` that has the step's milliseconds by part gives the
shares; without one they are assumed. Least time over share is the time to expect. A table shows all of it
and says where each share is from. Below it stand the memory by what it holds, the largest micro-batch that
fits, and the time of a whole run.
"""

import argparse
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import timing
from gpt import cli
from gpt.flops import peak_flops
from gpt.model import GPT, GPTConfig
from kernels import OPS
from kernels.linear_cross_entropy import ALIGN, chunk_rows
from kernels.op import Cost

Result = dict[str, Any]
SIZES = {  # layers, heads, width
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
MARGIN = 0.07  # of the memory, left free for NCCL and fragments; --batch_size=auto leaves as much
_OPS = {op.name: op for op in OPS}


@dataclass(frozen=True)
class Limits:
    """The rates that a GPU reaches. `link` is bytes/s to the other GPUs of its machine, in one direction."""

    copy: float  # bytes/s, read and written
    product: float  # FLOP/s of a large bf16 matrix product
    link: float
    memory: float  # bytes
    source: str


# Memory bytes/s, NVLink bytes/s in one direction, bytes of memory: the vendor's datasheets of the SXM parts.
DATASHEET = {
    "A100": (2.039e12, 300e9, 80e9),
    "H100": (3.35e12, 450e9, 80e9),
    "H200": (4.8e12, 450e9, 141e9),
    "B200": (8.0e12, 900e9, 180e9),
}
# Shares of the datasheet to assume where no GPU was measured. An A100 has 400 W for 312 TFLOP/s and an H200
# 700 W for 989, so power should hold an A100's products back less: its 87% stays an assumption.
REACHED = (0.9, 0.8, 0.8)  # copy, product, link
A100_PRODUCT = 0.87
# Shares that parts reach of their limits, to assume where no step was measured: one H200's, rounded.
ASSUMED = dict(zip(PARTS, (0.88, 0.34, 0.27, 0.83, 0.79, 0.58, 0.61, 0.7, 0.46, 0.012)))


@dataclass(frozen=True)
class Part:
    """A share of the step: for each kind of kernel the (FLOPs, bytes, launches) of a step."""

    name: str
    work: tuple[tuple[float, float, int], ...]

    @property
    def flops(self) -> float:
        return sum(flops * times for flops, _, times in self.work)

    @property
    def bytes(self) -> float:
        return sum(moved * times for _, moved, times in self.work)

    def least(self, limits: Limits) -> float:
        """Seconds. Each kernel waits for the slower of its two limits."""
        return sum(max(f / limits.product, b / limits.copy) * times for f, b, times in self.work)


def parts(config: GPTConfig, batch_size: int, accumulation: int) -> list[Part]:
    """The step of our kernels in bf16 with an fp32 residual stream: all of PARTS but "between kernels"."""
    assert config.vocab_size is not None
    T, L, H, C, V = config.block_size, config.n_layer, config.n_head, config.n_embd, config.vocab_size
    rows, layers = batch_size * T, L * accumulation
    matrices = V * C + 12 * L * C * C
    params = matrices + T * C + (2 * L + 1) * C * (1 + config.bias) + 9 * L * C * config.bias
    # Checkpointing runs a block's forward pass again, but for its last product: nothing needs that result.
    again = layers if config.activation_checkpointing else 0

    def cost(name: str, **sample: Any) -> Cost:
        return _OPS[name].cost(**_OPS[name].make(dtype=torch.bfloat16, device="meta", **sample))

    def product(n: int, k: int, times: int) -> tuple[float, float, int]:
        return 2.0 * rows * n * k, 2.0 * (rows * n + rows * k + n * k), times

    attention = cost("causal_attention", B=batch_size, T=T, H=H, D=C // H)
    # Tensor cores do no norm and no loss: their FLOPs count as none.
    norm = cost("add_layer_norm", shape=(rows, C), bias=config.bias, mixed=True)
    norms = 2 * layers + accumulation
    hidden = 2.0 * 4 * C * rows  # bytes of the MLP's middle in bf16
    work: dict[str, list[tuple[float, float, int]]] = {
        "matrix products": [
            *(
                product(n, k, 3 * layers + again * (name != "mlp.c_proj"))
                for name, (n, k) in shapes(C).items()
            ),
            product(C, V, 3 * accumulation),  # lm_head
        ],
        "attention, forward": [(attention.forward_flops, attention.forward_bytes, layers + again)],
        "attention, backward": [(attention.backward_flops, attention.backward_bytes, layers)],
        "norms, forward": [(0, norm.forward_bytes, norms + 2 * again)],
        "norms, backward": [(0, norm.backward_bytes, norms)],
        "GELU, forward": [(0, 2 * hidden, layers + again)],  # x -> y
        "GELU, backward": [(0, 3 * hidden, layers)],  # dy, x -> dx
        "loss": [(0, 4.0 * rows * V, accumulation)],  # bf16 logits read, their gradient written over them
        "rest": [
            (0, 8.0 * C * rows, 2 * accumulation),  # rows of wte -> the stream; its gradient -> wte's
            (0, (6.0 + 10.0) * matrices, accumulation),  # fp32 -> bf16; a gradient added in fp32
            (0, (4.0 + 8.0 + 28.0) * params, 1),  # gradient's norm, clipping, AdamW: p, g, m, v -> p, m, v
        ],
    }
    return [Part(name, tuple(kernels)) for name, kernels in work.items()]


def shapes(C: int) -> dict[str, tuple[int, int]]:
    """The linear layers of a block: (inputs, outputs)."""
    return {"c_attn": (C, 3 * C), "attn.c_proj": (C, C), "c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}


def activations(config: GPTConfig, batch_size: int) -> dict[str, int]:
    """Bytes that the forward pass keeps for the backward pass, beside the weights; no dropout.

    A layer and token: twice the fp32 stream (4C) and the bf16 norm of it (2C), with mean and rstd; qkv (6C),
    the attention's output (2C), the log-sum-exp of every head; the MLP's middle before and after the GELU (8C
    each). At the end the last norm's stream, and the gradient that the loss has for it. Checkpointed blocks
    keep the stream and the update to add to it (2C); one of them at a time has the rest.
    """
    T, L, H, C = config.block_size, config.n_layer, config.n_head, config.n_embd
    tokens = batch_size * T
    inputs, whole = (L * (4 + 2) * C, 1) if config.activation_checkpointing else (0, L)
    return {
        "activations, inputs of blocks": tokens * inputs,
        "activations, stream and norms": tokens * whole * (2 * (4 + 2) * C + 2 * 2 * 4),
        "activations, attention": tokens * whole * (6 * C + 2 * C + 4 * H),
        "activations, MLP": tokens * whole * 2 * 8 * C,
        "activations, after the blocks": tokens * (4 * C + 2 * C + 2 * 4 + 8),  # 8: the ids
    }


def memory(
    config: GPTConfig, batch_size: int, gpus: int = 1, available: float | None = None
) -> dict[str, float]:
    """Bytes on one of the GPUs, by what they hold, at the end of a forward pass, when there are most.

    `available` is the memory of the GPU: a small one takes the loss in small chunks.
    """
    with torch.device("meta"):
        model = GPT(config)
    n = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    rows, (V, C) = batch_size * config.block_size, model.lm_head.weight.shape
    held = {
        "weights, fp32": 4 * n,
        "gradients, fp32": 4 * n,
        "DDP's buckets, fp32": 4 * n if gpus > 1 else 0,  # beside the gradients that are accumulated
        "AdamW, fp32": 8 * n,
        "weights, bf16": 2 * matrices,
        **activations(config, batch_size),
        "logits, a chunk": 2 * chunk_rows(rows, V, 2, available) * -(-V // ALIGN) * ALIGN,
        # dW in fp32 from the loss's chunks, before it is added to the gradient
        "gradient of lm_head": 4 * V * C,
    }
    return {what: size for what, size in held.items() if size}


def largest_micro_batch(config: GPTConfig, sequences: int, gpus: int, available: float) -> int | None:
    """The largest that fits into `available` bytes and divides a GPU's share of `sequences`; None if none."""
    share = sequences // gpus
    sizes = (size for size in range(share, 0, -1) if share % size == 0)
    most = (1 - MARGIN) * available
    fits = (s for s in sizes if sum(memory(config, s, gpus, available).values()) <= most)
    return next(fits, None)


def exchange(params: int, gpus: int, limits: Limits) -> float:
    """Seconds of the ring all-reduce of fp32 gradients over `gpus`, if nothing hid it."""
    return 2 * (gpus - 1) / gpus * 4 * params / limits.link


def kind_of(gpu: str) -> str | None:
    """The datasheet's name for a device, "H100" for "NVIDIA H100 80GB HBM3"; None where there is none."""
    words = gpu.replace("-", " ").upper().split()
    if "PCIE" in words or "NVL" in words:  # the same names, slower parts
        return None
    return next((kind for kind in DATASHEET if kind in words), None)


def limits_of(gpu: str, results: list[Result]) -> Limits:
    """Limits of a GPU that is not here: measured on one of its kind, else predicted. Raises ValueError.

    A prediction takes the shares of its datasheet that another GPU reached, the one measured last.
    """
    kind = kind_of(gpu)
    if kind is None:
        raise ValueError(f"there is no datasheet of {gpu!r}, only of {', '.join(DATASHEET)} (SXM)")
    copy, link, size = DATASHEET[kind]
    peak = peak_flops(kind, "bfloat16") or 0.0
    copy_share, product_share, link_share = REACHED
    basis = "assumed shares"
    measured = [r for r in results if r["benchmark"] in ("roofline", "kernels") and _kind(r) is not None]
    if measured:
        result = max(reversed(measured), key=lambda result: _kind(result) == kind)
        rates = result["limits"]["copy_bytes_per_s"], result["limits"]["product_flops_per_s"]
        other = _kind(result) or ""
        if other == kind:
            return Limits(*rates, link_share * link, size, f"measured, {result['file']}")
        copy_share = rates[0] / DATASHEET[other][0]
        product_share = rates[1] / (peak_flops(other, "bfloat16") or 0.0)
        basis = f"shares of an {other}, {result['file']}"
    if kind == "A100":
        product_share, basis = A100_PRODUCT, f"{basis}; product assumed"
    source = (
        f"predicted: {copy_share:.0%} of the datasheet's {copy / 1e12:.2f} TB/s, {product_share:.0%} of its "
        f"{peak / 1e12:,.0f} TFLOP/s; {basis}"
    )
    return Limits(copy_share * copy, product_share * peak, link_share * link, size, source)


def _kind(result: Result) -> str | None:
    return kind_of(result["environment"]["device"])


def measured_limits(device: str) -> Limits:
    """Limits of this GPU, or CPU. Its links are the datasheet's, if it has one."""
    rates = timing.limits(device)
    link, size = 1e10, 0.0
    if device == "cuda":
        size = torch.cuda.get_device_properties(0).total_memory
        with suppress(ValueError):
            link = limits_of(torch.cuda.get_device_name(), []).link
    return Limits(rates["copy_bytes_per_s"], rates["product_flops_per_s"], link, size, "measured now")


def measure_products(config: GPTConfig, batch_size: int, device: str) -> dict[str, dict[str, float]]:
    """The step's matrix products as they lie in memory: {layer, direction: {ms, flops_per_s}}.

    c_fc's forward also runs for two seconds on end, at the clocks that the GPU's power then allows.
    """
    rows, C, V = batch_size * config.block_size, config.n_embd, config.vocab_size
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    assert V is not None
    results: dict[str, dict[str, float]] = {}
    for name, (n, k) in (shapes(C) | {"lm_head, a chunk": (C, V)}).items():
        m = chunk_rows(rows, V, dtype.itemsize) if "chunk" in name else rows
        x, dy, w = (torch.randn(*s, device=device).to(dtype) for s in ((m, n), (m, k), (k, n)))
        calls: dict[str, Callable[[], Any]] = {
            "forward": partial(torch.mm, x, w.t()),
            "dx": partial(torch.mm, dy, w),
            "dw": partial(torch.mm, dy.t(), x),
        }
        if "chunk" in name and device == "cuda":  # added up in fp32
            dw = torch.zeros(k, n, device=device)
            calls["dw"] = partial(torch.addmm, dw, dy.t(), x, out_dtype=torch.float32, out=dw)
        times = {what: timed.median for what, timed in timing.interleaved(calls, device, 0.1).items()}
        if name == "c_fc":
            seconds = 2.0 if device == "cuda" else 0.05
            times["forward, sustained"] = timing.sustained(calls["forward"], device, seconds)
        for what, ms in times.items():
            results[f"{name} {what}"] = {"ms": ms, "flops_per_s": 2.0 * m * n * k / ms * 1e3}
    return results


@dataclass(frozen=True)
class Step:
    """A step on one GPU: `accumulation` micro-batches of `batch_size` sequences."""

    config: GPTConfig
    batch_size: int
    accumulation: int

    @property
    def tokens(self) -> int:
        return self.accumulation * self.batch_size * self.config.block_size

    def parts(self) -> list[Part]:
        return parts(self.config, self.batch_size, self.accumulation)


def measured_steps(results: list[Result]) -> list[tuple[Step, Result]]:
    """Our steps on a single GPU that has a datasheet, with their throughput results, the newest first."""
    names = {field.name for field in fields(GPTConfig)}
    steps = []
    for result in reversed(results):
        ours = result["variants"].get("tritongpt") if result["benchmark"] == "throughput" else None
        if isinstance(ours, dict) and result["ranks"] == 1 and _kind(result) is not None:
            config = GPTConfig(**{k: v for k, v in result["model"].items() if k in names})
            batch_size = result["batch_size"]["tritongpt"]
            sequences = ours["tokens_per_s"] * ours["step_ms"] / 1e3 / config.block_size
            steps.append((Step(config, batch_size, round(sequences / batch_size)), result))
    return steps


def same_step(step: Step, kind: str | None, results: list[Result]) -> Result | None:
    """The newest measurement of this step on this kind of GPU."""
    like = (r for s, r in measured_steps(results) if _kind(r) == kind and s.parts() == step.parts())
    return next(like, None)


def shares(
    step: Step, kind: str | None, results: list[Result]
) -> tuple[dict[str, float], dict[str, float], str]:
    """({part: share of its limit}, {part: measured ms} if it is this very step, where from).

    From the newest step by part on this kind of GPU, else on another, else assumed. "between kernels" is a
    share of the other parts' time.
    """
    by_part = [(s, r) for s, r in measured_steps(results) if "tritongpt" in r.get("parts", {})]
    if not by_part:
        return ASSUMED, {}, "assumed"
    other, result = max(by_part, key=lambda pair: _kind(pair[1]) == kind)  # the first of equals: the newest
    device, ms = result["environment"]["device"], result["parts"]["tritongpt"]
    limits = limits_of(device, results)
    reached = {part.name: 1e3 * part.least(limits) / ms[part.name] for part in other.parts()}
    reached["between kernels"] = ms["between kernels"] / sum(ms[name] for name in reached)
    if _kind(result) == kind and other.parts() == step.parts():
        return reached, ms, f"measured in the step, {result['file']}"
    return reached, {}, f"share measured on {device}, {result['file']}"


def print_step(step: Step, gpu: str, limits: Limits, results: list[Result]) -> float:
    """The parts of one GPU's step. Returns its seconds: measured, else expected."""
    kind, peak = kind_of(gpu), peak_flops(gpu, "bfloat16")
    with torch.device("meta"):
        flops_per_token = GPT(step.config).flops_per_token()

    def line(what: str, seconds: float, note: str) -> str:
        rate = step.tokens / seconds
        mfu = "" if peak is None else f", MFU {rate * flops_per_token / peak:.1%}"
        return f"{what:20} {1e3 * seconds:8.2f} ms a step, {rate:,.0f} tokens/s{mfu} ({note})"

    copy, product = f"{limits.copy / 1e9:,.0f} GB/s", f"{limits.product / 1e12:,.1f} TFLOP/s"
    print(f"limits: copy {copy}, product {product} ({limits.source})\n")
    reached, measured, source = shares(step, kind, results)
    columns = f"{'least ms':>9} {'share':>6} {'expected':>9} {'measured':>9}  source"
    print(f"{'part':20} {'TFLOP':>8} {'GB':>8} {columns}")
    least = expected = 0.0
    for part in [*step.parts(), Part("between kernels", ())]:
        at_least, share = part.least(limits), reached[part.name]
        in_step = f"{measured[part.name]:9.2f}" if measured else f"{'':9}"
        seconds = at_least / share if part.work else share * expected
        least, expected = least + at_least, expected + seconds
        print(
            f"{part.name:20} {part.flops / 1e12:8.2f} {part.bytes / 1e9:8.1f} {1e3 * at_least:9.2f} "
            f"{share:6.1%} {1e3 * seconds:9.2f} {in_step}  {source}"
        )
    print("\n" + line("at least", least, "every part at its limit"))
    print(line("expected", expected, "the sum of this step's own parts" if measured else "predicted"))
    if (same := same_step(step, kind, results)) is not None:
        expected = same["variants"]["tritongpt"]["step_ms"] / 1e3
        print(line("measured", expected, same["file"]))
    return expected


def print_memory(step: Step, gpu: str, gpus: int, limits: Limits, results: list[Result]) -> None:
    def line(what: str, size: float, note: str = "") -> str:
        return f"{what:42} {size / 1e9:8.2f} GB{note}"

    held = memory(step.config, step.batch_size, gpus, limits.memory or None)
    needed, available = sum(held.values()), (1 - MARGIN) * limits.memory
    print("\n" + line(f"memory at micro-batch {step.batch_size}, predicted", needed))
    same = same_step(step, kind_of(gpu), results)
    if same is not None and gpus == 1:
        print(line("memory, measured", same["variants"]["tritongpt"]["peak_bytes"], f" ({same['file']})"))
    print(*(line(f"  {what}", size) for what, size in held.items()), sep="\n")
    if not limits.memory:
        return
    fits = "fits" if needed <= available else "does not fit"
    print(f"{fits} into {limits.memory / 1e9:.0f} GB less {MARGIN:.0%}, predicted")
    sequences = step.batch_size * step.accumulation * gpus
    if (largest := largest_micro_batch(step.config, sequences, gpus, limits.memory)) is None:
        print("not one sequence fits, predicted: try --activation_checkpointing=True or --strategy=fsdp")
    else:
        needed = sum(memory(step.config, largest, gpus, limits.memory).values())
        print(line(f"largest micro-batch of {sequences} sequences: {largest}, predicted", needed))


def print_run(step: Step, seconds: float, gpus: int, limits: Limits, tokens: float | None) -> None:
    """What several GPUs make of a step of `seconds` on each, and how long `tokens` take."""
    rate = step.tokens / seconds
    if gpus > 1:
        with torch.device("meta"):
            params = sum(p.numel() for p in GPT(step.config).parameters())
        # Gradients travel while the last micro-batch's backward pass, two thirds of it, computes the rest.
        whole = exchange(params, gpus, limits)
        exposed = max(0.05 * whole, whole - seconds / step.accumulation * 2 / 3)
        share = seconds / (seconds + exposed)
        rate *= gpus * share
        print(
            f"\n{gpus} GPUs, predicted: gradients take {1e3 * whole:.1f} ms, {1e3 * exposed:.1f} of it not "
            f"hidden: {rate:,.0f} tokens/s, {share:.1%} of {gpus} times one"
        )
    if tokens:
        hours = tokens / rate / 3600
        print(f"\n{tokens:,.0f} tokens, predicted: {hours:,.1f} hours, {hours / 24:,.1f} days")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.roofline", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--gpu", help=f"predict for another: {', '.join(DATASHEET)}")
    parser.add_argument("--gpus", type=int, default=1, help="of one machine, linked by NVLink")
    parser.add_argument("--size", choices=SIZES, help="of the model; 124M on a GPU")
    parser.add_argument("--batch_size", type=int, help="sequences in a micro-batch; 64 on a GPU")
    parser.add_argument("--block_size", type=int, help="tokens in a sequence; 1024 on a GPU")
    parser.add_argument("--tokens", type=float, help="of a whole run, to say how long it takes")
    parser.add_argument("--results", type=Path, default=Path("bench/results"), help="folder of measurements")
    parser.add_argument("--out", type=Path, help="a JSON file for the limits that were measured")
    cli.run(lambda: predict(parser.parse_args()))


def predict(options: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = options.gpu is None and device == "cpu"
    batch_size = options.batch_size or (2 if small else 64)
    block_size = options.block_size or (64 if small else 1024)
    if min(options.gpus, batch_size, block_size) < 1:
        raise ValueError("--gpus, --batch_size and --block_size must be at least 1")
    layers, heads, width = SIZES[options.size or ("tiny" if small else "124M")]
    vocab_size = 512 if small else 50304
    config = GPTConfig(block_size, vocab_size, layers, heads, width, bias=False, kernels="torch")
    accumulation = max(1, round(TOKENS_PER_STEP / (batch_size * options.gpus * block_size)))
    step, results = Step(config, batch_size, accumulation), timing.read(options.results)
    if options.gpu is not None:
        gpu, limits = options.gpu, limits_of(options.gpu, results)
    else:
        gpu = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        if small:
            print("There is no GPU: a tiny model on the CPU, which says nothing about a GPU. Try --gpu A100.")
        limits, products = measured_limits(device), measure_products(config, batch_size, device)
        for what, timed in products.items():
            print(f"  {what:26} {timed['ms']:8.3f} ms  {timed['flops_per_s'] / 1e12:7.1f} TFLOP/s")
        if options.out:
            rates = {"copy_bytes_per_s": limits.copy, "product_flops_per_s": limits.product}
            shape = {"model": vars(config), "batch_size": batch_size}
            timing.write(options.out, "roofline", device, limits=rates, products=products, **shape)
    size = f"{layers} layers, {width} wide"
    print(f"{size}, {accumulation} micro-batches of {batch_size} x {block_size} tokens on one {gpu}")
    seconds = print_step(step, gpu, limits, results)
    print_memory(step, gpu, options.gpus, limits, results)
    print_run(step, seconds, options.gpus, limits, options.tokens)


if __name__ == "__main__":
    main()
