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
NANOGPT_LABELS = {"parameters": "number of parameters:", "tokens per step": "tokens per iteration will be:"}
MAX_SILENCE = 5  # seconds without output after which an evaluation prints its progress
# After a signal a run stops at these moments, by what it is doing. Otherwise it stops after the step.
WHEN_IT_STOPS = {
    "starting": "once the run has begun",
    "compiling": "once the run has begun",
    "evaluating": "after this evaluation",
}


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
            self.print(f"{NANOGPT_LABELS.get(label, label)} {text}")

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
        if time.monotonic() - self.last_print > MAX_SILENCE:
            self.print(f"{self.doing}: {done:,} of {total:,} batches")

    def stopping(self, signal: str) -> None:
        """Called by a signal handler, perhaps inside a print: os.write works even then."""
        os.write(2, f"{self._answer(signal)}\n".encode())

    def _answer(self, signal: str) -> str:
        again = "; Ctrl-C again stops at once" if "RANK" not in os.environ else ""
        return f"{signal}: stopping {WHEN_IT_STOPS.get(self.doing, 'after this step')}{again}"

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
    """Progress bars, and the figures of the last logged step below them. All other text scrolls above."""

    says_if_slow = False

    def __init__(self) -> None:
        """Raises ImportError if the package rich is missing."""
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = Console(highlight=False)
        self.bars = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(None), TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(), console=self.console, expand=True,
        )  # fmt: skip
        self.figures: dict[str, str] = {}
        self.best = math.inf
        self.answer = ""
        self.live = Live(get_renderable=self._frame, console=self.console, vertical_overflow="crop")

    def print(self, text: str) -> None:
        self.console.out(text)

    def start(self, summary: dict[str, str], done: int, steps: int, best: float) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        for label, text in summary.items():
            table.add_row(label, Text(text))
        self.console.print(table, "")
        self.best, self.steps = best, steps
        self.run = self.bars.add_task("training", count="")
        self.advance(done)
        self.live.start()
        # rich hides the cursor. A process that is killed could not show it again.
        self.console.show_cursor(True)

    def advance(self, done: int) -> None:
        super().advance(done)
        self.bars.update(self.run, completed=done, total=self.steps, count=f"{done:,}/{self.steps:,}")

    @contextmanager
    def busy(self, doing: str) -> Iterator[None]:
        """A second bar. Without calls of `part` it only moves."""
        self.second = self.bars.add_task(doing, total=None, count="")
        try:
            with super().busy(doing):
                yield
        finally:
            self.bars.remove_task(self.second)

    def part(self, done: int, total: int) -> None:
        self.bars.update(self.second, completed=done, total=total, count=f"{done:,}/{total:,}")

    def stopping(self, signal: str) -> None:
        self.answer = self._answer(signal)
        if not self.live.is_started:
            super().stopping(signal)

    def step(self, record: dict[str, Any], left: float | None) -> None:
        figures = {
            "loss": f"{record['loss']:.4f}",
            "lr": f"{record['lr']:.2e}",
            "grad norm": f"{record['grad_norm']:.3f}",
            "tokens/s": f"{record['tokens_per_s']:,.0f}",
            "ms/step": f"{record['ms']:,.1f}",
            "memory": f"{record['memory_gb']:.1f} GB",
        }
        if record["mfu"] is not None:
            figures["MFU"] = f"{record['mfu']:.1f}%"
        if record["skipped"]:
            figures["skipped"] = f"{record['skipped']:,}"
        if left is not None:
            figures["left"] = f"about {_duration(left)}"
        self.figures = figures

    def evaluation(self, record: dict[str, Any]) -> None:
        self.best = min(self.best, record["val/loss"])  # with a NaN this keeps self.best
        super().evaluation(record)

    def close(self) -> None:
        if self.live.is_started:
            self.bars.update(self.run, description="done" if self.bars.tasks[0].finished else "stopped")
            self.figures = {label: value for label, value in self.figures.items() if label != "left"}
            self.answer = ""
            self.live.stop()

    def _frame(self) -> Any:
        from rich.columns import Columns
        from rich.console import Group
        from rich.constrain import Constrain
        from rich.text import Text

        best = {"best val": f"{self.best:.4f}"} if self.best < math.inf else {}
        cells = [Text.assemble((f"{label} ", "dim"), value) for label, value in (best | self.figures).items()]
        answer = [Text(self.answer, "yellow")] if self.answer else []
        frame = Group("", *self.bars.get_renderables(), *answer, Columns(cells, width=18))
        return Constrain(frame, self.console.width - 2)  # a terminal prints ^C behind the last line


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
