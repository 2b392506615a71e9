"""The first hour with the project: hints, error messages, commands that go wrong."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from gpt import cli, sample
from tests.runs import TINY, run
from tests.test_command_line import command, complaint
from train import __main__ as training
from train import evaluate, plot
from train.metrics import Metrics
from train.prepare import __main__ as prepare
from train.view import Lines


def test_each_program_explains_how_to_install_pytorch(tmp_path):
    """A Python without site-packages has no PyTorch."""
    for module in ("train", "train.plot", "train.prepare", "gpt.sample", "bench.kernels"):
        result = subprocess.run(
            [sys.executable, "-S", "-m", module],
            cwd=Path(__file__).parents[1], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
        assert "run make install once, and then source .venv/bin/activate" in result.stderr


def test_a_missing_package_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = command(lambda: __import__("matplotlib"), monkeypatch, capsys)
    assert code == 1 and "make install" in err and err.count("\n") == 1


def printed_command(text):
    """The words after the first `python -m train` in a text."""
    line = next(line for line in text.splitlines() if " -m train " in line)
    return line.partition(" -m train ")[2].split()


def test_the_command_after_a_stop_resumes_and_the_one_at_the_end_doubles_the_run(
    workplace, monkeypatch, capsys
):
    def stop_at_2(view, record, left):
        if record["iter"] == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Lines, "step", stop_at_2)
        code, out, _ = command(training.main, monkeypatch, capsys, *TINY, "--out_dir=out")
    assert code == 0 and "stopped by SIGINT after 4 steps: to resume from out/ckpt.pt:" in out
    code, out, _ = command(training.main, monkeypatch, capsys, *printed_command(out))
    assert code == 0 and "resumed out/ckpt.pt at step 4\n" in out and "iter 4:" in out
    assert "finished after 8 steps: out/ckpt.pt" in out and "gpt.sample out\n" in out
    longer = printed_command(out)
    assert longer[1:] == ["--init_from=resume", "--max_iters=16", "--lr_decay_iters=16"]
    code, out, _ = command(training.main, monkeypatch, capsys, *longer[:2])
    assert code == 0 and "the run in out/ckpt.pt has made 8 steps, and max_iters=8 leaves no more" in out
    assert printed_command(out) == longer
    _, out, _ = command(training.main, monkeypatch, capsys, *longer, "--eval_interval=5")
    assert "resumed out/ckpt.pt at step 8\n" in out and "finished after 16 steps: out/ckpt.pt" in out


def test_the_command_for_an_unfinished_run_that_max_iters_ends_is_that_of_its_own_length(workplace, capsys):
    run("--max_iters=4")
    state = torch.load("out/ckpt.pt", weights_only=True)
    state["config"]["max_iters"] = 100
    torch.save(state, "out/ckpt.pt")
    capsys.readouterr()
    run("--init_from=resume", "--max_iters=2")
    out = capsys.readouterr().out
    assert "the run in out/ckpt.pt has made 4 steps, and max_iters=2 leaves no more" in out
    assert printed_command(out)[1:] == ["--init_from=resume", "--max_iters=100"]


def test_a_long_evaluation_prints_its_progress(workplace, monkeypatch, capsys):
    monkeypatch.setattr("train.view.MAX_SILENCE", -1)
    _, out, _ = command(training.main, monkeypatch, capsys, *TINY, "--eval_only", "--eval_iters=3")
    lines = [line for line in out.splitlines() if line.startswith("evaluating")]
    assert lines == [f"evaluating: {done} of 6 batches" for done in range(6)]


def test_ctrl_c_is_answered_at_once(workplace, monkeypatch, capfd):
    def evaluation(log, step, losses, lr):
        signal.raise_signal(signal.SIGINT)
        assert "SIGINT: stopping after this evaluation; Ctrl-C again stops at once" in capfd.readouterr().err

    monkeypatch.setattr(Metrics, "evaluation", evaluation)
    monkeypatch.setattr(sys, "argv", ["train", *TINY])
    training.main()


def test_training_without_data_names_the_command_that_prepares_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for flags, hint in (
        ([], "-m train.prepare openwebtext prepares it"),
        (["quickstart"], "-m train.prepare plays_char prepares it"),
        (["--dataset=mine"], "-m train.prepare text --input=FILE --name=mine makes it from a text"),
    ):
        code, _, err = command(training.main, monkeypatch, capsys, *flags, "--device=cpu")
        assert code == 1 and hint in err and "make quickstart" in err and err.count("\n") == 1


def test_sampling_and_evaluation_take_the_folder_of_a_run_and_say_what_is_wrong(
    workplace, monkeypatch, capsys
):
    run("--max_iters=1", out_dir="out-mine")
    few = ["--num_samples=1", "--max_new_tokens=3", "--start=king", "--device=cpu"]
    code, out, _ = command(sample.main, monkeypatch, capsys, "out-mine", *few)
    assert code == 0 and out.startswith("king")
    code, out, _ = command(evaluate.main, monkeypatch, capsys, "out-mine", "--device=cpu")
    assert code == 0 and '"file": "data/tiny/val.bin"' in out
    Path("prompts.txt").write_text("the king\n\nthe queen\n")
    code, _, err = command(sample.main, monkeypatch, capsys, "out-mine", "--prompts=prompts.txt", *few[3:])
    assert code == 1 and err.startswith("error: prompts.txt, line 2: the prompt is empty")
    for main in (sample.main, evaluate.main):
        code, _, err = command(main, monkeypatch, capsys)
        assert code == 1 and "there is no checkpoint out/ckpt.pt; the runs here are out-mine" in err


def test_every_program_explains_a_wrong_flag_in_the_same_way(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for main, args, answer in (
        (training.main, ["--n_layers=3"], "there is no flag '--n_layers'; did you mean '--n_layer'?"),
        (sample.main, ["--temprature=1"], "there is no flag '--temprature'; did you mean '--temperature'?"),
        (evaluate.main, ["-stride=1"], "there is no flag '-stride'; did you mean '--stride'?"),
        (prepare.main, ["text", "--names=x"], "there is no flag '--names'; did you mean '--name'?"),
        (plot.main, ["out", "--zzz"], "there is no flag '--zzz'; --help lists them"),
        (prepare.main, ["text", "text.txt"], "--name=... is missing: name of the data set"),
        (training.main, ["--n_layer"], "--n_layer needs a value: "),
    ):
        err = complaint(main, monkeypatch, capsys, *args)
        assert err.startswith(f"error: {answer}"), err


def test_a_printed_command_names_the_python_that_runs(tmp_path, monkeypatch):
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(python))
    for path, expected in ((python.parent, "python"), ("/nowhere", "env/bin/python")):
        monkeypatch.setenv("PATH", str(path))
        assert cli.command("gpt.sample", "a b") == f"{expected} -m gpt.sample 'a b'"
