"""Checkpoints: nanoGPT's format both ways, whole whatever happens, refused when not what they seem."""

import errno
import fcntl
import os
import pickle
import resource
import threading
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path

import pytest
import torch

from gpt import pretrained
from gpt.checkpoint import Checkpoint, read
from gpt.convert import convert
from gpt.model import GPTConfig
from tests.runs import TINY, run
from tests.test_command_line import command
from train import checkpoint, distributed, metrics
from train.__main__ import main
from train.config import parse
from train.loop import train


@dataclass
class NanoGPTConfig:
    """nanoGPT's GPTConfig: it is called with **model_args, so an eighth name is a TypeError."""

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True


def test_nanogpt_can_read_what_is_written_here(workplace):
    state = run("--dropout=0.1")
    assert NanoGPTConfig(**state["model_args"]) == NanoGPTConfig(16, 21, 2, 2, 32, 0.1, False)
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


def nanogpts(state):
    """The same run, as a compiled nanoGPT would have saved it."""
    kept = ("optimizer", "model_args", "iter_num", "config")
    foreign = {name: state[name] for name in kept}
    foreign["model"] = {f"_orig_mod.{name}": weight for name, weight in state["model"].items()}
    return foreign | {"best_val_loss": torch.tensor(state["best_val_loss"])}


def test_nanogpts_checkpoint_resumes_here_as_if_never_interrupted(workplace):
    straight = run(out_dir="straight")
    stopped = run("--max_iters=4", out_dir="stopped")
    torch.save(nanogpts(stopped), "stopped/ckpt.pt")
    resumed = run("--init_from=resume", out_dir="stopped")
    for name, weight in straight["model"].items():
        assert torch.equal(weight, resumed["model"][name]), name


def test_a_checkpoint_of_before_gpt_config_resumes_as_if_never_interrupted(workplace):
    """The keys are those that commit 9111c6c wrote."""
    flags = ["--dropout=0.2", "--activation=gelu_tanh"]
    straight = run(*flags, out_dir="straight")
    stopped = run(*flags, "--max_iters=4", out_dir="stopped")
    keys = "model optimizer model_args config scaler rng iter_num position evaluated tokenizer data skipped"
    before = [*keys.split(), "best_val_loss", "began"]
    older = {name: stopped[name] for name in before} | {"activation": "gelu_tanh", "kernels": "torch"}
    assert older.keys() - {"activation", "kernels"} == stopped.keys() - {"gpt_config"}
    torch.save(older, "stopped/ckpt.pt")
    assert read(Path("stopped/ckpt.pt")).gpt_config["activation"] == "gelu_tanh"
    resumed = run("--dropout=0.2", "--init_from=resume", out_dir="stopped")
    assert resumed["gpt_config"] == straight["gpt_config"]
    for key in ("position", "skipped", "best_val_loss", "evaluated", "began", "tokenizer", "data"):
        assert straight[key] == resumed[key], key
    for name, weight in straight["model"].items():
        assert torch.equal(weight, resumed["model"][name]), name


def test_every_key_that_is_saved_is_described_and_every_option_of_a_model_comes_back(workplace):
    state = run("--max_iters=1", "--activation=gelu_tanh", "--activation_checkpointing=True", "--bias=True")
    assert state.keys() == {key.name for key in fields(Checkpoint)}
    assert state["gpt_config"].keys() == {option.name for option in fields(GPTConfig)}
    config = vars(pretrained.from_checkpoint(Path("out/ckpt.pt"))[0].config)
    expected = state["gpt_config"] | {"activation_checkpointing": False}  # the run's own, as kernels are
    assert config == expected and config["bias"] and config["activation"] == "gelu_tanh"


