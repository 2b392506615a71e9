"""--batch_size=auto, out-of-memory messages, profiles."""

import json
import re
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpt.model import GPT
from tests.runs import TINY, assert_same_run, run
from tests.test_command_line import command
from train import checkpoint, distributed, evaluate, fit, loop
from train.__main__ import main
from train.config import TrainConfig, parse
from train.distributed import Ranks
from train.view import Lines


def small_model(**more):
    return GPT(replace(TrainConfig().model, n_layer=1, n_head=1, n_embd=8, vocab_size=16, **more))


def test_the_batch_size_before_auto_fixes_the_sequences_per_step(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("batch_size = 'auto'\n")
    for args, number in (
        (["--batch_size=auto"], 12),
        (["train_shakespeare_char", str(file)], 64),
        (["--batch_size=5", "--batch-size=auto"], 5),
    ):
        config, given = parse(args)
        assert (config.batch_size, given["batch_size"][-1]) == (number, "auto")


@pytest.fixture
def limit_to(monkeypatch):
    """A function that limits the memory to micro-batches of so many sequences. It returns the sizes tried."""

    def limit(largest):
        sizes = []

        def fits(trial, size, model, ranks):
            sizes.append(size)
            trial(size, deepcopy(model))
            return size <= largest

        monkeypatch.setattr(fit, "check_supported", lambda config, ranks: None)
        monkeypatch.setattr(fit, "fits", fits)
        return sizes

    return limit


def test_auto_gives_the_same_bits_as_the_batch_size_that_it_finds(workplace, limit_to, capsys):
    flags = ["--dropout=0.2", "--batch_size=6", "--gradient_accumulation_steps=4"]
    run(*flags, out_dir="written")
    sizes = limit_to(11)
    fitted = run(*flags, "--batch_size=auto", out_dir="fitted")
    assert_same_run("written", "fitted")
    assert sizes == [24, 12, 6] and (fitted["config"]["batch_size"], fitted["position"]) == (6, 8 * 24)
    assert "batch_size=auto: 6 x 4 accumulation steps = 24 sequences a step" in capsys.readouterr().out


def test_all_ranks_take_the_size_that_fits_on_the_smallest_gpu(limit_to, monkeypatch):
    """Ten sequences fit on this rank, three on the other."""
    sizes = limit_to(10)
    monkeypatch.setattr(Ranks, "any", lambda self, value: value or sizes[-1] > 3)
    model, ranks = small_model(), Ranks(0, 2, "cpu", "gloo")
    config = TrainConfig(batch_size=6, gradient_accumulation_steps=5, model=model.config)
    fitted, _ = fit.micro_batch(config, model, ranks, lambda size, model: None)
    assert sizes == [15, 5, 1] and (fitted.batch_size, fitted.gradient_accumulation_steps) == (1, 30)
    many = Ranks(0, 64, "cpu", "gloo")  # more than sequences, as --eval_only allows
    assert fit.micro_batch(config, model, many, lambda size, model: None)[0].batch_size == 1


def test_a_trial_has_a_limit_for_its_memory_and_fails_only_if_that_runs_out(monkeypatch):
    limits, model, ranks = [1.0], small_model(), Ranks(0, 1, "cpu", None)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: limits.append(share))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def trial(size, model):
        assert limits[-1] == 1 - fit.MARGIN
        if size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert size, "another error"

    for size in (3, 4):
        assert fit.fits(trial, size, model, ranks) == (size == 3)
        assert limits[-1] == 1.0
    with pytest.raises(AssertionError, match="another error"):
        fit.fits(trial, 0, model, ranks)


def test_auto_that_is_not_supported_or_finds_no_size_is_a_sentence(workplace, limit_to, monkeypatch, capsys):
    code, _, err = command(main, monkeypatch, capsys, *TINY, "--batch_size=auto")
    assert code == 1 and "--batch_size=12" in err
    with pytest.raises(ValueError, match="strategy=fsdp"):
        fit.check_supported(TrainConfig(strategy="fsdp"), Ranks(0, 2, "cuda:0", "nccl"))
    limit_to(0)
    code, _, err = command(main, monkeypatch, capsys, *TINY, "--batch_size=auto")
    assert code == 1 and err.count("\n") == 1 and "block_size=16" in err and "93% of the memory of cpu" in err


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.AcceleratorError("CUDA error: out of memory", 2), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError("Unable to allocate 1.00 PiB for an array"), True),
        (RuntimeError("MPS backend out of memory. Tried to allocate 64.00 MB on private pool."), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("a book on what to do when one runs out of memory"), False),
    ],
)
def test_out_of_memory_errors_are_recognized(error, is_memory):
    assert fit.out_of_memory(error) == is_memory


