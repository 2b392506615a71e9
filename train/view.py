"""What a run shows: nanoGPT's lines in a pipe or a file, and a live view on a terminal."""

import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, TypeVar

from gpt import cli

Item = TypeVar("Item")

# nanoGPT's words for two lines of the summary.
NANOGPT = {"parameters": "number of parameters:", "tokens per step": "tokens per iteration will be:"}
PATIENCE = 5  # seconds without output after which a reader would wonder
STOPS = {"starting": "once the run has begun", "compiling": "once the run has begun"}
STOPS |= {"evaluating": "after this evaluation", "training": "after this step"}


class Lines:
    """Plain lines. Steps and evaluations arrive as the records of train/metrics.py."""

    estimated = False  # whether it has printed how long the run will take
    doing = "starting"
    says_if_slow = True
    last_print = math.inf

    def print(self, text: str) -> None:
        print(text, flush=True)
        self.last_print = time.monotonic()

    def start(self, summary: dict[str, str], done: int, steps: int, best: float) -> None:
        """Shows the summary. `done` of the `steps` were made before; `best` is the lowest validation loss."""
        for label, text in summary.items():
            self.print(f"{NANOGPT.get(label, label)} {text}")

    def advance(self, done: int) -> None:
        """Called after each step, with the number of steps so far."""
        self.doing = "training"

    @contextmanager
    def busy(self, doing: str) -> Iterator[None]:
        """Shown while something other than training runs."""
        before, self.doing = self.doing, doing
        with cli.IfSlow(doing, self.says_if_slow):
            yield
        self.doing = before

    def part(self, done: int, total: int) -> None:
        """The progress of what `busy` is doing."""
        if time.monotonic() - self.last_print > PATIENCE:
            self.print(f"{self.doing}: {done:,} of {total:,} batches")

    def stopping(self, signal: str) -> None:
        """Called by a signal handler, perhaps inside a print: os.write works even then."""
        os.write(2, f"{self._answer(signal)}\n".encode())

    def _answer(self, signal: str) -> str:
        again = "; Ctrl-C again stops at once" if "RANK" not in os.environ else ""
        return f"{signal}: stopping {STOPS.get(self.doing, 'after this step')}{again}"

    def step(self, record: dict[str, Any], left: float | None) -> None:
        """`left` estimates the seconds to the end of the run. It is None for the first steps."""
        mfu = "" if record["mfu"] is None else f", mfu {record['mfu']:.2f}%"
        self.print(f"iter {record['iter']}: loss {record['loss']:.4f}, time {record['ms']:.2f}ms{mfu}")
        if left is not None and not self.estimated:
            self.print(f"time left: about {_duration(left)}")
            self.estimated = True

    def evaluation(self, record: dict[str, Any]) -> None:
        losses = f"train loss {record['train/loss']:.4f}, val loss {record['val/loss']:.4f}"
        self.print(f"step {record['iter']}: {losses}")

    def close(self) -> None:
        """The live view stops. What is printed afterwards appears below it."""


