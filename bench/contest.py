"""python -m bench.sweep attention: bench/candidates/attention.py against what is shipped and SDPA's backends.

For 144, 384 and 768 heads in all and T of 1024, 2048 and 4096 at D=64: forward, backward, and both with the
best of each. A pool of processes compiles every candidate and holds it, in NaN-poisoned memory, to fp64
and, where it claims them, to its own bits. Here it is held to what is shipped at the full size, twice, and
what passes takes turns with PyTorch's backends, which pay for packing their gradient. TFLOP/s count
2 products forward and 5 backward of the causal half, whatever a candidate does.
"""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import kernels as suite
from bench import timing
from bench.candidates import attention as candidates
from bench.candidates.attention import Candidate
from bench.sweep import Pool
from kernels import OPS

OP = next(op for op in OPS if op.name == "causal_attention")
TABLES = {"forward": candidates.forwards, "backward": candidates.backwards}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# What decides first: of the 124M, then longer ones, then fp16 by the best of bf16.
SHAPES = [
    {"B": B, "T": T, "H": 12, "D": 64, "dtype": "bf16"} for T in (1024, 2048, 4096) for B in (32, 64, 12)
]
SHAPES += [
    {"B": B, "T": T, "H": 12, "D": 64, "dtype": "fp16"} for B, T in ((32, 1024), (64, 1024), (12, 4096))
]
KEPT = 5  # candidates of a direction that go on to fp16


def inputs(shape: dict[str, Any], device: str) -> tuple[Tensor, Tensor, float]:
    """(qkv, upstream gradient, scale), the same every time."""
    sizes = {k: shape[k] for k in "BTHD"}
    torch.manual_seed(0)
    qkv = OP.make(DTYPES[shape["dtype"]], device, **sizes)["qkv"]
    dout = torch.randn(*(shape[k] for k in "BTHD"), device=device).to(qkv.dtype)
    return qkv, dout, shape["D"] ** -0.5


def attempt(_: str, shape: dict[str, Any], direction: str, index: int) -> str | None:
    """Why that candidate of the table cannot be timed, or None: in a process of the pool, on a GPU.

    What it compiles is in Triton's cache afterwards. 16 heads are enough, and divide by 16 as the others do.
    """
    few = shape | {"B": 8, "H": 2}
    try:
        return wrong(few, direction, index, "cuda")
    except Exception as error:  # what does not compile, or needs more than there is
        if "CUDA error" in str(error):  # this process has lost its GPU
            os._exit(1)
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def wrong(shape: dict[str, Any], direction: str, index: int, device: str) -> str | None:
    """Why it is not right: off by more than twice what PyTorch is, to fp64; or not the same every run."""
    qkv, dout, scale = inputs(shape, device)
    candidate = TABLES[direction](qkv)[index]
    ends = sorted({0, shape["B"] - 1})  # of the batch: fp64 scores take T x T x 8 bytes a head
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is allocated with NaN
    try:
        out, lse = candidates._forward(qkv, None, 0.0, scale)
        call = (qkv, None, 0.0, scale) if direction == "forward" else (dout, qkv, out, lse, None, 0.0, scale)
        runs = [first(candidate.run(*call)) for _ in range(3 if candidate.same_bits else 1)]
    finally:
        torch.use_deterministic_algorithms(False)
    if any(not torch.equal(runs[0], again) for again in runs[1:]):
        return "differs from run to run"
    exact, peer = (
        _reference(qkv[ends].to(d), dout[ends].to(d), direction) for d in (torch.float64, qkv.dtype)
    )
    error, allowed = (((x.double() - exact).norm() / exact.norm()).item() for x in (runs[0][ends], peer))
    most = max(2 * allowed, torch.finfo(qkv.dtype).eps / 4)
    return None if error <= most else f"wrong: off by {error:.1e}, and PyTorch by {allowed:.1e}"


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _reference(qkv: Tensor, dout: Tensor, direction: str) -> Tensor:
    qkv = qkv.detach().requires_grad_()
    out = OP.reference(qkv)
    return out.detach() if direction == "forward" else torch.autograd.grad(out, qkv, dout)[0]


