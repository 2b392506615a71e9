"""Checkpoints: nanoGPT's format in both directions, safe writing, and refusal of files that do not fit."""

import errno
import fcntl
import os
import re
import resource
import threading
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path

import pytest
import torch

from gpt import pretrained
from gpt.checkpoint import Checkpoint
from gpt.convert import convert
from gpt.model import GPTConfig
from tests.runs import TINY, assert_same_run, assert_same_state, assert_same_weights, load, records, run
from tests.test_command_line import command
from train import checkpoint, distributed, metrics
from train.__main__ import main
from train.config import parse
from train.loop import train
from train.prepare import documents
from train.prepare.encode import encode

# ---- the format


@dataclass
class NanoGPTConfig:
    """nanoGPT's GPTConfig. Its sample.py calls it with **model_args, so an eighth name is a TypeError."""

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True


def resume_in_nanogpt(model_args, dropout):
    """The config that nanoGPT's train.py makes from a checkpoint. It reads six names and ignores the rest."""
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")
    return NanoGPTConfig(**{name: model_args[name] for name in names}, dropout=dropout)


def test_nanogpt_can_read_our_checkpoints(workplace):
    state = run("--dropout=0.1")
    expected = NanoGPTConfig(16, 21, 2, 2, 32, 0.1, False)
    assert NanoGPTConfig(**state["model_args"]) == resume_in_nanogpt(state["model_args"], 0.1) == expected
    assert state["config"]["dataset"] == "tiny" and state["config"]["n_layer"] == 2
    assert all(isinstance(v, bool | int | float | str | None) for v in state["config"].values())
    assert isinstance(state["iter_num"], int) and isinstance(state["best_val_loss"], float)
    # The optimizer numbers parameters as nanoGPT's does: matrices in the order of the modules, then the rest.
    names = [name for name in state["model"] if name != "lm_head.weight"]
    matrices = [name for name in names if state["model"][name].dim() >= 2]
    order = matrices + [name for name in names if name not in matrices]
    for i, name in enumerate(order):
        assert state["optimizer"]["state"][i]["exp_avg"].shape == state["model"][name].shape, name
    assert [len(g["params"]) for g in state["optimizer"]["param_groups"]] == [10, 5]


def nanogpt_format(state):
    """The same run, as a compiled nanoGPT would have saved it."""
    nanogpts = {name: state[name] for name in ("optimizer", "model_args", "iter_num", "config")}
    nanogpts["model"] = {f"_orig_mod.{name}": weight for name, weight in state["model"].items()}
    return nanogpts | {"best_val_loss": torch.tensor(state["best_val_loss"])}


def earlier_format(state):
    """With the keys that commit 9111c6c wrote, before there was gpt_config."""
    keys = "model optimizer model_args config scaler rng iter_num position evaluated tokenizer data skipped"
    earlier = {name: state[name] for name in [*keys.split(), "best_val_loss"]}
    return earlier | {"activation": state["gpt_config"]["activation"], "kernels": "torch", "began": "scratch"}


@pytest.mark.parametrize(
    ("saved", "flags"),
    [(nanogpt_format, []), (earlier_format, ["--dropout=0.2", "--activation=gelu_tanh"])],
)
def test_a_run_resumes_exactly_from_nanogpts_and_from_our_earlier_format(workplace, saved, flags):
    straight = run(*flags, out_dir="straight")
    stopped = run(*flags, "--max_iters=4", out_dir="stopped")
    torch.save(saved(stopped), "stopped/ckpt.pt")
    resumed = run(*flags[:1], "--init_from=resume", out_dir="stopped")
    assert_same_weights(straight, resumed)
    for key in ("gpt_config", "position"):
        assert straight[key] == resumed[key], key