def test_an_option_that_nanogpt_lacks_resumes_and_is_refused_where_it_cannot_be_said(workplace):
    """By nanoGPT's GPTConfig, which is called with all of model_args; by the export with a sentence."""
    straight = run("--qk_norm=True", out_dir="straight")
    without = run(out_dir="without")
    assert not torch.equal(straight["model"]["lm_head.weight"], without["model"]["lm_head.weight"])
    run("--qk_norm=True", "--max_iters=4")
    resumed = run("--init_from=resume")  # the checkpoint has it
    for name, weight in straight["model"].items():
        assert torch.equal(weight, resumed["model"][name]), name
    with pytest.raises(ValueError, match="has qk_norm=True, and qk_norm=False was asked for"):
        run("--init_from=out", "--qk_norm=False", out_dir="tuned")
    with pytest.raises(TypeError, match="qk_norm"):
        NanoGPTConfig(**resumed["model_args"])
    with pytest.raises(ValueError, match="GPT-2's format cannot say qk_norm=True, which this model has"):
        convert("out/ckpt.pt", Path("hf"))
    assert not Path("hf").exists()
    convert("out/ckpt.pt", Path("copy.pt"))
    assert pretrained.load("copy.pt")[0].config.qk_norm


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("iter_num", "4", "iter_num is '4', and must be a whole number of at least 0"),
        ("iter_num", -4, "iter_num is -4, and must be a whole number of at least 0"),
        ("iter_num", True, "iter_num is True, and must be a whole number of at least 0"),
        ("position", 1.5, "position is 1.5, and must be a whole number of at least 0"),
        ("best_val_loss", None, "best_val_loss is None, and must be a number"),
        ("config", [1], "config is a list, and must be a dict"),
        ("model", {"transformer.wte.weight": 1.0}, "model['transformer.wte.weight'] is 1.0, and must be"),
        ("optimizer", {"state": {}}, "optimizer['param_groups'] is None, and must be a list"),
        ("optimizer", {"state": {"a": {}}, "param_groups": []}, "a key of optimizer['state'] is 'a', and"),
        ("rng", [{"cpu": 1}], "rng[0]['cpu'] is 1, and must be a tensor"),
        ("gpt_config", {"n_layer": -1}, "n_layer is -1, and must be a whole number of at least 0"),
        ("gpt_config", {"wings": 2}, "has a model option that is unknown here: wings"),
        ("gpt_config", {"n_layer": 1.0}, "n_layer is 1.0, and must be a whole number of at least 0"),
        ("model_args", {"n_layer": 2}, "its model_args lack n_head, n_embd, block_size, vocab_size"),
    ],
)  # fmt: skip
def test_a_key_of_another_type_is_named(workplace, key, value, problem):
    state = run("--max_iters=1", "--n_layer=1")
    if key == "model_args":
        del state["gpt_config"]
    torch.save(state | {key: value}, "out/ckpt.pt")
    with pytest.raises(ValueError) as error:
        run("--init_from=out/ckpt.pt", out_dir="tuned")
    assert problem in str(error.value) and str(error.value).startswith("out/ckpt.pt ")


def test_flags_not_the_checkpoint_say_how_to_go_on(workplace):
    run("--max_iters=4", "--weight_decay=0.1")
    state = run("--init_from=resume", "--weight_decay=0.3", "--beta2=0.5")
    group = state["optimizer"]["param_groups"][0]
    assert (group["weight_decay"], group["betas"][1]) == (0.3, 0.5)


def test_another_shape_than_the_checkpoints_is_refused(workplace):
    run("--max_iters=4")
    with pytest.raises(ValueError, match=r"ckpt.pt has n_layer=2, and n_layer=3 was asked for"):
        run("--init_from=resume", "--n_layer=3")
    state = torch.load("out/ckpt.pt", weights_only=True)
    state["model"]["lm_head.weight"] = torch.zeros(5, 5)
    torch.save(state, "out/ckpt.pt")
    with pytest.raises(ValueError, match=r"lm_head.weight is \(5, 5\) there and \(21, 32\) here"):
        run("--init_from=resume")


def test_another_alphabet_than_the_checkpoints_is_refused(workplace):
    from train.prepare.__main__ import write

    run("--max_iters=4")
    write(Path("data/other"), "abc" * 1000, "char")
    with pytest.raises(ValueError, match="another tokenizer or alphabet than data/other"):
        run("--init_from=resume", "--dataset=other")


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_checkpoint_is_told(workplace, keep):
    run("--max_iters=4", "--keep_last=0")
    path = Path("out/ckpt.pt")
    whole = path.read_bytes()
    for name in ("ckpt.pt", "best.pt"):  # the same bytes under two names
        Path("out", name).unlink()
        Path("out", name).write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(ValueError, match=r"ckpt.pt \([\d,]+ bytes\) is truncated or no checkpoint"):
        run("--init_from=resume")


