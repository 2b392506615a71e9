"""Plots show the values in metrics.jsonl."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.test_command_line import command
from train import plot


def write(folder, records, more=""):
    Path(folder).mkdir(parents=True)
    Path(folder, "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + more)


def step(i, ms=100.0, tokens=50, **other):
    fields = dict(iter=i, loss=3 - i / 100, lr=1e-3 / (i + 1), grad_norm=0.5 + i, ms=ms)
    return fields | {"tokens_per_s": tokens * 1000 / ms} | other


def evaluation(i, val):
    return {"iter": i, "train/loss": 2.5, "val/loss": val, "lr": 1e-3}


def draw(*folders, x="step"):
    return plot.draw(plot.load_runs([Path(folder) for folder in folders]), x)


def lines(figure, field):
    """(x, y) of each line of a field."""
    drawn = [line for axes in figure.axes for line in axes.lines if line.get_gid() == field]
    return [tuple(np.array(values, float) for values in line.get_data()) for line in drawn]


def legend(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_line_has_the_values_of_the_records():
    steps = [step(0), step(10), step(20, loss=None, grad_norm=None), step(30), step(40)]
    write("run", [evaluation(0, 3.1), *steps, evaluation(25, None), evaluation(50, 2.4)], '{"iter": 60, "lo')
    figure = draw("run")
    for field in ("loss", "lr", "grad_norm", "tokens_per_s"):
        [(x, y)] = lines(figure, field)
        assert x.tolist() == [0, 10, 20, 30, 40]
        np.testing.assert_array_equal(y, np.array([s[field] for s in steps], float), field)  # a gap for null
    for field, values in (("train/loss", [2.5, 2.5, 2.5]), ("val/loss", [3.1, np.nan, 2.4])):
        [(x, y)] = lines(figure, field)
        assert x.tolist() == [0, 25, 50]
        np.testing.assert_array_equal(y, values, field)
    validation = "validation loss, lowest 2.4000 at step 50"
    assert legend(figure) == ["training loss", "training loss, evaluated", validation]


def test_tokens_and_time_are_sums_over_the_steps():
    """A log of every fifth step, with another batch from 11 on, and an evaluation after the last line."""
    steps = [step(0, 2000.0), step(5), step(10), step(15, 300.0, tokens=80)]
    write("run", [evaluation(0, 3.0), *steps, evaluation(10, 2.8), evaluation(18, 2.5)])
    seconds = [2.0] + 10 * [0.1] + 5 * [0.3]  # of step 0, 1, ..., 15
    tokens = 11 * [50] + 5 * [80]
    for x, each in (("time", seconds), ("tokens", tokens)):
        figure = draw("run", x=x)
        assert lines(figure, "loss")[0][0] == pytest.approx([sum(each[:i]) for i in (0, 5, 10, 15)])
        assert lines(figure, "val/loss")[0][0] == pytest.approx([sum(each[:i]) for i in (0, 10, 18)])


def test_a_run_whose_record_begins_later_has_the_tokens_before_and_not_the_time():
    """As one that began in nanoGPT. Here every fifth step is logged."""
    write("run", [evaluation(98, 3.0), step(100, 2000.0, tokens=50), step(105), evaluation(106, 2.0)])
    for x, expected in (("tokens", [4900, 5300]), ("time", [0, 3 * 2 + 5 * 0.1])):
        assert lines(draw("run", x=x), "val/loss")[0][0] == pytest.approx(expected)
    write("evaluated", [evaluation(98, 3.0), evaluation(99, 2.0)])
    assert lines(draw("evaluated", x="time"), "val/loss")[0][0].tolist() == [0, 0]


def test_a_long_run_is_smoothed_and_its_first_losses_may_be_cut_off():
    losses = [100.0, *np.random.default_rng(0).normal(3, 0.1, 199)]
    losses[90] = None
    write("run", [step(i, 3.6e6 / 20, loss=loss) for i, loss in enumerate(losses)])
    figure = draw("run", x="time")
    [(hours, smooth)] = lines(figure, "smoothed")
    values = np.array(losses, float)
    # over 1/50 of the run each way
    assert smooth == pytest.approx([np.nanmean(values[max(0, i - 4) : i + 5]) for i in range(200)])
    assert hours == pytest.approx(np.arange(200) / 20)
    assert figure.axes[0].get_xlabel() == "time of the steps, h"
    low, high = figure.axes[0].get_ylim()
    assert np.nanmax(values[1:]) < high < 5 and low < np.nanmin(values[1:])


def test_several_runs_share_their_axes_and_have_different_labels():
    """Two runs with the same name are labelled by their paths."""
    write("a/base", [step(0), step(1), evaluation(2, 2.5)])
    write("b/base", [step(0), step(1), step(2), evaluation(3, 2.25)])
    latin_1 = os.fsdecode("größe".encode("latin-1"))  # a name that is not UTF-8, as of an old disk
    write(latin_1, [step(0, tokens=500), evaluation(1, 2.0)])
    figure = draw("a/base", "b/base", latin_1, x="tokens")
    figure.savefig(io.BytesIO())
    assert [len(x) for x, _ in lines(figure, "loss")] == [2, 3, 1]
    assert [x.tolist() for x, _ in lines(figure, "val/loss")] == [[100], [150], [500]]
    lowest = ["2.5000 at step 2", "2.2500 at step 3", "2.0000 at step 1"]
    names = ["a/base", "b/base", "gr\ufffd\ufffde"]
    assert legend(figure) == [f"{name}, lowest {best}" for name, best in zip(names, lowest)]
    assert len({axes.get_xlim() for axes in figure.axes}) == 1


def test_the_command_writes_a_picture_or_one_sentence(monkeypatch, capsys):
    write("out", [step(0), step(1), evaluation(2, 2.5)])
    write("evaluated", [evaluation(0, 3.0)])
    write("begun", [{"event": "start", "iter": 0, "evaluated": False}], '{"event": "start", "iter": 0, "eval')
    for args, picture in (
        (["out"], "out/loss.png"),
        (["out", "evaluated", "--x=time"], "compare.png"),
        (["--x", "tokens", "out", "--out=mine.png"], "mine.png"),
    ):
        assert command(plot.main, monkeypatch, capsys, *args)[:2] == (0, f"{picture}\n")
        assert Path(picture).stat().st_size > 20_000
    for args, words in (
        (["nowhere"], "nowhere holds no metrics.jsonl"),
        (["out", "begun"], "begun/metrics.jsonl"),
        ([], "OUT_DIR"),
        (["out", "--out=no/where.png"], "no/where.png"),
        (["out", "--out=picture.xyz"], "xyz"),
    ):
        code, _, err = command(plot.main, monkeypatch, capsys, *args)
        assert code == 1 and err.startswith("error: ") and words in err and err.count("\n") == 1, args
