"""A run on a terminal, read off a screen; in a pipe, line by line; the records in metrics.jsonl and wandb."""

import io
import json
import re
import signal
import sys
import types
from pathlib import Path

import pytest
import torch

from gpt.model import GPT, GPTConfig
from tests.runs import TINY, run
from train import __main__ as program
from train import distributed, metrics
from train.checkpoint import Progress
from train.config import parse
from train.view import Lines, LiveView, open_view


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def screen(self):
        """The lines that a terminal ends with, and whether it shows its cursor. Knows rich's codes."""
        lines, row, column, cursor = [""], 0, 0, True
        for code, final, plain in re.findall(r"\x1b\[([\d;?]*)([A-Za-z])|([^\x1b])", self.getvalue()):
            if plain in ("\n", "\r"):
                row, column = row + (plain == "\n"), 0
                lines += [""] * (row + 1 - len(lines))
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
    """Makes stdout a terminal of so many columns."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("LINES", "50")

    def start(columns):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "stdout", terminal := Terminal())
        return terminal

    return start


@pytest.fixture
def train(monkeypatch):
    """python -m train; a signal's handler is that of before afterwards."""
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    }

    def train(*flags):
        monkeypatch.setattr(sys, "argv", ["train", *TINY, "--out_dir=out", *flags])
        program.main()

    yield train
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("columns", [40, 120])
def test_the_view_ends_with_the_figures_of_the_record_and_the_rest_stands_above(
    workplace, terminal, train, columns
):
    stdout = terminal(columns)
    train("--eval_sample=5")
    assert sys.stdout is stdout
    lines, cursor = stdout.screen()
    records = metrics.read(Path("out/metrics.jsonl"))
    last = [r for r in records if "loss" in r][-1]
    best = min(r["val/loss"] for r in records if "val/loss" in r)
    start = max(i for i, line in enumerate(lines) if line.startswith("done"))
    end = next(i for i, line in enumerate(lines) if line.startswith("the run is done"))
    above, view = lines[:start], "  ".join(lines[start:end])
    for figure in (
        "8/8", f"loss {last['loss']:.4f}", f"best val {best:.4f}", f"lr {last['lr']:.2e}",
        f"grad norm {last['grad_norm']:.3f}", f"tokens/s {last['tokens_per_s']:,.0f}",
        f"ms a step {last['ms']:,.1f}", f"memory {last['memory_gb']:.1f} GB", "elapsed ",
    ):  # fmt: skip
        assert figure in view, (figure, view)
    assert "left" not in view and "MFU" not in view and "skipped" not in view
    evaluations = [line.split(":")[0] for line in above if re.match(r"step \d: train loss", line)]
    assert evaluations == ["step 0", "step 4", "step 8"]
    assert not any(line.startswith(("iter", "training", "evaluating", "starting")) for line in lines)
    assert above[0].startswith("parameters") and "Chinchilla" in " ".join(above)
    # Nothing of the view is wider than the terminal; what scrolls by is for the terminal to wrap.
    assert all(len(line) <= columns - 2 for line in lines[start:end])
    assert cursor


def test_a_frame_shows_what_goes_on_and_when_it_will_end(terminal):
    stdout = terminal(80)
    record = dict(
        iter=5, loss=2.5, lr=1e-3, grad_norm=0.5, skipped=3, ms=1234.5, tokens_per_s=9e6, mfu=41.23,
        memory_gb=7.0,
    )  # fmt: skip
    with open_view() as view:
        view.start({"parameters": "1M"}, 5, 1000, 2.25)
        assert stdout.screen()[1], "a process that is killed cannot give the cursor back"
        view.advance(6)
        view.step(record, 3725.0)
        with view.busy("evaluating"):
            view.evaluation({"iter": 6, "train/loss": 2.0, "val/loss": float("nan")})
            view.print("[bold]as it is[/bold] :smile:\n  two lines")
            print("a warning", file=sys.stderr)
            frame = "".join(segment.text for segment in view.console.render(view._frame()))
        assert "training" in "".join(segment.text for segment in view.console.render(view._frame()))
    lines, _ = stdout.screen()
    assert "evaluating" in frame and "6/1,000" in frame and "left about 1h 2m" in frame
    for figure in ("MFU 41.2%", "skipped 3", "tokens/s 9,000,000", "ms a step 1,234.5", "best val 2.2500"):
        assert figure in frame, figure
    end = lines.index("a warning")
    losses = "step 6: train loss 2.0000, val loss nan"
    assert lines[end - 3 : end] == [losses, "[bold]as it is[/bold] :smile:", "  two lines"]
    assert lines[end + 2].startswith("stopped") and "left" not in " ".join(lines[end:])


