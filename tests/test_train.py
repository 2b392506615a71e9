"""Whole runs: results, exact resuming, evaluation, and what a run prints."""

import json
import math
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.runs import (
    TINY,
    assert_close_weights,
    assert_same_run,
    assert_same_weights,
    load,
    run,
    series,
)
from train import distributed, loop
from train.config import PRESETS, TrainConfig, parse
from train.loop import train
from train.optim import learning_rate


@pytest.mark.parametrize("preset", sorted(p.stem for p in PRESETS.glob("*.py")))
def test_every_preset_trains_without_optional_packages(workplace, monkeypatch, capsys, preset):
    """With the preset's flags, except for data, size, length and initial weights."""
    for package in ("wandb", "transformers", "safetensors", "datasets", "tokenizers", "flash_attn"):
        monkeypatch.setitem(sys.modules, package, None)
    sizes = [flag for flag in TINY if not flag.startswith(("--learning_rate", "--warmup", "--eval_interval"))]
    flags = [*sizes, "--init_from=scratch", "--out_dir=out", "--max_iters=2", "--eval_iters=1"]
    config, given = parse([preset, *flags])
    train(config, distributed.start("auto", "cpu"), given)
    losses = re.search(r"^step 0: train loss (\S+), val loss (\S+)", capsys.readouterr().out, re.MULTILINE)
    assert losses and all(2.5 < float(loss.rstrip(",")) < 4 for loss in losses.groups())
    assert Path("out", "ckpt.pt").exists() != config.eval_only


# ---- resuming


@pytest.mark.parametrize(("dtype", "optimizer"), [("float32", "muon"), ("float16", "adamw")])
def test_a_resumed_run_equals_an_uninterrupted_run_bit_for_bit(workplace, dtype, optimizer):
    flags = ["--dropout=0.2", f"--dtype={dtype}", f"--optimizer={optimizer}", "--eval_sample=5"]
    run(*flags, out_dir="straight")
    run(*flags, "--max_iters=4", out_dir="stopped")
    with open("stopped/metrics.jsonl", "r+") as f:  # what a crash after the checkpoint leaves
        step = f.readlines()[-2]
        f.write(step.replace('"iter": 3', '"iter": 4') + step[:20])
    resumed = run(*flags, "--init_from=resume", out_dir="stopped")
    assert_same_run("straight", "stopped")
    assert (resumed["iter_num"], resumed["position"]) == (8, 8 * 4 * 2)
    assert bool(resumed["scaler"]) == (dtype == "float16")


def test_fine_tuning_loads_only_the_weights(workplace):
    trained = run()
    still = ["--init_from=out/ckpt.pt", "--max_iters=1", "--learning_rate=0", "--min_lr=0"]
    tuned = run(*still, out_dir="tuned")
    assert_same_weights(trained, tuned)
    assert {moments["step"].item() for moments in tuned["optimizer"]["state"].values()} == {1}
    assert tuned["iter_num"] == 1
    shorter = run(*still, "--block_size=8", out_dir="shorter")["model"]["transformer.wpe.weight"]
    assert torch.equal(shorter, trained["model"]["transformer.wpe.weight"][:8])


# ---- steps


def test_training_lowers_the_loss_also_in_half_precision(workplace):
    flags = ["--max_iters=60", "--lr_decay_iters=60", "--eval_interval=60", "--eval_iters=8"]
    first_norm, last_loss = {}, {}
    for dtype in ("float32", "bfloat16", "float16"):
        checkpoint = run(*flags, f"--dtype={dtype}", out_dir=dtype)
        first_norm[dtype], last_loss[dtype] = series(dtype, "grad_norm")[0], series(dtype, "val/loss")[-1]
        assert all(weight.dtype == torch.float32 for weight in checkpoint["model"].values())
    assert last_loss["float32"] < 2.3  # from 3.04, the log of 21 symbols
    for dtype in ("bfloat16", "float16"):
        assert first_norm[dtype] == pytest.approx(first_norm["float32"], rel=0.02)
        assert last_loss[dtype] == pytest.approx(last_loss["float32"], abs=0.05)


def test_a_run_makes_max_iters_steps_then_evaluates_and_saves(workplace):
    checkpoint = run("--max_iters=5", "--eval_interval=100")
    assert {moments["step"].item() for moments in checkpoint["optimizer"]["state"].values()} == {5}
    assert series("out", "iter", of="loss") == [0, 1, 2, 3, 4]
    assert series("out", "iter", of="val/loss") == [0, 5]
    assert checkpoint["iter_num"] == 5


def test_gradient_accumulation_does_not_change_the_step(workplace):
    whole = run("--batch_size=8", "--gradient_accumulation_steps=1", out_dir="whole")
    parts = run("--batch_size=2", "--gradient_accumulation_steps=4", out_dir="parts")
    assert_close_weights(whole, parts)


def test_the_gradient_is_clipped_and_its_norm_before_clipping_is_logged(workplace):
    run("--max_iters=2", out_dir="clipped")
    run("--max_iters=2", "--grad_clip=0", out_dir="free")
    norms = [series(d, "grad_norm")[0] for d in ("clipped", "free")]
    assert norms[0] == pytest.approx(norms[1]) and norms[0] > 1.0, "the norm before clipping"
    clipped, free = series("clipped", "loss"), series("free", "loss")
    assert clipped[0] == free[0] and clipped[1] != free[1]
    run("--max_iters=2", "--grad_clip=1e9", out_dir="high")
    assert series("high", "loss") == free, "0 switches clipping off"


