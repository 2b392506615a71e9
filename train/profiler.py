"""--profile=START:STOP profiles those steps with torch.profiler, and prints the most expensive operations."""

from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from train.config import TrainConfig
from train.distributed import Ranks
from train.metrics import Metrics


def start_profiler(config: TrainConfig, first_step: int, ranks: Ranks, metrics: Metrics) -> profile | None:
    """A running profiler on rank 0, or None if there is nothing to profile. Call its `step` after each step.

    It profiles the steps START to STOP - 1, with evaluations between them. The step before START, if there is
    one, warms it up. The profiled steps and the step after them are slower than others.
    https://ui.perfetto.dev opens the trace.
    """
    steps = range(max(config.profiled.start, first_step), min(config.profiled.stop, config.max_iters))
    if config.profile and not steps:
        metrics.print(f"profile={config.profile}: those steps were made before")
    if config.eval_only or not steps or not ranks.is_main:
        return None
    on_gpu = ranks.device_type == "cuda"

    def report(finished: profile) -> None:
        with metrics.paused("profiling"):
            # A signal can end a run before the last of `steps`, or in the step that warms the profiler up.
            last_step = first_step + finished.step_num - 1
            if last_step < steps[0]:
                return
            path = Path(config.out_dir, f"trace-{steps[0]}-{last_step}.json")
            finished.export_chrome_trace(str(path))
            operations = finished.key_averages()
            # Ranges such as a whole step contain the operations.
            operations[:] = [operation for operation in operations if not operation.is_user_annotation]
            metrics.print(f"profile of steps {steps[0]} to {last_step}: {path}")
            metrics.print(
                operations.table(
                    sort_by="self_device_time_total" if on_gpu else "self_cpu_time_total",
                    row_limit=12,
                    max_name_column_width=60,
                )
            )

    warmup = min(1, steps[0] - first_step)
    profiler = profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])],
        schedule=schedule(
            skip_first=steps[0] - first_step - warmup, wait=0, warmup=warmup, active=len(steps), repeat=1
        ),
        on_trace_ready=report,
    )
    profiler.start()
    return profiler