def test_an_error_leaves_the_terminal_as_it_was(workplace, terminal, train, monkeypatch):
    def fails_at_3(view, record, left, step=LiveView.step):
        step(view, record, left)
        if record["iter"] == 3:
            raise ValueError("a disk is full")

    monkeypatch.setattr(LiveView, "step", fails_at_3)
    stdout = terminal(80)
    with pytest.raises(ValueError, match="a disk is full"):
        train()
    assert sys.stdout is stdout
    print("error: a disk is full")
    lines, cursor = stdout.screen()
    assert cursor and lines[-2:] == ["error: a disk is full", ""]
    assert any(line.startswith("stopped") and line.endswith("4/8") for line in lines)


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


def log_of(config, ranks, view):
    Path("out").mkdir()
    return metrics.Metrics(config, ranks, GPT(GPTConfig(16, 21, 1, 1, 4)), view, Progress(), {})


def test_only_rank_0_prints_and_writes(workplace, capsys):
    log = log_of(parse(TINY)[0], distributed.Ranks(1, 2, "cpu", None), Lines())
    log.start(100, 10)
    log.print("a line")
    log.step(0, torch.tensor(1.0), torch.tensor(1.0), 1e-3)
    log.evaluation(0, {"train": 1.0, "val": 1.0}, 1e-3)
    log.stop(1, "SIGTERM")
    log.close()
    assert capsys.readouterr().out == "" and not list(Path("out").iterdir())


def test_the_time_left_is_that_of_the_steps_and_of_the_evaluations(workplace):
    config = parse([*TINY, "--max_iters=100", "--eval_interval=30", "--compile=False"])[0]
    log = log_of(config, distributed.Ranks(0, 1, "cpu", None), Lines())
    assert log._seconds_left(40) is None, "nothing is measured yet"
    log.seconds, log.pauses = 2.0, {"evaluating": [10.0], "profiling": [77.0]}
    for done in (1, 30, 31, 89, 90, 91, 99):
        evaluations = sum(step % 30 == 0 for step in range(done, 100)) + 1
        assert log._seconds_left(done) == (100 - done) * 2.0 + evaluations * 10.0, done
    log.config.compile = True  # the first evaluation was spent on compiling
    assert log._seconds_left(40) == 60 * 2.0
    log.close()


def test_every_line_in_a_pipe(workplace, capsys):
    run()
    step, number = r"iter {}: loss \d\.\d{{4}}, time \d+\.\d\dms", r"[\d,]+"
    evaluation = r"step {}: train loss \d\.\d{{4}}, val loss \d\.\d{{4}}"
    expected = [
        r"number of parameters: 0\.03M \(2 layers, 2 heads, 32 wide, block 16, 21 symbols\)",
        r"tokens per iteration will be: 128 \(389 steps = one epoch\)",
        rf"data tiny: 49,801 tokens to train on, {number} to validate",
        r"run 8 steps, 1,024 tokens: 0\.02 epochs, 0\.0 tokens per parameter \(Chinchilla-optimal: 20\)",
        r"cost 1\.65e\+05 FLOPs a token, 1\.69e\+08 in the run",
        "device cpu x 1, dtype float32, compile False, kernels torch",
        evaluation.format(0),
        *(step.format(i) for i in range(4)),
        evaluation.format(4),
        *(step.format(i) for i in (4, 5)),
        r"time left: about \ds, by the time of the first steps",
        *(step.format(i) for i in (6, 7)),
        evaluation.format(8),
        r"the run is done: out/ckpt.pt has made 8 steps, lowest validation loss \d\.\d{4}",
        r"  sample from it  \S*python -m gpt\.sample out",
        r"  train further   \S*python -m train out/config\.py .* --max_iters=16 --lr_decay_iters=16",
    ]
    for line, pattern in zip(capsys.readouterr().out.splitlines(), expected, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)