def test_a_compiled_model_has_no_graph_break_and_is_saved_without_wrappers(workplace, monkeypatch, capsys):
    """Without code generation, which takes half a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.utils.counters.clear()
    eager = run("--max_iters=3", out_dir="eager")
    compiled = run("--max_iters=3", "--compile=True", out_dir="compiled")
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2, "the step's, made by the first pass, and the evaluation's"
    assert not counters["graph_break"]
    assert re.search(r"^compiled in \d+\.\d s, including a first pass", capsys.readouterr().out, re.MULTILINE)
    assert compiled["model"].keys() == eager["model"].keys()
    assert_close_weights(eager, compiled, rtol=1e-3)


def test_the_cosine_schedule_is_nanogpts():
    def nanogpts(it, c):
        if it < c.warmup_iters:
            return c.learning_rate * (it + 1) / (c.warmup_iters + 1)
        if it > c.lr_decay_iters:
            return c.min_lr
        ratio = (it - c.warmup_iters) / (c.lr_decay_iters - c.warmup_iters)
        return c.min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (c.learning_rate - c.min_lr)

    config = TrainConfig(warmup_iters=10, lr_decay_iters=50)
    for it in range(70):
        assert learning_rate(it, config) == pytest.approx(nanogpts(it, config), rel=1e-12)
    constant = TrainConfig(decay_lr=False)
    assert {learning_rate(it, constant) for it in (0, 5, 10**6)} == {constant.learning_rate}


@pytest.mark.parametrize("wsd_decay_iters", [20, 0])
def test_wsd_warms_up_stays_constant_and_decays_over_the_last_fifth_by_default(wsd_decay_iters):
    sizes = dict(warmup_iters=10, lr_decay_iters=100, learning_rate=1.0, min_lr=0.1)
    config = TrainConfig(schedule="wsd", wsd_decay_iters=wsd_decay_iters, **sizes)
    rates = [learning_rate(it, config) for it in range(120)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert set(rates[10:81]) == {1.0}
    assert rates[90] == pytest.approx(0.55)
    assert set(rates[100:]) == {0.1}


# ---- evaluation and what is printed


def test_the_number_of_evaluations_does_not_change_the_weights(workplace):
    often = run("--dropout=0.2", "--eval_interval=1", "--eval_sample=5", out_dir="often")
    seldom = run("--dropout=0.2", "--eval_interval=8", "--eval_iters=1", out_dir="seldom")
    assert_same_weights(often, seldom)


def test_a_finished_run_and_eval_only_write_nothing(workplace, capsys):
    run("--init_from=auto")
    assert parse(["out/config.py"])[0].init_from == "scratch"
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    run("--init_from=auto")
    assert "out/ckpt.pt has made 8 steps, and max_iters=8 leaves no more" in capsys.readouterr().out
    for source in ("resume", "scratch"):
        run(f"--init_from={source}", "--eval_only=True")
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before
    config, given = parse([*TINY, "--out_dir=elsewhere", "--eval_only=True"])
    train(config, distributed.start("auto", "cpu"), given)
    assert not Path("elsewhere").exists()


def test_best_pt_has_the_lowest_validation_loss(workplace, monkeypatch):
    losses = iter([3.0, 1.0, math.nan, 1.5, 1.2])
    monkeypatch.setattr(loop, "estimate_loss", lambda *a: dict.fromkeys(("train", "val"), next(losses)))
    latest, best = run("--eval_interval=2"), load("out", "best.pt")
    assert (latest["iter_num"], best["iter_num"]) == (8, 2)
    assert latest["best_val_loss"] == best["best_val_loss"] == 1.0
    lines = Path("out/metrics.jsonl").read_text().splitlines()
    strict = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [r["val/loss"] for r in strict if "val/loss" in r] == [3.0, 1.0, None, 1.5, 1.2]


def test_a_failed_sample_does_not_end_the_training(workplace, monkeypatch, capsys):
    import gpt.generate

    monkeypatch.setattr(gpt.generate, "draw_ids", lambda logits, *_: torch.full_like(logits[:, 0], -1).long())
    assert run("--eval_sample=5")["iter_num"] == 8
    assert capsys.readouterr().out.count("no sample: the logits of the model are not finite") == 3


def test_no_rank_samples_if_one_has_no_tokenizer_and_rank_0_prints_why(monkeypatch, capsys):
    monkeypatch.setattr(distributed.Ranks, "gather", lambda self, reason: [reason, "no network"])
    config, ranks = TrainConfig(eval_sample=5, strategy="fsdp"), distributed.Ranks(0, 2, "cpu", None)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=2))
    description = {"kind": "char", "symbols": ["a", "b"]}
    log = SimpleNamespace(print=print)
    assert loop.tokenizer_for_samples(description, model, config, ranks, log) is None
    assert capsys.readouterr().out == "no samples: no network\n"
