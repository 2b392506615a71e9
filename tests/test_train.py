"""Whole runs: exactness of resuming and of several ranks, what a run prints, what it leaves behind."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.runs import TINY, run, surroundings
from train import distributed, loop, metrics
from train.config import PRESETS, TrainConfig, parse
from train.loop import train
from train.optim import learning_rate

ROOT = Path(__file__).parents[1]


def same_weights(a, b):
    return all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


def records(out_dir):
    """metrics.jsonl without what the machine gives."""
    machine = {"ms", "tokens_per_s", "mfu", "memory_gb"}
    return [
        {k: v for k, v in r.items() if k not in machine} for r in metrics.read(Path(out_dir, "metrics.jsonl"))
    ]


def torchrun(*flags, ranks=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    result = subprocess.run(
        [*command, "-m", "train", *TINY, *flags],
        env=surroundings(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("preset", sorted(p.stem for p in PRESETS.glob("*.py")))
def test_every_preset_starts_with_nothing_optional_installed(workplace, monkeypatch, capsys, preset):
    """Its flags as they are, but for the data, the weights to begin with, the size and the length."""
    for package in ("wandb", "transformers", "safetensors", "datasets", "tokenizers", "flash_attn"):
        monkeypatch.setitem(sys.modules, package, None)
    sizes = [flag for flag in TINY if not flag.startswith(("--learning_rate", "--warmup", "--eval_interval"))]
    flags = [*sizes, "--init_from=scratch", "--out_dir=out", "--max_iters=2", "--eval_iters=1"]
    config, given = parse([preset, *flags])
    train(config, distributed.start("auto", "cpu"), given)
    losses = re.search(r"^step 0: train loss (\S+), val loss (\S+)", capsys.readouterr().out, re.MULTILINE)
    assert losses and all(2.5 < float(loss.rstrip(",")) < 4 for loss in losses.groups())
    assert Path("out", "ckpt.pt").exists() != config.eval_only


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_resuming_equals_never_having_stopped_bit_for_bit(workplace, dtype, optimizer):
    flags = ["--dropout=0.2", f"--dtype={dtype}", f"--optimizer={optimizer}", "--eval_sample=5"]
    straight = run(*flags, out_dir="straight")
    run(*flags, "--max_iters=4", out_dir="stopped")
    with open("stopped/metrics.jsonl", "a") as f:  # what a crash after the checkpoint leaves
        f.write('{"iter": 4, "loss": 1.0}\n{"iter": 5, "lo')
    resumed = run(*flags, "--init_from=resume", out_dir="stopped")
    assert same_weights(straight, resumed)
    assert records("straight") == records("stopped")
    for a, b in zip(
        straight["optimizer"]["state"].values(), resumed["optimizer"]["state"].values(), strict=True
    ):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert straight["scaler"] == resumed["scaler"]
    assert torch.equal(straight["rng"][0]["cpu"], resumed["rng"][0]["cpu"])
    assert (resumed["iter_num"], resumed["position"]) == (8, 8 * 4 * 2)
    assert straight["best_val_loss"] == resumed["best_val_loss"]


def test_evaluating_more_often_changes_nothing_else(workplace):
    often = run("--dropout=0.2", "--eval_interval=1", "--eval_sample=5", out_dir="often")
    seldom = run("--dropout=0.2", "--eval_interval=8", "--eval_iters=1", out_dir="seldom")
    assert same_weights(often, seldom)


def test_two_ranks_equal_one_on_the_same_global_batch(workplace):
    one = run(out_dir="one")
    torchrun("--out_dir=two")
    two = torch.load("two/ckpt.pt", weights_only=True)
    for name, weight in one["model"].items():
        torch.testing.assert_close(two["model"][name], weight, rtol=1e-4, atol=1e-5, msg=name)
    for a, b in zip(records("one"), records("two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4), "the logged loss is the mean over the whole global batch"
    assert len(two["rng"]) == 2 and not torch.equal(two["rng"][0]["cpu"], two["rng"][1]["cpu"])


def test_a_run_of_three_ranks_resumes_on_three_bit_for_bit_and_on_one(workplace):
    """Of three, because the sum of two has but one order."""
    flags = ["--dropout=0.2", "--gradient_accumulation_steps=3", "--eval_interval=2"]
    torchrun(*flags, "--max_iters=4", "--out_dir=straight", ranks=3)
    torchrun(*flags, "--max_iters=2", "--out_dir=stopped", ranks=3)
    (workplace / "one").mkdir()
    (workplace / "one" / "ckpt.pt").write_bytes((workplace / "stopped" / "ckpt.pt").read_bytes())
    torchrun(*flags, "--max_iters=4", "--out_dir=stopped", "--init_from=resume", ranks=3)
    straight, resumed = (torch.load(f"{d}/ckpt.pt", weights_only=True) for d in ("straight", "stopped"))
    assert same_weights(straight, resumed)
    assert records("straight") == records("stopped")
    alone = run(*flags, "--max_iters=4", "--init_from=resume", out_dir="one")
    assert alone["position"] == straight["position"]


def test_what_is_printed_is_nanogpts(workplace, capsys):
    run("--log_interval=2")
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("iter ")]
    assert len(steps) == 4
    assert all(re.fullmatch(r"iter \d+: loss \d\.\d{4}, time \d+\.\d\dms", line) for line in steps)
    evaluations = [line for line in lines if line.startswith("step ")]
    assert [line.split(":")[0] for line in evaluations] == ["step 0", "step 4", "step 8"]
    assert all(re.fullmatch(r"step \d: train loss \d\.\d{4}, val loss \d\.\d{4}", e) for e in evaluations)
    assert any("tokens per iteration will be: 128 " in line for line in lines)


def test_mfu_is_printed_where_the_peak_is_known(workplace, capsys, monkeypatch):
    monkeypatch.setattr(
        "gpt.model.GPT.estimate_mfu", lambda self, sequences, seconds, dtype: 0.25 * sequences / 8
    )
    run()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("iter ")]
    assert [line.endswith("ms, mfu 25.00%") for line in lines] == [False] * 5 + [True] * 3
    assert [r["mfu"] for r in metrics.read(Path("out/metrics.jsonl")) if "loss" in r] == [None] * 5 + [
        25.0
    ] * 3


def test_exactly_max_iters_updates_then_an_evaluation_and_a_checkpoint(workplace):
    checkpoint = run("--max_iters=5", "--eval_interval=100")
    steps = [s["step"].item() for s in checkpoint["optimizer"]["state"].values()]
    assert set(steps) == {5}
    assert [r["iter"] for r in records("out") if "loss" in r] == [0, 1, 2, 3, 4]
    assert [r["iter"] for r in records("out") if "val/loss" in r] == [0, 5]
    assert checkpoint["iter_num"] == 5


def test_a_finished_run_says_so(workplace, capsys):
    first = run()
    before = Path("out/ckpt.pt").stat()
    assert same_weights(first, run("--init_from=auto"))
    assert "out/ckpt.pt is of a finished run: all 8 steps are made" in capsys.readouterr().out
    assert Path("out/ckpt.pt").stat().st_mtime_ns == before.st_mtime_ns


def test_eval_only_trains_nothing_and_saves_nothing_also_when_resuming(workplace):
    run()
    before = {p: p.read_bytes() for p in Path("out").iterdir()}
    for source in ("resume", "scratch"):
        run(f"--init_from={source}", "--eval_only=True")
    assert {p: p.read_bytes() for p in Path("out").iterdir()} == before


def test_best_checkpoint_is_that_of_the_lowest_validation_loss(workplace, monkeypatch):
    losses = iter([3.0, 1.0, math.nan, 1.5, 1.2])
    monkeypatch.setattr(loop, "estimate_loss", lambda *a: dict.fromkeys(("train", "val"), next(losses)))
    latest = run("--eval_interval=2")
    best = torch.load("out/best.pt", weights_only=True)
    assert (latest["iter_num"], best["iter_num"]) == (8, 2)
    assert latest["best_val_loss"] == best["best_val_loss"] == 1.0
    lines = Path("out/metrics.jsonl").read_text().splitlines()
    strict = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [r["val/loss"] for r in strict if "val/loss" in r] == [3.0, 1.0, None, 1.5, 1.2]


def test_training_learns_and_half_precision_follows(workplace):
    long = ["--max_iters=60", "--lr_decay_iters=60", "--eval_interval=60", "--eval_iters=8"]
    final = {}
    for dtype in ("float32", "bfloat16", "float16"):
        checkpoint = run(*long, f"--dtype={dtype}", out_dir=dtype)
        final[dtype] = records(dtype)[-1]["val/loss"]
        assert all(w.dtype == torch.float32 for w in checkpoint["model"].values())
    assert final["float32"] < 2.3  # from 3.04, the log of 21 symbols
    assert final["bfloat16"] == pytest.approx(final["float32"], abs=0.05)
    assert final["float16"] == pytest.approx(final["float32"], abs=0.05)


def test_accumulation_changes_the_memory_not_the_step(workplace):
    whole = run("--batch_size=8", "--gradient_accumulation_steps=1", out_dir="whole")
    parts = run("--batch_size=2", "--gradient_accumulation_steps=4", out_dir="parts")
    for name, weight in whole["model"].items():
        torch.testing.assert_close(parts["model"][name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_gradient_is_clipped_and_its_norm_logged(workplace):
    run("--max_iters=2", out_dir="clipped")
    run("--max_iters=2", "--grad_clip=0", out_dir="free")
    norms = [[r["grad_norm"] for r in records(d) if "loss" in r] for d in ("clipped", "free")]
    assert norms[0][0] == pytest.approx(norms[1][0]) and norms[0][0] > 1.0, "it is that before clipping"
    losses = [[r["loss"] for r in records(d) if "loss" in r] for d in ("clipped", "free")]
    assert losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]


def test_compiled_once_without_a_graph_break_and_saved_bare(workplace, capsys):
    torch._dynamo.utils.counters.clear()
    eager = run("--max_iters=3", "--n_layer=1", out_dir="eager")
    compiled = run("--max_iters=3", "--n_layer=1", "--compile=True", out_dir="compiled")
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2, "the step's, made by the first pass, and the evaluation's"
    assert not counters["graph_break"]
    assert re.search(
        r"^compiled, with a first pass, in \d+\.\d s, which", capsys.readouterr().out, re.MULTILINE
    )
    assert compiled["model"].keys() == eager["model"].keys()
    for name, weight in eager["model"].items():
        torch.testing.assert_close(compiled["model"][name], weight, rtol=1e-3, atol=1e-4, msg=name)


def nanogpt_learning_rate(it, c):
    if it < c.warmup_iters:
        return c.learning_rate * (it + 1) / (c.warmup_iters + 1)
    if it > c.lr_decay_iters:
        return c.min_lr
    ratio = (it - c.warmup_iters) / (c.lr_decay_iters - c.warmup_iters)
    return c.min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (c.learning_rate - c.min_lr)


def test_learning_rate_is_nanogpts():
    config = TrainConfig(warmup_iters=10, lr_decay_iters=50)
    for it in range(70):
        assert learning_rate(it, config) == pytest.approx(nanogpt_learning_rate(it, config), rel=1e-12)
    constant = TrainConfig(decay_lr=False)
    assert {learning_rate(it, constant) for it in (0, 5, 10**6)} == {constant.learning_rate}


def test_wsd_warms_up_stays_and_comes_down():
    config = TrainConfig(
        schedule="wsd", warmup_iters=10, lr_decay_iters=100, wsd_decay_iters=20, learning_rate=1.0, min_lr=0.1
    )
    rates = [learning_rate(it, config) for it in range(120)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert set(rates[10:81]) == {1.0}
    assert rates[90] == pytest.approx(0.55)
    assert set(rates[100:]) == {0.1}


def test_metrics_are_documented(workplace):
    run()
    documented = metrics.__doc__
    for record in map(json.loads, Path("out/metrics.jsonl").read_text().splitlines()):
        assert all(re.search(rf"\b{re.escape(field)}\b", documented) for field in record), record


def test_fine_tuning_takes_weights_and_nothing_else(workplace):
    trained = run()
    start = run(
        "--init_from=out/ckpt.pt", "--max_iters=1", "--learning_rate=0", "--min_lr=0", out_dir="tuned"
    )
    assert same_weights(trained, start)
    assert {s["step"].item() for s in start["optimizer"]["state"].values()} == {1}
    assert start["iter_num"] == 1
    shorter = run("--init_from=out/ckpt.pt", "--block_size=8", "--max_iters=1", out_dir="shorter")
    assert shorter["model"]["transformer.wpe.weight"].shape == (8, 32)


def test_a_sample_that_cannot_be_drawn_does_not_end_the_training(workplace, monkeypatch, capsys):
    import gpt.generate

    monkeypatch.setattr(gpt.generate, "choose", lambda logits, *_: torch.full_like(logits[:, 0], -1).long())
    assert run("--eval_sample=5")["iter_num"] == 8
    assert capsys.readouterr().out.count("no sample: the logits of the model are not finite") == 3
