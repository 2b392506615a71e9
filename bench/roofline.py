"""python -m bench.roofline: what the training step must cost at least on a GPU, what it costs, the gap.

    python -m bench.roofline                                     this GPU, its limits measured first
    python -m bench.roofline --gpu A100 --gpus 8 --tokens 10e9   another: predicted, and so it says
    python -m bench.roofline train_gpt2 --n_layer=24 --gpu A100  a run, by its config files and flags

The step is cut into parts. Each has the FLOPs and bytes that it needs at the least (`Op.cost` for the
operations of `kernels`, counted here for the rest), so the least time at a GPU's limits. The expected time
divides that by the share of the limit that each part reaches: measured where `--results` has it, of the
nearest shape, otherwise assumed. Both are printed with where they are from. Beside the time: the memory by
what it holds, whether it fits, the largest micro-batch that does, and how long the run takes.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import timing
from bench.kernels import peers
from gpt import cli
from gpt.flops import peak_flops
from gpt.model import GPT, GPTConfig
from kernels import OPS
from kernels.op import Cost
from train import fit
from train.config import asked_batch_size, parse

Result = dict[str, Any]
SIZES = {  # layers, heads, width
    "124M": (12, 12, 768),
    "350M": (24, 16, 1024),
    "774M": (36, 20, 1280),
    "1.5B": (48, 25, 1600),
    "tiny": (2, 2, 64),
}
TOKENS_PER_STEP = 1 << 19
_OPS = {op.name: op for op in OPS}
_loss = sys.modules["kernels.linear_cross_entropy"]
chunk_rows, ALIGN = _loss.chunk_rows, _loss.ALIGN


@dataclass(frozen=True)
class Limits:
    """What a GPU gives. `link` is bytes/s to the other GPUs of its machine, in one direction."""

    copy: float  # bytes/s, read and written
    product: float  # FLOP/s of a large bf16 matrix product
    link: float
    memory: float  # bytes
    source: str


# memory bytes/s, NVLink bytes/s in one direction, memory; by the vendor's datasheets of the SXM parts
DATASHEET = {
    "A100": (2.039e12, 300e9, 80e9),
    "H100": (3.35e12, 450e9, 80e9),
    "H200": (4.8e12, 450e9, 141e9),
    "B200": (8.0e12, 900e9, 180e9),
}
# Share of the datasheet that a large copy, a large product and an exchange reach. A plain PyTorch 2.11
# program got 3.0 TB/s and 798 TFLOP/s of an H100, 4.3 TB/s and 788 TFLOP/s of an H200; the rest is
# assumed, and more of an A100, whose power holds it back less.
REACHED = {"copy": 0.9, "product": 0.8, "A100 product": 0.87, "link": 0.8}
# Share of its limit that a part reaches where nothing was measured.
ASSUMED = {
    "matrix products": 0.8, "attention": 0.45, "norms": 0.85, "GELU": 0.9, "lm_head and loss": 0.75,
    "embedding": 0.5, "weights": 0.85, "optimizer": 0.85,
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A share of the step: work that one kernel does, each as (FLOPs, bytes, times a step)."""

    name: str
    work: tuple[tuple[float, float, int], ...]

    @property
    def flops(self) -> float:
        return sum(flops * times for flops, _, times in self.work)

    @property
    def bytes(self) -> float:
        return sum(moved * times for _, moved, times in self.work)

    def least(self, limits: Limits) -> float:
        """Seconds: each kernel at the slower of its two limits."""
        return sum(max(f / limits.product, b / limits.copy) * times for f, b, times in self.work)


