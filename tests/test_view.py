"""A run on a terminal, read off a screen; in a pipe, line by line; what metrics.jsonl and wandb are told."""

import io
import json
import os
import re
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

from tests.runs import TINY, run
from train import distributed, loop, metrics
from train.checkpoint import Progress
from train.config import parse
from train.view import Lines, LiveView, open_view


def screen(text):
    """The lines that a terminal ends with, and whether it shows its cursor. Knows what rich makes use of."""
    lines, row, column, cursor = [""], 0, 0, True
    for code, final, plain in re.findall(r"\x1b\[([\d;?]*)([A-Za-z])|([^\x1b])", text):
        if plain == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif plain == "\r":
            column = 0
        elif plain:
            lines[row] = lines[row].ljust(column)[:column] + plain + lines[row][column + 1 :]
            column += 1
        elif final == "A":
            row -= int(code)
        elif final == "K":
            lines[row] = ""
        elif code == "?25":
            cursor = final == "h"
        else:
            assert final == "m", (code, final)
    return [line.rstrip() for line in lines], cursor


@pytest.fixture
def terminal(monkeypatch):
    """Makes stdout a terminal of so many columns; returns what reads the screen."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    master, slave = os.openpty()
    received = bytearray()

    def drain():
        while True:
            try:
                received.extend(os.read(master, 65536))
            except OSError:  # the other end is closed
                return

    reader = threading.Thread(target=drain, daemon=True)

    def start(columns):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", "50")
        monkeypatch.setattr(sys, "stdout", os.fdopen(slave, "w"))
        reader.start()

        def read():
            sys.stdout.close()
            reader.join(10)
            return screen(received.decode())

        return read

    yield start
    os.close(master)


def train(*flags, out_dir="out"):
    """As main() does it."""
    config, given = parse([*TINY, f"--out_dir={out_dir}", *flags])
    with open_view() as view:
        loop.train(config, distributed.start("auto", "cpu"), given, view=view)
    return view


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_the_view_ends_with_the_figures_of_the_record_and_the_rest_stands_above(workplace, terminal, columns):
    read = terminal(columns)
    before = sys.stdout
    train("--eval_sample=5")
    assert sys.stdout is before
    lines, cursor = read()
    records = metrics.read(Path("out/metrics.jsonl"))
    last = [r for r in records if "loss" in r][-1]
    best = min(r["val/loss"] for r in records if "val/loss" in r)
    start = max(i for i, line in enumerate(lines) if line.startswith("done"))
    view = "  ".join(lines[start:])
    for figure in (
        "8/8", f"loss {last['loss']:.4f}", f"best val {best:.4f}", f"lr {last['lr']:.2e}",
        f"grad norm {last['grad_norm']:.3f}", f"tokens/s {last['tokens_per_s']:,.0f}",
        f"ms a step {last['ms']:,.1f}", f"memory {last['memory_gb']:.1f} GB", "elapsed ",
    ):  # fmt: skip
        assert figure in view, (figure, view)
    assert "left" not in view and "MFU" not in view and "skipped" not in view
    above = lines[:start]
    evaluations = [line for line in above if re.match(r"step \d: train loss", line)]
    assert [line.split(":")[0] for line in evaluations] == ["step 0", "step 4", "step 8"]
    assert not any(line.startswith(("iter", "training", "evaluating", "starting")) for line in lines)
    assert above[0].startswith("parameters") and "Chinchilla" in " ".join(above)
    # Nothing of the view is wider than the terminal; what scrolls by is for the terminal to wrap.
    assert all(len(line) <= columns - 2 for line in lines[start:])
    assert cursor


RECORD = dict(
    iter=5, loss=2.5, lr=1e-3, grad_norm=0.5, skipped=3, ms=1234.5, tokens_per_s=9e6, mfu=41.23, memory_gb=7.0
)  # fmt: skip


def test_a_frame_says_what_goes_on_and_when_it_will_end(terminal):
    read = terminal(80)
    with open_view() as view:
        view.start({"parameters": "1M"}, 5, 1000, 2.25)
        view.advance(6)
        view.step(RECORD, 3725.0)
        with view.busy("evaluating"):
            view.evaluation({"iter": 6, "train/loss": 2.0, "val/loss": float("nan")})
            view.print("[bold]as it is[/bold] :smile:\n  two lines")
            print("a warning", file=sys.stderr)
            frame = "".join(segment.text for segment in view.console.render(view._frame()))
    lines, _ = read()
    assert "evaluating" in frame and "6/1,000" in frame and "left about 1h 2m" in frame
    for figure in ("MFU 41.2%", "skipped 3", "tokens/s 9,000,000", "ms a step 1,234.5", "best val 2.2500"):
        assert figure in frame, figure
    end = lines.index("a warning")
    assert lines[end - 3 : end] == [
        "step 6: train loss 2.0000, val loss nan",
        "[bold]as it is[/bold] :smile:",
        "  two lines",
    ]
    assert lines[end + 2].startswith("stopped") and "left" not in " ".join(lines[end:])


def test_an_error_leaves_the_terminal_as_it_was(workplace, terminal, monkeypatch):
    train_step, calls = loop.train_step, []

    def fails(*args):
        calls.append(args)
        if len(calls) == 4:
            raise ValueError("a disk is full")
        return train_step(*args)

    monkeypatch.setattr(loop, "train_step", fails)
    read = terminal(80)
    before, threads = sys.stdout, threading.active_count()
    with pytest.raises(ValueError, match="a disk is full"):
        train()
    assert sys.stdout is before
    print("error: a disk is full")
    lines, cursor = read()
    assert cursor and lines[-2:] == ["error: a disk is full", ""]
    assert any(line.startswith("stopped") and line.endswith("3/8") for line in lines)
    assert threading.active_count() <= threads


def test_the_cursor_is_there_while_training_so_that_a_kill_cannot_take_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    view = LiveView()
    view.start({}, 0, 10, float("inf"))
    view.live.refresh()
    lines, cursor = screen(out.getvalue())
    view.close()
    assert cursor and any(line.startswith("starting") for line in lines)


@pytest.mark.parametrize("lacking", ["rich", "terminal", "interaction"])
def test_lines_where_no_view_can_be_had(terminal, monkeypatch, lacking):
    if lacking == "rich":
        monkeypatch.setitem(sys.modules, "rich.console", None)
    if lacking == "interaction":
        monkeypatch.setenv("TERM", "dumb")
    if lacking != "terminal":
        terminal(80)
    with open_view() as view:
        assert type(view) is Lines


def test_ranks_but_the_first_are_silent_also_on_a_terminal(workplace, terminal):
    read = terminal(80)
    config, _ = parse(TINY)
    Path("out").mkdir()
    model = loop.GPT(config.model.__class__(n_layer=1, n_head=1, n_embd=4, block_size=16, vocab_size=21))
    with open_view() as view:
        log = metrics.Metrics(config, distributed.Ranks(1, 2, "cpu", None), model, view, Progress(), {})
        log.start(100, 10)
        log.step(0, torch.tensor(1.0), torch.tensor(1.0), 1e-3)
        log.evaluation(0, {"train": 1.0, "val": 1.0}, 1e-3)
        log.stop(1, "SIGTERM")
        log.close()
    assert read()[0] == [""] and not list(Path("out").iterdir())


# ---- in a pipe


def test_every_line_in_a_pipe(workplace, capsys):
    run()
    step, number = r"iter {}: loss \d\.\d{{4}}, time \d+\.\d\dms", r"[\d,]+"
    evaluation = r"step {}: train loss \d\.\d{{4}}, val loss \d\.\d{{4}}"
    expected = [
        r"number of parameters: 0\.03M \(2 layers, 2 heads, 32 wide, block 16, 21 symbols\)",
        r"tokens per iteration will be: 128 \(1/389\.1 of the data\)",
        rf"data tiny: 49,801 tokens to train on, {number} to validate",
        rf"run 8 steps, 1,024 tokens: 0\.02 epochs, 0\.0 a parameter \(Chinchilla: 20, or {number} tokens\)",
        r"cost 1\.65e\+05 FLOPs a token, 1\.69e\+08 in the run",
        "device cpu x 1, dtype float32, compile False, kernels torch",
        evaluation.format(0),
        *(step.format(i) for i in range(4)),
        evaluation.format(4),
        *(step.format(i) for i in (4, 5)),
        r"time left: about \ds, by the time of the first steps",
        *(step.format(i) for i in (6, 7)),
        evaluation.format(8),
    ]
    lines = capsys.readouterr().out.splitlines()
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)


def test_the_time_left_is_that_of_the_steps_and_of_the_evaluations(workplace):
    config, _ = parse([*TINY, "--max_iters=100", "--eval_interval=30", "--compile=False"])
    Path("out").mkdir()
    model = loop.GPT(config.model.__class__(n_layer=1, n_head=1, n_embd=4, block_size=16, vocab_size=21))
    log = metrics.Metrics(config, distributed.Ranks(0, 1, "cpu", None), model, Lines(), Progress(), {})
    assert log._seconds_left(40) is None, "nothing is measured yet"
    log.seconds, log.pauses = 2.0, {"evaluating": [10.0], "profiling": [77.0]}
    for done in (1, 30, 31, 89, 90, 91, 99):
        evaluations = sum(step % 30 == 0 for step in range(done, 100)) + 1
        assert log._seconds_left(done) == (100 - done) * 2.0 + evaluations * 10.0, done
    log.config.compile = True  # the first evaluation was spent on compiling
    assert log._seconds_left(40) == 60 * 2.0
    log.close()


# ---- metrics.jsonl


def objects(out_dir="out"):
    return [json.loads(line) for line in Path(out_dir, "metrics.jsonl").read_text().splitlines()]


def test_metrics_only_grow_and_what_was_replaced_is_not_read(workplace, monkeypatch):
    run("--max_iters=4")
    with open("out/metrics.jsonl", "a") as f:  # steps that a crash has taken from the checkpoint
        f.write('{"iter": 4, "loss": 1.0}\n')
    before = Path("out/metrics.jsonl").read_bytes()
    with open("out/metrics.jsonl", "a") as f:
        f.write('{"iter": 5, "lo')
    run("--init_from=resume")
    assert Path("out/metrics.jsonl").read_bytes().startswith(before)
    records = metrics.read(Path("out/metrics.jsonl"))
    assert [r["iter"] for r in records if "loss" in r] == list(range(8))
    assert all(r["loss"] != 1.0 for r in records if "loss" in r)
    assert [r["iter"] for r in records if "val/loss" in r] == [0, 4, 8]
    events = [r for r in objects() if "event" in r]
    assert [(e["event"], e["iter"], e["evaluated"]) for e in events] == [
        ("start", 0, False),
        ("start", 4, True),
    ]
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="allocate"):
        patch.setattr(distributed, "first_pass", lambda *_: torch.empty(1 << 60, dtype=torch.int8))
        run("--init_from=resume", "--max_iters=12")
    assert metrics.read(Path("out/metrics.jsonl")) == records, "a run that made nothing replaces nothing"
    for path in Path("out").glob("*.pt"):  # a new run wants a folder without checkpoints
        path.unlink()
    run("--max_iters=2")
    assert [r["iter"] for r in metrics.read(Path("out/metrics.jsonl"))] == [0, 0, 1, 2], "a new run"


def test_a_start_tells_what_was_resolved_and_a_stop_why(workplace):
    class AfterTwo:
        asked = 0

        @property
        def received(self):
            self.asked += 1
            return "SIGTERM" if self.asked > 2 else None

    config, given = parse([*TINY, "--grad_clip=inf"])
    loop.train(config, distributed.start("auto", "cpu"), given, AfterTwo())
    start, *_, stop = objects()
    assert (start["event"], stop["event"], stop["iter"]) == ("start", "stop", 2)
    assert stop["reason"] == "stopped by SIGTERM"
    config = start["config"]
    assert (config["device"], config["dtype"], config["compile"]) == ("cpu", "float32", False)
    assert (config["kernels"], config["vocab_size"], config["n_embd"]) == ("torch", 21, 32)
    assert config["grad_clip"] is None, "JSON has no name for it"
    matrices = 2 * 12 * 32 * 32 + 21 * 32  # two blocks, the embedding; then their norms and the last
    assert start["parameters"] == matrices + 5 * 32
    assert start["flops_per_token"] == 6 * start["parameters"] + 12 * 2 * 32 * 16
    assert (start["tokens_per_step"], start["train_tokens"], start["ranks"]) == (128, 49801, 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", stop["time"])
    assert 0.05 < objects()[-2]["memory_gb"] < 100  # PyTorch alone takes the first


# ---- wandb


class StandIn(types.ModuleType):
    """As much of wandb as is used: without a key it refuses to start unless told to stay offline."""

    class Error(Exception):
        pass

    def __init__(self, refusal=None):
        super().__init__("wandb")
        self.refusal, self.started, self.logged, self.finished = refusal, [], [], False

    def init(self, **options):
        if self.refusal and options.get("mode") != "offline":
            raise self.Error(self.refusal)
        self.started.append(options)
        return types.SimpleNamespace(dir="/runs/wandb/offline-run-1/files")

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished = True


def test_wandb_gets_nanogpts_keys_at_evaluations(workplace, monkeypatch):
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(loop.GPT, "estimate_mfu", lambda *a: 0.25)
    run("--wandb_log=True", "--wandb_project=p", "--wandb_run_name=r")
    [started] = wandb.started
    assert (started["project"], started["name"], started["config"]["n_embd"]) == ("p", "r", 32)
    assert "mode" not in started and wandb.finished
    nanogpts = {"iter", "train/loss", "val/loss", "lr"}
    assert [values.keys() for values in wandb.logged] == [nanogpts, nanogpts, nanogpts | {"mfu"}]
    assert wandb.logged[2]["mfu"] == pytest.approx(25.0)
    records = [r for r in metrics.read(Path("out/metrics.jsonl")) if "val/loss" in r]
    assert [{k: v for k, v in values.items() if k != "mfu"} for values in wandb.logged] == records


def test_wandb_without_a_key_and_anybody_to_ask_logs_offline_and_says_how_to_sync(
    workplace, monkeypatch, capsys
):
    wandb = StandIn("No API key configured. Use `wandb login` to log in.")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run("--wandb_log=True")
    assert wandb.started[0]["mode"] == "offline" and len(wandb.logged) == 3
    said = capsys.readouterr().out
    assert "wandb knows no API key and logs to the disk; later: wandb sync /runs/wandb/offline-run-1" in said


def test_wandb_that_cannot_start_is_one_sentence(workplace, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", StandIn("project 'p/q' holds a slash"))
    with pytest.raises(ValueError, match=r"wandb did not start \(project 'p/q' .*WANDB_MODE=offline"):
        run("--wandb_log=True")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="needs the package wandb"):
        run("--wandb_log=True")