class LiveView(Lines):
    """A view of the last logged step, redrawn in place. Everything else scrolls above it."""

    says_if_slow = False
    CELL = 18  # columns for a label and its figure
    GAP = 2

    def __init__(self) -> None:
        """Raises ImportError if the package rich is missing."""
        from rich.console import Console
        from rich.live import Live

        self.console = Console(highlight=False)
        self.done, self.steps = 0, 1
        self.parts: tuple[int, int] | None = None  # done and total of an evaluation
        self.answer = ""
        self.figures: dict[str, str] = {}
        self.best = math.inf
        self.started = time.monotonic()
        self.end: float | None = None  # expected end, on the same clock
        self.live = Live(get_renderable=self._frame, console=self.console, vertical_overflow="crop")

    def print(self, text: str) -> None:
        self.console.out(text)

    def start(self, summary: dict[str, str], done: int, steps: int, best: float) -> None:
        from rich.table import Table
        from rich.text import Text

        self.done, self.steps, self.best = done, steps, best
        table = Table.grid(padding=(0, self.GAP))
        table.add_column(style="dim")
        for label, text in summary.items():
            table.add_row(label, Text(text))
        self.console.print(table, "")
        self.started = time.monotonic()
        self.live.start()
        # rich hides the cursor. A process that is killed could not show it again.
        self.console.show_cursor(True)

    def advance(self, done: int) -> None:
        self.done, self.doing = done, "training"

    @contextmanager
    def busy(self, doing: str) -> Iterator[None]:
        with super().busy(doing):
            yield
        self.parts = None

    def part(self, done: int, total: int) -> None:
        self.parts = done, total

    def stopping(self, signal: str) -> None:
        self.answer = self._answer(signal)
        if not self.live.is_started:
            super().stopping(signal)

    def step(self, record: dict[str, Any], left: float | None) -> None:
        self.figures = {
            "loss": f"{record['loss']:.4f}",
            "best val": "",
            "lr": f"{record['lr']:.2e}",
            "grad norm": f"{record['grad_norm']:.3f}",
            "tokens/s": f"{record['tokens_per_s']:,.0f}",
            "ms/step": f"{record['ms']:,.1f}",
            "memory": f"{record['memory_gb']:.1f} GB",
        }
        if record["mfu"] is not None:
            self.figures["MFU"] = f"{record['mfu']:.1f}%"
        if record["skipped"]:
            self.figures["skipped"] = f"{record['skipped']:,}"
        self.end = None if left is None else time.monotonic() + left

    def evaluation(self, record: dict[str, Any]) -> None:
        self.best = min(self.best, record["val/loss"])  # with a NaN this keeps self.best
        super().evaluation(record)

    def close(self) -> None:
        self.doing = "done" if self.done >= self.steps else "stopped"
        self.live.stop()

    def _frame(self) -> Any:
        from rich.console import Group
        from rich.constrain import Constrain
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width = self.console.width - 2  # room for the ^C that a terminal prints behind the last line
        progress = Table.grid(padding=(0, self.GAP, 0, 0), expand=True)
        for ratio in (None, 1, None):
            progress.add_column(no_wrap=True, ratio=ratio)
        done, total = self.parts or (self.done, self.steps)
        bar = ProgressBar(total, done, complete_style="cyan", finished_style="green")
        progress.add_row(Text(self.doing, "bold"), bar, f"{done:,}/{total:,}")

        now = time.monotonic()
        figures = self.figures | {"elapsed": _duration(now - self.started)}
        if self.best < math.inf:
            figures["best val"] = f"{self.best:.4f}"
        if self.end is not None and self.doing not in ("done", "stopped"):
            figures["left"] = f"about {_duration(self.end - now)}"
        cells = [Text.assemble((f"{label} ", "dim"), value) for label, value in figures.items() if value]
        fit = max(1, (width + self.GAP) // (self.CELL + self.GAP))
        rows = -(-len(cells) // fit)
        per_row = -(-len(cells) // rows)
        table = Table.grid(padding=(0, self.GAP, 0, 0))
        for _ in range(per_row):
            table.add_column(min_width=self.CELL, no_wrap=True)
        for i in range(0, len(cells), per_row):
            table.add_row(*cells[i : i + per_row])
        answer = [Text(self.answer, "yellow")] if self.answer and self.doing != "stopped" else []
        return Constrain(Group("", progress, *answer, table), width)


@contextmanager
def open_view() -> Iterator[Lines]:
    """A live view if stdout is a terminal that supports one, else plain lines."""
    view = Lines()
    if sys.stdout.isatty():
        try:
            live = LiveView()
        except ImportError:
            pass
        else:
            view = live if live.console.is_interactive else view
    try:
        yield view
    finally:
        view.close()


def progress_bar(
    items: Iterable[Item], label: str, total: int, size: Callable[[Item], int] = lambda item: 1
) -> Iterator[Item]:
    """Yields the items, and shows a progress bar on stderr if it is a terminal and rich is installed."""
    if find_spec("rich") is None or not sys.stderr.isatty():
        yield from items
        return
    from rich import progress
    from rich.console import Console

    with progress.Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        for item in items:
            yield item
            bar.advance(task, size(item))


def _duration(seconds: float) -> str:
    """Such as 2d 4h or 1m 44s: the two largest units."""
    whole = max(0, round(seconds))
    for size, unit, part, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // part}{smaller}"
    return f"{whole}s"
