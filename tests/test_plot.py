"""The pictures of runs show what their metrics.jsonl say."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt import cli
from tests.runs import run, surroundings
from train import plot


def write(folder, records, more=""):
    Path(folder).mkdir(parents=True)
    Path(folder, "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + more)


def step(i, ms=100.0, tokens=50, **other):
    fields = dict(iter=i, loss=3 - i / 100, lr=1e-3 / (i + 1), grad_norm=0.5 + i, ms=ms)
    return fields | {"tokens_per_s": tokens * 1000 / ms} | other


def evaluation(i, val):
    return {"iter": i, "train/loss": 2.5, "val/loss": val, "lr": 1e-3}


def lines(figure, field):
    return [line for axes in figure.axes for line in axes.lines if line.get_gid() == field]


def drawn(figure, field):
    """The points of the only line of a field."""
    [line] = lines(figure, field)
    return [np.array(values, float) for values in (line.get_xdata(), line.get_ydata())]


def legend(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_series_is_that_of_the_records(place):
    steps = [step(0), step(10), step(20, loss=None, grad_norm=None), step(30), step(40)]
    write("run", [evaluation(0, 3.1), *steps, evaluation(25, None), evaluation(50, 2.4)], '{"iter": 60, "lo')
    figure = plot.draw(plot.load([Path("run")]))
    for field in ("loss", "lr", "grad_norm", "tokens_per_s"):
        x, y = drawn(figure, field)
        assert x.tolist() == [0, 10, 20, 30, 40]
        np.testing.assert_array_equal(y, np.array([s[field] for s in steps], float), field)  # a gap for null
    for field, values in (("train/loss", [2.5, 2.5, 2.5]), ("val/loss", [3.1, np.nan, 2.4])):
        x, y = drawn(figure, field)
        assert x.tolist() == [0, 25, 50]
        np.testing.assert_array_equal(y, values, field)
    assert not lines(figure, "smoothed"), "five points need none"
    assert legend(figure) == ["training loss, evaluated", "validation loss, lowest 2.4000 at step 50"]
    low, high = figure.axes[0].get_ylim()
    assert low < 2.4 and high > 3.1, "of a short run all is shown"


def test_tokens_and_time_add_up_what_each_step_took(place):
    """Logged every fifth step; with another batch from 12 on; the last evaluation after the last line."""
    steps = [step(0, 2000.0), step(5), step(10), step(15, 300.0, tokens=80)]
    write("run", [evaluation(0, 3.0), *steps, evaluation(10, 2.8), evaluation(18, 2.5)])
    seconds = [2.0] + 10 * [0.1] + 5 * [0.3] + 2 * [0.3]  # of step 0, 1, ..., 17
    tokens = 11 * [50] + 7 * [80]
    for x, each in (("time", seconds), ("tokens", tokens)):
        figure = plot.draw(plot.load([Path("run")]), x)
        assert drawn(figure, "loss")[0] == pytest.approx([sum(each[:i]) for i in (0, 5, 10, 15)])
        assert drawn(figure, "val/loss")[0] == pytest.approx([sum(each[:i]) for i in (0, 10, 18)])
    assert {axes.get_xlabel() for axes in figure.axes} == {"tokens"}
    # A record that begins later knows the tokens before, but not the time.
    write("later", [step(100), step(101), evaluation(102, 2.0)])
    [later] = plot.load([Path("later")])
    assert later.behind("tokens")(np.array([100.0, 102.0])).tolist() == [5000, 5100]
    assert later.behind("time")(np.array([100.0, 102.0])) == pytest.approx([0.0, 0.2])


def test_large_numbers_get_a_unit(place):
    write("run", [step(i, 3.6e6, tokens=10**9) for i in range(10)])
    for x, end, label in (("time", 9, "time of the steps, h"), ("tokens", 9, "tokens, billions")):
        figure = plot.draw(plot.load([Path("run")]), x)
        assert drawn(figure, "loss")[0][-1] == pytest.approx(end)
        assert figure.axes[0].get_xlabel() == label


def test_a_long_run_is_smoothed_by_its_neighbours_and_its_beginning_may_leave_the_picture(place):
    losses = [100.0, *np.random.default_rng(0).normal(3, 0.1, 199)]
    losses[90] = None
    write("run", [step(i, loss=loss) for i, loss in enumerate(losses)])
    figure = plot.draw(plot.load([Path("run")]))
    smooth = drawn(figure, "smoothed")[1]
    values = np.array(losses, float)
    expected = [np.nanmean(values[max(0, i - 4) : i + 5]) for i in range(200)]  # a fiftieth on each side
    assert smooth == pytest.approx(expected)
    low, high = figure.axes[0].get_ylim()
    assert np.nanmax(values[1:]) < high < 5 and low < np.nanmin(values[1:])


def test_several_runs_share_their_axes_and_are_told_apart(place):
    write("a/base", [step(0), step(1), evaluation(2, 2.5)])
    write("b/base", [step(0), step(1), step(2), evaluation(3, 2.25)])
    write("wide", [step(0, tokens=500), evaluation(1, 2.0)])
    figure = plot.draw(plot.load([Path("a/base"), Path("b/base"), Path("wide")]), "tokens")
    assert [len(line.get_xdata()) for line in lines(figure, "loss")] == [2, 3, 1]
    assert [line.get_xdata().tolist() for line in lines(figure, "val/loss")] == [[100], [150], [500]]
    assert len({line.get_color() for line in lines(figure, "val/loss")}) == 3
    assert not lines(figure, "train/loss"), "of several runs the validation loss says enough"
    assert legend(figure) == [
        "a/base, lowest 2.5000 at step 2",
        "b/base, lowest 2.2500 at step 3",
        "wide, lowest 2.0000 at step 1",
    ]
    assert len({axes.get_xlim() for axes in figure.axes}) == 1


def command(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["plot", *args])
    capsys.readouterr()
    try:
        cli.run(plot.main)
    except SystemExit as stop:
        return stop.code
    return capsys.readouterr().out.strip()


def test_a_folder_that_the_locale_has_no_letters_for_has_its_name_in_the_picture(place):
    """In the locale C, Python keeps the bytes of what it cannot read as surrogates."""
    pytest.importorskip("matplotlib")
    write("größe", [step(0), step(1), evaluation(2, 2.5)])
    program = "from train.plot import *; import sys; r = load([Path(sys.argv[1])]); draw(r).savefig('a.png');"
    program += "print(ascii(r[0].label))"
    environment = surroundings(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    result = subprocess.run(
        [sys.executable, "-c", program, "größe"], env=environment, capture_output=True, text=True
    )
    assert result.stdout == ascii("größe") + "\n", result.stderr


def test_the_command_draws_a_run_and_what_cannot_be_drawn_is_one_sentence(workplace, monkeypatch, capsys):
    from PIL import Image

    run()
    assert command(monkeypatch, capsys, "out") == "out/loss.png"
    picture = np.asarray(Image.open("out/loss.png").convert("RGB"))
    assert picture.shape[:2] == (900, 1200) and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    write("cut", [], '{"event": "start", "iter": 0, "eval')
    write("begun", [{"event": "start", "iter": 0, "evaluated": False}])
    write("evaluated", [evaluation(0, 3.0)])
    assert command(monkeypatch, capsys, "--x", "tokens", "out") == "out/loss.png"
    assert command(monkeypatch, capsys, "out", "evaluated", "--x=time") == "compare.png"
    assert Path("compare.png").exists()
    for args, message in (
        (["nowhere"], "nowhere holds no metrics.jsonl"),
        (["out", "cut"], "cut/metrics.jsonl holds no step and no evaluation yet"),
        (["begun"], "begun/metrics.jsonl holds no step and no evaluation yet"),
        ([], "give the out_dir of a run"),
        (["out", "--out=no/where.png"], "no/where.png"),
        (["out", "--out=picture.xyz"], "'xyz' is not supported"),
    ):
        said = command(monkeypatch, capsys, *args)
        assert said.startswith("error: ") and message in said and "\n" not in said, args
