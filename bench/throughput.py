"""python -m bench.throughput: tokens/s, MFU and memory of the training step, each kernel taken away in turn.

The step is `train_step`, the one that trains, on random tokens: forward and backward in mixed precision,
accumulation to about half a million tokens, clipping, AdamW. Variants take turns in one process, so that
clocks and temperature treat them alike. With --nanogpt=PATH, a checkout of nanoGPT, its own model and step
are among them. Under torchrun it measures all GPUs together.

On a GPU it ends with the milliseconds of a step by part, ours and nanoGPT's, beside the least that the
GPU's limits allow: torch's profiler gives the time of each kernel, and KERNELS says to which part it belongs.

Without a GPU the model is tiny, and the figures say nothing about a GPU.
"""

import argparse
import importlib.util
import math
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from bench import roofline, timing
from bench.roofline import PARTS, SIZES, TOKENS_PER_STEP
from gpt.checkpoint import MODEL_ARGS
from gpt.device import autocast, resolve_dtype
from gpt.flops import peak_flops
from gpt.model import GPT, GPTConfig
from train import distributed, fit
from train.config import TrainConfig
from train.distributed import Ranks
from train.loop import prepare as prepare_training
from train.loop import train_step

ABLATIONS = ("layer_norm", "attention", "activation", "cross_entropy")
OUT_OF_MEMORY = "out of memory"
# The part of the step that a kernel belongs to, by its name; the first pattern that fits decides. What fits
# none is "rest": embeddings, casts, clipping, AdamW. The names are those of our kernels, of cuBLAS, cuDNN and
# FlashAttention, and Inductor's, which list what it fused.
KERNELS = (
    (r"_attention_forward_kernel|sdpa.*fprop|flash_fwd|fmha_cutlassF", "attention, forward"),
    # cuDNN's has a kernel before and one after it. Inductor packs dq, dk and dv together by cat or stack.
    (r"_attention_d\w+_kernel|sdpa.*bprop|flash_bwd|fmha_cutlassB", "attention, backward"),
    (r"compute_dot_do_o|convert_dq_to|^triton_\w+_fused_(cat|clone_stack)_", "attention, backward"),
    (r"_norm_forward_kernel", "norms, forward"),
    (r"_norm_(backward|sum)_kernel|embedding_dense_backward\w*native_layer_norm", "norms, backward"),
    # The forward pass is named after what it keeps for the backward pass as well.
    (r"native_layer_norm_native_layer_norm_backward", "norms, forward"),
    (r"native_layer_norm_backward", "norms, backward"),
    (r"native_layer_norm", "norms, forward"),
    (r"gelu_backward", "GELU, backward"),
    (r"gelu", "GELU, forward"),
    (r"_loss_kernel|log_softmax", "loss"),
    (r"nvjet_|gemm|cutlass|splitKreduce", "matrix products"),
)


@dataclass
class Variant:
    """A training that can make steps; `step` does one, of `tokens` tokens over all ranks."""

    name: str
    step: Callable[[], Any]
    tokens: int
    flops_per_token: int
    peak_bytes: int | None = None


def our_variant(
    name: str,
    changes: dict[str, Any],
    compiled: bool,
    config: GPTConfig,
    dtype: str,
    ranks: Ranks,
    batch_size: int,
    step_tokens: int = TOKENS_PER_STEP,
) -> Variant:
    torch.manual_seed(0)
    model = GPT(replace(config, **changes), ranks.device, dtype).to(ranks.device)
    settings = TrainConfig(dtype=dtype, compile=compiled, model=model.config)
    trained, optimizer, scaler = prepare_training(model, settings, ranks)
    precision = partial(autocast, ranks.device, dtype)
    accumulation = _accumulation(step_tokens, batch_size * config.block_size, ranks)
    batch = _batch(config, batch_size, ranks.device)

    def step() -> None:
        train_step(trained, optimizer, scaler, repeat(batch, accumulation), accumulation, 1.0, precision)

    tokens = accumulation * ranks.world_size * batch_size * config.block_size
    return Variant(name, step, tokens, model.flops_per_token())