def test_a_checkpoint_has_the_documented_keys_and_restores_every_model_option(workplace):
    state = run("--max_iters=1", "--activation=gelu_tanh", "--activation_checkpointing=True", "--bias=True")
    assert state.keys() == {key.name for key in fields(Checkpoint)}
    assert state["gpt_config"].keys() == {option.name for option in fields(GPTConfig)}
    config = vars(pretrained.from_checkpoint(Path("out/ckpt.pt"))[0].config)
    expected = state["gpt_config"] | {"activation_checkpointing": False}  # a run chooses it, as its kernels
    assert config == expected and config["bias"] and config["activation"] == "gelu_tanh"


def test_a_model_option_that_nanogpt_lacks_is_saved_and_refused_by_other_formats(workplace):
    straight = run("--qk_norm=True", out_dir="straight")
    run("--qk_norm=True", "--max_iters=4")
    resumed = run("--init_from=resume")  # the checkpoint has the option
    assert_same_weights(straight, resumed)
    with pytest.raises(TypeError, match="qk_norm"):
        NanoGPTConfig(**resumed["model_args"])
    with pytest.raises(KeyError, match="n_layer"):
        resume_in_nanogpt(resumed["model_args"], 0.0)
    with pytest.raises(ValueError, match="GPT-2's format cannot express qk_norm=True"):
        convert("out/ckpt.pt", Path("hf"))
    assert not Path("hf").exists()


# ---- refused files


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_file_that_is_not_a_checkpoint_is_refused_with_the_wrong_key(workplace):
    state = run("--max_iters=1", "--n_layer=1")
    earlier = earlier_format(state)
    for content, message in (
        ([1, 2], "it holds a list"),
        ({"weights": 1}, "it lacks model, model_args"),
        (state | {"iter_num": -4}, "iter_num is -4, but must be a whole number of at least 0"),
        (state | {"optimizer": {"state": {"a": {}}}}, "a key of optimizer['state'] is 'a', but must be"),
        (
            state | {"gpt_config": {"wings": 2}},
            "it uses the model option wings, which this version does not know",
        ),
        (earlier | {"model_args": {"n_layer": 2}}, "its model_args lack n_head, n_embd, block_size, vocab_"),
        (state | {"config": Hostile()}, "holds objects, which could run code"),
    ):
        torch.save(content, "other.pt")
        with pytest.raises(ValueError, match="^other.pt .*" + re.escape(message)):
            run("--init_from=other.pt", out_dir="tuned")
    assert not Path("executed").exists()
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint tuned/ckpt\.pt"):
        run("--init_from=resume", out_dir="tuned")
    with pytest.raises(ValueError, match=r"'scrath' must be scratch, resume, auto, .*; the runs here"):
        run("--init_from=scrath", out_dir="tuned")


def test_a_checkpoint_that_does_not_fit_the_run_is_refused(workplace):
    def refused(message, *flags):
        with pytest.raises(ValueError, match=message):
            run("--init_from=resume", *flags)

    state = run("--max_iters=4")
    refused("ckpt.pt has n_layer=2; leave out n_layer=3", "--n_layer=3")
    encode(Path("data/other"), documents.text("abc" * 1000, "x"), "char", 1)
    refused("and data/other have different tokenizers or alphabets", "--dataset=other")
    Path("data/tiny/meta.pkl").rename("meta.pkl")
    refused(r"the model uses char \(21 symbols\), the data gpt2 \(50,257 symbols\)")
    Path("meta.pkl").rename("data/tiny/meta.pkl")
    moments = state["optimizer"]["state"]
    whole = moments[0]["exp_avg"]
    moments[0]["exp_avg"] = whole[:3]
    torch.save(state, "out/ckpt.pt")
    refused(r"the checkpoint's optimizer has no moments of shape \(21, 32\) for tensor 0; load only")
    moments[0]["exp_avg"] = whole
    moments[99] = {"exp_avg": torch.zeros(1)}
    torch.save(state, "out/ckpt.pt")
    refused("the checkpoint's optimizer, scaler or rng cannot be restored .*; resume from a different")
    state["model"]["lm_head.weight"] = torch.zeros(5, 5)
    torch.save(state, "out/ckpt.pt")
    refused(r"lm_head.weight is \(5, 5\) in the weights and \(21, 32\) in the model")


