"""The one clock: medians of device time, competitors interleaved, caches cold unless said otherwise.

On a GPU a call is timed by device events. Before each, a buffer larger than the L2 cache is read
(cold), and the GPU is kept busy for twice as long as the host needs to queue the call: what is measured is
the GPU's time and not Python's. Competitors take turns, in an order that
changes from round to round, so that clocks and temperature treat them alike. On a CPU a call is timed by
the host's clock.
"""

import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from gpt.atomic import replacing

FLUSH_BYTES = 512 << 20  # several times the largest L2
HEAD_START_CYCLES = 1_000_000  # about half a millisecond
CYCLES_A_SECOND = 2e9  # at most
# Older drivers know the last field by this name alone, newer ones know it as well.
CLOCK_FIELDS = "clocks.sm,power.draw,temperature.gpu,clocks_throttle_reasons.active"
POWER_CAP = 0x4  # the bit of NVML's reasons that says: the power limit holds the clocks down


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
    """Times each call for about `seconds`, after warm-up, all of them in turns.

    The calls must be correct and compiled already: what they return is thrown away.
    """
    if not calls:
        return {}
    clock = _GpuClock(cold) if device.startswith("cuda") else _HostClock()
    longest = max(statistics.median(clock(call) for _ in range(3)) for call in calls.values())
    rounds = max(5, min(200, int(seconds * 1000 / max(longest, 1e-3))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            times[name].append(clock(calls[name]))
    return {name: summary(values) for name, values in times.items()}


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
            self.flush.sum()  # read, not written: a full cache of dirty lines would be written back in `call`
        # for twice as long as the host took the last time
        cycles = 2 * self.host_seconds.get(call, 0.0) * CYCLES_A_SECOND
        torch.cuda._sleep(int(min(max(cycles, HEAD_START_CYCLES), 40 * HEAD_START_CYCLES)))
        began = time.perf_counter()
        start.record()
        call()
        end.record()
        self.host_seconds[call] = time.perf_counter() - began
        end.synchronize()
        return start.elapsed_time(end)


class _HostClock:
    def __call__(self, call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start)


def sustained(call: Callable[[], Any], device: str, seconds: float) -> float:
    """Milliseconds of a call among as many as fill `seconds`, one right after the other.

    A call that the GPU finishes sooner than the host can queue it shows the host's time.
    """
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def repeat(times: int) -> float:
        synchronize()
        began = time.perf_counter()
        for _ in range(times):
            call()
        synchronize()
        return time.perf_counter() - began

    # Twenty waits for the GPU in all, so that waiting costs nothing beside the calls.
    at_once = max(1, int(seconds / 20 / max(repeat(3) / 3, 1e-7)))
    count, elapsed = 0, 0.0
    while elapsed < seconds:
        elapsed += repeat(at_once)
        count += at_once
    return 1e3 * elapsed / count


@contextmanager
def clocks(device: str) -> Iterator[dict[str, Any]]:
    """Fills the dictionary, at the end of the block, with the clock and power that nvidia-smi read meanwhile.

    It reads ten times a second. The dictionary stays empty where there is no GPU or no nvidia-smi.
    """
    result: dict[str, Any] = {}
    sampler = None
    with tempfile.TemporaryFile("w+") as output:
        if device.startswith("cuda"):
            with suppress(OSError, AttributeError):  # no nvidia-smi, or a PyTorch that does not know the uuid
                # A machine may have several GPUs, and nvidia-smi numbers them in an order of its own.
                gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
                command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={CLOCK_FIELDS}"]
                command += ["--format=csv,noheader,nounits", "--loop-ms=100"]
                sampler = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)
        try:
            yield result
        finally:
            if sampler is not None:
                sampler.terminate()
                try:
                    sampler.wait(5)
                except subprocess.TimeoutExpired:
                    sampler.kill()
                output.seek(0)
                result |= summary_of_clocks(output.read())


def summary_of_clocks(text: str) -> dict[str, Any]:
    """Of nvidia-smi's lines: MHz, watts, degrees, the share of samples that the power limit held down."""
    rows = []
    for line in text.splitlines(keepends=True):
        # A field can be "[N/A]", and the last line can be cut short.
        with suppress(ValueError):
            mhz, watts, celsius, reasons = line.split(",")
            if line.endswith("\n"):
                rows.append((float(mhz), float(watts), float(celsius), int(reasons, 16) & POWER_CAP))
    if not rows:
        return {}
    *readings, capped = zip(*rows)
    found = {name: asdict(summary(list(v))) for name, v in zip(("mhz", "watts", "celsius"), readings)}
    return found | {"power_capped": sum(map(bool, capped)) / len(capped)}


def peak_extra_bytes(call: Callable[[], Any], device: str) -> int | None:
    """The most memory that `call` holds beyond what was held before it; None on a CPU."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def l2_bytes(device: str) -> int:
    """Size of the GPU's L2 cache; 0 on a CPU, whose caches nothing here empties."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.startswith("cuda") else 0


def limits(device: str) -> dict[str, float]:
    """What this machine gives: bytes/s of a large copy (read and written), FLOP/s of a square product."""
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
    """What somebody needs to know to repeat a measurement."""
    on_gpu = device.startswith("cuda")
    smi = [
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit",
        "--format=csv,noheader",
    ]
    return {
        "device": torch.cuda.get_device_name()
        if on_gpu
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "driver, clocks, power": _output(smi) if on_gpu else None,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cudnn": torch.backends.cudnn.version(),
        "sdpa": sdpa_backend(device),
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
        "command": " ".join(command),
    }


def sdpa_backend(device: str) -> str | None:
    """The backend that PyTorch chooses for the causal attention of the 124M in bf16, to be trained."""
    try:
        q = torch.empty(1, 12, 1024, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
        return SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True)).name
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None  # PyTorch promises this function to nobody


def commit() -> str | None:
    """Of the checkout; where it travels without .git, what TRITONGPT_COMMIT says."""
    here = str(Path(__file__).parent)
    described = _output(["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"])
    return os.environ.get("TRITONGPT_COMMIT") or described


def write(path: str | Path, benchmark: str, device: str, **results: Any) -> None:
    """A JSON file of one benchmark's results with what somebody needs to repeat it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ["python", "-m", f"bench.{benchmark}", *sys.argv[1:]]
    report = {"benchmark": benchmark, "environment": environment(device, command)} | results
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(report, indent=1) + "\n")


def of_same_commit(path: str | Path, name: str) -> list[dict[str, Any]]:
    """The list `name` of a file that the same commit wrote: a run that was cut short goes on from it."""
    if not Path(path).is_file() or commit() is None:
        return []
    before = json.loads(Path(path).read_text())
    return before[name] if before["environment"]["commit"] == commit() else []


def read(folder: str | Path) -> list[dict[str, Any]]:
    """Every result in `folder`, the oldest first; "file" is added to each."""
    results = [
        json.loads(path.read_text()) | {"file": path.name} for path in sorted(Path(folder).glob("*.json"))
    ]
    return sorted(results, key=lambda result: result["environment"]["date"])


def plain(timings: Mapping[str, Timing]) -> dict[str, dict[str, float]]:
    """For JSON."""
    return {name: asdict(timing) for name, timing in timings.items()}


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
