"""What weeks on a cluster bring: signals, kills, dead and hung ranks, bad gradients; strategies.

KILLS=100 (make soak) kills more often than a test can.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.runs import TINY, run
from train import metrics

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("KILLS", "3"))


def start(*flags, ranks=0, environment=None, agent=()):
    """`python -m train`, under torchrun where there are ranks, in a process group of its own."""
    command = [sys.executable]
    if ranks:
        agent = agent or ("--standalone",)
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", *agent]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | (environment or {})
    return subprocess.Popen(
        [*command, "-m", "train", *TINY, *flags], env=env, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process, code=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    return out, err


def wait_for(condition, what, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.01)


def steps(out_dir):
    path = Path(out_dir, "metrics.jsonl")
    return [r["iter"] for r in metrics.read(path) if "loss" in r] if path.exists() else []


def load(out_dir, name="ckpt.pt"):
    return torch.load(Path(out_dir, name), weights_only=True)


def assert_same_run(first, second):
    """Every bit of the last checkpoint, and every line of the metrics but for the clock."""
    a, b = load(first), load(second)
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    for i, state in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][i][k]) for k, value in state.items())
    assert [torch.equal(x["cpu"], y["cpu"]) for x, y in zip(a["rng"], b["rng"], strict=True)].count(
        False
    ) == 0
    assert (a["iter_num"], a["position"], a["skipped"]) == (b["iter_num"], b["position"], b["skipped"])
    clock = {"ms", "tokens_per_s", "mfu"}
    lines = [
        [{k: v for k, v in r.items() if k not in clock} for r in metrics.read(Path(d, "metrics.jsonl"))]
        for d in (first, second)
    ]
    assert lines[0] == lines[1]


def assert_close_run(first, second, rtol=1e-4):
    a, b = load(first), load(second)
    for name, weight in a["model"].items():
        torch.testing.assert_close(b["model"][name], weight, rtol=rtol, atol=rtol / 10, msg=name)
    for i, state in a["optimizer"]["state"].items():
        assert {k: v.shape for k, v in state.items()} == {
            k: v.shape for k, v in b["optimizer"]["state"][i].items()
        }


# ---- signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_ends_the_run_with_a_checkpoint_and_resuming_equals_never_having_stopped(workplace, name):
    flags = ["--dropout=0.2", "--max_iters=60", "--eval_interval=25", "--lr_decay_iters=60"]
    run(*flags, out_dir="straight")
    process = start(*flags, "--out_dir=stopped")
    wait_for(lambda: len(steps("stopped")) > 3, "step")
    process.send_signal(getattr(signal, name))
    out, _ = finish(process)
    stopped = load("stopped")["iter_num"]
    assert f"stopped by {name} after {stopped} steps: --init_from=resume goes on from stopped/ckpt.pt" in out
    assert 0 < stopped < 60
    run(*flags, "--init_from=resume", out_dir="stopped")
    assert_same_run("straight", "stopped")


def test_a_stop_where_an_evaluation_is_due_leaves_it_to_the_resumed_run(workplace, monkeypatch):
    class Request:
        received = None

    class AfterFour(Request):
        def __init__(self):
            self.asked = 0

        @property
        def received(self):
            self.asked += 1
            return "SIGTERM" if self.asked >= 4 else None

    from train import distributed
    from train.__main__ import train
    from train.config import parse

    run(out_dir="straight")
    config, given = parse([*TINY, "--out_dir=stopped"])
    train(config, distributed.start("auto", "cpu"), given, AfterFour())
    assert load("stopped")["iter_num"] == 4 and not load("stopped")["evaluated"]
    assert not Path("stopped/best.pt").exists()
    run("--init_from=resume", out_dir="stopped")
    assert_same_run("straight", "stopped")
    assert load("straight", "best.pt")["iter_num"] == load("stopped", "best.pt")["iter_num"]


def test_two_ranks_stop_at_the_same_step_though_only_one_was_told(workplace):
    flags = ["--max_iters=60", "--eval_interval=25", "--lr_decay_iters=60"]
    process = start(*flags, "--out_dir=straight", ranks=2)
    finish(process)
    process = start(*flags, "--out_dir=stopped", ranks=2)
    wait_for(lambda: len(steps("stopped")) > 3, "step")
    os.kill(workers(process)[1], signal.SIGUSR1)
    finish(process)
    assert 0 < load("stopped")["iter_num"] < 60
    finish(start(*flags, "--out_dir=stopped", "--init_from=resume", ranks=2))
    assert_same_run("straight", "stopped")


def workers(process):
    """The ranks' process ids, in order, of a torchrun."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            environment = dict(
                item.split("=", 1) for item in (folder / "environ").read_text().split("\0") if "=" in item
            )
        except (OSError, ValueError):
            continue
        if parent == process.pid and "RANK" in environment:
            found[int(environment["RANK"])] = int(folder.name)
    return [found[rank] for rank in sorted(found)]