# ---- starting and resuming


def test_a_resumed_run_takes_its_settings_from_the_flags_and_prints_what_changed(workplace, capsys):
    run("--max_iters=4")
    capsys.readouterr()
    state = run("--init_from=resume", "--weight_decay=0.3", "--beta2=0.5")
    lines = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("changed since the checkpoint: ")
    ]
    assert lines == [
        "changed since the checkpoint: beta2 0.95 -> 0.5",
        "changed since the checkpoint: max_iters 4 -> 8",
        "changed since the checkpoint: weight_decay 0.1 -> 0.3",
    ]
    group = state["optimizer"]["param_groups"][0]
    assert (group["weight_decay"], group["betas"][1]) == (0.3, 0.5)


def test_a_resumed_run_keeps_its_data_set_unless_a_flag_changes_it(workplace, capsys):
    straight = run(out_dir="straight")
    run("--max_iters=4")
    with pytest.raises(FileNotFoundError, match="data/moved"):
        run("--init_from=resume", "--dataset=moved")
    config, given = parse([flag for flag in TINY if "dataset" not in flag] + ["--init_from=auto"])
    capsys.readouterr()
    train(config, distributed.start("auto", "cpu"), given)
    printed = capsys.readouterr().out
    assert "dataset: tiny, as in out/ckpt.pt\n" in printed and "the checkpoint: dataset" not in printed
    assert (load("out")["config"]["dataset"], parse(["out/config.py"])[0].dataset) == ("tiny", "tiny")
    assert_same_weights(straight, load("out"))


@pytest.mark.parametrize(("source", "damage"), [("resume", "is damaged"), ("auto", "is missing")])
def test_a_run_resumes_from_the_newest_intact_checkpoint(workplace, capsys, source, damage):
    run("--eval_interval=2", out_dir="straight")
    run("--eval_interval=2", "--max_iters=6", "--keep_last=3")
    for name in ("ckpt.pt", "ckpt-6.pt", "best.pt"):
        path = Path("out", name)
        content = bytearray(path.read_bytes())
        path.unlink()
        content[len(content) // 2] ^= 1  # a bit of a weight
        if damage == "is damaged":
            path.write_bytes(content)
    capsys.readouterr()
    run("--eval_interval=2", f"--init_from={source}")
    printed = capsys.readouterr().out
    assert f"out/ckpt.pt {damage}" in printed
    assert "iter 4:" in printed and "iter 3:" not in printed
    assert_same_run("straight", "out")


def test_without_an_intact_checkpoint_the_latest_is_named(workplace, capsys):
    run("--max_iters=4")
    for path in Path("out").glob("*.pt"):
        path.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"^out/ckpt\.pt \(2 bytes\) is truncated"):
        run("--init_from=resume")
    assert "out/best.pt is damaged and is skipped: out/best.pt (2 bytes)" in capsys.readouterr().out


def test_a_machine_that_does_not_share_out_dir_says_so(workplace):
    """Rank 0 has found a checkpoint on its own machine."""
    config, given = parse(TINY)
    start = checkpoint.Start("resume", Path("elsewhere/ckpt.pt"), "tiny")
    with pytest.raises(ValueError, match=r"no elsewhere/ckpt\.pt on this machine: all machines must share"):
        checkpoint.initial_model(config, given, {}, distributed.Ranks(1, 2, "cpu", None), start)


def test_a_run_that_stopped_before_its_first_checkpoint_starts_over(workplace):
    run("--max_iters=4")
    for path in Path("out").glob("*.pt"):
        path.unlink()
    run()
    assert [record["iter"] for record in records("out") if "loss" in record] == list(range(8))


