"""Logging: the live view, lines in a pipe, metrics.jsonl, wandb."""

import io
import json
import re
import sys
import types
from pathlib import Path
from unittest import mock

import pytest

from gpt.model import GPT, GPTConfig
from tests.runs import TINY, run
from train import distributed, metrics
from train.checkpoint import Progress
from train.config import parse
from train.loop import train
from train.view import Lines, open_view, progress_bar


@pytest.fixture
def terminal(monkeypatch):
    """A function that makes stdout a terminal of so many columns. It returns a function for its lines."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("LINES", "50")

    def start(columns):
        stdout = io.StringIO()
        stdout.isatty = lambda: True
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "stdout", stdout)
        return lambda: re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", stdout.getvalue()).splitlines()

    return start


def records(out_dir="out"):
    return metrics.read(Path(out_dir, "metrics.jsonl"))


def test_evaluations_scroll_above_the_live_view(workplace, terminal):
    screen, stdout = terminal(120), sys.stdout
    config, given = parse(TINY)
    with open_view() as view:
        train(config, distributed.start("auto", "cpu"), given, view=view)
    assert sys.stdout is stdout
    start = max(i for i, line in enumerate(screen()) if line.startswith("done"))
    above, end = screen()[:start], "  ".join(screen()[start:])
    evaluations = [line.split(":")[0] for line in above if re.match(r"step \d: train loss", line)]
    assert evaluations == ["step 0", "step 4", "step 8"]
    last = [r for r in records() if "loss" in r][-1]
    assert re.search(r"8/8 0:00:\d\d", end) and f"loss {last['loss']:.4f}" in end
    assert "left" not in end and "MFU" not in end and "skipped" not in end


@pytest.mark.parametrize("columns", [40, 120])
def test_the_live_view_fits_the_screen_and_shows_the_run_the_evaluation_and_the_last_step(terminal, columns):
    screen = terminal(columns)
    record = dict(
        iter=5, loss=2.5, lr=1e-3, grad_norm=0.5, skipped=3, ms=1234.5, tokens_per_s=9e6, mfu=41.23,
        memory_gb=7.0,
    )  # fmt: skip

    def frame(view):
        return "".join(segment.text for segment in view.console.render(view._frame()))

    with pytest.raises(KeyError), open_view() as view:
        view.start({"parameters": "1M"}, 5, 1000, 2.25)
        assert sys.stdout.getvalue().rindex("\x1b[?25h") > sys.stdout.getvalue().rindex("\x1b[?25l"), (
            "a process that is killed cannot give the cursor back"
        )
        view.advance(6)
        with view.busy("evaluating"):
            view.evaluation({"iter": 6, "train/loss": 2.0, "val/loss": float("nan")})
            view.step(record, 3725.0)
            view.print("[bold]as it is[/bold] :smile:")
            view.part(3, 40)
            view.stopping("SIGINT")
            during = frame(view)
            raise KeyError("an error ends the view too")
    assert max(map(len, during.splitlines())) <= columns - 2
    for figure in (
        "training", "6/1,000", "evaluating", "3/40", "SIGINT: stopping after this", "left about 1h 2m",
        "loss 2.5000", "best val 2.2500", "lr 1.00e-03", "grad norm 0.500", "skipped 3", "tokens/s 9,000,000",
        "ms/step 1,234.5", "MFU 41.2%", "7.0 GB",
    ):  # fmt: skip
        assert figure in during, figure
    assert "[bold]as it is[/bold] :smile:" in screen()
    end = "".join(screen()[-6:])
    assert "stopped" in end and "6/1,000" in end
    assert not any(word in end for word in ("left", "evaluating", "SIGINT"))


@pytest.mark.parametrize("lacking", ["rich", "terminal", "interaction"])
def test_without_rich_or_a_terminal_a_run_prints_plain_lines(terminal, monkeypatch, lacking):
    if lacking == "rich":
        monkeypatch.setitem(sys.modules, "rich.console", None)
    if lacking == "interaction":
        monkeypatch.setenv("TERM", "dumb")
    if lacking != "terminal":
        terminal(80)
    with open_view() as view:
        assert type(view) is Lines


@pytest.mark.parametrize("has_rich", [True, False])
def test_a_progress_bar_yields_the_items_even_without_rich(monkeypatch, has_rich):
    stderr = io.StringIO()
    stderr.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stderr)
    if not has_rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    assert list(progress_bar(iter("abc"), "letters", 3)) == ["a", "b", "c"]
    assert ("letters" in stderr.getvalue()) == has_rich


def test_the_time_left_counts_steps_and_evaluations(workplace):
    Path("out").mkdir()
    config = parse([*TINY, "--max_iters=100", "--eval_interval=30", "--compile=False"])[0]
    ranks, model = distributed.Ranks(0, 1, "cpu", None), GPT(GPTConfig(16, 21, 1, 1, 4))
    log = metrics.Metrics(config, ranks, model, Lines(), Progress())
    assert log._seconds_left(40) is None, "no step has been timed yet"
    log.seconds, log.pauses = 2.0, {"evaluating": [10.0], "profiling": [77.0]}
    for done in (1, 30, 31, 90, 91, 99):
        evaluations = sum(step % 30 == 0 for step in range(done, 100)) + 1
        assert log._seconds_left(done) == (100 - done) * 2.0 + evaluations * 10.0, done
    log.config.compile = True  # the first evaluation includes compiling
    assert log._seconds_left(40) == 60 * 2.0
    log.close()


def test_the_lines_in_a_pipe_are_nanogpts_with_a_summary(workplace, monkeypatch, capsys):
    monkeypatch.setattr(GPT, "estimate_mfu", lambda self, sequences, *_: 0.25 * sequences / 8)
    run()
    step, number = r"iter {}: loss \d\.\d{{4}}, time \d+\.\d\dms", r"[\d,]+"
    evaluation = r"step {}: train loss \d\.\d{{4}}, val loss \d\.\d{{4}}"
    expected = [
        r"number of parameters: 0\.03M \(2 layers, 2 heads, 32 wide, block 16, 21 symbols\)",
        r"tokens per iteration will be: 128 \(389 steps = one epoch\)",
        rf"data tiny: 49,801 tokens to train on, {number} to validate",
        r"run 8 steps, 1,024 tokens: 0\.02 epochs, 0\.0 tokens per parameter \(Chinchilla-optimal: 20\)",
        r"cost 1\.65e\+05 FLOPs per token, 1\.69e\+08 in the run",
        "device cpu x 1, dtype float32, compile False, kernels torch",
        evaluation.format(0),
        *(step.format(i) for i in range(4)),
        evaluation.format(4),
        step.format(4),
        step.format(5) + r", mfu 25\.00%",
        r"time left: about \ds",
        *(step.format(i) + r", mfu 25\.00%" for i in (6, 7)),
        evaluation.format(8),
        r"finished after 8 steps: out/ckpt.pt, lowest validation loss \d\.\d{4}",
        r"  sample from it  \S*python -m gpt\.sample out",
        r"  train further   \S*python -m train out/config\.py .* --max_iters=16 --lr_decay_iters=16",
    ]
    for line, pattern in zip(capsys.readouterr().out.splitlines(), expected, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)


# ---- metrics.jsonl


def test_metrics_jsonl_only_grows_and_repeated_steps_are_read_once(workplace):
    run("--max_iters=4")
    path = Path("out/metrics.jsonl")
    step = [r for r in records() if "loss" in r][-1]
    with path.open("a") as f:  # a step after the last checkpoint, before a crash
        f.write(json.dumps(step | {"iter": 4, "loss": 1.0}) + "\n")
    before = path.read_bytes()
    with path.open("a") as f:
        f.write('{"iter": 5, "lo')
    run("--init_from=resume")
    assert path.read_bytes().startswith(before)
    steps = [r for r in records() if "loss" in r]
    assert [r["iter"] for r in steps] == list(range(8)) and all(r["loss"] != 1.0 for r in steps)
    assert [r["iter"] for r in records() if "val/loss" in r] == [0, 4, 8]


def test_a_line_that_no_run_wrote_is_refused_with_its_number(workplace):
    run("--max_iters=1", "--eval_interval=1")
    path = Path("out/metrics.jsonl")
    whole = path.read_bytes()
    number = whole.count(b"\n") + 1
    for line in (b"null", b"5", b"[]", b'{"loss": 1}', b'{"event": "start"}', b"[" * 100_000, b"\xff"):
        path.write_bytes(whole + line + b"\n" + whole)
        with pytest.raises(ValueError, match=rf"^out/metrics.jsonl, line {number}, is not a step"):
            records()


def test_a_start_event_has_the_resolved_settings_and_a_stop_event_the_reason(workplace):
    stop, view = types.SimpleNamespace(received=None), Lines()
    view.step = lambda record, left: record["iter"] == 1 and vars(stop).update(received="SIGTERM")
    config, given = parse([*TINY, "--grad_clip=inf"])
    train(config, distributed.start("auto", "cpu"), given, stop, view)
    objects = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    start, *_, last_step, end = objects
    assert (start["event"], end["event"], end["reason"]) == ("start", "stop", "stopped by SIGTERM")
    assert end["iter"] == last_step["iter"] + 1 < 8
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", end["time"])
    config = start["config"]
    assert (config["device"], config["dtype"], config["compile"]) == ("cpu", "float32", False)
    assert (config["kernels"], config["vocab_size"], config["n_embd"]) == ("torch", 21, 32)
    assert config["grad_clip"] is None, "JSON cannot write inf"
    matrices = 2 * 12 * 32 * 32 + 21 * 32  # two blocks and the embedding; below: five norms
    assert start["parameters"] == matrices + 5 * 32
    assert start["flops_per_token"] == 6 * start["parameters"] + 12 * 2 * 32 * 16
    assert (start["tokens_per_step"], start["train_tokens"], start["ranks"]) == (128, 49801, 1)
    assert 0.05 < last_step["memory_gb"] < 100  # PyTorch alone takes more than the first


# ---- wandb


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package."""
    module = mock.Mock(Error=type("Error", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_nanogpts_keys_at_evaluations(workplace, monkeypatch, wandb):
    monkeypatch.setattr(GPT, "estimate_mfu", lambda *a: 0.25)
    run("--wandb_log=True", "--wandb_project=p", "--wandb_run_name=r")
    options = wandb.init.call_args.kwargs
    assert (options["project"], options["name"], options["config"]["n_embd"]) == ("p", "r", 32)
    wandb_run = wandb.init.return_value
    logged = [call.args[0] for call in wandb_run.log.call_args_list]
    keys = {"iter", "train/loss", "val/loss", "lr"}
    assert [values.keys() for values in logged] == [keys, keys, keys | {"mfu"}]
    assert logged[2].pop("mfu") == pytest.approx(25.0)
    assert logged == [r for r in records() if "val/loss" in r]
    wandb_run.finish.assert_called_once()


def test_wandb_that_cannot_start_is_one_sentence(workplace, monkeypatch, wandb):
    wandb.init.side_effect = wandb.Error("No API key configured")
    with pytest.raises(ValueError, match=r"No API key configured.*WANDB_MODE=offline.*--wandb_log=False"):
        run("--wandb_log=True")
    # The folder wandb of offline runs imports too, as an empty package.
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    with pytest.raises(ValueError, match=r"needs the package wandb: .*pip install"):
        run("--wandb_log=True")