@pytest.mark.parametrize("damage", ["truncated", "a bit of a weight"])
def test_resuming_falls_back_to_the_checkpoint_before_a_damaged_one(workplace, capsys, damage):
    straight = run(out_dir="straight")
    run("--eval_interval=2", "--max_iters=6")
    for name in ("ckpt.pt", "ckpt-6.pt", "best.pt"):
        path = Path("out", name)
        content = bytearray(path.read_bytes())
        path.unlink()
        if damage == "truncated":
            del content[-100:]
        else:
            content[len(content) // 2] ^= 1
        path.write_bytes(content)
    capsys.readouterr()
    resumed = run("--eval_interval=2", "--init_from=resume")
    said = capsys.readouterr().out
    assert "out/ckpt.pt is damaged" in said and "out/ckpt-6.pt is damaged" in said
    assert "iter 4:" in said and "iter 3:" not in said
    for name, weight in straight["model"].items():
        assert torch.equal(weight, resumed["model"][name]), name
    steps = [r["iter"] for r in metrics.read(Path("out/metrics.jsonl")) if "loss" in r]
    assert steps == list(range(8))


def test_damage_anywhere_in_a_file_leads_to_one_that_can_be_read(workplace):
    run("--max_iters=4", "--eval_interval=2", "--n_layer=1", "--n_embd=8", "--n_head=1")
    latest = Path("out/ckpt.pt")
    whole = latest.read_bytes()
    for name in ("ckpt.pt", "ckpt-4.pt", "best.pt"):
        Path("out", name).unlink()
    fell_back = 0
    for bit in range(0, 8 * len(whole), 8 * len(whole) // 150 + 1):  # headers and directory are most of it
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        latest.write_bytes(damaged)
        found, saved = checkpoint.newest_whole(latest)
        assert saved.iter_num == (4 if found == latest else 2)
        fell_back += found != latest
    assert fell_back > 75


@pytest.mark.parametrize("source", ["resume", "auto"])
def test_a_latest_that_is_lost_is_replaced_by_the_one_before(workplace, capsys, source):
    run("--max_iters=6", "--eval_interval=2")
    for name in ("ckpt.pt", "ckpt-6.pt"):
        Path("out", name).unlink()
    capsys.readouterr()
    run(f"--init_from={source}", "--max_iters=6", "--eval_interval=2")
    said = capsys.readouterr().out
    assert "out/ckpt.pt is not there: looking for the one before" in said
    assert "iter 4:" in said and "iter 3:" not in said


def test_killed_between_its_names_a_checkpoint_is_made_again(workplace, monkeypatch):
    """best.pt may be ahead of ckpt.pt for that long, never behind."""
    run("--eval_interval=2", out_dir="straight")
    replace = Path.replace

    def killed(source, target):
        if Path(target).name == "ckpt.pt" and torch.load(source)["iter_num"] == 4:
            raise KeyboardInterrupt
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run("--eval_interval=2")
    monkeypatch.setattr(Path, "replace", replace)
    assert [torch.load(f"out/{n}.pt")["iter_num"] for n in ("ckpt", "best")] == [2, 4]
    run("--eval_interval=2", "--init_from=resume")
    for name in ("ckpt.pt", "best.pt"):
        a, b = (torch.load(f"{d}/{name}") for d in ("straight", "out"))
        assert a["iter_num"] == b["iter_num"] and a["best_val_loss"] == b["best_val_loss"]


def at(step):
    return Checkpoint(model={}, model_args={}, iter_num=step)


def test_the_last_few_are_kept_and_none_of_a_future_that_was_given_up(tmp_path):
    def kept():
        return sorted(p.name for p in tmp_path.glob("ckpt-*.pt"))

    for step in (900, 1000, 1100):
        checkpoint.save(tmp_path, at(step), best=False, keep_last=2)
    assert kept() == ["ckpt-1000.pt", "ckpt-1100.pt"]
    assert (tmp_path / "ckpt.pt").samefile(tmp_path / "ckpt-1100.pt"), "it costs no second file"
    (tmp_path / "ckpt-mine.pt").touch()
    checkpoint.save(tmp_path, at(1050), best=False, keep_last=2)
    assert kept() == ["ckpt-1000.pt", "ckpt-1050.pt", "ckpt-mine.pt"]
    checkpoint.save(tmp_path, at(1060), best=False, keep_last=0)
    assert kept() == ["ckpt-mine.pt"]


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_checkpoint_that_would_run_code_is_refused(workplace):
    torch.save({"model": {}, "model_args": {}, "extra": Hostile()}, "hostile.pt")
    with pytest.raises(ValueError, match=r"hostile.pt .* holds objects, which could run code"):
        run("--init_from=hostile.pt")
    Path("raw.pt").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match=r"raw.pt"):
        run("--init_from=raw.pt")
    assert not Path("executed").exists()


def test_what_is_no_checkpoint_is_told(workplace):
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint out/ckpt.pt"):
        run("--init_from=resume")
    with pytest.raises(ValueError, match="init_from='scrath' is none of scratch, resume"):
        run("--init_from=scrath")
    torch.save({"weights": 1}, "other.pt")
    with pytest.raises(ValueError, match="it lacks model, model_args"):
        run("--init_from=other.pt")
    with pytest.raises(ValueError, match=r"list.pt is not a GPT checkpoint: it holds a list"):
        torch.save([1, 2], "list.pt")
        run("--init_from=list.pt")


def test_a_full_disk_leaves_the_previous_checkpoint_whole(workplace):
    run("--max_iters=4")
    before = Path("out/ckpt.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(OSError, match=r"ckpt.pt could not be written .*; the previous one is whole"):
            run("--init_from=resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Path("out/ckpt.pt").read_bytes() == before
    left = sorted(p.name for p in Path("out").iterdir())
    assert left == ["best.pt", "ckpt-4.pt", "ckpt.pt", "config.py", "metrics.jsonl"]


def test_a_crash_while_saving_leaves_the_previous_checkpoint_whole(workplace, monkeypatch):
    run("--max_iters=4")
    before = Path("out/ckpt.pt").read_bytes()

    def torn(state, path):
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        run("--init_from=resume")
    assert Path("out/ckpt.pt").read_bytes() == before


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_touch_it(workplace, monkeypatch):
    """Saving takes as long as the rest of the run: it writes the weights of its own step all the same."""
    go_on, save = threading.Event(), torch.save

    def slow(state, path):
        if state["iter_num"] == 4:
            assert go_on.wait(60)
        save(state, path)

    monkeypatch.setattr(torch, "save", slow)
    step = metrics.Metrics.step

    def notes(self, number, *rest):
        step(self, number, *rest)
        if number == 7:
            go_on.set()

    monkeypatch.setattr(metrics.Metrics, "step", notes)
    run("--keep_last=2")
    monkeypatch.undo()
    os.chdir(workplace)
    straight = run("--max_iters=4", out_dir="straight")
    assert torch.load("out/ckpt-8.pt")["iter_num"] == 8
    slowly = torch.load("out/ckpt-4.pt", weights_only=True)
    for name, weight in straight["model"].items():
        assert torch.equal(weight, slowly["model"][name]), name
    for i, state in straight["optimizer"]["state"].items():
        assert all(torch.equal(value, slowly["optimizer"]["state"][i][k]) for k, value in state.items())


def test_a_checkpoint_that_could_not_be_written_ends_the_run_soon(workplace, monkeypatch):
    def full(state, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"No space left on device\); there is none yet"):
        run("--max_iters=1000", "--eval_interval=2")
    assert len(metrics.read(Path("out/metrics.jsonl"))) < 100


def test_a_folder_that_cannot_be_written_to_is_told_before_training(workplace):
    Path("file").touch()
    with pytest.raises(OSError, match="out_dir='file/out' cannot be written to"):
        run(out_dir="file/out")


def test_saving_flushes_to_the_disk_before_the_name_changes(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append("fsync"))
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda a, b: (calls.append(b.name), replace(a, b))[1])
    checkpoint.save(tmp_path, at(1), best=True)
    assert calls == ["fsync", "best.pt", "ckpt.pt", "fsync"]  # the file, then its names, then the folder
    assert (tmp_path / "best.pt").samefile(tmp_path / "ckpt.pt")
    checkpoint.save(tmp_path, at(2), best=False)
    numbers = [torch.load(tmp_path / name)["iter_num"] for name in ("ckpt.pt", "best.pt")]
    assert numbers == [2, 1]


def test_a_stale_temporary_file_shares_no_bytes_with_what_is_saved(tmp_path):
    """Left by a crash between linking best.pt and renaming it: a third name of both checkpoints."""
    checkpoint.save(tmp_path, at(1), best=True)
    os.link(tmp_path / "ckpt.pt", tmp_path / "ckpt.pt.tmp")
    os.link(tmp_path / "ckpt.pt", tmp_path / "best.pt.tmp")
    checkpoint.save(tmp_path, at(2), best=False)
    assert torch.load(tmp_path / "best.pt")["iter_num"] == 1
    checkpoint.save(tmp_path, at(3), best=True)
    assert torch.load(tmp_path / "best.pt")["iter_num"] == torch.load(tmp_path / "ckpt.pt")["iter_num"] == 3


def test_best_is_copied_where_there_are_no_links(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    checkpoint.save(tmp_path, at(1), best=True)
    checkpoint.save(tmp_path, at(2), best=False)
    assert [torch.load(tmp_path / name)["iter_num"] for name in ("ckpt.pt", "best.pt")] == [2, 1]


def test_an_optimizer_of_another_shape_is_refused(workplace):
    state = run("--max_iters=4")
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(state, "out/ckpt.pt")
    with pytest.raises(ValueError, match=r"optimizer: exp_avg of tensor 0 is \(3,\), not \(21, 32\)"):
        run("--init_from=resume")


def test_resuming_says_which_settings_are_not_as_before(workplace, capsys):
    run("--max_iters=4")
    capsys.readouterr()
    run("--init_from=resume", "--max_iters=4", "--seed=7", "--eval_only=True")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not as before")]
    assert lines == [
        "not as before: eval_only was False and is True",
        "not as before: seed was 1337 and is 7",
    ]


def test_fine_tuning_takes_the_shape_of_the_checkpoint_or_refuses(workplace):
    run("--max_iters=1")
    with pytest.raises(ValueError, match=r"out/ckpt.pt has n_embd=32, and n_embd=64 was asked for"):
        run("--init_from=out/ckpt.pt", "--n_embd=64", out_dir="tuned")


def test_gpt2_by_folder_starts_a_fine_tuning_with_the_tokenizer_of_the_data(workplace, capsys):
    """`init_from=gpt2*` goes through transformers, here with a small model of random weights.

    The folder has no tokenizer, so that of the data is taken, with a line that says so.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    hf = GPT2LMHeadModel(GPT2Config(vocab_size=50257, n_positions=32, n_layer=1, n_head=2, n_embd=16))
    hf.save_pretrained("gpt2-small")
    flags = (
        "--init_from=gpt2-small --dataset=tiny --device=cpu --batch_size=2 --gradient_accumulation_steps=1 "
    )
    flags += "--eval_iters=1 --max_iters=1 --learning_rate=0 --min_lr=0 --block_size=16"
    note = "gpt2-small does not say which tokenizer it was trained with: that of data/tiny is taken, "
    for out_dir, data_tokenizer in (("chars", "char (21 symbols)"), ("out", "gpt2 (50,257 symbols)")):
        config, given = parse([*flags.split(), f"--out_dir={out_dir}"])
        train(config, distributed.start("auto", "cpu"), given)
        assert f"{note}{data_tokenizer}\n" in capsys.readouterr().out
        (workplace / "data" / "tiny" / "meta.pkl").unlink(missing_ok=True)
    model, state = pretrained.from_checkpoint(Path("out/ckpt.pt"))
    assert state.tokenizer == {"kind": "gpt2"}
    assert state.gpt_config["activation"] == "gelu_tanh" and state.model_args["block_size"] == 16
    idx = torch.arange(16)[None]
    torch.testing.assert_close(
        model.eval()(idx, idx, return_logits=True)[0], hf.eval()(idx).logits, rtol=1e-4, atol=1e-5
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("source", ["scratch", "out", "out/ckpt.pt", "hf"])
def test_a_new_run_does_not_replace_the_checkpoints_of_another(workplace, source):
    run("--max_iters=4")
    if source == "hf":
        convert("out/ckpt.pt", Path("hf"))
    before = contents("out")
    with pytest.raises(ValueError) as error:
        run(f"--init_from={source}", "--max_iters=2")
    said = str(error.value)
    today = datetime.now().date().isoformat()
    assert said.startswith(f"out/ckpt.pt is the checkpoint of another run (step 4, saved {today} ")
    assert "--init_from=resume" in said and "--out_dir=FOLDER" in said
    assert contents("out") == before


@pytest.mark.parametrize("name", ["best.pt", "ckpt-4.pt"])
@pytest.mark.parametrize("source", ["scratch", "auto"])
def test_one_checkpoint_that_cannot_be_read_is_not_replaced_either(workplace, name, source):
    run("--max_iters=4")
    for path in Path("out").glob("*.pt"):
        path.unlink()
    Path("out", name).write_bytes(b"damaged")
    sentence = {
        "scratch": rf"out/{name} is the checkpoint of another run \(unreadable, saved",
        "auto": rf"out/{name} .* is truncated .*; no checkpoint beside it is whole either",
    }[source]
    with pytest.raises(ValueError, match=sentence):
        run(f"--init_from={source}")
    assert Path("out", name).read_bytes() == b"damaged"


def test_a_folder_without_checkpoints_is_free(workplace):
    """What a run that stopped before its first one has left, and a file of the user."""
    run("--max_iters=4")
    for path in Path("out").glob("*.pt"):
        path.unlink()
    Path("out/ckpt-mine.pt").write_bytes(b"mine")
    assert run("--max_iters=6")["iter_num"] == 6
    assert [r["iter"] for r in metrics.read(Path("out/metrics.jsonl")) if "loss" in r] == list(range(6))
    assert Path("out/ckpt-mine.pt").read_bytes() == b"mine"


@pytest.mark.parametrize("source", ["resume", "auto"])
def test_resuming_takes_the_data_that_the_run_was_trained_on(workplace, capsys, source):
    straight = run(out_dir="straight")
    run("--max_iters=4")
    flags = [flag for flag in TINY if not flag.startswith("--dataset")]
    config, given = parse([*flags, f"--init_from={source}"])
    capsys.readouterr()
    train(config, distributed.start("auto", "cpu"), given)
    said = capsys.readouterr().out
    assert "dataset: tiny, as in out/ckpt.pt\n" in said and "not as before: dataset" not in said
    state = torch.load("out/ckpt.pt", weights_only=True)
    assert (state["config"]["dataset"], parse(["out/config.py"])[0].dataset) == ("tiny", "tiny")
    assert all(torch.equal(weight, state["model"][name]) for name, weight in straight["model"].items())


def test_data_that_a_flag_names_are_taken_when_resuming(workplace):
    run("--max_iters=4")
    with pytest.raises(FileNotFoundError, match="data/moved"):
        run("--init_from=resume", "--dataset=moved")


def test_a_second_run_at_the_same_time_stops_and_the_first_goes_on(workplace, monkeypatch, capsys):
    flags = [*TINY, "--device=cpu", "--max_iters=4", "--out_dir=out"]
    config, given = parse(flags)
    ranks = distributed.start("auto", "cpu")
    with checkpoint.locked_folder(config, ranks):
        for source in ("scratch", "auto"):
            code, _, err = command(main, monkeypatch, capsys, *flags, f"--init_from={source}")
            assert code == 1 and f"another run writes to out now (process {os.getpid()} on " in err
        assert [path.name for path in Path("out").iterdir()] == [".lock"], "the second has written nothing"
        command(main, monkeypatch, capsys, *flags, "--eval_only=True")
        assert [path.name for path in Path("out").iterdir()] == [".lock"]
        code, _, err = command(main, monkeypatch, capsys, *flags, "--out_dir=elsewhere")
        assert code == 0, err
        train(config, ranks, given)
    code, _, err = command(main, monkeypatch, capsys, *flags, "--init_from=resume", "--max_iters=6")
    assert code == 0 and torch.load("out/ckpt.pt")["iter_num"] == 6, err


def test_a_file_system_without_locks_stops_no_run(workplace, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    code, _, err = command(main, monkeypatch, capsys, *TINY, "--max_iters=4", "--out_dir=out")
    assert code == 0 and torch.load("out/ckpt.pt")["iter_num"] == 4, err
