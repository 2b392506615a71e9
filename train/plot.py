"""python -m train.plot OUT_DIR [OUT_DIR ...] [--x=tokens]: a run as a picture, or several to be compared.

Loss, learning rate, gradient norm and throughput. One run goes to OUT_DIR/loss.png, several to compare.png.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gpt import cli
from gpt.checkpoint import runs_here
from gpt.cli import UserPath
from train.metrics import read

# Okabe and Ito's, which the colour-blind tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
UNITS = {
    "step": [(1.0, "step")],
    "tokens": [(1.0, "tokens"), (1e6, "tokens, millions"), (1e9, "tokens, billions")],
    "time": [(1.0, "s"), (60.0, "min"), (3600.0, "h"), (86400.0, "days")],
}
SMOOTHED = 100  # logged steps from which on a smooth line is drawn over that of the steps

Column = NDArray[np.float64]
Records = list[dict[str, Any]]


@dataclass
class PlotConfig:
    """Draw the metrics of runs: python -m train.plot OUT_DIR [OUT_DIR ...]"""

    x: Literal["step", "tokens", "time"] = "step"  # what goes to the right; time is that of the steps alone
    out: UserPath = ""  # the picture; OUT_DIR/loss.png, or compare.png where there are several runs


@dataclass
class Run:
    label: str
    steps: Records
    evaluations: Records

    def behind(self, x: str) -> Callable[[Column], Column]:
        """How much lies behind a run that has made n updates: steps, tokens, or seconds of its steps."""
        if x == "step" or not self.steps:
            return lambda n: n
        iters, ms = column(self.steps, "iter"), column(self.steps, "ms")
        made = np.diff(iters, prepend=-1)
        if x == "time":
            made[0] = 1  # what came before a record that begins later took nobody knows how long
            each = ms / 1000
        else:
            each = np.rint(column(self.steps, "tokens_per_s") * ms / 1000)
        known = np.concatenate([[iters[0] + 1 - made[0]], iters + 1])
        sums = np.concatenate([[0], np.nancumsum(made * each)])  # of a step without a figure nothing is known
        return lambda n: np.interp(n, known, sums) + np.maximum(0, n - known[-1]) * np.nan_to_num(each[-1])


def main() -> None:
    prog = "python -m train.plot OUT_DIR [OUT_DIR ...]"
    config, paths = cli.parse_with_paths(PlotConfig, sys.argv[1:], prog)
    folders = [Path(path) for path in paths]
    if not folders:
        raise ValueError(f"give the out_dir of a run: {prog} [--x=tokens]; {runs_here()}")
    default = folders[0] / "loss.png" if len(folders) == 1 else "compare.png"
    picture = Path(config.out or default)
    draw(load(folders), config.x).savefig(picture, dpi=120)
    print(picture)


def load(folders: list[Path]) -> list[Run]:
    """The runs, by the names of their folders. Raises OSError, ValueError for one without records."""
    # A locale without a character of the name leaves its bytes, which matplotlib cannot draw: it is UTF-8.
    names = [os.fsencode(folder.resolve().name).decode(errors="replace") for folder in folders]
    paths = [os.fsencode(folder).decode(errors="replace") for folder in folders]
    runs = []
    for folder, name, whole in zip(folders, names, paths):
        path = folder / "metrics.jsonl"
        if not path.exists():
            raise FileNotFoundError(f"{folder} holds no metrics.jsonl: no run was made there; {runs_here()}")
        records = read(path)
        if not records:
            raise ValueError(f"{path} holds no step and no evaluation yet")
        steps = [r for r in records if "loss" in r]
        evaluations = [r for r in records if "val/loss" in r]
        runs.append(Run(name if names.count(name) == 1 else whole, steps, evaluations))
    return runs


def draw(runs: list[Run], x: str = "step") -> Any:
    """A matplotlib Figure. The `gid` of a line is the field of metrics.jsonl it shows, or "smoothed"."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator

    figure = Figure(figsize=(10, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(2, 1))
    top = figure.add_subplot(grid[0, :])
    panels = {
        "lr": figure.add_subplot(grid[1, 0], sharex=top, title="learning rate"),
        "grad_norm": figure.add_subplot(grid[1, 1], sharex=top, title="gradient norm", yscale="log"),
        "tokens_per_s": figure.add_subplot(grid[1, 2], sharex=top, title="tokens/s"),
    }
    farthest = max(run.behind(x)(column(run.steps + run.evaluations, "iter")).max() for run in runs)
    scale, unit = [u for u in UNITS[x] if u[0] <= max(farthest, 1)][-1]
    for i, run in enumerate(runs):
        colour, dashes = COLOURS[i % len(COLOURS)], "-" if i < len(COLOURS) else "--"
        at = run.behind(x)(column(run.steps, "iter")) / scale
        evaluated = run.behind(x)(column(run.evaluations, "iter")) / scale
        loss = column(run.steps, "loss")
        alone, smooth = len(runs) == 1, len(loss) >= SMOOTHED
        faint = (0.25 if alone else 0.12) if smooth else 0.5
        named = "training loss" if alone else None
        top.plot(at, loss, color=colour, lw=0.7, alpha=faint, gid="loss", label=None if smooth else named)
        if smooth:
            line = smoothed(loss, len(loss) // 50)
            clear = 0.8 if alone else 0.4
            top.plot(at, line, color=colour, lw=1.2, alpha=clear, gid="smoothed", label=named)
        if alone:
            top.plot(
                evaluated, column(run.evaluations, "train/loss"), "s", color=colour, mfc="white", ms=5,
                gid="train/loss", label="training loss, evaluated",
            )  # fmt: skip
        top.plot(
            evaluated, column(run.evaluations, "val/loss"), f"o{dashes}", ms=4, lw=1.2,
            color=COLOURS[1] if alone else colour, gid="val/loss",
            label="validation loss" + best(run) if alone else run.label + best(run),
        )  # fmt: skip
        for field, axes in panels.items():
            axes.plot(at, column(run.steps, field), ls=dashes, color=colour, lw=0.9, alpha=0.8, gid=field)
    low, high = (pick(bounds) for pick, bounds in zip((min, max), zip(*map(shown, runs))))
    if low < high:
        top.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    top.set(ylabel="loss, nats a token", title=runs[0].label if len(runs) == 1 else "")
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


def best(run: Run) -> str:
    known = [r for r in run.evaluations if r["val/loss"] is not None]
    if not known:
        return ""
    lowest = min(known, key=lambda r: r["val/loss"])
    return f", lowest {lowest['val/loss']:.4f} at step {lowest['iter']:,}"


def shown(run: Run) -> tuple[float, float]:
    """The lowest and the highest loss after the first twentieth of a run, which would flatten the rest."""
    start = len(run.steps) // 20
    first = run.steps[start]["iter"] if start else 0
    losses = [r["loss"] for r in run.steps[start:]]
    losses += [r["val/loss"] for r in run.evaluations if r["iter"] >= first]
    known = [value for value in losses if value is not None]
    return min(known, default=np.inf), max(known, default=-np.inf)


def smoothed(values: Column, width: int) -> Column:
    """The mean over `width` neighbours on each side, fewer at the ends, of what is finite."""
    known = np.isfinite(values)
    window = np.ones(2 * width + 1)
    sums = np.convolve(np.where(known, values, 0), window)[width:-width]
    counts = np.convolve(known, window)[width:-width]
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def column(records: Records, field: str) -> Column:
    return np.array([r[field] for r in records], np.float64)  # None becomes NaN, which is not drawn


if __name__ == "__main__":
    cli.run(main)
