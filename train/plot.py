"""python -m train.plot OUT_DIR [OUT_DIR ...]: plots one run to OUT_DIR/loss.png, or several to compare.png.

The picture shows loss, learning rate, gradient norm and throughput.
"""

import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gpt import cli
from gpt.checkpoint import runs_here
from gpt.cli import UserPath
from train.metrics import read

# The palette of Okabe and Ito, which colour-blind people can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
UNITS = {
    "step": [(1.0, "step")],
    "tokens": [(1.0, "tokens"), (1e6, "tokens, millions"), (1e9, "tokens, billions")],
    "time": [(1.0, "s"), (60.0, "min"), (3600.0, "h"), (86400.0, "days")],
}
SMOOTHED = 100  # a run with this many logged steps gets a smoothed line too

Column = NDArray[np.float64]
Records = list[dict[str, Any]]


@dataclass
class PlotConfig:
    """Draw the metrics of runs: python -m train.plot OUT_DIR [OUT_DIR ...]"""

    x: Literal["step", "tokens", "time"] = "step"  # the horizontal axis; time is that of the steps alone
    out: UserPath = ""  # the picture; the default is OUT_DIR/loss.png, or compare.png for several runs


@dataclass
class Run:
    label: str
    steps: Records
    evaluations: Records

    def progress(self, x: str, n: Column) -> Column:
        """The steps, tokens, or seconds of steps that the run has made after `n` steps.

        The steps before the first record count as tokens, but their time is unknown and left out. After the
        last logged step neither grows, so a later evaluation is drawn there.
        """
        if x == "step":
            return n
        iters, seconds = column(self.steps, "iter"), column(self.steps, "ms") / 1000
        per_step = seconds if x == "time" else np.rint(column(self.steps, "tokens_per_s") * seconds)
        start = column(self.steps + self.evaluations, "iter").min() if x == "time" else 0
        # Each record stands for the steps since the record before it.
        sums = np.nancumsum(np.diff(iters, prepend=start - 1) * per_step)
        return np.interp(n, np.append(start, iters + 1), np.append(0, sums))


def main() -> None:
    prog = "python -m train.plot OUT_DIR [OUT_DIR ...]"
    config, paths = cli.parse_with_paths(PlotConfig, sys.argv[1:], prog)
    folders = [Path(path) for path in paths]
    if not folders:
        raise ValueError(f"give the out_dir of a run: {prog} [--x=tokens]; {runs_here()}")
    default = folders[0] / "loss.png" if len(folders) == 1 else "compare.png"
    picture = Path(config.out or default)
    draw(load_runs(folders), config.x).savefig(picture, dpi=120)
    print(picture)


def load_runs(folders: list[Path]) -> list[Run]:
    """Raises OSError, and ValueError for a run without records."""
    names = [folder.resolve().name for folder in folders]
    runs = []
    for folder, name in zip(folders, names):
        path = folder / "metrics.jsonl"
        if not path.exists():
            raise FileNotFoundError(f"{folder} holds no metrics.jsonl, so it is not a run; {runs_here()}")
        records = read(path)
        if not records:
            raise ValueError(f"{path} has no steps and no evaluations yet")
        label = name if names.count(name) == 1 else str(folder)
        # Python keeps the bytes of a name that is not UTF-8, which matplotlib cannot draw.
        label = os.fsencode(label).decode(errors="replace")
        steps = [r for r in records if "loss" in r]
        runs.append(Run(label, steps, [r for r in records if "val/loss" in r]))
    return runs


def draw(runs: list[Run], x: str = "step") -> Any:
    """A matplotlib Figure. The `gid` of a line is its field of metrics.jsonl, or "smoothed"."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator

    alone = len(runs) == 1
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(2, 1))
    top = figure.add_subplot(grid[0, :])
    panels = {
        "loss": top,
        "lr": figure.add_subplot(grid[1, 0], sharex=top, title="learning rate"),
        "grad_norm": figure.add_subplot(grid[1, 1], sharex=top, title="gradient norm", yscale="log"),
        "tokens_per_s": figure.add_subplot(grid[1, 2], sharex=top, title="tokens/s"),
    }
    farthest = max(run.progress(x, column(run.steps + run.evaluations, "iter")).max() for run in runs)
    scale, unit = [u for u in UNITS[x] if u[0] <= max(farthest, 1)][-1]
    for colour, run in zip(itertools.cycle(COLOURS), runs):
        steps_x = run.progress(x, column(run.steps, "iter")) / scale
        evaluations_x = run.progress(x, column(run.evaluations, "iter")) / scale
        is_smoothed = len(run.steps) >= SMOOTHED
        for field, axes in panels.items():
            alpha = 0.2 if field == "loss" and is_smoothed else 0.7
            axes.plot(steps_x, column(run.steps, field), color=colour, lw=0.8, alpha=alpha, gid=field)
        if is_smoothed:
            line = smoothed(column(run.steps, "loss"), len(run.steps) // 50)
            top.plot(steps_x, line, color=colour, lw=1.2, alpha=0.6, gid="smoothed")
        label = run.label
        if alone:
            top.lines[-1].set_label("training loss")
            top.plot(
                evaluations_x, column(run.evaluations, "train/loss"), "s", color=colour, mfc="white", ms=5,
                gid="train/loss", label="training loss, evaluated",
            )  # fmt: skip
            colour, label = COLOURS[1], "validation loss"
        values, label = column(run.evaluations, "val/loss"), label + lowest(run)
        top.plot(evaluations_x, values, "o-", color=colour, ms=4, lw=1.2, gid="val/loss", label=label)
    losses = [loss for run in runs for loss in settled_losses(run)]
    if margin := 0.05 * (max(losses, default=0) - min(losses, default=0)):
        top.set_ylim(min(losses) - margin, max(losses) + margin)
    top.set(ylabel="loss, nats per token", title=runs[0].label if alone else "")
    panels["grad_norm"].yaxis.set_major_formatter("{x:g}")
    panels["grad_norm"].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels["grad_norm"].yaxis.set_minor_formatter("")
    panels["tokens_per_s"].set_ylim(bottom=0)
    panels["tokens_per_s"].yaxis.set_major_formatter("{x:,.0f}")
    top.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))  # the small panels share it
    top.legend(loc="upper right")
    for axes in figure.axes:
        axes.set_xlabel(f"time of the steps, {unit}" if x == "time" else unit)
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def lowest(run: Run) -> str:
    """The lowest validation loss, for the legend."""
    evaluations = [r for r in run.evaluations if r["val/loss"] is not None]
    if not evaluations:
        return ""
    best = min(evaluations, key=lambda r: r["val/loss"])
    return f", lowest {best['val/loss']:.4f} at step {best['iter']:,}"


def settled_losses(run: Run) -> list[float]:
    """The losses after the first twentieth of a run, whose high losses would flatten the rest."""
    steps = run.steps[len(run.steps) // 20 :]
    losses = [r["loss"] for r in steps]
    losses += [r["val/loss"] for r in run.evaluations if not steps or r["iter"] >= steps[0]["iter"]]
    return [loss for loss in losses if loss is not None]


def smoothed(values: Column, width: int) -> Column:
    """The mean of the finite values among `width` neighbours on each side."""
    finite = np.isfinite(values)
    window = np.ones(2 * width + 1)
    sums = np.convolve(np.where(finite, values, 0), window)[width:-width]
    counts = np.convolve(finite, window)[width:-width]
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def column(records: Records, field: str) -> Column:
    return np.array([r[field] for r in records], np.float64)  # None becomes NaN, which matplotlib leaves out


if __name__ == "__main__":
    cli.run(main)
