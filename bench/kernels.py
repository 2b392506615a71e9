"""python -m bench.kernels [NAME ...]: time every operation beside its competitors and the machine's limits.

For each shape: milliseconds forward, backward and both, in turns with the competitors that are installed; the
share of the limit; and the memory that the operation needs beyond its inputs. The limit is the least time
that the operation's bytes or FLOPs (`Op.cost`) could take at the rates measured in the same run. Ours and the
fastest competitor also run for a second without a pause ("sustained"), at the clocks that the GPU's power
limit then allows.

Each function must first agree with fp64 on fewer rows of the same shape. One that does not is reported, not
timed. The shape of each operation that decides how fast the 124M trains comes first; `--few` stops there.

Without a GPU the shapes are those of the tests, only PyTorch's operations run, and the figures say nothing
about a GPU.
"""

import importlib.util
import json
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product, zip_longest
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import timing
from bench.judge import Function, copied, failures, floating, outputs
from gpt import cli
from gpt.cli import UserPath
from kernels import OPS
from kernels.attention import CAUSAL_ATTENTION
from kernels.cross_entropy import CROSS_ENTROPY, loss_and_gradient_
from kernels.op import INTERPRETED, Cost, Op, unavailable

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIRECTIONS = ("forward", "backward", "both")
COMPILED = ("tritongpt", "compile", "flex")  # of the variants: those that --warm compiles


def variants(op: Op, device: str) -> dict[str, Function | str]:
    """{name: function with the operation's arguments, or why there is none}."""
    reason = unavailable(torch.device(device))
    if reason is None and INTERPRETED:
        reason = "the interpreter's speed says nothing"
    result: dict[str, Function | str] = {
        "tritongpt": op.implementations["triton"] if reason is None else reason,
        "eager": op.reference,
    }
    if device.startswith("cuda"):
        result["compile"] = torch.compile(op.reference, dynamic=False)
    if op.name == "linear_cross_entropy":
        fused = getattr(F, "linear_cross_entropy", None)
        result["torch fused"] = "this PyTorch has no F.linear_cross_entropy"
        if fused is not None:  # it chooses the size of its chunks itself
            result["torch fused"] = lambda input, linear_weight, target, chunk_size=None, **options: fused(
                input, linear_weight, target, **options
            )
    if op.name == "causal_attention":
        result |= attention_competitors(device)
    if op.name in LIGER:
        result["liger"] = liger(*LIGER[op.name])
    return result


def liger(name: str, adapt: Callable[[Function], Function]) -> Function | str:
    try:
        from liger_kernel.transformers import functional
    except ImportError:
        return "Liger-Kernel is not installed"
    function = getattr(functional, name, None)
    return f"this Liger-Kernel has no {name}" if function is None else adapt(function)


# operation -> Liger's name for it, and what gives it our arguments
LIGER: dict[str, tuple[str, Callable[[Function], Function]]] = {
    "layer_norm": (
        "liger_layer_norm",
        lambda liger: lambda input, normalized_shape, weight, bias: liger(input, weight, bias, 1e-5),
    ),
    "cross_entropy": ("liger_cross_entropy", lambda liger: liger),
    "linear_cross_entropy": (
        "liger_fused_linear_cross_entropy",
        lambda liger: (
            lambda input, linear_weight, target, ignore_index: liger(
                input, linear_weight, target, ignore_index=ignore_index
            )
        ),
    ),
}


