"""python -m bench.throughput: tokens/s, MFU and memory of the training step, each kernel taken away in turn.

The step is `train_step`, which trains, on random tokens: forward and backward in mixed precision,
accumulation to about half a million tokens, clipping, AdamW. The variants take turns in one process, so that
they run at the same clocks and temperature. With --nanogpt=PATH, a checkout of nanoGPT, its own model and
step take part. Under torchrun the figures are of all GPUs together.

On one GPU it ends with the milliseconds of a step by part, ours and nanoGPT's, beside the least that the
GPU's limits allow. torch's profiler times each kernel, and KERNELS says to which part a kernel belongs.

Without a GPU the model is tiny, and the figures say nothing about a GPU.
"""

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
from typing import Any, Literal

import torch
import torch._dynamo

from bench import roofline, timing
from bench.roofline import PARTS, SIZES, TOKENS_PER_STEP
from gpt import cli
from gpt.checkpoint import MODEL_ARGS
from gpt.cli import UserPath
from gpt.device import autocast, resolve_dtype
from gpt.flops import peak_flops
from gpt.model import GPT, GPTConfig
from train import distributed, fit
from train.config import TrainConfig
from train.distributed import Ranks
from train.loop import set_up, train_step

ABLATIONS = ("layer_norm", "attention", "activation", "cross_entropy")
OUT_OF_MEMORY = "out of memory"
# The name of a kernel says to which part of the step it belongs. The first pattern that matches decides. The
# others are the "rest": embeddings, casts, clipping, AdamW. The names are those of our kernels, of cuBLAS,
# cuDNN and FlashAttention, and of Inductor, which names a kernel after what it has fused.
KERNELS = (
    (r"_attention_forward_kernel|sdpa.*fprop|flash_fwd|fmha_cutlassF", "attention, forward"),
    # cuDNN has a kernel before and one after. Inductor packs dq, dk and dv by cat or stack.
    (r"_attention_d\w+_kernel|sdpa.*bprop|flash_bwd|fmha_cutlassB", "attention, backward"),
    (r"compute_dot_do_o|convert_dq_to|^triton_\w+_fused_(cat|clone_stack)_", "attention, backward"),
    (r"_norm_forward_kernel", "norms, forward"),
    (r"_norm_backward_kernel|embedding_dense_backward\w*native_layer_norm", "norms, backward"),
    # This is a forward pass. Its name includes what it saves for the backward pass.
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
    """A training: each call of `step` makes one step, with `tokens` tokens over all ranks."""

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
    trained, optimizer, scaler = set_up(model, settings, ranks)
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
    """nanoGPT's model in the step of its train.py, compiled, with its default attention."""
    if ranks.world_size > 1:
        raise ValueError("nanoGPT's step is timed on one GPU only: leave --nanogpt out under torchrun")
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


def our_variants(ablate: bool, on_gpu: bool) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """(name, fields of GPTConfig, compiled) of each of our variants."""
    yield "tritongpt", {"kernels": "triton" if on_gpu else "torch"}, on_gpu
    if ablate and on_gpu:
        for family in ABLATIONS:
            yield f"without {family}", {"kernels": f"triton,{family}=torch"}, True
        # PyTorch's norms have a float32 stream: compare "without layer_norm" with residual_dtype=float32.
        for residual_dtype in ("float32", "bfloat16"):
            changes = {"kernels": "triton", "residual_dtype": residual_dtype}
            yield f"residual_dtype={residual_dtype}", changes, True
        yield "torch compiled", {"kernels": "torch"}, True
        yield "tritongpt eager", {"kernels": "triton"}, False
        yield "torch eager", {"kernels": "torch"}, False


def warmed_up(build: Callable[[], Variant], ranks: Ranks) -> Variant | str:
    """The variant after two steps, with its peak memory; or the reason why it does not run."""
    on_gpu = ranks.device_type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    try:
        variant = build()
        variant.step()  # compiles, and makes the optimizer's state
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


def largest_that_fits(
    build: Callable[[int], Variant], batch_size: int, ranks: Ranks
) -> tuple[Variant | str, int]:
    """(variant, micro-batch): the micro-batch is halved until the step fits into memory."""
    while (variant := warmed_up(partial(build, batch_size), ranks)) == OUT_OF_MEMORY and batch_size > 1:
        batch_size //= 2
    return variant, batch_size


def measure(
    variants: list[Variant],
    seconds: float,
    ranks: Ranks,
    after_round: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, dict[str, Any]]:
    """Makes steps of all variants in turns, about `seconds` of each and at least three.

    `after_round` gets the figures so far, by variant, after each round.
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
        after_round(figures)
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
    """(micro-batch, figures of the variant with it), until it does not fit into memory."""
    for size in sizes:
        torch._dynamo.reset()  # else the second size compiles a graph for every size, as no training does
        variant = warmed_up(partial(build, size), ranks)
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
    """Sums (name, milliseconds) of the kernels of a step by part. The step took `wall` milliseconds."""
    parts = dict.fromkeys(PARTS, 0.0)
    for name, ms in kernels:
        parts[next((part for pattern, part in KERNELS if re.search(pattern, name)), "rest")] += ms
    parts["between kernels"] = max(0.0, wall - sum(parts.values()))
    return parts


def print_parts(parts: dict[str, dict[str, float]], least: dict[str, float]) -> None:
    """`parts` by variant, `least` by part: the roofline has no least time for some parts."""
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
    """nanoGPT's GPT, from its model.py. Raises ValueError where `checkout` has no such file."""
    path = checkout / "model.py"
    if not path.is_file():
        raise ValueError(f"{path.parent} is not a checkout of nanoGPT: it has no {path.name}")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    args = {name: getattr(config, name) for name in MODEL_ARGS}
    return module.GPT(module.GPTConfig(**args))


class Session:
    """The variants of a run and their figures, in a file after each round: a run cut short loses nothing."""

    def __init__(self, config: GPTConfig, dtype: str, ranks: Ranks, out: str):
        self.config, self.dtype, self.ranks, self.out = config, dtype, ranks, out
        self.variants: dict[str, Variant | str] = {}  # or the reason why it cannot be timed
        self.results: dict[str, Any] = {"batch_size": {}, "sweep": {}, "variants": {}}
        self.results |= {"parts": {}, "least": {}, "clocks": {}}

    def print(self, text: str) -> None:
        if self.ranks.is_main:
            print(text, flush=True)

    def save(self) -> None:
        if self.out and self.ranks.is_main:
            timing.write(
                self.out, "throughput", self.ranks.device, ranks=self.ranks.world_size,
                model=vars(self.config), dtype=self.dtype, **self.results,
            )  # fmt: skip

    def find_batch_size(self, name: str, build: Callable[[int], Variant]) -> int:
        """The micro-batch with the most tokens/s."""
        figures = self.results["sweep"][name] = {}
        for size, figures[size] in by_batch(build, (8, 16, 32, 64, 128), self.ranks):
            self.print(_line(f"{name} micro-batch {size}", figures[size]))
            self.save()
        torch._dynamo.reset()
        rates = {size: f["tokens_per_s"] for size, f in figures.items() if not isinstance(f, str)}
        return max(rates, key=lambda size: rates[size], default=1)

    def add(self, name: str, build: Callable[[int], Variant], batch_size: int) -> None:
        began = time.monotonic()
        self.variants[name], batch_size = largest_that_fits(build, batch_size, self.ranks)
        self.results["batch_size"][name] = batch_size
        self.print(_warmed_up(name, self.variants[name], time.monotonic() - began))

    def measure(self, seconds: float) -> None:
        def save_figures(figures: dict[str, Any]) -> None:
            self.results["variants"] = {
                name: variant if isinstance(variant, str) else figures[name]
                for name, variant in self.variants.items()
            }
            self.save()

        ready = [variant for variant in self.variants.values() if isinstance(variant, Variant)]
        save_figures(measure(ready, seconds, self.ranks, save_figures))
        for name, figures in self.results["variants"].items():
            self.print(_line(name, figures))

    def profile(self) -> None:
        """Runs ours and nanoGPT's alone, reads clocks and power, and takes a step of each apart."""
        rates = timing.limits("cuda")
        limits = roofline.Limits(rates["copy_bytes_per_s"], rates["product_flops_per_s"], "measured now")
        batch_size = self.results["batch_size"]["tritongpt"]
        accumulation = _accumulation(TOKENS_PER_STEP, batch_size * self.config.block_size, self.ranks)
        parts = roofline.parts(self.config, batch_size, accumulation)
        self.results["least"] = {part.name: 1e3 * part.least(limits) for part in parts}
        for name in ("tritongpt", "nanogpt"):
            if isinstance(variant := self.variants.get(name), Variant):
                with timing.clocks(self.ranks.device) as self.results["clocks"][name]:
                    for _ in range(3):
                        variant.step()
                    _synchronize(self.ranks)
                self.results["parts"][name] = profile(variant, self.ranks)
        self.save()


def _warmed_up(name: str, variant: Variant | str, seconds: float) -> str:
    if isinstance(variant, str):
        return f"{name:24} {variant}"
    peak = "" if variant.peak_bytes is None else f", peak {variant.peak_bytes / 2**30:.1f} GiB"
    return f"compiled {name} in {seconds:.1f} s{peak}"


def _line(name: str, figures: dict[str, Any] | str) -> str:
    if isinstance(figures, str):
        return f"{name:24} {figures}"
    mfu = "" if figures["mfu"] is None else f"  MFU {figures['mfu']:6.1%}"
    memory = "" if figures["peak_bytes"] is None else f"  {figures['peak_bytes'] / 2**30:6.1f} GiB"
    rate = f"{figures['tokens_per_s']:12,.0f} tokens/s  {figures['step_ms']:9.2f} ms a step"
    return f"{name:24} {rate}{mfu}{memory}"


@dataclass
class ThroughputConfig:
    """Time the training step, and with --ablate the step without each of our kernels."""

    size: Literal["", "124M", "350M", "774M", "1.5B", "tiny"] = ""  # of the model; default: 124M on a GPU
    batch_size: int = 0  # sequences in a micro-batch; 0 tries 8 to 128 and takes the fastest
    block_size: int = 1024  # tokens in a sequence
    ablate: bool = False  # take each kernel away in turn; not compiled as well
    seconds: float = 30.0  # of each variant
    budget: float = math.inf  # seconds in all: variants for which no time is left are not timed
    warm: bool = False  # compile every variant, time nothing
    nanogpt: UserPath = ""  # a checkout of nanoGPT, to time beside ours
    out: UserPath = ""  # a JSON file for the results


def builders(
    options: ThroughputConfig, config: GPTConfig, dtype: str, ranks: Ranks
) -> dict[str, Callable[..., Variant]]:
    """{name: function of a micro-batch} of every variant, the most important first."""
    builds: dict[str, Callable[..., Variant]] = {
        name: partial(our_variant, name, changes, compiled, config, dtype, ranks)
        for name, changes, compiled in our_variants(options.ablate, ranks.device_type == "cuda")
    }
    if options.nanogpt:
        builds["nanogpt"] = partial(nanogpt_variant, Path(options.nanogpt), config, dtype, ranks)
    first = ("tritongpt", "nanogpt", "torch compiled")
    return {name: builds[name] for name in sorted(builds, key=lambda name: name not in first)}


def warm(builds: dict[str, Callable[..., Variant]], batch_size: int, block_size: int, ranks: Ranks) -> None:
    """Compiles each variant on a step of one micro-batch; the compilers' caches on disk keep the result."""
    for name, build in builds.items():
        began = time.monotonic()
        torch._dynamo.reset()  # it compiles a function for a few variants only
        variant = warmed_up(partial(build, batch_size, batch_size * block_size * ranks.world_size), ranks)
        if ranks.is_main:
            print(_warmed_up(name, variant, time.monotonic() - began), flush=True)
        del variant
        fit.release(ranks.device)


def main() -> None:
    options = cli.parse(ThroughputConfig, sys.argv[1:], prog="python -m bench.throughput")
    started = time.monotonic()
    ranks = distributed.start("auto", "auto")
    on_gpu = ranks.device_type == "cuda"
    dtype = resolve_dtype("auto", ranks.device)
    shape = SIZES[options.size or ("124M" if on_gpu else "tiny")]
    block_size = options.block_size if on_gpu else 64
    config = GPTConfig(block_size, 50304 if on_gpu else 512, *shape, bias=False)
    with torch.device("meta"):
        model = GPT(config, ranks.device, dtype)  # its config has what "auto" stands for
    session = Session(model.config, dtype, ranks, options.out)
    if not on_gpu:
        session.print("There is no GPU: a tiny model on the CPU, whose figures say nothing about a GPU.")
    builds = builders(options, config, dtype, ranks)
    batch_sizes = dict.fromkeys(builds, options.batch_size or 2)
    if options.warm:
        compiled = {name: build for name, build in builds.items() if not name.endswith("eager")}
        warm(compiled, options.batch_size or 2, block_size, ranks)
        distributed.stop(ranks)
        return
    if on_gpu and not options.batch_size:
        batch_sizes = dict.fromkeys(builds, session.find_batch_size("tritongpt", builds["tritongpt"]))
        if "nanogpt" in builds:
            batch_sizes["nanogpt"] = session.find_batch_size("nanogpt", builds["nanogpt"])
    one_gpu = on_gpu and ranks.world_size == 1
    longest = 0.0  # seconds that a variant took to compile so far
    for position, (name, build) in enumerate(builds.items()):
        began = time.monotonic()
        needed = began - started + longest + options.seconds * (position + 2)
        late = torch.tensor(float(needed > options.budget), device=ranks.device)
        if ranks.sum(late).item():
            session.variants[name] = "no time was left for it"
            continue
        session.add(name, build, batch_sizes[name])
        longest = max(longest, time.monotonic() - began)
        if position == 1:  # ours and nanoGPT's: the figures that matter most, before anything else can fail
            session.measure(min(options.seconds, 3.0))
            if one_gpu:
                session.profile()
    session.measure(options.seconds if on_gpu else min(options.seconds, 1.0))
    if one_gpu:
        if len(builds) == 1:
            session.profile()
        print_parts(session.results["parts"], session.results["least"])
    distributed.stop(ranks)


if __name__ == "__main__":
    cli.run(main)
