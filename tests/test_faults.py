"""What weeks on a cluster bring: signals, kills, dead and hung ranks, bad gradients; strategies.

KILLS=100 (make soak) kills more often than a test can.
"""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.runs import TINY, run, surroundings
from train import metrics

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("KILLS", "3"))


STARTED = []
linux = pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the ranks in Linux's /proc")


@pytest.fixture(autouse=True)
def no_process_is_left_behind():
    yield
    while STARTED:
        process = STARTED.pop()
        for pid in workers(process):
            os.kill(pid, signal.SIGKILL)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def start(*flags, ranks=0, agent=()):
    """`python -m train`, under torchrun where there are ranks, in a process group of its own."""
    command = [sys.executable]
    if ranks:
        agent = agent or ("--standalone",)
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", *agent]
    process = subprocess.Popen(
        [*command, "-m", "train", *TINY, *flags], env=surroundings(), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    STARTED.append(process)
    return process


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
    """Every bit of the last checkpoint and of the best, and the metrics but for what the machine gives."""
    for name in ("ckpt.pt", "best.pt"):
        a, b = load(first, name), load(second, name)
        assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"]), name
        for i, state in a["optimizer"]["state"].items():
            assert all(torch.equal(value, b["optimizer"]["state"][i][k]) for k, value in state.items())
        assert all(torch.equal(x["cpu"], y["cpu"]) for x, y in zip(a["rng"], b["rng"], strict=True))
        for key in ("iter_num", "position", "skipped", "best_val_loss"):
            assert a[key] == b[key], (name, key)
    machine = {"ms", "tokens_per_s", "mfu", "memory_gb"}
    lines = [
        [{k: v for k, v in r.items() if k not in machine} for r in metrics.read(Path(d, "metrics.jsonl"))]
        for d in (first, second)
    ]
    assert lines[0] == lines[1]


def assert_close_run(first, second, rtol=1e-4):
    a, b = load(first), load(second)
    for name, weight in a["model"].items():
        torch.testing.assert_close(b["model"][name], weight, rtol=rtol, atol=rtol / 10, msg=name)
    for i, state in a["optimizer"]["state"].items():
        for name, value in state.items():
            other = b["optimizer"]["state"][i][name]
            torch.testing.assert_close(other, value, rtol=100 * rtol, atol=rtol / 10, msg=f"{name} of {i}")


# ---- signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_ends_the_run_with_a_checkpoint_and_resuming_equals_never_having_stopped(workplace, name):
    flags = ["--dropout=0.2", "--max_iters=300", "--eval_interval=125", "--lr_decay_iters=300"]
    run(*flags, out_dir="straight")
    process = start(*flags, "--out_dir=stopped")
    wait_for(lambda: len(steps("stopped")) > 3, "step")
    process.send_signal(getattr(signal, name))
    out, _ = finish(process)
    stopped = load("stopped")["iter_num"]
    assert f"stopped by {name} after {stopped} steps: stopped/ckpt.pt goes on by" in out
    assert 0 < stopped < 300
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
            return "SIGTERM" if self.asked > 4 else None  # after the first evaluation, then after each step

    from train import distributed
    from train.config import parse
    from train.loop import train

    run(out_dir="straight")
    config, given = parse([*TINY, "--out_dir=stopped"])
    train(config, distributed.start("auto", "cpu"), given, AfterFour())
    assert load("stopped")["iter_num"] == 4 and not load("stopped")["evaluated"]
    assert not Path("stopped/best.pt").exists()
    run("--init_from=resume", out_dir="stopped")
    assert_same_run("straight", "stopped")
    assert load("straight", "best.pt")["iter_num"] == load("stopped", "best.pt")["iter_num"]


@linux
def test_two_ranks_stop_at_the_same_step_whoever_was_told(workplace):
    flags = ["--max_iters=300", "--eval_interval=120", "--eval_iters=1", "--lr_decay_iters=300"]
    finish(start(*flags, "--out_dir=straight", ranks=2))
    process = start(*flags, "--out_dir=stopped", ranks=2)
    wait_for(lambda: len(steps("stopped")) > 3, "step")
    process.terminate()  # torchrun, which tells both and counts it as a failure of its own
    out, _ = finish(process, code=1)
    first = load("stopped")["iter_num"]
    assert f"stopped by SIGTERM after {first} steps" in out
    process = start(*flags, "--out_dir=stopped", "--init_from=resume", ranks=2)
    wait_for(lambda: steps("stopped")[-1] > first + 3, "step")
    os.kill(workers(process)[1], signal.SIGUSR1)  # one rank alone
    out, _ = finish(process)
    assert f"stopped with another rank after {load('stopped')['iter_num']} steps" in out
    assert first < load("stopped")["iter_num"] < 300
    finish(start(*flags, "--out_dir=stopped", "--init_from=resume", ranks=2))
    assert_same_run("straight", "stopped")


def test_an_evaluation_that_died_before_its_checkpoint_is_in_the_metrics_once(workplace, monkeypatch):
    from train import checkpoint

    run(out_dir="straight")
    run("--max_iters=4", out_dir="stopped")
    state = load("stopped")
    torch.save(state | {"evaluated": False}, "stopped/ckpt.pt")  # as a signal at step 4 leaves it
    lines = Path("stopped/metrics.jsonl").read_text().splitlines(keepends=True)
    Path("stopped/metrics.jsonl").write_text(
        "".join(line for line in lines if "val/loss" not in line or '"iter": 0' in line)
    )
    save = checkpoint.Saver.save
    monkeypatch.setattr(checkpoint.Saver, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run("--init_from=resume", out_dir="stopped")
    monkeypatch.setattr(checkpoint.Saver, "save", save)
    run("--init_from=resume", out_dir="stopped")
    evaluations = [r["iter"] for r in metrics.read(Path("stopped/metrics.jsonl")) if "val/loss" in r]
    assert evaluations == [0, 4, 8]


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


@pytest.mark.parametrize("ranks", [0] if KILLS < 50 else [0, 2])
def test_killed_at_random_moments_the_run_resumes_every_time_and_ends_as_if_never_killed(workplace, ranks):
    """A checkpoint follows every second step of some 20 ms: kills fall into saves too."""
    flags = ["--dropout=0.2", f"--max_iters={60 + 40 * KILLS}", "--eval_interval=2", "--eval_iters=1"]
    finish(start(*flags, "--out_dir=straight", ranks=ranks))
    moment = random.Random(0)
    for _ in range(KILLS):
        before = len(steps("killed"))
        process = start(*flags, "--out_dir=killed", "--init_from=auto", ranks=ranks)
        wait_for(lambda p=process, n=before: p.poll() is not None or len(steps("killed")) > n, "step")
        time.sleep(moment.uniform(0, 0.3))
        assert process.poll() is None, "the run was over before it could be killed: raise max_iters"
        for pid in workers(process):
            os.kill(pid, signal.SIGKILL)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    finish(start(*flags, "--out_dir=killed", "--init_from=auto", ranks=ranks))
    assert_same_run("straight", "killed")


@linux
def test_two_machines_go_on_from_the_last_checkpoint_when_a_rank_of_one_dies(workplace):
    """Their agents start both ranks again, with another port of one and the same store."""
    flags = ["--max_iters=60", "--eval_interval=5", "--eval_iters=1", "--lr_decay_iters=60", "--timeout=60"]
    finish(start(*flags, "--out_dir=straight", ranks=2))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    agent = ("--nnodes=2", "--max_restarts=3", "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}")
    again = [*flags, "--out_dir=died", "--init_from=auto"]
    machines = [start(*again, ranks=1, agent=agent) for _ in range(2)]
    wait_for(lambda: Path("died/best.pt").exists() and steps("died")[-1] > 6, "checkpoint")
    [victim] = workers(machines[1])
    os.kill(victim, signal.SIGKILL)
    out = "".join(finish(machine)[0] for machine in machines)
    assert out.count("iter 0:") == 1 and out.count("number of parameters") == 2, "one of both speaks"
    assert_same_run("straight", "died")


@linux
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


def test_data_cut_short_while_training_ends_the_run_with_a_sentence_and_the_last_checkpoint_whole(workplace):
    process = start("--max_iters=100000", "--eval_interval=5", "--eval_iters=1")
    wait_for(lambda: list(Path("out").glob("ckpt-*.pt")), "checkpoint")
    os.truncate("data/tiny/train.bin", 5000)
    _, err = finish(process, code=1)
    assert re.search(r"train.bin was cut short while it was in use: 99,602 bytes before, 5,000 now", err)
    assert load("out")["iter_num"] % 5 == 0


# ---- gradients that are not finite


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_whose_gradient_is_not_finite_changes_nothing_but_the_count(workplace, monkeypatch, optimizer):
    from train import loop

    train_step, seen = loop.train_step, []

    def poisoned(model, optimizer, *rest):
        step = len(seen)
        hook = model.transformer.ln_f.weight.register_hook(
            lambda g: g * (torch.inf if step in (2, 5) else 1.0)
        )
        before = {k: v.clone() for k, v in model.state_dict().items()}
        moments = [m.clone() for s in optimizer.state.values() for m in s.values()]
        found = train_step(model, optimizer, *rest)
        hook.remove()
        unchanged = all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        after = [m for s in optimizer.state.values() for m in s.values()]
        same_moments = len(moments) == len(after) and all(map(torch.equal, moments, after))
        seen.append((unchanged, same_moments))
        return found

    monkeypatch.setattr(loop, "train_step", poisoned)
    run("--log_interval=1", f"--optimizer={optimizer}")
    assert [i for i, (unchanged, _) in enumerate(seen) if unchanged] == [2, 5]
    assert [i for i, (_, same) in enumerate(seen) if same] == [2, 5]
    records = [r for r in metrics.read(Path("out/metrics.jsonl")) if "loss" in r]
    assert [r["skipped"] for r in records] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [r["iter"] for r in records if r["grad_norm"] is None] == [2, 5]
    assert load("out")["skipped"] == 2


def test_a_run_that_no_longer_learns_stops_and_names_a_checkpoint_that_is_good(workplace, capsys):
    flags = ["--decay_lr=False", "--warmup_iters=0", "--eval_interval=4", "--max_iters=100"]
    with pytest.raises(ValueError, match=r"last 20 steps, up to step 20: .*; there is no checkpoint yet"):
        run(*flags, "--learning_rate=1e30", out_dir="never")
    assert "iter 1: 1 skipped, the gradient was not finite" in capsys.readouterr().out
    run(*flags, "--max_iters=8", out_dir="well")
    with pytest.raises(ValueError, match=r"the last good checkpoint is well/ckpt\.pt"):
        run(*flags, "--learning_rate=1e30", "--init_from=resume", out_dir="well")
    assert load("well")["iter_num"] == 8
    run(*flags, "--max_iters=12", "--init_from=resume", out_dir="well")
    last = metrics.read(Path("well/metrics.jsonl"))[-1]
    assert last["iter"] == 12 and last["val/loss"] < 3


# ---- strategies


def test_each_strategy_equals_a_single_process_and_opens_the_others_checkpoint(workplace):
    for strategy, other, ranks, optimizer in (("fsdp", "ddp", 2, "adamw"), ("ddp", "fsdp", 4, "muon")):
        flags = ["--gradient_accumulation_steps=4", "--eval_iters=3", "--eval_sample=3"]
        flags += [f"--optimizer={optimizer}"]
        run(*flags, out_dir=optimizer)
        first = [*flags, f"--strategy={strategy}", "--max_iters=4", f"--out_dir={strategy}"]
        finish(start(*first, ranks=ranks))
        second = [*flags, f"--strategy={other}", f"--out_dir={strategy}", "--init_from=resume"]
        finish(start(*second, ranks=6 - ranks))
        assert_close_run(optimizer, strategy)
        assert steps(strategy) == list(range(8))
    # alone again, from what both have written
    assert run(*flags, "--max_iters=9", "--init_from=resume", out_dir="ddp")["iter_num"] == 9


def test_shards_resume_bit_for_bit_in_mixed_precision_on_our_kernels(workplace):
    small = ["--dtype=bfloat16", "--max_iters=2", "--eval_interval=1", "--eval_iters=1", "--n_layer=1"]
    small += ["--batch_size=1", "--grad_clip=0", "--n_embd=16", "--n_head=1", "--block_size=8"]
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