def nanogpt_variant(
    checkout: Path,
    config: GPTConfig,
    dtype: str,
    ranks: Ranks,
    batch_size: int,
    step_tokens: int = TOKENS_PER_STEP,
) -> Variant:
    """nanoGPT's model from its own file, in the step of its train.py: compiled, its default attention."""
    if ranks.world_size > 1:
        raise ValueError("nanoGPT's step stands beside ours on one GPU only")
    torch.manual_seed(0)
    raw = nanogpt_model(checkout, config).to(ranks.device)
    optimizer = raw.configure_optimizers(0.1, 6e-4, (0.9, 0.95), ranks.device_type)
    scaler = torch.amp.GradScaler(ranks.device_type, enabled=dtype == "float16")
    model = torch.compile(raw) if ranks.device_type == "cuda" else raw
    accumulation = _accumulation(step_tokens, batch_size * config.block_size, ranks)
    idx, targets = _batch(config, batch_size, ranks.device)

    def step() -> None:
        for _ in range(accumulation):
            with autocast(ranks.device, dtype):
                _, loss = model(idx, targets)
                loss = loss / accumulation
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(raw.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    flops = 6 * raw.get_num_params() + 12 * config.n_layer * config.n_embd * config.block_size
    return Variant("nanogpt", step, accumulation * batch_size * config.block_size, flops)


def wanted(options: argparse.Namespace, on_gpu: bool) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """(name, fields of GPTConfig, compiled) of our variants."""
    yield "tritongpt", {"kernels": "triton" if on_gpu else "torch"}, on_gpu
    if options.ablate and on_gpu:
        for family in ABLATIONS:
            yield f"without {family}", {"kernels": f"triton,{family}=torch"}, True
        # PyTorch's norms, above and below, mean float32: compare them with that variant.
        for residual_dtype in ("float32", "bfloat16"):
            changes = {"kernels": "triton", "residual_dtype": residual_dtype}
            yield f"residual_dtype={residual_dtype}", changes, True
        yield "torch compiled", {"kernels": "torch"}, True
        yield "tritongpt eager", {"kernels": "triton"}, False
        yield "torch eager", {"kernels": "torch"}, False


def prepare(build: Callable[[], Variant], ranks: Ranks) -> Variant | str:
    """Builds and warms up a variant, with its peak memory; or why it cannot be."""
    on_gpu = ranks.device_type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    try:
        variant = build()
        variant.step()  # compiles, makes the optimizer's state
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        variant.step()
        if on_gpu:
            torch.cuda.synchronize()
            variant.peak_bytes = torch.cuda.max_memory_allocated() - before
        return variant
    except Exception as failure:  # a kernel that does not compile here is a result too
        reason = f"{type(failure).__name__}: {' '.join(str(failure).split())[:160]}"
        if fit.out_of_memory(failure):
            reason = OUT_OF_MEMORY
    fit.release(ranks.device)
    return reason


def prepare_largest(
    build: Callable[[int], Variant], batch_size: int, ranks: Ranks
) -> tuple[Variant | str, int]:
    """With the micro-batch halved until it fits, and its size."""
    while (found := prepare(partial(build, batch_size), ranks)) == OUT_OF_MEMORY and batch_size > 1:
        batch_size //= 2
    return found, batch_size


def warm(builds: dict[str, Callable[..., Variant]], batch_size: int, block_size: int, ranks: Ranks) -> None:
    """Compiles each variant on a step of one micro-batch; the compilers' caches on disk keep the result."""
    for name, build in builds.items():
        began = time.monotonic()
        torch._dynamo.reset()  # it compiles a function for a few variants only
        variant = prepare(partial(build, batch_size, batch_size * block_size * ranks.world_size), ranks)
        if ranks.is_main:
            print(_prepared(name, variant, time.monotonic() - began), flush=True)
        del variant
        fit.release(ranks.device)


def measure(
    variants: list[Variant],
    seconds: float,
    ranks: Ranks,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, dict[str, Any]]:
    """Steps of all variants in turns, about `seconds` of each and at least three.

    After each round `keep` gets the figures so far, by variant.
    """
    if not variants:
        return {}

    def timed(variant: Variant) -> float:
        _synchronize(ranks)
        start = time.perf_counter()
        variant.step()
        _synchronize(ranks)
        return time.perf_counter() - start

    slowest = torch.tensor(max(map(timed, variants)), device=ranks.device)
    slowest = ranks.sum(slowest) / ranks.world_size  # the same number of rounds on every rank
    rounds = max(3, round(seconds / slowest.item()))
    times: dict[str, list[float]] = {v.name: [] for v in variants}
    order, shuffle = list(variants), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for variant in order:
            times[variant.name].append(timed(variant))
        figures = {v.name: figures_of(v, times[v.name], ranks) for v in variants}
        keep(figures)
    return figures


def figures_of(variant: Variant, times: list[float], ranks: Ranks) -> dict[str, Any]:
    rates = timing.summary([1000 * t for t in times])
    tokens_per_s = variant.tokens / (rates.median / 1000)
    peak = peak_flops(torch.cuda.get_device_name(), "bfloat16") if ranks.device_type == "cuda" else None
    mfu = None if peak is None else tokens_per_s * variant.flops_per_token / (peak * ranks.world_size)
    return {
        "tokens_per_s": tokens_per_s,
        "mfu": mfu,
        "step_ms": rates.median,
        "step_ms_low": rates.low,
        "step_ms_high": rates.high,
        "steps": rates.runs,
        "peak_bytes": variant.peak_bytes,
    }


def by_batch(
    build: Callable[[int], Variant], sizes: tuple[int, ...], ranks: Ranks
) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(micro-batch, a variant's figures), until memory ends."""
    for size in sizes:
        torch._dynamo.reset()  # else the second size makes a graph for any size, which no training runs
        variant = prepare(partial(build, size), ranks)
        if isinstance(variant, str):
            yield size, variant
            return
        (figures,) = measure([variant], 2.0, ranks).values()
        del variant
        yield size, figures


def profile(variant: Variant, ranks: Ranks) -> dict[str, float]:
    """Milliseconds of one step by part, by torch's profiler."""
    _synchronize(ranks)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        start = time.perf_counter()
        variant.step()
        _synchronize(ranks)
        wall = 1e3 * (time.perf_counter() - start)
    events = (e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return by_part(((e.name, e.time_range.elapsed_us() / 1e3) for e in events), wall)


def by_part(kernels: Iterable[tuple[str, float]], wall: float) -> dict[str, float]:
    """(name, milliseconds) of all kernels of a step that took `wall` milliseconds -> milliseconds by part."""
    parts = dict.fromkeys(PARTS, 0.0)
    for name, ms in kernels:
        parts[next((part for pattern, part in KERNELS if re.search(pattern, name)), "rest")] += ms
    parts["between kernels"] = max(0.0, wall - sum(parts.values()))
    return parts


def print_parts(parts: dict[str, dict[str, float]], least: dict[str, float]) -> None:
    """`parts` by variant, `least` by part; the roofline counts no least time for some."""
    print(f"\n{'ms a step':20}" + "".join(f"{name:>12}" for name in (*parts, "at least")))
    for part in PARTS:
        limit = f"{least[part]:12.1f}" if part in least else ""
        print(f"{part:20}" + "".join(f"{ms[part]:12.1f}" for ms in parts.values()) + limit)
    print(f"{'step':20}" + "".join(f"{sum(ms.values()):12.1f}" for ms in parts.values()), flush=True)


def _accumulation(step_tokens: int, micro_batch_tokens: int, ranks: Ranks) -> int:
    if ranks.device_type != "cuda":
        return 2
    return max(1, round(step_tokens / (micro_batch_tokens * ranks.world_size)))


def _batch(config: GPTConfig, batch_size: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    assert config.vocab_size is not None
    tokens = torch.randint(config.vocab_size, (batch_size, config.block_size + 1), device=device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _synchronize(ranks: Ranks) -> None:
    if ranks.device_type == "cuda":
        torch.cuda.synchronize()


def nanogpt_model(checkout: Path, config: GPTConfig) -> Any:
    """Its GPT, from its model.py. Exits with a sentence where there is none."""
    path = checkout / "model.py"
    if not path.is_file():
        sys.exit(f"error: {path.parent} is no checkout of nanoGPT: it has no {path.name}")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    args = {name: getattr(config, name) for name in MODEL_ARGS}
    return module.GPT(module.GPTConfig(**args))


def _prepared(name: str, variant: Variant | str, seconds: float) -> str:
    if isinstance(variant, str):
        return f"{name:24} {variant}"
    peak = "" if variant.peak_bytes is None else f", peak {variant.peak_bytes / 2**30:.1f} GiB"
    return f"prepared {name} in {seconds:.1f} s{peak}"


def _line(name: str, found: Any) -> str:
    if isinstance(found, str):
        return f"{name:24} {found}"
    mfu = "" if found["mfu"] is None else f"  MFU {found['mfu']:6.1%}"
    memory = "" if found["peak_bytes"] is None else f"  {found['peak_bytes'] / 2**30:6.1f} GiB"
    return (
        f"{name:24} {found['tokens_per_s']:12,.0f} tokens/s  {found['step_ms']:9.2f} ms a step{mfu}{memory}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.throughput", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--size", default=None, choices=SIZES, help="of the model; 124M on a GPU")
    parser.add_argument("--batch_size", type=int, help="sequences in a micro-batch; by default the fastest")
    parser.add_argument("--block_size", type=int, default=1024)
    parser.add_argument("--ablate", action="store_true", help="take each kernel away in turn; eager as well")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each variant")
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="seconds in all: variants that do not fit are left out"
    )
    parser.add_argument("--warm", action="store_true", help="compile every variant, measure nothing")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT, to stand beside ours")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    started = time.monotonic()
    ranks = distributed.start("auto", "auto")
    on_gpu = ranks.device_type == "cuda"
    dtype = resolve_dtype("auto", ranks.device)
    layers, heads, width = SIZES[options.size or ("124M" if on_gpu else "tiny")]
    block_size = options.block_size if on_gpu else 64
    config = GPTConfig(block_size, 50304 if on_gpu else 512, layers, heads, width, bias=False)

    def say(text: str) -> None:
        if ranks.is_main:
            print(text, flush=True)

    if not on_gpu:
        say("There is no GPU: a tiny model on the CPU, whose figures say nothing about a GPU.")
    builds: dict[str, Callable[..., Variant]] = {
        name: partial(our_variant, name, changes, compiled, config, dtype, ranks)
        for name, changes, compiled in wanted(options, on_gpu)
        if compiled or not (options.warm and on_gpu)
    }
    if options.nanogpt is not None:
        builds["nanogpt"] = partial(nanogpt_variant, options.nanogpt, config, dtype, ranks)
    # What matters most comes first, and is kept before the rest is tried.
    first = ("tritongpt", "nanogpt", "torch compiled")
    builds = dict(sorted(builds.items(), key=lambda b: first.index(b[0]) if b[0] in first else len(first)))
    if options.warm:
        warm(builds, options.batch_size or 2, block_size, ranks)
        distributed.stop(ranks)
        return
    with torch.device("meta"):
        model = GPT(config, ranks.device, dtype).config  # with what "auto" stands for
    sweep: dict[str, dict[int, Any]] = {}
    best = dict.fromkeys(builds, options.batch_size or 2)
    results: dict[str, Any] = {}
    more: dict[str, Any] = {"parts": {}, "least": {}, "clocks": {}}

    def keep() -> None:
        if options.out and ranks.is_main:
            timing.write(
                options.out, "throughput", ranks.device, ranks=ranks.world_size, model=vars(model),
                dtype=dtype, batch_size=best, sweep=sweep, variants=results, **more,
            )  # fmt: skip

    if options.batch_size is None and on_gpu:
        for name in ("tritongpt", "nanogpt") if "nanogpt" in builds else ("tritongpt",):
            sweep[name] = {}
            for size, figures in by_batch(builds[name], (8, 16, 32, 64, 128), ranks):
                say(_line(f"{name} micro-batch {size}", figures))
                sweep[name][size] = figures
                keep()
            rates = {b: f["tokens_per_s"] for b, f in sweep[name].items() if not isinstance(f, str)}
            best[name] = max(rates, key=lambda b: rates[b], default=1)
        best |= {name: best["tritongpt"] for name in builds if name not in sweep}
        torch._dynamo.reset()

    prepared: dict[str, Variant | str] = {}
    longest = 0.0  # of the preparations so far

    def measured(seconds: float) -> None:
        def keep_round(figures: dict[str, Any]) -> None:
            results.update({n: v if isinstance(v, str) else figures[n] for n, v in prepared.items()})
            keep()

        ready = [variant for variant in prepared.values() if isinstance(variant, Variant)]
        keep_round(measure(ready, seconds, ranks, keep_round))
        for name, figures in results.items():
            say(_line(name, figures))
        keep()

    def cut_steps() -> None:
        """Each model alone for a few steps, with its clocks and power, then a step by part."""
        rates = timing.limits("cuda")
        limits = roofline.Limits(rates["copy_bytes_per_s"], rates["product_flops_per_s"], "measured now")
        accumulation = _accumulation(TOKENS_PER_STEP, best["tritongpt"] * block_size, ranks)
        cut = roofline.parts(model, best["tritongpt"], accumulation)
        more["least"] = {part.name: 1e3 * part.least(limits) for part in cut}
        for name in ("tritongpt", "nanogpt"):
            if isinstance(variant := prepared.get(name), Variant):
                with timing.clocks(ranks.device) as more["clocks"][name]:
                    for _ in range(3):
                        variant.step()
                    _synchronize(ranks)
                more["parts"][name] = profile(variant, ranks)
        keep()

    for name in builds:
        began = time.monotonic()
        needed = began - started + longest + options.seconds * (len(prepared) + 2)
        late = torch.tensor(float(needed > options.budget), device=ranks.device)
        if ranks.sum(late).item():
            prepared[name] = "no time was left for it"
            continue
        prepared[name], best[name] = prepare_largest(builds[name], best[name], ranks)
        longest = max(longest, time.monotonic() - began)
        say(_prepared(name, prepared[name], time.monotonic() - began))
        if len(prepared) == 2:
            measured(min(options.seconds, 3.0))
            if on_gpu and ranks.world_size == 1:
                cut_steps()
    measured(options.seconds if on_gpu else min(options.seconds, 1.0))
    if on_gpu and ranks.world_size == 1:
        if not more["parts"]:  # a run of one variant
            cut_steps()
        print_parts(more["parts"], more["least"])
    distributed.stop(ranks)


if __name__ == "__main__":
    main()
