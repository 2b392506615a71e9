"""--profile=START:STOP: those steps under torch.profiler, as a trace and as the list of what costs most."""

from pathlib import Path

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from train.config import TrainConfig
from train.distributed import Ranks
from train.metrics import Metrics

LISTED = 12  # operations


class Profile:
    """Steps START to STOP - 1 of rank 0, as far as the run makes them; each takes longer than it would.

    The trace opens in https://ui.perfetto.dev and chrome://tracing.
    """

    def __init__(self, config: TrainConfig, first_step: int, ranks: Ranks, metrics: Metrics):
        """Raises ValueError where the run makes none of the steps."""
        start, stop = parse(config.profile) if config.profile else (0, 0)
        self.steps = range(max(start, first_step), min(stop, config.max_iters))
        if config.profile and not self.steps:
            raise ValueError(
                f"profile={config.profile}: this run makes the steps {first_step} to {config.max_iters - 1}"
            )
        self.folder, self.ranks, self.metrics = Path(config.out_dir), ranks, metrics
        self.running: profile | None = None

    def before(self, step: int) -> None:
        if self.ranks.is_main and step in self.steps and self.running is None:
            with self.metrics.paused("profiling"):
                on_gpu = [ProfilerActivity.CUDA] if self.ranks.device_type == "cuda" else []
                self.running = profile(activities=[ProfilerActivity.CPU, *on_gpu])
                self.running.start()

    def after(self, step: int, is_last: bool) -> None:
        if self.running is not None and (is_last or step + 1 not in self.steps):
            with self.metrics.paused("profiling"):
                self.running.stop()
                path = self.folder / f"trace-{self.steps[0]}-{step}.json"
                self.running.export_chrome_trace(str(path))
                self.metrics.print(f"profile of steps {self.steps[0]} to {step}: {path}")
                self.metrics.print(self._costliest(self.running, step + 1 - self.steps[0]))
                self.running = None

    def _costliest(self, profiled: profile, steps: int) -> str:
        """A line for each kernel of a GPU, or operation of a CPU, that took most time itself."""
        on_gpu = self.ranks.device_type == "cuda"
        events = [
            (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count, event.key)
            for event in profiled.key_averages()
            if (event.device_type != DeviceType.CPU) == on_gpu and not event.is_user_annotation
        ]
        whole = max(1.0, sum(microseconds for microseconds, *_ in events))
        lines = [f"{whole / steps / 1000:.2f} ms a step in operations on {self.ranks.device}, mostly in"]
        for microseconds, count, name in sorted(events, reverse=True)[:LISTED]:
            name = name if len(name) <= 60 else f"{name[:57]}..."
            share, ms = microseconds / whole, microseconds / steps / 1000
            lines.append(f"  {share:6.1%} {ms:10.3f} ms {count / steps:7,.0f} times  {name}")
        return "\n".join(lines)


def parse(steps: str) -> tuple[int, int]:
    """START:STOP. Raises ValueError."""
    start, _, stop = steps.partition(":")
    if not (start.isdigit() and stop.isdigit() and int(start) < int(stop)):
        raise ValueError(f"profile={steps!r} must be START:STOP, such as 10:13 for the steps 10, 11 and 12")
    return int(start), int(stop)
