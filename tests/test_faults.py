"""Faults of long runs: signals, kills, dead and hung ranks, bad gradients. Also DDP and FSDP.

`make soak` sets KILLS=100, to kill a run more often.
"""

import itertools
import multiprocessing
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

from tests.runs import (
    TINY,
    assert_close_weights,
    assert_same_run,
    load,
    records,
    run,
    run_ranks,
    series,
    start,
    surroundings,
)
from train import checkpoint, distributed, loop
from train.config import parse
from train.signals import StopRequest

KILLS = int(os.environ.get("KILLS", "3"))
LONG = ["--max_iters=300", "--lr_decay_iters=300", "--eval_interval=125", "--eval_iters=1"]


@pytest.fixture(autouse=True)
def no_process_is_left_behind():
    yield
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


def steps(out_dir):
    """The steps that a run has logged so far."""
    return series(out_dir, "iter", of="loss") if Path(out_dir, "metrics.jsonl").exists() else []


def wait_for(condition, what, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.01)


def wait_for_a_step(out_dir, after=3):
    wait_for(lambda: steps(out_dir)[-1:] > [after], "step")


# ---- signals


def test_a_second_ctrl_c_interrupts_a_plain_run_but_not_a_rank(monkeypatch):
    """torchrun sends a rank another signal for each Ctrl-C that the rank has received itself."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    request = StopRequest()
    request._note(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        request._note(signal.SIGINT, None)
    monkeypatch.setenv("RANK", "0")
    request._note(signal.SIGINT, None)
    assert request.received == "SIGINT"


def test_a_stop_before_an_evaluation_leaves_it_to_the_resumed_run(workplace, monkeypatch):
    """Its first try dies after the evaluation and before the checkpoint. The metrics still have it once."""

    class AfterFourSteps:
        answers = itertools.chain([None] * 4, itertools.repeat("SIGTERM"))
        received = property(lambda self: next(self.answers))

    def killed(*_):
        raise KeyboardInterrupt

    run(out_dir="straight")
    config, given = parse([*TINY, "--out_dir=stopped"])
    loop.train(config, distributed.start("auto", "cpu"), given, AfterFourSteps())
    assert load("stopped")["iter_num"] == 4 and not load("stopped")["evaluated"]
    assert not Path("stopped/best.pt").exists()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.Saver, "save", killed)
        run("--init_from=resume", out_dir="stopped")
    run("--init_from=resume", out_dir="stopped")
    assert_same_run("straight", "stopped")


def test_all_ranks_stop_after_the_same_step_even_if_one_gets_the_signal(workplace):
    run_ranks(*LONG, "--out_dir=straight")
    launch = start(*LONG, "--out_dir=stopped", ranks=2)
    wait_for_a_step("stopped")
    for process in launch.processes:  # as torchrun does
        process.terminate()
    assert launch.wait() == [0, 0], launch.printed()
    first = load("stopped")["iter_num"]
    assert f"stopped by SIGTERM after {first} steps" in launch.printed()
    launch = start(*LONG, "--out_dir=stopped", "--init_from=resume", ranks=2)
    wait_for_a_step("stopped", first + 3)
    os.kill(launch.processes[1].pid, signal.SIGUSR1)
    assert launch.wait() == [0, 0], launch.printed()
    second = load("stopped")["iter_num"]
    assert f"stopped with another rank after {second} steps" in launch.printed()
    assert first < second < 300
    run_ranks(*LONG, "--out_dir=stopped", "--init_from=resume")
    assert_same_run("straight", "stopped")


# ---- kills


@pytest.mark.parametrize("ranks", [0] if KILLS < 50 else [0, 2])
def test_a_run_that_is_killed_at_random_moments_ends_like_one_that_is_not(workplace, ranks):
    """It saves after every second step, and a step takes about 20 ms. So some kills interrupt a save."""
    flags = ["--dropout=0.2", f"--max_iters={60 + 40 * KILLS}", "--eval_interval=2", "--eval_iters=1"]
    run_ranks(*flags, "--out_dir=straight", ranks=ranks)
    moment = random.Random(0)
    for _ in range(KILLS):
        before = len(steps("killed"))
        launch = start(*flags, "--out_dir=killed", "--init_from=auto", ranks=ranks)
        wait_for(lambda n=before: len(steps("killed")) > n, "step")
        time.sleep(moment.uniform(0, 0.3))
        assert launch.processes[0].is_alive(), "the run ended before it could be killed: raise max_iters"
        for process in launch.processes:
            process.kill()
        launch.wait()
    run_ranks(*flags, "--out_dir=killed", "--init_from=auto", ranks=ranks)
    assert_same_run("straight", "killed")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds a rank in Linux's /proc")
def test_torchrun_restarts_the_ranks_of_two_machines_from_the_last_checkpoint_if_one_dies(workplace):
    """The agents share one store over restarts."""
    flags = ["--max_iters=60", "--eval_interval=5", "--eval_iters=1", "--lr_decay_iters=60", "--timeout=60"]
    run_ranks(*flags, "--out_dir=straight")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    agent = f"-m torch.distributed.run --nproc_per_node=1 --nnodes=2 --max_restarts=3 --rdzv_backend=c10d \
        --rdzv_endpoint={endpoint} -m train --out_dir=died --init_from=auto"
    machines = [
        subprocess.Popen(
            [sys.executable, *agent.split(), *TINY, *flags], env=surroundings(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        wait_for(lambda: Path("died/best.pt").exists() and steps("died")[-1] > 6, "checkpoint")
        [victim] = Path(f"/proc/{machines[1].pid}/task/{machines[1].pid}/children").read_text().split()
        os.kill(int(victim), signal.SIGKILL)
        printed = "".join(machine.communicate(timeout=120)[0] for machine in machines)
    finally:
        for machine in machines:
            machine.terminate()  # an agent ends its ranks
            machine.wait()
    assert [machine.returncode for machine in machines] == [0, 0], printed
    assert printed.count("iter 0:") == 1 and printed.count("number of parameters") == 2, "only rank 0 prints"
    assert_same_run("straight", "died")


def test_a_hung_rank_ends_the_run_with_a_sentence(workplace):
    launch = start("--max_iters=100000", "--eval_interval=100000", "--timeout=5", ranks=2)
    wait_for_a_step("out")
    waiting, hung = launch.processes
    os.kill(hung.pid, signal.SIGSTOP)
    waiting.join(60)
    hung.kill()
    assert launch.wait() == [1, -signal.SIGKILL]
    assert "error: another rank died or did not answer within timeout=5 s" in launch.printed()
    assert "--init_from=resume continues from the last checkpoint" in launch.printed()


def test_data_cut_short_during_training_end_the_run_with_a_sentence_and_an_intact_checkpoint(workplace):
    launch = start("--max_iters=100000", "--eval_interval=5", "--eval_iters=1")
    wait_for(lambda: list(Path("out").glob("ckpt-*.pt")), "checkpoint")
    os.truncate("data/tiny/train.bin", 5000)
    assert launch.wait() == [1]
    sentence = r"error: \S+train.bin was cut short while it was in use: 99,602 bytes before, 5,000 now"
    assert re.search(sentence, launch.printed())
    assert load("out")["iter_num"] % 5 == 0


# ---- gradients that are not finite


def test_a_step_with_a_non_finite_gradient_is_skipped_and_counted(workplace, monkeypatch):
    train_step, unchanged = loop.train_step, []

    def poisoned(model, *rest):
        factor = torch.inf if len(unchanged) in (2, 5) else 1.0
        hook = model.transformer.ln_f.weight.register_hook(lambda gradient: gradient * factor)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        result = train_step(model, *rest)
        hook.remove()
        unchanged.append(all(map(torch.equal, before, model.parameters())))
        return result

    monkeypatch.setattr(loop, "train_step", poisoned)
    run()
    assert [i for i, same in enumerate(unchanged) if same] == [2, 5]
    lines = [line for line in records("out") if "loss" in line]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [line["iter"] for line in lines if line["grad_norm"] is None] == [2, 5]
    assert load("out")["skipped"] == 2


def test_a_run_whose_gradient_stays_non_finite_stops_and_names_the_last_good_checkpoint(workplace, capsys):
    flags = ["--decay_lr=False", "--warmup_iters=0", "--eval_interval=4", "--max_iters=100"]
    with pytest.raises(ValueError, match=r"last 20 steps, up to step 20: .*; there is no checkpoint yet"):
        run(*flags, "--learning_rate=1e30", out_dir="never")
    assert "iter 1: skipped 1 step with a non-finite gradient" in capsys.readouterr().out
    run(*flags, "--max_iters=8", out_dir="well")
    with pytest.raises(ValueError, match=r"the last good checkpoint is well/ckpt\.pt"):
        run(*flags, "--learning_rate=1e30", "--init_from=resume", out_dir="well")
    assert load("well")["iter_num"] == 8
    run(*flags, "--max_iters=12", "--init_from=resume", out_dir="well")
    last = records("well")[-1]
    assert last["iter"] == 12 and last["val/loss"] < 3


# ---- strategies


@pytest.mark.parametrize(
    ("strategy", "other", "ranks", "optimizer"), [("fsdp", "ddp", 2, "adamw"), ("ddp", "fsdp", 4, "muon")]
)
def test_ddp_and_fsdp_equal_a_single_process_and_resume_each_others_checkpoints(
    workplace, strategy, other, ranks, optimizer
):
    flags = ["--gradient_accumulation_steps=4", "--eval_iters=3", "--eval_sample=3"]
    flags += [f"--optimizer={optimizer}"]
    run(*flags, out_dir="alone")
    run_ranks(*flags, f"--strategy={strategy}", "--max_iters=4", ranks=ranks)
    generators = [state["cpu"].numpy().tobytes() for state in load("out")["rng"]]
    assert len(set(generators)) == ranks, "each rank draws its own dropout"
    run_ranks(*flags, f"--strategy={other}", "--init_from=resume", ranks=6 - ranks)
    alone, together = load("alone"), load("out")
    assert_close_weights(alone, together)
    for i, moments in alone["optimizer"]["state"].items():
        for name, value in moments.items():
            other_value = together["optimizer"]["state"][i][name]
            torch.testing.assert_close(other_value, value, rtol=1e-2, atol=1e-5, msg=f"{name} of {i}")
    for one, all_ranks in zip(records("alone"), records("out"), strict=True):
        assert one == pytest.approx(all_ranks, rel=1e-4), "losses and norms are of the whole global batch"
    # A single process resumes what both strategies have written.
    assert run(*flags, "--max_iters=9", "--init_from=resume")["iter_num"] == 9


def test_fsdp_in_mixed_precision_resumes_bit_for_bit(workplace):
    flags = ["--dtype=bfloat16", "--strategy=fsdp", "--activation_checkpointing=True", "--dropout=0.2"]
    run_ranks(*flags, "--out_dir=straight")
    run_ranks(*flags, "--out_dir=stopped", "--max_iters=4")
    run_ranks(*flags, "--out_dir=stopped", "--init_from=resume")
    assert_same_run("straight", "stopped")
    assert all(weight.dtype == torch.float32 for weight in load("straight")["model"].values())


def test_fsdp_with_triton_kernels_equals_one_process_with_pytorchs_operations(workplace):
    """In mixed precision: one process has float32 parameters under autocast."""
    flags = ["--dtype=bfloat16", "--max_iters=1", "--eval_iters=1", "--grad_clip=0", "--n_layer=1"]
    flags += ["--batch_size=1", "--n_embd=16", "--n_head=1", "--block_size=8"]
    run(*flags, out_dir="whole")
    run_ranks(*flags, "--strategy=fsdp", "--kernels=triton", "--activation_checkpointing=True")
    whole, shards = records("whole"), records("out")
    assert whole[1]["loss"] == pytest.approx(shards[1]["loss"], rel=1e-3)
    assert whole[1]["grad_norm"] == pytest.approx(shards[1]["grad_norm"], rel=1e-2)
    assert whole[0]["val/loss"] == pytest.approx(shards[0]["val/loss"], rel=1e-3)


def test_three_ranks_resume_bit_for_bit_and_one_process_resumes_their_checkpoint(workplace):
    """With three ranks the order of a sum matters; with two it does not."""
    flags = ["--dropout=0.2", "--gradient_accumulation_steps=3", "--eval_interval=2"]
    run_ranks(*flags, "--max_iters=4", "--out_dir=straight", ranks=3)
    run_ranks(*flags, "--max_iters=2", "--out_dir=stopped", ranks=3)
    run_ranks(*flags, "--max_iters=4", "--out_dir=stopped", "--init_from=resume", ranks=3)
    assert_same_run("straight", "stopped")
    alone = run(*flags, "--max_iters=5", "--init_from=resume", out_dir="stopped")
    assert alone["position"] == 5 * 4 * 3


def test_activation_checkpointing_changes_no_bits(workplace):
    run("--dropout=0.2", "--max_iters=4", out_dir="stored")
    run("--dropout=0.2", "--max_iters=4", "--activation_checkpointing=True", out_dir="computed")
    assert_same_run("stored", "computed")


def test_fsdp_needs_ranks(workplace):
    with pytest.raises(ValueError, match="strategy='fsdp' shards over ranks: start it with torchrun"):
        run("--strategy=fsdp")