# ---- kills


def test_killed_at_random_moments_the_run_resumes_every_time_and_ends_as_if_never_killed(workplace):
    """Steps take 20 ms here and a checkpoint follows every second one: kills fall into saves too."""
    flags = ["--dropout=0.2", f"--max_iters={60 + 10 * KILLS}", "--eval_interval=2", "--eval_iters=1"]
    flags += ["--n_embd=64", "--log_interval=1"]
    run(*flags, out_dir="straight")
    moment = random.Random(0)
    for _ in range(KILLS):
        before = len(steps("killed"))
        process = start(*flags, "--out_dir=killed", "--init_from=auto")
        wait_for(lambda p=process, n=before: p.poll() is not None or len(steps("killed")) > n, "step")
        time.sleep(moment.uniform(0, 0.3))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    finish(start(*flags, "--out_dir=killed", "--init_from=auto"))
    assert_same_run("straight", "killed")


def test_torchrun_restarts_a_run_whose_rank_died_and_it_goes_on_from_its_last_checkpoint(workplace):
    flags = ["--max_iters=40", "--eval_interval=5", "--eval_iters=1", "--lr_decay_iters=40"]
    finish(start(*flags, "--out_dir=straight", ranks=2))
    Path("dead").mkdir()
    # of another run: what is restarted does not take it for its own
    stranger = load("straight") | {"iter_num": 39, "elastic_run": "another"}
    torch.save(stranger, "dead/ckpt.pt")
    process = start(*flags, "--out_dir=dead", ranks=2, agent=("--standalone", "--max-restarts=1"))
    wait_for(lambda: Path("dead/ckpt-5.pt").exists() and len(steps("dead")) > 6, "checkpoint")
    os.kill(workers(process)[1], signal.SIGKILL)
    out, _ = finish(process)
    assert out.count("iter 0:") == 1 and out.count("number of parameters") == 2
    assert_same_run("straight", "dead")


def test_a_hung_rank_ends_the_run_with_a_sentence(workplace):
    process = start("--max_iters=100000", "--eval_interval=100000", "--timeout=10", ranks=2)
    wait_for(lambda: len(steps("out")) > 3, "step")
    hung = workers(process)[1]
    os.kill(hung, signal.SIGSTOP)
    started = time.monotonic()
    wait_for(lambda: len(workers(process)) < 2 or time.monotonic() > started + 60, "end", 90)
    os.kill(hung, signal.SIGKILL)
    _, err = finish(process, code=1)
    assert "error: another rank died or did not answer within timeout=10 s" in err
    assert "--init_from=resume goes on from the last checkpoint" in err


def test_two_machines_find_each_other_and_equal_one(workplace):
    run("--max_iters=4", out_dir="alone")
    port = 20000 + os.getpid() % 20000
    agent = ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=a")
    machines = [start("--max_iters=4", "--out_dir=both", ranks=1, agent=agent) for _ in range(2)]
    outs = [finish(machine)[0] for machine in machines]
    assert sorted(out.count("iter 3:") for out in outs) == [0, 1], "one of both speaks"
    assert_close_run("alone", "both")


def test_data_cut_short_while_training_ends_the_run_with_a_sentence_and_the_last_checkpoint_whole(workplace):
    process = start("--max_iters=100000", "--eval_interval=5", "--eval_iters=1")
    wait_for(lambda: Path("out/ckpt-5.pt").exists(), "checkpoint")
    os.truncate("data/tiny/train.bin", 5000)
    _, err = finish(process, code=1)
    assert re.search(r"train.bin was cut short while it was in use: 99,602 bytes before, 5,000 now", err)
    assert load("out")["iter_num"] % 5 == 0


# ---- gradients that are not finite


