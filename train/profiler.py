"""--profile=START:STOP: profiles those steps with torch.profiler, and lists the slowest operations."""

from pathlib import Path

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from train.config import TrainConfig
from train.distributed import Ranks
from train.metrics import Metrics

LISTED = 12  # operations in the list


class Profile:
    """Traces the steps START to STOP - 1 on rank 0, or fewer if an evaluation or the end comes first.

    The profiler slows these steps down. Open the trace in https://ui.perfetto.dev or chrome://tracing.
    """

    def __init__(self, config: TrainConfig, first_step: int, ranks: Ranks, metrics: Metrics):
        steps = config.profiled
        self.steps = range(max(steps.start, first_step), min(steps.stop, config.max_iters))
        self.folder, self.ranks, self.metrics = Path(config.out_dir), ranks, metrics
        self.running: profile | None = None
        if steps and not self.steps:
            metrics.print(f"profile={config.profile}: those steps were made before")

    def before(self, step: int) -> None:
        if self.ranks.is_main and self.steps and step == self.steps[0]:
            with self.metrics.paused("profiling"):
                on_gpu = [ProfilerActivity.CUDA] if self.ranks.device_type == "cuda" else []
                self.running = profile(activities=[ProfilerActivity.CPU, *on_gpu])
                self.running.start()

    def after(self, step: int) -> None:
        if step + 1 not in self.steps:
            self.finish(step + 1)

    def finish(self, next_step: int) -> None:
        """Ends the trace before `next_step`, or before an evaluation that comes first."""
        if self.running is None:
            return
        with self.metrics.paused("profiling"):
            self.running.stop()
            first, last = self.steps[0], next_step - 1
            path = self.folder / f"trace-{first}-{last}.json"
            self.running.export_chrome_trace(str(path))
            self.metrics.print(f"profile of steps {first} to {last}: {path}")
            self.metrics.print(self._slowest(self.running, next_step - first))
            self.running = None

    def _slowest(self, finished: profile, steps: int) -> str:
        """A line for each of the slowest kernels of a GPU, or operations of a CPU without those they call."""
        on_gpu = self.ranks.device_type == "cuda"
        events = [
            (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count, event.key)
            for event in finished.key_averages()
            if (event.device_type != DeviceType.CPU) == on_gpu and not event.is_user_annotation
        ]
        total = max(1.0, sum(microseconds for microseconds, *_ in events))
        lines = [f"{total / steps / 1000:.2f} ms a step in operations on {self.ranks.device}, mostly in"]
        for microseconds, count, name in sorted(events, reverse=True)[:LISTED]:
            name = name if len(name) <= 60 else f"{name[:57]}..."
            share, ms = microseconds / total, microseconds / steps / 1000
            lines.append(f"  {share:6.1%} {ms:10.3f} ms {count / steps:7,.0f} times  {name}")
        return "\n".join(lines)