def test_a_checkpoint_without_read_permission_ends_the_resume(workplace, monkeypatch):
    def denied(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    run("--max_iters=4")
    monkeypatch.setattr(torch, "load", denied)
    with pytest.raises(PermissionError, match=r"out/ckpt\.pt"):
        run("--init_from=resume")


def test_fine_tuning_gpt2_uses_its_weights_and_the_tokenizer_of_the_data(workplace, capsys):
    """`init_from=gpt2*` goes through transformers, here with a folder that has no tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    hf = GPT2LMHeadModel(GPT2Config(vocab_size=50257, n_positions=32, n_layer=1, n_head=2, n_embd=16))
    hf.save_pretrained("gpt2-small")
    Path("data/tiny/meta.pkl").unlink()
    flags = [flag for flag in TINY if not flag.startswith(("--n_", "--min_lr"))]
    config, given = parse([*flags, "--init_from=gpt2-small", "--max_iters=1", "--learning_rate=0"])
    train(config, distributed.start("auto", "cpu"), given)
    note = "gpt2-small names no tokenizer; assuming that of data/tiny, gpt2"
    assert note in capsys.readouterr().out
    model, state = pretrained.from_checkpoint(Path("out/ckpt.pt"))
    assert state.tokenizer == {"kind": "gpt2"} and state.model_args["block_size"] == 16
    idx = torch.arange(16)[None]
    logits = model.eval()(idx, idx, return_logits=True)[0]
    torch.testing.assert_close(logits, hf.eval()(idx).logits, rtol=1e-4, atol=1e-5)


# ---- saving


def at(step):
    return Checkpoint(model={}, model_args={}, iter_num=step)


def steps_of(folder, *names):
    return [load(folder, name)["iter_num"] for name in names]


def test_the_last_few_checkpoints_are_kept_but_none_of_later_steps(tmp_path):
    def numbered():
        return sorted(p.name for p in tmp_path.glob("ckpt-*.pt"))

    for step in (900, 1000, 1100):
        checkpoint.save(tmp_path, at(step), best=False, keep_last=2)
    assert numbered() == ["ckpt-1000.pt", "ckpt-1100.pt"]
    assert (tmp_path / "ckpt.pt").samefile(tmp_path / "ckpt-1100.pt"), "a hard link, not a second file"
    (tmp_path / "ckpt-mine.pt").touch()
    checkpoint.save(tmp_path, at(1050), best=False, keep_last=2)
    assert numbered() == ["ckpt-1000.pt", "ckpt-1050.pt", "ckpt-mine.pt"]
    checkpoint.save(tmp_path, at(1060), best=False, keep_last=0)
    assert numbered() == ["ckpt-mine.pt"]


def test_a_checkpoint_is_flushed_to_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append("fsync"))
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda a, b: (calls.append(b.name), replace(a, b))[1])
    checkpoint.save(tmp_path, at(1), best=True)
    # The file, then its names, then the folder. A run that is killed before ckpt.pt makes best.pt again.
    assert calls == ["fsync", "best.pt", "ckpt.pt", "fsync"]


def test_a_temporary_file_left_by_a_crash_is_not_written_to(tmp_path):
    """A crash between linking and renaming best.pt leaves a third hard link to both checkpoints."""
    checkpoint.save(tmp_path, at(1), best=True)
    os.link(tmp_path / "ckpt.pt", tmp_path / "ckpt.pt.tmp")
    os.link(tmp_path / "ckpt.pt", tmp_path / "best.pt.tmp")
    checkpoint.save(tmp_path, at(2), best=False)
    assert steps_of(tmp_path, "ckpt.pt", "best.pt") == [2, 1]
    checkpoint.save(tmp_path, at(3), best=True)
    assert steps_of(tmp_path, "ckpt.pt", "best.pt") == [3, 3]


def test_best_pt_is_a_copy_if_hard_links_do_not_work(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    checkpoint.save(tmp_path, at(1), best=True)
    checkpoint.save(tmp_path, at(2), best=False)
    assert steps_of(tmp_path, "ckpt.pt", "best.pt") == [2, 1]


def test_a_full_disk_leaves_the_previous_checkpoint_intact(workplace):
    run("--max_iters=4")
    before = contents("out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["ckpt.pt"]) // 2, hard))
    try:
        with pytest.raises(OSError, match=r"ckpt.pt could not be written .*; the previous one is intact"):
            run("--init_from=resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = contents("out")
    assert after["ckpt.pt"] == before["ckpt.pt"] and after.keys() == before.keys()


def test_training_continues_while_a_checkpoint_is_written_without_changing_it(workplace, monkeypatch):
    """Even if saving takes as long as the rest of the run, it writes the weights of its own step."""
    straight = run("--max_iters=4", out_dir="straight")
    finish_saving, save, step = threading.Event(), torch.save, metrics.Metrics.step

    def slow(state, path):
        assert state["iter_num"] != 4 or finish_saving.wait(60)
        save(state, path)

    def last_step_releases(self, number, *rest):
        step(self, number, *rest)
        if number == 7:
            finish_saving.set()

    monkeypatch.setattr(torch, "save", slow)
    monkeypatch.setattr(metrics.Metrics, "step", last_step_releases)
    run("--keep_last=2")
    assert_same_state(straight, load("out", "ckpt-4.pt"))
    assert steps_of("out", "ckpt-8.pt") == [8]


def test_a_failed_write_ends_the_run_before_the_next_checkpoint(workplace, monkeypatch):
    def full(state, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"No space left on device\); there is none yet"):
        run("--max_iters=60", "--eval_interval=30")
    assert records("out")[-1]["iter"] < 59


# ---- the folder of a run


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_a_new_run_does_not_replace_checkpoints_even_damaged_ones(workplace):
    def refused(source, message):
        before = contents("out")
        with pytest.raises(ValueError, match=message):
            run(f"--init_from={source}", "--max_iters=2")
        assert contents("out") == before

    run("--max_iters=4")
    today = datetime.now().date().isoformat()
    for source in ("scratch", "out"):
        refused(source, rf"^out/ckpt.pt is the checkpoint of another run \(saved {today} .*resume")
    for path in Path("out").glob("*.pt"):
        path.unlink()
    Path("out/ckpt-4.pt").write_bytes(b"damaged")
    refused("scratch", r"^out/ckpt-4.pt is the checkpoint of another run")
    refused("auto", "^out/ckpt-4.pt .* is truncated")


def test_an_out_dir_that_is_not_writable_is_refused_before_training(workplace):
    Path("file").touch()
    with pytest.raises(OSError, match="out_dir='file/out' cannot be written to"):
        run(out_dir="file/out")


def test_a_second_run_in_the_same_folder_stops_and_the_first_continues(workplace, monkeypatch, capsys):
    flags = [*TINY, "--max_iters=4", "--out_dir=out"]
    config, given = parse(flags)
    ranks = distributed.start("auto", "cpu")
    with checkpoint.locked_folder(config, ranks):
        code, _, err = command(main, monkeypatch, capsys, *flags)
        assert code == 1 and f"another run writes to out now (process {os.getpid()} on " in err
        code, _, err = command(main, monkeypatch, capsys, *flags, "--eval_only=True")
        assert code == 0, err
        assert [path.name for path in Path("out").iterdir()] == [".lock"], "neither run has written anything"
        train(config, ranks, given)
    code, _, err = command(main, monkeypatch, capsys, *flags, "--init_from=resume", "--max_iters=6")
    assert code == 0 and load("out")["iter_num"] == 6, err


def test_a_run_does_not_need_a_file_system_with_locks(workplace, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    code, _, err = command(main, monkeypatch, capsys, *TINY, "--max_iters=4", "--out_dir=out")
    assert code == 0 and load("out")["iter_num"] == 4, err
