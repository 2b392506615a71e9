"""The clock of all benchmarks, and the JSON files of their results.

On a GPU, device events time a call. Before each call a buffer larger than the L2 cache is read, so that the
cache is cold. Then the GPU sleeps for twice as long as the host needs to queue the call, so that the GPU's
time is measured and not Python's. The calls take turns, in an order that changes from round to round, so that
all of them run at the same clocks and temperature. On a CPU the host's clock times a call.
"""

import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from gpt.atomic import replacing
from kernels.op import triton

FLUSH_BYTES = 512 << 20  # several times the largest L2
HEAD_START_CYCLES = 1_000_000  # about half a millisecond
CYCLES_A_SECOND = 2e9  # upper bound
# MHz, watts, degrees, and the bits of the reasons for lower clocks: 4 is the power limit. Old and new drivers
# know the last field by this name.
CLOCK_FIELDS = "clocks.sm,power.draw,temperature.gpu,clocks_throttle_reasons.active"


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, and the 10th and 90th percentiles of `runs` calls."""

    median: float
    low: float
    high: float
    runs: int


def interleaved(
    calls: Mapping[str, Callable[[], Any]], device: str, seconds: float = 0.5, cold: bool = True
) -> dict[str, Timing]:
    """Times each call for about `seconds` after a warm-up. The calls take turns.

    They must be compiled and known to be correct: their results are thrown away.
    """
    clock = _GpuClock(cold) if device.startswith("cuda") else host_clock
    for call in calls.values():
        clock(call)  # the first call allocates, and tells the clock how long the host takes
    times = [{}, *in_turns(calls, clock, seconds)][-1]  # after the last round
    return {name: summary(values) for name, values in times.items()}


def in_turns(
    calls: Mapping[str, Callable[[], Any]],
    clock: Callable[[Callable[[], Any]], float],
    seconds: float,
    fewest: int = 5,
    agree: Callable[[float], float] = lambda milliseconds: milliseconds,
) -> Iterator[dict[str, list[float]]]:
    """Times each call once a round, in an order that changes. Yields all milliseconds so far, each round.

    There are as many rounds as fit into `seconds` for the slowest call, from `fewest` to 200. `agree` gives
    all processes of a group the same time of the slowest call.
    """
    if not calls:
        return
    slowest = agree(max(clock(call) for call in calls.values()))
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for _ in range(max(fewest, min(200, int(1e3 * seconds / max(slowest, 1e-3))))):
        shuffle(order)
        for name in order:
            times[name].append(clock(calls[name]))
        yield times


def summary(milliseconds: list[float]) -> Timing:
    ordered = sorted(milliseconds)
    tenth = len(ordered) // 10
    return Timing(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth], len(ordered))


class _GpuClock:
    def __init__(self, cold: bool):
        self.flush = torch.zeros(FLUSH_BYTES // 4, device="cuda") if cold else None
        self.host_seconds: dict[Callable[[], Any], float] = {}

    def __call__(self, call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.flush is not None:
            self.flush.sum()  # reads only: dirty lines in the cache would be written back during `call`
        # Sleep for twice as long as the host took the last time.
        cycles = 2 * self.host_seconds.get(call, 0.0) * CYCLES_A_SECOND
        torch.cuda._sleep(int(min(max(cycles, HEAD_START_CYCLES), 40 * HEAD_START_CYCLES)))
        began = time.perf_counter()
        start.record()
        call()
        end.record()
        self.host_seconds[call] = time.perf_counter() - began
        end.synchronize()
        return start.elapsed_time(end)


def host_clock(call: Callable[[], Any], synchronize: Callable[[], Any] = lambda: None) -> float:
    """Milliseconds of a call by the host's clock, from one `synchronize` to the next."""
    synchronize()
    began = time.perf_counter()
    call()
    synchronize()
    return 1e3 * (time.perf_counter() - began)


def sustained(call: Callable[[], Any], seconds: float) -> float:
    """Milliseconds of a call when calls run for `seconds` without a pause.

    If the GPU finishes a call sooner than the host queues the next, this is the host's time.
    """
    from torch.utils.benchmark import Timer  # it imports setuptools, which takes 0.2 s

    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange(min_run_time=seconds).mean