@pytest.mark.parametrize("when", ["creation", "training"])
def test_running_out_of_memory_is_one_sentence(workplace, monkeypatch, capsys, when):
    """With real errors of the allocator."""
    flags, saved = [f"--block_size={2**29}", f"--n_embd={2**20}"], "nothing is saved yet"
    if when == "training":
        flags, saved = [], "--init_from=resume continues from out/ckpt.pt"
        train_step, calls = loop.train_step, []

        def failing(*args):
            calls.append(args)
            if len(calls) == 6:
                torch.empty(1 << 50, dtype=torch.int8)
            return train_step(*args)

        monkeypatch.setattr(loop, "train_step", failing)
        begin = checkpoint.Saver.save  # saves in the background; here the run waits for it
        monkeypatch.setattr(checkpoint.Saver, "save", lambda self, *args: (begin(self, *args), self.wait()))
    code, _, err = command(main, monkeypatch, capsys, *TINY, *flags)
    assert code == 1 and re.match(r"error: out of memory \(\d+ bytes ", err) and err.count("\n") == 1
    assert "halve batch_size and double gradient_accumulation_steps" in err
    assert err.endswith(f"; {saved}\n")


def test_running_out_of_memory_in_train_evaluate_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: torch.empty(1 << 50, dtype=torch.int8))
    code, _, err = command(evaluate.main, monkeypatch, capsys, "--data=x", "--device=cpu")
    assert code == 1 and err.startswith("error: out of memory") and "batch_size than 8" in err


def test_a_profile_is_a_trace_of_its_steps_and_a_table_of_the_most_expensive_operations(workplace, capsys):
    run("--profile=1:4", "--eval_interval=5", out_dir="profiled")
    run("--eval_interval=5", out_dir="plain")
    assert_same_run("plain", "profiled")
    events = json.loads(Path("profiled/trace-1-3.json").read_text())["traceEvents"]
    count = sum(event.get("name") == "aten::_fused_adamw_" for event in events)
    assert count == 3 * 2, "a call for each of two groups in each of three steps"
    out = capsys.readouterr().out
    assert out.index("iter 3:") < out.index("profiled/trace-1-3.json") < out.index("iter 4:")
    self_cpu = [float(share) for share in re.findall(r"^ *\S.*?  ([\d.]+)%", out, re.MULTILINE)]
    assert len(self_cpu) == 12 and self_cpu == sorted(self_cpu, reverse=True)
    assert "ProfilerStep" not in out, "a whole step is not an operation"


def test_a_profile_can_begin_at_step_0_and_ends_with_the_run_at_the_latest(workplace, capsys):
    with pytest.warns(UserWarning, match="won't be using warmup"):
        run("--profile=0:7", "--max_iters=4")
    assert [path.name for path in Path("out").glob("trace-*")] == ["trace-0-3.json"]
    capsys.readouterr()
    config, given = parse([*TINY, "--eval_only", "--profile=0:2", "--out_dir=evaluated"])
    loop.train(config, distributed.start("auto", "cpu"), given)
    assert "profile" not in capsys.readouterr().out, "an evaluation alone makes no steps"
    run("--profile=1:3", "--init_from=resume")
    assert "profile=1:3: those steps were made before" in capsys.readouterr().out
    assert "profile" not in Path("out/config.py").read_text(), "a repeated run is not profiled"


@pytest.mark.parametrize("start", [1, 3])
def test_a_profile_that_a_signal_ends_names_the_steps_that_were_made(workplace, start):
    stop, view = SimpleNamespace(received=None), Lines()
    view.step = lambda record, left: record["iter"] == 1 and vars(stop).update(received="SIGTERM")
    config, given = parse([*TINY, f"--profile={start}:7"])
    loop.train(config, distributed.start("auto", "cpu"), given, stop, view)
    last_step = json.loads(Path("out/metrics.jsonl").read_text().splitlines()[-1])["iter"] - 1
    assert last_step == 2
    traces = [path.name for path in Path("out").glob("trace-*")]
    assert traces == (["trace-1-2.json"] if start == 1 else []), (
        "step 2 only warms the profiler up for step 3"
    )


@pytest.mark.parametrize(("steps", "words"), [("5:5", "START:STOP"), ("8:9", "steps 0 to 7")])
def test_a_profile_of_steps_outside_the_run_is_refused(steps, words):
    with pytest.raises(ValueError, match=words):
        parse([*TINY, f"--profile={steps}"])


def test_the_first_pass_leaves_no_gradient_and_the_same_random_state():
    model, before = small_model(dropout=0.5), torch.get_rng_state()
    assert distributed.first_pass(model, 2, 4, Ranks(0, 1, "cpu", None), nullcontext()) > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.gpu
def test_a_trial_fits_if_it_leaves_the_margin_free():
    model, ranks = torch.nn.Linear(1, 1), Ranks(0, 1, "cuda:0", None)
    total = torch.cuda.mem_get_info()[1]

    def allocate(size, model):
        torch.empty(size, dtype=torch.int8, device="cuda")

    def allocate_twice(size, model):
        allocate(size, model)
        allocate(size + (64 << 20), model)  # PyTorch frees the unused block first

    assert fit.fits(allocate, total // 8, model, ranks)
    assert not fit.fits(allocate, int(total * (1 - fit.MARGIN / 2)), model, ranks)
    assert fit.fits(allocate_twice, total // 2, model, ranks)
    with pytest.raises(RuntimeError, match="size"):
        fit.fits(lambda *_: torch.ones(2) @ torch.ones(3), 1, model, ranks)