def attention_competitors(device: str) -> dict[str, Function | str]:
    if not device.startswith("cuda"):
        return dict.fromkeys(("sdpa flash", "sdpa cudnn", "flex", "flash-attn"), "needs a GPU")

    def sdpa(qkv: Tensor, backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return CAUSAL_ATTENTION.reference(qkv)

    has_flash = importlib.util.find_spec("flash_attn")
    flash = CAUSAL_ATTENTION.implementations["flash_attn"]
    return {
        "sdpa flash": partial(sdpa, backend=SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn": partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION),
        "flex": _flex(device),
        "flash-attn": flash if has_flash else "flash-attn is not installed",
    }


def _flex(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    masks: dict[int, Any] = {}

    def flex(qkv: Tensor) -> Tensor:
        T = qkv.size(1)
        if T not in masks:
            masks[T] = create_block_mask(lambda b, h, q, k: q >= k, None, None, T, T, device=device)
        q, k, v = qkv.transpose(1, 3).unbind(2)
        return compiled(q, k, v, block_mask=masks[T]).transpose(1, 2)

    return flex


def loss_and_gradient(input: Tensor, target: Tensor, ignore_index: int, **_: Any) -> tuple[Tensor, Tensor]:
    """Returns the losses (N,), and the gradient of their sum, written over the logits (N, V)."""
    return loss_and_gradient_(input, target, ignore_index, gradient=input), input


def _loss_and_gradient_reference(input: Tensor, target: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """The same, but it leaves the logits as they are. No target is ignored."""
    logs = F.log_softmax(input if input.dtype == torch.float64 else input.float(), dim=1)
    p, hot = logs.exp(), torch.arange(input.shape[1], device=input.device) == target[:, None]
    return -logs.gather(1, target[:, None])[:, 0], torch.where(hot, p - 1, p).to(input.dtype)


# What linear_cross_entropy does with the logits of a chunk. Most of the time of the loss goes here.
IN_PLACE = replace(
    CROSS_ENTROPY,
    name="loss_and_gradient",
    implementations={"triton": loss_and_gradient, "torch": _loss_and_gradient_reference},
    cost=lambda input, **_: Cost(2 * input.numel() * input.element_size(), 0, 8 * input.numel(), 0),
    differentiable=False,
)
TIMED = {op.name: op for op in (*OPS, IN_PLACE)}


def make_inputs(op: Op, dtype: torch.dtype, device: str, sample: dict[str, Any]) -> dict[str, Any]:
    """Random arguments. No target is ignored, since the row of an ignored target is not read."""
    call = op.make(dtype=dtype, device=device, **sample)
    if "target" in call:
        call["target"] = torch.randint(sample["V"], call["target"].shape, device=device)
    return call


def make_call(op: Op, dtype: torch.dtype, device: str, sample: dict[str, Any]) -> dict[str, Any]:
    """The same, and the floating-point arguments require gradients."""
    call = make_inputs(op, dtype, device, sample)
    return {k: v.requires_grad_(op.differentiable) if floating(v) else v for k, v in call.items()}


def fewer(op: Op, sample: dict[str, Any]) -> dict[str, Any]:
    """The sample with few enough rows for fp64. Multiples of 16 stay so: the same kernels are compiled."""
    if op.name == "decode_attention":  # its grid depends on the batch
        return sample
    most = {"N": 512, "B": 2, "H": 2}
    smaller = {k: min(v, most.get(k, v)) if isinstance(v, int) else v for k, v in sample.items()}
    if "shape" in sample:
        smaller["shape"] = (min(4096, sample["shape"][0]), *sample["shape"][1:])
    return smaller


# ---- what is timed


def directions(function: Function, call: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """{"forward", "backward", "both": what to time}. Backward gives the gradients of all inputs."""
    inputs = [v for v in call.values() if floating(v) and v.requires_grad]
    if not inputs:
        return {"forward": lambda: function(**call)}

    def forward() -> list[Tensor]:
        return [output for output in outputs(function(**call)) if output.requires_grad]

    results = forward()
    gradients = [torch.randn(r.shape, dtype=r.dtype, device=r.device) for r in results]
    return {
        "forward": lambda: function(**call),
        # The mixed norm's gradient of the residual is the carrier's: autograd has none for the residual.
        "backward": lambda: torch.autograd.grad(
            results, inputs, gradients, retain_graph=True, allow_unused=True
        ),
        "both": lambda: torch.autograd.grad(forward(), inputs, gradients, allow_unused=True),
    }


@contextmanager
def honest_compilation() -> Iterator[None]:
    """Lets a compiled backward pass run twice, and raises where torch.compile would fall back to eager."""
    torch._dynamo.reset()  # it compiles a function for a few shapes only
    donated = torch._functorch.config.patch(donated_buffer=False)
    with donated, torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


def prepare(
    op: Op, call: dict[str, Any], sample: dict[str, Any], dtype: torch.dtype, only: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, dict[str, Callable[[], Any]]]]:
    """Checks and compiles the variants, or those in `only` where it names any.

    Returns ({variant: {"bytes"} or why it cannot be timed}, {variant: {direction: what to time}}).
    """
    device = next(iter(call.values())).device.type
    chosen = {name: f for name, f in variants(op, device).items() if not only or name in only}
    result: dict[str, Any] = {name: reason for name, reason in chosen.items() if isinstance(reason, str)}
    functions = {name: function for name, function in chosen.items() if not isinstance(function, str)}
    result |= failures(op, make_call(op, dtype, device, fewer(op, sample)), functions)
    ready: dict[str, dict[str, Callable[[], Any]]] = {}
    for name in [name for name in functions if name not in result]:
        try:
            overwrites = name == "liger" or op is IN_PLACE
            runs = directions(functions[name], copied(call) if overwrites else call)
            *_, last = runs.values()
            result[name] = {"bytes": timing.peak_extra_bytes(last, device)}
            for run_once in runs.values():
                run_once()
            ready[name] = runs
        except Exception as error:  # out of memory, or what a compiler raises
            result[name] = timing.reason(error)
    return {name: result[name] for name in chosen}, ready


def measure(
    op: Op, sample: dict[str, Any], dtype: torch.dtype, device: str, limits: dict[str, float], seconds: float
) -> dict[str, Any]:
    """One shape: {variant: {direction: {median, limit, ...}, "bytes", "sustained"} or why there is none}.

    "sustained" is the milliseconds of one call, forward and backward, when calls fill a second without a
    pause. Only ours and the fastest competitor have it.
    """
    call = make_call(op, dtype, device, sample)
    result, ready = prepare(op, call, sample, dtype)
    cost = op.cost(**call)
    for direction in DIRECTIONS if op.differentiable else DIRECTIONS[:1]:
        least_seconds, moved, computed = least_time(cost, direction, limits)
        calls = {name: runs[direction] for name, runs in ready.items()}
        timed = timing.interleaved(calls | {"copy": _copy(moved, device)}, device, seconds)
        same_copy = timed.pop("copy").median
        for name, t in timed.items():
            result[name][direction] = asdict(t) | {
                "limit": 1e3 * least_seconds / t.median,
                "bytes_per_s": 1e3 * moved / t.median,
                "flops_per_s": 1e3 * computed / t.median,
                "same_copy_ms": same_copy,
            }
    others = sorted(ready.keys() - {"tritongpt"}, key=lambda n: forward_and_backward(result[n])["median"])
    for name in [*(ready.keys() & {"tritongpt"}), *others[:1]]:
        *_, last = ready[name].values()
        result[name]["sustained"] = timing.sustained(last, 1.0 if device == "cuda" else 0.01)
    return result


def _copy(moved: int, device: str) -> Callable[[], Any]:
    """A copy that moves `moved` bytes, read and written."""
    source = torch.empty(max(moved // 2, 1), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def least_time(cost: Cost, direction: str, limits: dict[str, float]) -> tuple[float, int, int]:
    """(seconds at the slower of the two limits, bytes, FLOPs)."""
    if direction == "both":
        forward, backward = (least_time(cost, d, limits) for d in ("forward", "backward"))
        return forward[0] + backward[0], forward[1] + backward[1], forward[2] + backward[2]
    moved, computed = cost.forward_bytes, cost.forward_flops
    if direction == "backward":
        moved, computed = cost.backward_bytes, cost.backward_flops
    seconds = max(moved / limits["copy_bytes_per_s"], computed / limits["product_flops_per_s"])
    return seconds, moved, computed


def forward_and_backward(variant: dict[str, Any]) -> dict[str, Any]:
    """The figures of both together, or of forward where there is no backward."""
    return variant["both"] if "both" in variant else variant["forward"]


# ---- the command


def rate(timed: dict[str, float], limits: dict[str, float]) -> str:
    """The rate of the resource that limits it: bytes or FLOPs a second."""
    by_bytes = timed["bytes_per_s"] / limits["copy_bytes_per_s"]
    if by_bytes > timed["flops_per_s"] / limits["product_flops_per_s"]:
        return f"{timed['bytes_per_s'] / 1e9:,.0f} GB/s"
    return f"{timed['flops_per_s'] / 1e12:,.1f} TFLOP/s"


def shape_of(sample: dict[str, Any]) -> str:
    if "shape" in sample:
        return " x ".join(map(str, sample["shape"]))
    return ", ".join(f"{k}={v}" for k, v in sample.items())


ROW = "  {:12}{:>9}{:>9}{:>9}{:>9}{:>14}{:>10}{:>6}"
HEADER = ROW.format("ms", "forward", "backward", "both", "of limit", "rate", "sustained", "MiB")


def _line(name: str, variant: dict[str, Any] | str, limits: dict[str, float]) -> str:
    """A row below HEADER."""
    if isinstance(variant, str):
        return textwrap.fill(f"  {name:12} {variant}", width=80, subsequent_indent=" " * 15)
    times = (f"{variant[d]['median']:.3f}" if d in variant else "" for d in DIRECTIONS)
    both = forward_and_backward(variant)
    sustained = f"{variant['sustained']:.3f}" if "sustained" in variant else ""
    memory = "" if variant["bytes"] is None else f"{variant['bytes'] / 2**20:,.0f}"
    return ROW.format(name, *times, f"{both['limit']:.0%}", rate(both, limits), sustained, memory).rstrip()


def samples_to_time(ops: Collection[Op], device: str, few: bool) -> list[tuple[Op, dict[str, Any]]]:
    """The first shape of each operation, then the second of each, ...; on a CPU one small sample of each."""
    cases = in_turns(ops, lambda op: op.benchmark_shapes[: 1 if few else None])
    if device != "cuda":
        cases = [(op, op.samples[0]) for op in ops]
    return [(op, json.loads(json.dumps(sample))) for op, sample in cases]


def in_turns(
    ops: Collection[Op], shapes: Callable[[Op], Sequence[dict[str, Any]]]
) -> list[tuple[Op, dict[str, Any]]]:
    """The first of the shapes of each operation, then the second of each, and so on."""
    turns = zip_longest(*([(op, shape) for shape in shapes(op)] for op in ops))
    return [case for turn in turns for case in turn if case is not None]


@dataclass
class KernelsConfig:
    """Time every operation beside its competitors: python -m bench.kernels [NAME ...] [--flag=value ...]"""

    dtype: str = "bf16"  # of the inputs: bf16, fp16, fp32, or several with commas
    seconds: float = 0.2  # for each variant and direction
    few: bool = False  # only the first shape of each operation
    warm: bool = False  # compile and check, time nothing; the compilers' caches on disk keep the result
    out: UserPath = ""  # a JSON file for the results


def main() -> None:
    options, names = cli.parse_with_paths(KernelsConfig, sys.argv[1:], prog="python -m bench.kernels")
    ops = [cli.choose(TIMED, name, "operation") for name in names] or list(TIMED.values())
    dtypes = {name: cli.choose(DTYPES, name, "dtype") for name in options.dtype.split(",")}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        print("There is no GPU: small shapes on the CPU, which say nothing about a GPU.")
    limits = {}
    if not options.warm:
        limits = timing.limits(device)
        copy, flops = limits["copy_bytes_per_s"] / 1e9, limits["product_flops_per_s"] / 1e12
        print(f"limits of this machine: copy {copy:,.0f} GB/s, product {flops:,.1f} TFLOP/s")
    cases = timing.of_same_commit(options.out, "cases")
    done = [(case["operation"], case["dtype"], str(case["sample"])) for case in cases]
    for (op, sample), (name, dtype) in product(samples_to_time(ops, device, options.few), dtypes.items()):
        if (op.name, name, str(sample)) in done:
            continue
        print(f"{op.name} {name} {shape_of(sample)}", flush=True)
        with honest_compilation():
            if options.warm:
                prepare(op, make_call(op, dtype, device, sample), sample, dtype, COMPILED)
                continue
            variants = measure(op, sample, dtype, device, limits, options.seconds)
        cases.append({"operation": op.name, "sample": sample, "dtype": name, "variants": variants})
        print(HEADER, *(_line(*variant, limits) for variant in variants.items()), sep="\n", flush=True)
        if options.out:  # after each case: a run that is cut short loses nothing
            timing.write(options.out, "kernels", device, limits=limits, cases=cases)


if __name__ == "__main__":
    cli.run(main)