def at_full_size(candidate: Candidate, call: tuple[Any, ...], expected: Tensor) -> str | None:
    """Why a result is not what is shipped gives, or not the same twice, where many programs run at once."""
    found, again = (first(candidate.run(*call)) for _ in range(2))
    if candidate.same_bits and not torch.equal(found, again):
        return "differs from run to run at full size"
    # A wrong tile is far off in its own rows, and nothing among all. The first rows' dq is mostly rounding.
    rows = slice(min(64, found.shape[1] // 2), None)
    error = max(_apart(a[rows], b[rows]) for a, b in zip(found, expected))
    return None if error <= 0.5 else f"wrong at full size: a row is off by {error:.1e} of itself"


def _apart(found: Tensor, expected: Tensor) -> float:
    """The largest relative distance of two tensors' vectors. Of one batch element: in fp32 all take room."""
    expected = expected.float()
    apart = (found.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return apart.nan_to_num(nan=torch.inf).max().item()


def measure(
    shape: dict[str, Any],
    device: str,
    attempts: Callable[[str, list[int]], dict[int, str | None]],
    seconds: float,
    wanted: dict[str, set[str]] | None = None,
) -> list[dict[str, Any]]:
    """A row for every candidate and peer: {direction, name, ms and tflops, or why}.

    `wanted`: the candidates' names by direction, if not all.
    """
    qkv, dout, scale = inputs(shape, device)
    cost = OP.cost(qkv=qkv)
    flops = {"forward": cost.forward_flops, "backward": cost.backward_flops}
    flops["both"] = sum(flops.values())
    peers = {n: f for n, f in suite.peers(OP, device) if n.startswith("sdpa") and not isinstance(f, str)}
    peers = peers or {"sdpa": OP.reference}  # a CPU has one
    trained = {"qkv": qkv.detach().requires_grad_()}
    ready: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    for name, peer in peers.items():
        try:
            ready[name] = suite.directions(peer, trained)
            ready[name]["both"]()
        except Exception as error:  # a backend that PyTorch was built without
            ready.pop(name, None)
            rows.append({"direction": "both", "name": name, "why": suite._why(error)})
    out, lse = candidates._forward(qkv, None, 0.0, scale)
    calls = {"forward": (qkv, None, 0.0, scale), "backward": (dout, qkv, out, lse, None, 0.0, scale)}
    best: dict[str, Candidate] = {}
    for direction, call in calls.items():
        table = TABLES[direction](qkv)
        tried = [i for i, c in enumerate(table) if i == 0 or wanted is None or str(c) in wanted[direction]]
        expected = first(table[0].run(*call))
        right: dict[str, Candidate] = {}
        for index, why in attempts(direction, tried).items():
            candidate = table[index]
            try:
                why = why or at_full_size(candidate, call, expected)
            except torch.OutOfMemoryError as error:
                why = suite._why(error)
            if why is None:
                right[str(candidate)] = candidate
            else:
                rows.append({"direction": direction, "name": str(candidate), "why": why})
        works: dict[str, Callable[[], Any]] = {
            name: partial(candidate.run, *call) for name, candidate in right.items()
        }
        rivals = {name: parts[direction] for name, parts in ready.items()}
        timed = timing.interleaved(works | rivals, device, seconds)
        rows += _rows(direction, timed, flops[direction])
        if right:
            best[direction] = right[min(right, key=lambda name: timed[name].median)]

    def both(forward: Candidate, backward: Candidate) -> Tensor:
        result = forward.run(*calls["forward"])
        return backward.run(dout, qkv, *result, None, 0.0, scale)

    pairs = {name: parts["both"] for name, parts in ready.items()}
    pairs["shipped"] = partial(both, *(table(qkv)[0] for table in TABLES.values()))
    if len(best) == 2:
        pairs[" / ".join(map(str, best.values()))] = partial(both, best["forward"], best["backward"])
    return rows + _rows("both", timing.interleaved(pairs, device, 4 * seconds), flops["both"])


def _rows(direction: str, timed: dict[str, timing.Timing], flops: int) -> list[dict[str, Any]]:
    """The fastest first; `ratio` is how many times as fast as the fastest of SDPA's backends."""
    peer = min((t.median for name, t in timed.items() if name.startswith("sdpa")), default=None)
    return [
        {"direction": direction, "name": name, "ms": t.median, "low": t.low, "high": t.high, "runs": t.runs}
        | {"tflops": flops / t.median / 1e9, "ratio": peer and peer / t.median}
        for name, t in sorted(timed.items(), key=lambda item: item[1].median)
    ]


def table(shape: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = [" ".join(f"{k}={v}" for k, v in shape.items()) + f", {shape['B'] * shape['H']} heads"]
    for row in rows:
        start = f"  {row['direction']:9}{row['name']:75}"
        if "why" in row:
            lines.append(f"{start} {row['why']}")
        else:
            ratio = "" if row["ratio"] is None else f"{row['ratio']:6.2f} x SDPA"
            lines.append(f"{start} {row['ms']:8.3f} ms {row['tflops']:7.1f} TFLOP/s {ratio}")
    return "\n".join(lines)


def finalists(results: list[dict[str, Any]]) -> dict[str, set[str]]:
    """The fastest few of every shape so far, by direction."""
    names: dict[str, set[str]] = {direction: set() for direction in TABLES}
    for result in results:
        for direction, found in names.items():
            timed = [r for r in result["rows"] if r["direction"] == direction and "ms" in r]
            found |= {r["name"] for r in sorted(timed, key=lambda r: r["ms"])[:KEPT]}
    return names


def run(
    out: Path | None, seconds: float, shapes: list[dict[str, Any]] | None = None, device: str = "cuda"
) -> None:
    """Every shape that `out` has not, each written when it is measured."""
    results = timing.kept(out, "contests")
    processes = max(1, min(14, (os.cpu_count() or 2) - 2))
    pool = Pool(
        partial(ProcessPoolExecutor, processes, multiprocessing.get_context("spawn")), attempt=attempt
    )
    known: dict[Any, str | None] = {}  # what is right with a T and dtype is right with any number of heads
    for shape in SHAPES if shapes is None else shapes:
        if any(r["shape"] == shape for r in results):
            continue

        def attempts(
            direction: str, tried: list[int], shape: dict[str, Any] = shape
        ) -> dict[int, str | None]:
            keys = {(shape["T"], shape["dtype"], direction, index): index for index in tried}
            new = [index for key, index in keys.items() if key not in known]
            known.update(
                {(shape["T"], shape["dtype"], direction, i): why
                 for i, why in (pool.attempts(OP, shape, direction, new) if new else {}).items()}
            )  # fmt: skip
            return {index: known[key] for key, index in keys.items()}

        wanted = finalists(results) if shape["dtype"] == "fp16" else None
        rows = measure(shape, device, attempts, seconds, wanted)
        results.append({"shape": shape, "rows": rows})
        print(table(shape, rows), flush=True)
        if out:
            timing.write(out, "sweep", device, contests=results)
        torch.cuda.empty_cache()
    pool.close()