def parts(config: GPTConfig, batch_size: int, accumulation: int) -> list[Part]:
    """The step of the Triton kernels in bf16 with an fp32 residual stream: `accumulation` micro-batches."""
    assert config.vocab_size is not None
    T, L, H, C, V = config.block_size, config.n_layer, config.n_head, config.n_embd, config.vocab_size
    rows, layers = batch_size * T, L * accumulation
    matrices = V * C + 12 * L * C * C
    params = matrices + T * C + (2 * L + 1) * C * (1 + config.bias) + 9 * L * C * config.bias

    def cost(name: str, **sample: Any) -> Cost:
        return _OPS[name].cost(**_OPS[name].make(dtype=torch.bfloat16, device="meta", **sample))

    def both(found: Cost, times: int, again: int = 0) -> tuple[tuple[float, float, int], ...]:
        forward = (found.forward_flops, found.forward_bytes, times + again)
        return forward, (found.backward_flops, found.backward_bytes, times)

    # The FLOPs of a norm or a loss are no tensor core's.
    norm = cost("add_layer_norm", shape=(rows, C), bias=config.bias, mixed=True)._replace(
        forward_flops=0, backward_flops=0
    )
    # A block's forward pass a second time, but for its last product, whose result nothing needs.
    again = layers if config.activation_checkpointing else 0
    products = tuple(
        (2.0 * rows * n * k, 2.0 * (rows * n + rows * k + n * k), 3 * layers + again * (name != "mlp.c_proj"))
        for name, (n, k) in shapes(C).items()
    )
    attention = cost("causal_attention", B=batch_size, T=T, H=H, D=C // H)
    return [
        Part("matrix products", products),
        Part("attention", both(attention, layers, again)),
        Part("norms", both(norm, 2 * layers + accumulation, 2 * again)),
        # forward x -> y; backward dy, x -> dx
        Part("GELU", ((0, 2 * 2 * 4 * C * rows, layers + again), (0, 3 * 2 * 4 * C * rows, layers))),
        Part("lm_head and loss", both(cost("linear_cross_entropy", N=rows, C=C, V=V), accumulation)),
        # the rows of wte -> the stream; its gradient -> wte's
        Part("embedding", ((0, 8 * C * rows, accumulation), (0, 8 * C * rows, accumulation))),
        # fp32 -> bf16 and the gradient added in fp32, once a micro-batch
        Part("weights", ((0, 6 * matrices, accumulation), (0, 10 * matrices, accumulation))),
        # norm of the gradient, clipping, AdamW: p, g, m, v -> p, m, v
        Part("optimizer", ((0, (4 + 8 + 28) * params, 1),)),
    ]


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


def memory(config: GPTConfig, batch_size: int, gpus: int = 1) -> dict[str, float]:
    """Bytes on one of the GPUs, by what they hold, at the end of a forward pass, when there are most."""
    with torch.device("meta"):
        model = GPT(config)
    n = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    V, C = model.lm_head.weight.shape
    held = {
        "weights, fp32": 4 * n,
        "gradients, fp32": 4 * n,
        "DDP's buckets, fp32": 4 * n if gpus > 1 else 0,  # beside the gradients that are accumulated
        "AdamW, fp32": 8 * n,
        "weights, bf16": 2 * matrices,
        **activations(config, batch_size),
        "logits, a chunk": 2 * chunk_rows(batch_size * config.block_size, V, 2) * -(-V // ALIGN) * ALIGN,
        # dW in fp32 from the loss's chunks, before it is added to the gradient
        "gradient of lm_head": 4 * V * C,
    }
    return {what: size for what, size in held.items() if size}


def largest_micro_batch(config: GPTConfig, sequences: int, gpus: int, available: float) -> int | None:
    """Of those that share a step's `sequences` out evenly: with the margin that --batch_size=auto leaves."""

    def fits(size: int) -> bool:
        return sum(memory(config, size, gpus).values()) <= (1 - fit.MARGIN) * available

    return fit.largest(fit.micro_batches(sequences, gpus), fits)


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
    """Of a GPU that is not at hand: measured on one of its kind, or predicted. Raises ValueError."""
    kind = kind_of(gpu)
    if kind is None:
        raise ValueError(
            f"no datasheet of {gpu!r} is at hand; there are {', '.join(DATASHEET)}, as SXM parts"
        )
    copy, link, size = DATASHEET[kind]
    peak = peak_flops(kind, "bfloat16") or 0.0
    link *= REACHED["link"]
    for result in reversed(results):
        if result["benchmark"] == "roofline" and kind_of(result["environment"]["device"]) == kind:
            found = result["limits"]
            rates = found["copy_bytes_per_s"], found["product_flops_per_s"]
            return Limits(*rates, link, size, f"measured, {result['file']}")
    product = REACHED.get(f"{kind} product", REACHED["product"])
    return Limits(
        REACHED["copy"] * copy, product * peak, link, size,
        f"predicted: {REACHED['copy']:.0%} of the datasheet's {copy / 1e12:.2f} TB/s, "
        f"{product:.0%} of its {peak / 1e12:,.0f} TFLOP/s",
    )  # fmt: skip


def measured_limits(device: str) -> Limits:
    """Of this GPU, or CPU; its links are the datasheet's where it has one."""
    found = timing.limits(device)
    link, size = 1e10, 0.0
    if device == "cuda":
        size = torch.cuda.get_device_properties(0).total_memory
        with suppress(ValueError):
            link = limits_of(torch.cuda.get_device_name(), []).link
    return Limits(found["copy_bytes_per_s"], found["product_flops_per_s"], link, size, "measured now")


def measure_products(config: GPTConfig, batch_size: int, device: str) -> dict[str, dict[str, float]]:
    """The step's matrix products as they lie in memory: {layer, direction: {ms, flops_per_s}}.

    The last is c_fc's forward for two seconds on end, at the clocks that the GPU's power then allows.
    """
    rows, C, V = batch_size * config.block_size, config.n_embd, config.vocab_size
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    assert V is not None
    found: dict[str, dict[str, float]] = {}

    def operands(m: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        x, dy, w = (torch.randn(*s, device=device).to(dtype) for s in ((m, n), (m, k), (k, n)))
        return x, dy, w

    for name, (n, k) in (shapes(C) | {"lm_head, a chunk": (C, V)}).items():
        m = chunk_rows(rows, V, dtype.itemsize) if "chunk" in name else rows
        x, dy, w = operands(m, n, k)
        calls: dict[str, Callable[[], Any]] = {
            "forward": partial(torch.mm, x, w.t()),
            "dx": partial(torch.mm, dy, w),
            "dw": partial(torch.mm, dy.t(), x),
        }
        if "chunk" in name and device == "cuda":  # added up in fp32
            dw = torch.zeros(k, n, device=device)
            calls["dw"] = partial(torch.addmm, dw, dy.t(), x, out_dtype=torch.float32, out=dw)
        for direction, timed in timing.interleaved(calls, device, 0.1).items():
            rate = 2.0 * m * n * k / timed.median * 1e3
            found[f"{name} {direction}"] = {"ms": timed.median, "flops_per_s": rate}
    x, _, w = operands(rows, C, 4 * C)
    ms = timing.sustained(partial(torch.mm, x, w.t()), device, 2.0 if device == "cuda" else 0.05)
    found["c_fc forward, sustained"] = {"ms": ms, "flops_per_s": 2.0 * rows * 4 * C * C / ms * 1e3}
    return found


def measure_attention(config: GPTConfig, batch_size: int, device: str) -> dict[str, Any]:
    """Forward and backward of causal attention in ms, by PyTorch's backends; or why there is none."""
    op = _OPS["causal_attention"]
    B = batch_size if device == "cuda" else 1
    shape = {"B": B, "T": config.block_size, "H": config.n_head, "D": config.n_embd // config.n_head}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    qkv = op.make(dtype=dtype, device=device, **shape)["qkv"].requires_grad_()
    dy = torch.randn_like(qkv[:, :, 0])
    found: dict[str, Any] = {}
    ready: dict[str, Callable[[], Any]] = {}

    def both(function: Callable[..., Any]) -> Any:
        return torch.autograd.grad(function(qkv), qkv, dy)

    for name, function in [("eager", op.reference), *peers(op, device)]:
        if isinstance(function, str):
            found[name] = function
            continue
        try:
            both(function)
            ready[name] = partial(both, function)
        except Exception as failure:  # whatever a compiler raises
            found[name] = " ".join(str(failure).split())[:160]
    return found | {name: t.median for name, t in timing.interleaved(ready, device, 0.1).items()}


def reached(results: list[Result], kind: str | None, config: GPTConfig) -> dict[str, tuple[float, str]]:
    """{part: (share of its limit, where from)}: measured on this kind of GPU, else on another, else assumed.

    Shares are of the limits of the run that measured them.
    """
    wanted = {
        "norms": ("add_layer_norm", {"C": config.n_embd}),
        "attention": ("causal_attention", {"T": config.block_size, "D": config.n_embd // config.n_head}),
        "lm_head and loss": ("linear_cross_entropy", {"C": config.n_embd}),
    }
    elsewhere: dict[str, tuple[float, str]] = {}
    here: dict[str, tuple[float, str]] = {}
    for result in results:
        device = result["environment"]["device"]
        found, source = (
            (here, "measured") if kind_of(device) == kind else (elsewhere, f"measured on {device}")
        )
        source = f"{source}, {result['file']}"
        if result["benchmark"] == "roofline" and result["model"]["n_embd"] == config.n_embd:
            layers = [p for name, p in result["products"].items() if name.endswith(("forward", "dx", "dw"))]
            blocks = layers[: 3 * len(shapes(1))]
            rate = sum(p["ms"] * p["flops_per_s"] for p in blocks) / sum(p["ms"] for p in blocks)
            found["matrix products"] = rate / result["limits"]["product_flops_per_s"], source
        if result["benchmark"] == "kernels":
            for part, (operation, size) in wanted.items():
                nearest = _nearest(result["cases"], operation, size)
                if nearest is not None:
                    found[part] = nearest, source
    return {part: (share, "assumed") for part, share in ASSUMED.items()} | elsewhere | here


def _nearest(cases: list[Result], operation: str, size: dict[str, int]) -> float | None:
    """The share that our variant reached, forward and backward, at the shape that is most like `size`."""

    def distance(sample: dict[str, Any]) -> float:
        other_dtypes = "shape" in sample and not sample.get("mixed")  # than a training's
        sample = {"C": sample["shape"][-1]} if "shape" in sample else sample
        return sum(abs(sample[k] - v) / v for k, v in size.items()) + 1e-3 * other_dtypes

    ours = [
        (distance(case["sample"]), case["variants"]["tritongpt"]["both"]["limit"])
        for case in cases
        if case["operation"] == operation
        and case["dtype"] == "bf16"
        and "both" in case["variants"].get("tritongpt", ())
    ]
    return min(ours)[1] if ours else None


def measured_step(results: list[Result], kind: str | None, config: GPTConfig) -> tuple[float, str] | None:
    """(tokens/s, where from) of our whole step on one of these GPUs; the newest."""
    found = None
    for result in results:
        if result["benchmark"] != "throughput" or kind_of(result["environment"]["device"]) != kind:
            continue
        same = all(result["model"][k] == getattr(config, k) for k in ("n_layer", "n_embd", "block_size"))
        ours = result["variants"].get("tritongpt")
        if same and result["ranks"] == 1 and isinstance(ours, dict):
            found = ours["tokens_per_s"], result["file"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.roofline",
        description=(__doc__ or "").split("\n")[0],
        epilog="What else is given is read as python -m train reads it: config files, presets, flags.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpu", help=f"predict for another: {', '.join(DATASHEET)}")
    parser.add_argument("--gpus", type=int, default=1, help="of one machine, linked by NVLink")
    parser.add_argument("--size", default=None, choices=SIZES, help="of the model, without a config; 124M")
    parser.add_argument("--batch_size", help="sequences in a micro-batch, or auto, the largest that fits; 64")
    parser.add_argument("--block_size", help="tokens in a sequence; 1024")
    parser.add_argument(
        "--tokens", type=float, help="of a whole run, to say how long it takes; its max_iters"
    )
    parser.add_argument("--results", type=Path, default=Path("bench/results"), help="folder of measurements")
    parser.add_argument("--out", type=Path, help="a JSON file for the limits that were measured")
    cli.run(lambda: predict(*parser.parse_known_args()))


def planned(
    options: argparse.Namespace, args: list[str], small: bool
) -> tuple[GPTConfig, int, int | None, float]:
    """(model, sequences in a step, micro-batch or None for the largest, tokens in the run or 0).

    Raises ValueError for what is not predicted.
    """
    if options.gpus < 1:
        raise ValueError(f"--gpus {options.gpus} must be at least 1")
    sizes = {name: getattr(options, name) for name in ("batch_size", "block_size")}
    if args:
        if options.size is not None:
            raise ValueError(f"--size {options.size} is a model of its own: leave it out beside {args[0]}")
        flags = [f"--{name}={value}" for name, value in sizes.items() if value]
        config, given = parse([*args, *flags])
        if config.strategy == "fsdp" or config.dtype == "float32":
            raise ValueError(
                "strategy=fsdp and dtype=float32 are not predicted: only ddp, in 16 bits with fp32 weights"
            )
        if config.optimizer == "muon" or config.init_from not in ("scratch", "auto", "resume"):
            raise ValueError(
                f"optimizer={config.optimizer}, init_from={config.init_from}: only AdamW is predicted, and a "
                "model of the flags' own shape"
            )
        if config.gradient_accumulation_steps % options.gpus:
            raise ValueError(
                f"gradient_accumulation_steps={config.gradient_accumulation_steps} is that of all GPUs "
                f"and does not divide by --gpus {options.gpus}"
            )
        model = replace(config.model, vocab_size=config.model.vocab_size or 50304, kernels="torch")
        if config.model.vocab_size is None:
            print("vocab_size=50304 is supposed, GPT-2's: the data's own is not looked at")
        batch_size = None if config.batch_size == "auto" else config.micro_batch
        sequences = (batch_size or asked_batch_size(given)) * config.gradient_accumulation_steps
        return model, sequences, batch_size, float(config.max_iters) * sequences * model.block_size
    layers, heads, width = SIZES[options.size or ("tiny" if small else "124M")]
    vocab_size, block_size = (512, 64) if small else (50304, int(sizes["block_size"] or 1024))
    model = GPTConfig(block_size, vocab_size, layers, heads, width, bias=False, kernels="torch")
    if sizes["batch_size"] == "auto":
        return model, TOKENS_PER_STEP // block_size, None, 0.0
    batch_size = int(sizes["batch_size"] or (2 if small else 64))
    if batch_size < 1:
        raise ValueError(f"--batch_size {batch_size} must be at least 1")
    each = batch_size * options.gpus
    return model, each * max(1, round(TOKENS_PER_STEP / (each * block_size))), batch_size, 0.0


def predict(options: argparse.Namespace, args: list[str]) -> None:
    on_gpu = torch.cuda.is_available()
    small = options.gpu is None and not on_gpu
    if small and args:
        raise ValueError(f"there is no GPU here: say which, --gpu {' or '.join(DATASHEET)}")
    config, sequences, asked, tokens = planned(options, args, small)
    if options.gpu is None:
        device = "cuda" if on_gpu else "cpu"
        name = torch.cuda.get_device_name() if on_gpu else "CPU"
        if small:
            print("There is no GPU: a tiny model on the CPU, which says nothing about a GPU. Try --gpu A100.")
        limits = measured_limits(device)
        batch_size = asked or largest_micro_batch(config, sequences, options.gpus, limits.memory) or 1
        products = measure_products(config, batch_size, device)
        attention = measure_attention(config, batch_size, device)
        for what, found in products.items():
            print(f"  {what:26} {found['ms']:8.3f} ms  {found['flops_per_s'] / 1e12:7.1f} TFLOP/s")
        for what, ms in attention.items():
            print(f"  attention {what:16} {ms if isinstance(ms, str) else f'{ms:8.3f} ms'}")
        if options.out:
            rates = {"copy_bytes_per_s": limits.copy, "product_flops_per_s": limits.product}
            timing.write(
                options.out, "roofline", device, limits=rates, products=products, attention=attention,
                model=vars(config), batch_size=batch_size,
            )  # fmt: skip
    else:
        limits, name = limits_of(options.gpu, timing.read(options.results)), options.gpu
        batch_size = asked or largest_micro_batch(config, sequences, options.gpus, limits.memory) or 1
    results = timing.read(options.results)
    accumulation = sequences // (batch_size * options.gpus)
    seconds = print_step(config, batch_size, accumulation, name, limits, results)
    print_memory(config, batch_size, sequences, options.gpus, limits)
    tokens = options.tokens or tokens
    print_run(config, batch_size * accumulation, seconds, accumulation, options.gpus, limits, tokens)


def print_step(
    config: GPTConfig, batch_size: int, accumulation: int, name: str, limits: Limits, results: list[Result]
) -> float:
    """The parts of one GPU's step. Returns its seconds: measured, or what is expected."""
    tokens = accumulation * batch_size * config.block_size
    kind, peak = kind_of(name), peak_flops(name, "bfloat16")
    with torch.device("meta"):
        flops_per_token = GPT(config).flops_per_token()

    def line(what: str, seconds: float, note: str) -> str:
        rate = tokens / seconds
        mfu = "" if peak is None else f", MFU {rate * flops_per_token / peak:.1%}"
        return f"{what:18} {1e3 * seconds:9.2f} ms a step, {rate:,.0f} tokens/s{mfu} ({note})"

    print(
        f"{config.n_layer} layers, {config.n_embd} wide, {accumulation} micro-batches of {batch_size} x "
        f"{config.block_size} tokens on one {name}"
    )
    print(
        f"limits: copy {limits.copy / 1e9:,.0f} GB/s, product {limits.product / 1e12:,.1f} TFLOP/s "
        f"({limits.source})"
    )
    print(f"\n{'part':18} {'TFLOP':>8} {'GB':>8} {'least ms':>9} {'share':>6} {'expected':>9}  share from")
    least = expected = 0.0
    shares = reached(results, kind, config)
    for part in parts(config, batch_size, accumulation):
        share, source = shares[part.name]
        seconds = part.least(limits)
        least, expected = least + seconds, expected + seconds / share
        print(
            f"{part.name:18} {part.flops / 1e12:8.2f} {part.bytes / 1e9:8.1f} {1e3 * seconds:9.2f} "
            f"{share:6.0%} {1e3 * seconds / share:9.2f}  {source}"
        )
    print()
    print(line("at least", least, "every part at its limit"))
    print(line("expected", expected, "predicted"))
    measured = measured_step(results, kind, config)
    if measured is None:
        return expected
    seconds = tokens / measured[0]
    print(line("measured", seconds, measured[1]))
    print(f"{'gap':18} {1e3 * (seconds - expected):9.2f} ms that no part explains")
    return seconds


def print_memory(config: GPTConfig, batch_size: int, sequences: int, gpus: int, limits: Limits) -> None:
    held = memory(config, batch_size, gpus)
    needed = sum(held.values())
    print(f"\nmemory, predicted: {needed / 1e9:.1f} GB at micro-batch {batch_size}")
    for what, size in held.items():
        print(f"  {what:30} {size / 1e9:8.2f} GB")
    if config.dropout:
        print("  the masks of dropout are not counted")
    if not limits.memory:
        return
    available = f"{limits.memory / 1e9:.0f} GB less {fit.MARGIN:.0%}"
    fitting = needed <= (1 - fit.MARGIN) * limits.memory
    print(f"  {'fits' if fitting else 'does not fit'} into {available}, predicted")
    found = largest_micro_batch(config, sequences, gpus, limits.memory)
    if found is None:
        print("  not one sequence fits, predicted: try --activation_checkpointing=True or --strategy=fsdp")
    else:
        print(
            f"  largest micro-batch that fits, predicted: {found} x {sequences // found} accumulation steps ="
            f" {sequences} sequences a step, {sum(memory(config, found, gpus).values()) / 1e9:.1f} GB"
        )


def print_run(
    config: GPTConfig,
    sequences: int,
    seconds: float,
    accumulation: int,
    gpus: int,
    limits: Limits,
    tokens: float,
) -> None:
    """What several GPUs make of a step of `seconds` and `sequences` on each, and of `tokens` in all."""
    rate = sequences * config.block_size / seconds
    if gpus > 1:
        with torch.device("meta"):
            params = sum(p.numel() for p in GPT(config).parameters())
        # Gradients travel while the last micro-batch's backward pass, two thirds of it, computes the rest.
        whole = exchange(params, gpus, limits)
        exposed = max(0.05 * whole, whole - seconds / accumulation * 2 / 3)
        rate *= gpus * seconds / (seconds + exposed)
        print(
            f"\n{gpus} GPUs, predicted: gradients take {1e3 * whole:.1f} ms, {1e3 * exposed:.1f} of it not "
            f"hidden: {rate:,.0f} tokens/s, {seconds / (seconds + exposed):.1%} of {gpus} times one"
        )
    if tokens:
        hours = tokens / rate / 3600
        print(f"\n{tokens:,.0f} tokens, predicted: {hours:,.1f} hours, {hours / 24:,.1f} days")


if __name__ == "__main__":
    main()
