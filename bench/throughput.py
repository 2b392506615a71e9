"""python -m bench.throughput: tokens/s, MFU and memory of the training step, with and without our kernels.

The step is `train_step`, which trains, on random tokens: forward and backward in mixed precision,
accumulation to about half a million tokens, clipping, AdamW. The variants take turns in one process, so that
they run at the same clocks and temperature. With --nanogpt=PATH, a checkout of nanoGPT, its own model and
step take part. Under torchrun the figures are of all GPUs together.

On one GPU it ends with the milliseconds of a step by part, ours and nanoGPT's, beside the least time that
the GPU's limits allow. torch's profiler times each kernel, and KERNELS says to which part a kernel belongs.

Without a GPU the model is tiny, and the figures say nothing about a GPU.
"""

import importlib.util
import math
import os
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
from gpt import cli
from gpt.checkpoint import MODEL_ARGS
from gpt.cli import UserPath
from gpt.device import autocast, resolve_dtype
from gpt.flops import peak_flops
from gpt.model import GPT, GPTConfig
from kernels import FAMILIES
from train import distributed, fit
from train.config import TrainConfig
from train.distributed import Ranks
from train.loop import set_up, train_step

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
    peak_bytes: int | None = None


def our_variant(
    name: str,
    changes: dict[str, Any],
    compiled: bool,
    config: GPTConfig,
    dtype: str,
    ranks: Ranks,
    step_tokens: int,
    batch_size: int,
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

    return Variant(name, step, accumulation * ranks.world_size * batch_size * config.block_size)


def nanogpt_variant(
    checkout: Path, config: GPTConfig, dtype: str, ranks: Ranks, step_tokens: int, batch_size: int
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

    return Variant("nanogpt", step, accumulation * batch_size * config.block_size)


def warmed_up(build: Callable[[], Variant], ranks: Ranks) -> Variant | str:
    """The variant after two steps, with its peak memory; or the reason why it does not run."""
    before = torch.cuda.memory_allocated() if ranks.device_type == "cuda" else 0
    try:
        variant = build()
        variant.step()  # compiles, and makes the optimizer's state
        variant.peak_bytes = timing.peak_extra_bytes(variant.step, ranks.device, before)
        return variant
    except Exception as error:  # a kernel that does not compile here is a result too
        reason = OUT_OF_MEMORY if fit.out_of_memory(error) else timing.reason(error)
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
    variants: list[Variant], seconds: float, flops_per_token: int, ranks: Ranks
) -> Iterator[dict[str, dict[str, Any]]]:
    """Makes steps of all variants in turns, about `seconds` of each and at least three.

    Yields the figures so far, by variant, after each round.
    """
    clock = partial(timing.host_clock, synchronize=partial(_synchronize, ranks))

    def mean(milliseconds: float) -> float:
        return ranks.sum(torch.tensor(milliseconds, device=ranks.device)).item() / ranks.world_size

    steps = {variant.name: variant.step for variant in variants}
    for times in timing.in_turns(steps, clock, seconds, fewest=3, agree=mean):
        yield {v.name: figures_of(v, times[v.name], flops_per_token, ranks) for v in variants}


def figures_of(
    variant: Variant, milliseconds: list[float], flops_per_token: int, ranks: Ranks
) -> dict[str, Any]:
    ms = timing.summary(milliseconds)
    tokens_per_s = variant.tokens / (ms.median / 1000)
    peak = peak_flops(torch.cuda.get_device_name(), "bfloat16") if ranks.device_type == "cuda" else None
    mfu = None if peak is None else tokens_per_s * flops_per_token / (peak * ranks.world_size)
    return {
        "tokens_per_s": tokens_per_s,
        "mfu": mfu,
        "step_ms": ms.median,
        "step_ms_low": ms.low,
        "step_ms_high": ms.high,
        "steps": ms.runs,
        "peak_bytes": variant.peak_bytes,
    }


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


def print_parts(parts: dict[str, dict[str, float]], least_ms: dict[str, float]) -> None:
    """`parts` by variant, `least_ms` by part: the roofline has no least time for some parts."""
    print(f"\n{'ms a step':20}" + "".join(f"{name:>12}" for name in (*parts, "at least")))
    for part in PARTS:
        limit = f"{least_ms[part]:12.1f}" if part in least_ms else ""
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


def _three_steps(variant: Variant, ranks: Ranks) -> None:
    for _ in range(3):
        variant.step()
    _synchronize(ranks)


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

    def __init__(
        self, model: GPT, dtype: str, ranks: Ranks, builds: dict[str, Callable[[int], Variant]], out: str
    ):
        self.config, self.flops_per_token = model.config, model.flops_per_token()
        self.dtype, self.ranks, self.builds, self.out = dtype, ranks, builds, out
        self.variants: dict[str, Variant | str] = {}  # or the reason why it cannot be timed
        self.results: dict[str, Any] = {"batch_size": {}, "variants": {}}
        self.results |= {"parts": {}, "least_ms": {}, "clocks": {}}

    def save(self) -> None:
        if self.out and self.ranks.is_main:
            timing.write(
                self.out, "throughput", self.ranks.device, ranks=self.ranks.world_size,
                model=vars(self.config), dtype=self.dtype, **self.results,
            )  # fmt: skip

    def add(self, name: str, batch_size: int) -> None:
        began = time.monotonic()
        self.variants[name], batch_size = largest_that_fits(self.builds[name], batch_size, self.ranks)
        self.results["batch_size"][name] = batch_size
        print(_warmed_up(name, self.variants[name], time.monotonic() - began), flush=True)

    def fit_together(self) -> None:
        """Halves the micro-batch of a variant that does not fit beside the weights of those built later."""
        for name in self.variants:
            if self._runs_out_of_memory(name):
                self.variants[name] = OUT_OF_MEMORY  # the old one holds no memory when the new one is built
                fit.release(self.ranks.device)
                self.add(name, max(1, self.results["batch_size"][name] // 2))

    def _runs_out_of_memory(self, name: str) -> bool:
        variant = self.variants[name]
        try:
            if isinstance(variant, Variant):
                variant.step()
        except Exception as error:
            if not fit.out_of_memory(error):
                raise
            return True
        return False

    def measure(self, seconds: float) -> None:
        if len(self.variants) > 1:
            self.fit_together()
        ready = [variant for variant in self.variants.values() if isinstance(variant, Variant)]
        reasons = {name: reason for name, reason in self.variants.items() if isinstance(reason, str)}
        self.results["variants"] = reasons
        for figures in measure(ready, seconds, self.flops_per_token, self.ranks):
            self.results["variants"] = {name: reasons.get(name) or figures[name] for name in self.variants}
            self.save()
        for name, line in self.results["variants"].items():
            print(_line(name, line), flush=True)

    def profile(self) -> None:
        """Runs ours and nanoGPT's alone, reads clocks and power, and takes a step of each apart."""
        limits = timing.limits("cuda")
        for name in ("tritongpt", "nanogpt"):
            if isinstance(variant := self.variants.get(name), Variant):
                work = partial(_three_steps, variant, self.ranks)
                self.results["clocks"][name] = timing.clocks(work, self.ranks.device)
                self.results["parts"][name] = profile(variant, self.ranks)
        if "tritongpt" in self.results["parts"]:
            batch_size = self.results["batch_size"]["tritongpt"]
            accumulation = _accumulation(TOKENS_PER_STEP, batch_size * self.config.block_size, self.ranks)
            parts = roofline.parts(self.config, batch_size, accumulation)
            self.results["least_ms"] = {part.name: 1e3 * part.least_time(limits) for part in parts}
        self.save()


def _warmed_up(name: str, variant: Variant | str, seconds: float) -> str:
    if isinstance(variant, str):
        return f"{name:24} {variant}"
    peak = "" if variant.peak_bytes is None else f", peak {variant.peak_bytes / 1e9:.1f} GB"
    return f"warmed up {name} in {seconds:.1f} s{peak}"


def _line(name: str, figures: dict[str, Any] | str) -> str:
    if isinstance(figures, str):
        return f"{name:24} {figures}"
    mfu = "" if figures["mfu"] is None else f"  MFU {figures['mfu']:6.1%}"
    memory = "" if figures["peak_bytes"] is None else f"  {figures['peak_bytes'] / 1e9:6.1f} GB"
    rate = f"{figures['tokens_per_s']:12,.0f} tokens/s  {figures['step_ms']:9.2f} ms a step"
    return f"{name:24} {rate}{mfu}{memory}"


@dataclass
class ThroughputConfig:
    """Time the training step, and with --ablate the step without each of our kernels."""

    size: str = ""  # of the model: 124M, 350M, 774M, 1.5B or tiny; default: 124M on a GPU, tiny on a CPU
    batch_size: int = 0  # sequences in a micro-batch, halved until it fits; 0: 64 on a GPU, 2 on a CPU
    block_size: int = 1024  # tokens in a sequence
    ablate: bool = False  # also time the step without each kernel, and without the compiler
    seconds: float = 30.0  # of each variant
    budget: float = math.inf  # seconds in all: variants for which no time is left are not timed
    warm: bool = False  # compile every variant, time nothing; the compilers' caches on disk keep the result
    nanogpt: UserPath = ""  # a checkout of nanoGPT, to time beside ours
    out: UserPath = ""  # a JSON file for the results


def builders(
    options: ThroughputConfig, config: GPTConfig, dtype: str, ranks: Ranks
) -> dict[str, Callable[[int], Variant]]:
    """{name: function of a micro-batch} of every variant, the most important first."""
    on_gpu = ranks.device_type == "cuda"
    # A warm-up needs one micro-batch.
    step_tokens = 0 if options.warm else TOKENS_PER_STEP
    builds: dict[str, Callable[[int], Variant]] = {}

    def ours(name: str, compiled: bool = True, **changes: str) -> None:
        builds[name] = partial(our_variant, name, changes, compiled, config, dtype, ranks, step_tokens)

    ours("tritongpt", on_gpu, kernels="triton" if on_gpu else "torch")
    if options.nanogpt:
        builds["nanogpt"] = partial(nanogpt_variant, Path(options.nanogpt), config, dtype, ranks, step_tokens)
    if options.ablate and on_gpu:
        ours("torch compiled", kernels="torch")
        for family in FAMILIES:
            ours(f"without {family}", kernels=f"triton,{family}=torch")
        # PyTorch's norms have a float32 stream: compare "without layer_norm" with residual_dtype=float32.
        for residual_dtype in ("float32", "bfloat16"):
            ours(f"residual_dtype={residual_dtype}", kernels="triton", residual_dtype=residual_dtype)
        if not options.warm:
            ours("tritongpt eager", compiled=False, kernels="triton")
            ours("torch eager", compiled=False, kernels="torch")
    return builds


# By default Dynamo compiles a function for at most 8 models and, once a size has changed, for any size. A
# training has one model and one size.
@torch._dynamo.config.patch(
    automatic_dynamic_shapes=False, recompile_limit=64, fail_on_recompile_limit_hit=True
)
def main() -> None:
    options = cli.parse(ThroughputConfig, sys.argv[1:], prog="python -m bench.throughput")
    started = time.monotonic()
    ranks = distributed.start("auto", "auto")
    if not ranks.is_main:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    on_gpu = ranks.device_type == "cuda"
    dtype = resolve_dtype("auto", ranks.device)
    shape = cli.choose(SIZES, options.size or ("124M" if on_gpu else "tiny"), "size")
    block_size = options.block_size if on_gpu else 64
    config = GPTConfig(block_size, 50304 if on_gpu else 512, *shape, bias=False)
    with torch.device("meta"):
        model = GPT(config, ranks.device, dtype)  # its config has what "auto" stands for
    builds = builders(options, config, dtype, ranks)
    session = Session(model, dtype, ranks, builds, options.out)
    if not on_gpu:
        print("There is no GPU: a tiny model on the CPU, whose figures say nothing about a GPU.", flush=True)
    one_gpu = on_gpu and ranks.world_size == 1
    longest = 0.0  # seconds that a variant took to compile so far
    for position, name in enumerate(builds):
        began = time.monotonic()
        needed = began - started + longest + options.seconds * (position + 2)
        if ranks.any(needed > options.budget):
            session.variants[name] = "no time was left for it"
        else:
            session.add(name, options.batch_size or (64 if on_gpu else 2))
        longest = max(longest, time.monotonic() - began)
        if options.warm:
            session.variants.clear()
            fit.release(ranks.device)
        elif on_gpu and len(builds) > 2 and name == ("nanogpt" if options.nanogpt else "tritongpt"):
            # The figures that matter most, ours and nanoGPT's, before anything else can fail.
            session.measure(min(options.seconds, 3.0))
            if one_gpu:
                session.profile()
    if not options.warm:
        session.measure(options.seconds if on_gpu else min(options.seconds, 1.0))
        if one_gpu and not session.results["parts"]:
            session.profile()
        if session.results["parts"]:
            print_parts(session.results["parts"], session.results["least_ms"])
    distributed.stop(ranks)


if __name__ == "__main__":
    cli.run(main)