# ---- metrics.jsonl


def objects():
    return [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]


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
    starts = [(r["iter"], r["evaluated"]) for r in objects() if r.get("event") == "start"]
    assert starts == [(0, False), (4, True)]
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no memory"):
        patch.setattr(Lines, "busy", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
        run("--init_from=resume", "--max_iters=12")
    assert metrics.read(Path("out/metrics.jsonl")) == records, "a run that made nothing replaces nothing"
    for path in Path("out").glob("*.pt"):  # a new run wants a folder without checkpoints
        path.unlink()
    run("--max_iters=2")
    assert [r["iter"] for r in metrics.read(Path("out/metrics.jsonl"))] == [0, 0, 1, 2], "a new run"


def test_a_start_records_what_was_resolved_and_a_stop_why(workplace, train, monkeypatch):
    def stop_at_1(view, record, left):
        if record["iter"] == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Lines, "step", stop_at_1)
    train("--grad_clip=inf")
    start, *_, last_step, stop = objects()
    assert (start["event"], stop["event"], stop["reason"]) == ("start", "stop", "stopped by SIGTERM")
    assert stop["iter"] == last_step["iter"] + 1 < 8
    config = start["config"]
    assert (config["device"], config["dtype"], config["compile"]) == ("cpu", "float32", False)
    assert (config["kernels"], config["vocab_size"], config["n_embd"]) == ("torch", 21, 32)
    assert config["grad_clip"] is None, "JSON has no name for it"
    matrices = 2 * 12 * 32 * 32 + 21 * 32  # two blocks, the embedding; then their norms and the last
    assert start["parameters"] == matrices + 5 * 32
    assert start["flops_per_token"] == 6 * start["parameters"] + 12 * 2 * 32 * 16
    assert (start["tokens_per_step"], start["train_tokens"], start["ranks"]) == (128, 49801, 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", stop["time"])
    assert 0.05 < last_step["memory_gb"] < 100  # PyTorch alone takes the first


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
    monkeypatch.setitem(sys.modules, "wandb", wandb := StandIn())
    monkeypatch.setattr(GPT, "estimate_mfu", lambda *a: 0.25)
    run("--wandb_log=True", "--wandb_project=p", "--wandb_run_name=r")
    [started] = wandb.started
    assert (started["project"], started["name"], started["config"]["n_embd"]) == ("p", "r", 32)
    assert "mode" not in started and wandb.finished
    keys = {"iter", "train/loss", "val/loss", "lr"}
    assert [values.keys() for values in wandb.logged] == [keys, keys, keys | {"mfu"}]
    assert wandb.logged[2]["mfu"] == pytest.approx(25.0)
    records = metrics.read(Path("out/metrics.jsonl"))
    assert [r["mfu"] for r in records if "loss" in r][-1] == pytest.approx(25.0)
    evaluations = [r for r in records if "val/loss" in r]
    assert [{k: v for k, v in values.items() if k != "mfu"} for values in wandb.logged] == evaluations


def test_wandb_without_a_key_logs_offline_and_says_how_to_sync(workplace, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", wandb := StandIn("No API key configured. Use `wandb login`."))
    run("--wandb_log=True", "--max_iters=2")
    assert wandb.started[0]["mode"] == "offline" and len(wandb.logged) == 2
    out = capsys.readouterr().out
    assert "wandb knows no API key and logs to the disk; later: wandb sync /runs/wandb/offline-run-1" in out


def test_wandb_that_cannot_start_is_one_sentence(workplace, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", StandIn("project 'p/q' holds a slash"))
    with pytest.raises(ValueError, match=r"wandb did not start \(project 'p/q' .*WANDB_MODE=offline"):
        run("--wandb_log=True")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="needs the package wandb"):
        run("--wandb_log=True")