def clocks(work: Callable[[], Any], device: str) -> list[str]:
    """Runs `work`. Returns the lines that nvidia-smi printed meanwhile, ten a second, with CLOCK_FIELDS.

    Without nvidia-smi there are none.
    """
    # By uuid: nvidia-smi numbers the GPUs of a machine differently from CUDA.
    gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    flags = f"--id={gpu} --query-gpu={CLOCK_FIELDS} --format=csv,noheader --loop-ms=100".split()
    try:
        sampler = subprocess.Popen(["nvidia-smi", *flags], stdout=subprocess.PIPE, text=True)
    except OSError:
        work()
        return []
    try:
        work()
    finally:
        sampler.terminate()
        lines = sampler.communicate()[0].splitlines()
    return lines


def peak_extra_bytes(call: Callable[[], Any], device: str, before: int | None = None) -> int | None:
    """The peak memory of `call` beyond `before`, by default what is allocated now; None on a CPU."""
    if not device.startswith("cuda"):
        call()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if before is None else before
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def limits(device: str) -> dict[str, float]:
    """Bytes/s of a large copy, read and written, and FLOP/s of a large square product on this machine."""
    on_gpu = device.startswith("cuda")
    size, n = (2 << 30, 8192) if on_gpu else (64 << 20, 1024)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    source = torch.empty(size, dtype=torch.int8, device=device).random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    timings = interleaved(
        {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b, out=product)}, device
    )
    return {
        "copy_bytes_per_s": 2 * size / timings["copy"].median * 1e3,
        "product_flops_per_s": 2 * n**3 / timings["product"].median * 1e3,
    }


def environment(device: str, command: list[str]) -> dict[str, Any]:
    """What is needed to repeat a measurement."""
    on_gpu = device.startswith("cuda")
    smi = (
        "nvidia-smi --query-gpu=driver_version,clocks.sm,clocks.mem,power.limit --format=csv,noheader".split()
    )
    return {
        "device": torch.cuda.get_device_name()
        if on_gpu
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "driver, clocks, power": _output(smi) if on_gpu else None,
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", None),
        "cudnn": torch.backends.cudnn.version(),
        "sdpa": sdpa_backend(device),
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
        "command": " ".join(command),
    }


def sdpa_backend(device: str) -> str | None:
    """The backend that PyTorch chooses for training the causal attention of the 124M in bf16."""
    try:
        q = torch.empty(1, 12, 1024, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
        return SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True)).name
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None  # the function is private to PyTorch


def commit() -> str | None:
    """The commit of the checkout. TRITONGPT_COMMIT names it where there is no .git."""
    here = str(Path(__file__).parent)
    described = _output(["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"])
    return os.environ.get("TRITONGPT_COMMIT") or described


def write(path: str | Path, benchmark: str, device: str, **results: Any) -> None:
    """Writes a JSON file with the results of a benchmark and what is needed to repeat it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ["python", "-m", f"bench.{benchmark}", *sys.argv[1:]]
    report = {"benchmark": benchmark, "environment": environment(device, command)} | results
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(report, indent=1) + "\n")


def of_same_commit(path: str | Path, name: str) -> list[dict[str, Any]]:
    """The list `name` of a file that the same commit wrote: a run that was cut short resumes from it."""
    now = commit()
    # A modified tree has the name "...-dirty" before and after each edit.
    if not Path(path).is_file() or now is None or now.endswith("dirty"):
        return []
    before = json.loads(Path(path).read_text())
    return before[name] if before["environment"]["commit"] == now else []


def read(folder: str | Path) -> list[dict[str, Any]]:
    """Every result in `folder`, the oldest first, each with the name of its "file"."""
    results = [
        json.loads(path.read_text()) | {"file": path.name} for path in sorted(Path(folder).glob("*.json"))
    ]
    return sorted(results, key=lambda result: result["environment"]["date"])


def reason(error: Exception) -> str:
    """One line for an exception that is a result: a compiler's, a competitor's."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