def test_a_step_whose_gradient_is_not_finite_changes_nothing_but_the_count(workplace, monkeypatch):
    import train.__main__ as loop

    update, seen = loop.update, []

    def poisoned(model, optimizer, *rest):
        step = len(seen)
        hook = model.transformer.ln_f.weight.register_hook(
            lambda g: g * (torch.inf if step in (2, 5) else 1.0)
        )
        before = {k: v.clone() for k, v in model.state_dict().items()}
        moments = [m.clone() for s in optimizer.state.values() for m in s.values()]
        found = update(model, optimizer, *rest)
        hook.remove()
        unchanged = all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        after = [m for s in optimizer.state.values() for m in s.values()]
        same_moments = len(moments) == len(after) and all(map(torch.equal, moments, after))
        seen.append((unchanged, same_moments))
        return found

    monkeypatch.setattr(loop, "update", poisoned)
    run("--log_interval=1")
    assert [i for i, (unchanged, _) in enumerate(seen) if unchanged] == [2, 5]
    assert [i for i, (_, same) in enumerate(seen) if same] == [2, 5]
    records = [r for r in metrics.read(Path("out/metrics.jsonl")) if "loss" in r]
    assert [r["skipped"] for r in records] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [r["iter"] for r in records if r["grad_norm"] is None] == [2, 5]
    assert load("out")["skipped"] == 2


def test_a_run_that_no_longer_learns_stops_and_names_the_last_good_checkpoint(workplace, capsys):
    run("--max_iters=4")
    state = load("out")
    state["model"]["transformer.ln_f.weight"].fill_(torch.nan)
    state["model"]["lm_head.weight"] = state["model"]["transformer.wte.weight"]
    torch.save(state, "broken.pt")
    with pytest.raises(
        ValueError, match=r"not been finite for the last 20 steps, up to step 19: .*tuned/ckpt.pt"
    ):
        run("--init_from=broken.pt", "--max_iters=100", "--eval_interval=100", out_dir="tuned")
    assert "iter 3: 1 skipped, the gradient was not finite" in capsys.readouterr().out


# ---- strategies


def test_each_strategy_equals_a_single_process_and_opens_the_others_checkpoint(workplace):
    flags = ["--gradient_accumulation_steps=4", "--eval_iters=3", "--eval_sample=3"]
    run(*flags, out_dir="one")
    for strategy, other, ranks in (("fsdp", "ddp", 2), ("ddp", "fsdp", 4)):
        first = [*flags, f"--strategy={strategy}", "--max_iters=4", f"--out_dir={strategy}"]
        finish(start(*first, ranks=ranks))
        second = [*flags, f"--strategy={other}", f"--out_dir={strategy}", "--init_from=resume"]
        finish(start(*second, ranks=6 - ranks))
        assert_close_run("one", strategy)
        assert steps(strategy) == list(range(8))
    # alone again, from what both have written
    assert run(*flags, "--max_iters=9", "--init_from=resume", out_dir="fsdp")["iter_num"] == 9


def test_shards_resume_bit_for_bit_in_mixed_precision_on_our_kernels(workplace):
    small = ["--dtype=bfloat16", "--max_iters=2", "--eval_interval=1", "--eval_iters=1", "--n_layer=1"]
    small += ["--batch_size=1", "--grad_clip=0"]
    flags = [*small, "--strategy=fsdp", "--kernels=triton", "--activation_checkpointing=True"]
    finish(start(*flags, "--dropout=0.2", "--out_dir=straight", ranks=2))
    finish(start(*flags, "--dropout=0.2", "--out_dir=stopped", "--max_iters=1", ranks=2))
    finish(start(*flags, "--dropout=0.2", "--out_dir=stopped", "--init_from=resume", ranks=2))
    assert_same_run("straight", "stopped")
    assert all(weight.dtype == torch.float32 for weight in load("straight")["model"].values())
    # The first loss and gradient are those of one process with float32 parameters under autocast.
    run(*small, out_dir="whole")
    finish(start(*flags, "--out_dir=shards", "--max_iters=1", ranks=2))
    whole, shards = (metrics.read(Path(d, "metrics.jsonl"))[1] for d in ("whole", "shards"))
    assert whole["loss"] == pytest.approx(shards["loss"], rel=1e-3)
    assert whole["grad_norm"] == pytest.approx(shards["grad_norm"], rel=1e-2)


def test_activation_checkpointing_changes_memory_and_no_bit(workplace):
    flags = ["--dropout=0.2", "--max_iters=4"]
    run(*flags, out_dir="kept")
    run(*flags, "--activation_checkpointing=True", out_dir="computed")
    assert_same_run("kept", "computed")


def test_sharding_needs_ranks(workplace):
    with pytest.raises(ValueError, match="strategy='fsdp' shards over ranks: start it with torchrun"):
        run("--strategy=fsdp")
