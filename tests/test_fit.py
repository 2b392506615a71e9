"""What fits into memory, found and changing nothing else; the sentence where nothing does; profiles."""

import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from tests.runs import TINY, run
from tests.test_command_line import command
from tests.test_faults import assert_same_run
from train import checkpoint, evaluate, fit, loop, metrics
from train.__main__ import main
from train.config import TrainConfig, asked_batch_size, parse
from train.distributed import Ranks


def test_the_search_finds_the_largest_that_fits_and_tries_few():
    sizes = fit.micro_batches(480, 4)
    assert sizes[:8] == [1, 2, 3, 4, 5, 6, 8, 10] and sizes[-1] == 120 and all(120 % n == 0 for n in sizes)
    for limit in range(122):
        tried = []
        found = fit.largest(sizes, lambda n: (tried.append(n), n <= limit)[1])  # noqa: B023
        assert found == max((n for n in sizes if n <= limit), default=None)
        assert len(tried) == len(set(tried)) <= 5


def test_what_was_asked_before_auto_says_how_many_sequences_a_step_has(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("batch_size = 'auto'\n")
    for args, asked in (
        (["--batch_size=auto"], 12),
        (["train_shakespeare_char", "--batch_size", "auto"], 64),
        (["train_shakespeare_char", str(file)], 64),
        (["--batch_size=5", "--batch-size=auto"], 5),
    ):
        config, given = parse(args)
        assert (config.batch_size, asked_batch_size(given)) == ("auto", asked)
    assert parse([str(file), "--batch_size=8"])[0].batch_size == 8
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        parse(["--batch_size=0", "--batch_size=auto"])
    with pytest.raises(ValueError, match="which strategy=fsdp cannot: give a number"):
        parse(["--strategy=fsdp", "--batch_size=auto"])


@pytest.fixture
def memory_for(monkeypatch):
    """A device that can be asked for its memory, where so many sequences fit."""

    def set_limit(most):
        tried, trial = [], loop.trial

        def limited(size, *rest, **more):
            tried.append(size)
            trial(size, *rest, **more)
            if size > most:
                torch.empty(1 << 50, dtype=torch.int8)  # a real failure, after the weights have changed

        monkeypatch.setattr(loop, "trial", limited)
        monkeypatch.setattr(fit, "with_margin", lambda ranks: nullcontext(8 << 30))
        monkeypatch.setattr(fit, "peak_bytes", lambda ranks: tried[-1] << 29)
        return tried

    return set_limit


def test_auto_equals_the_micro_batch_it_finds_written_out_bit_for_bit(workplace, memory_for, capsys):
    flags = ["--dropout=0.2", "--batch_size=6", "--gradient_accumulation_steps=4"]
    run("--dropout=0.2", "--batch_size=8", "--gradient_accumulation_steps=3", out_dir="written")
    tried = memory_for(11)
    found = run(*flags, "--batch_size=auto", out_dir="found")
    assert_same_run("written", "found")
    assert tried == [6, 12, 8] and (found["config"]["batch_size"], found["position"]) == (8, 8 * 24)
    assert (
        "batch_size=auto: 8 x 3 accumulation steps = 24 sequences a step (6 x 4 was asked); "
        "peak 4.0 of 8.0 GiB\n"
    ) in capsys.readouterr().out
    # resumed in other micro-batches, on the same windows
    run(*flags, "--batch_size=auto", "--max_iters=4", out_dir="stopped")
    memory_for(5)
    resumed = run(*flags, "--batch_size=auto", "--init_from=resume", out_dir="stopped")
    assert (resumed["config"]["batch_size"], resumed["position"]) == (4, 8 * 24)


def test_all_ranks_take_what_fits_on_the_smallest(memory_for, monkeypatch):
    """Another rank, on which 3 sequences fit, is told by `any`."""
    tried = []
    monkeypatch.setattr(Ranks, "any", lambda self, value: value or tried[-1] > 3)
    memory_for(10)
    monkeypatch.setattr(fit, "peak_bytes", lambda ranks: 1)
    ranks = Ranks(0, 2, "cpu", "gloo")
    model = loop.GPT(loop.replace(TrainConfig().model, n_layer=1, n_head=1, n_embd=8, vocab_size=16))
    config = TrainConfig(batch_size="auto", gradient_accumulation_steps=4, model=model.config)
    found, _ = fit.micro_batch(config, 6, model, ranks, lambda size, model: tried.append(size))
    assert (found.batch_size, found.gradient_accumulation_steps) == (3, 8)


def test_where_auto_cannot_be_it_says_what_to_do(workplace, memory_for, monkeypatch, capsys):
    code, _, err = command(main, monkeypatch, capsys, *TINY, "--batch_size=auto")
    assert code == 1 and "cpu cannot be asked: give a number, such as --batch_size=12" in err
    memory_for(0)
    code, _, err = command(main, monkeypatch, capsys, *TINY, "--batch_size=auto")
    assert code == 1 and err.count("\n") == 1
    assert "not one sequence of block_size=16 can be trained on in the 8.0 GiB of cpu; try" in err


def test_a_fault_in_a_trial_that_is_not_about_memory_is_shown(workplace, memory_for, monkeypatch):
    memory_for(9)
    monkeypatch.setattr(loop, "trial", lambda *a, **k: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        run("--batch_size=auto")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0"), "2.00 GiB"),
        (torch.AcceleratorError("CUDA error: out of memory", 2), None),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), None),
        (MemoryError("Unable to allocate 1.00 PiB for an array"), None),
        (RuntimeError("MPS backend out of memory. Tried to allocate 64.00 MB on private pool."), "64.00 MB"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ...),
        (ValueError("a book on what to do when one runs out of memory"), ...),
    ],
)
def test_what_counts_as_out_of_memory(error, told):
    assert fit.out_of_memory(error) == (told is not ...)
    if told is not ...:
        assert (f"({told} more were wanted)" in fit.explain(error, TrainConfig())) == (told is not None)


@pytest.mark.parametrize("when", ["creation", "training", "evaluation"])
def test_out_of_memory_at_any_time_is_a_sentence(workplace, monkeypatch, capsys, when):
    """Each time the real failure of the allocator."""
    flags, saved = [], "nothing is saved yet"
    if when == "creation":
        flags = ["--block_size=2199023255552"]
    else:
        name = {"training": "train_step", "evaluation": "estimate_loss"}[when]
        whole, calls = getattr(loop, name), []

        def failing(*args):
            calls.append(args)
            if len(calls) == (6 if when == "training" else 2):
                torch.empty(1 << 50, dtype=torch.int8)
            return whole(*args)

        monkeypatch.setattr(loop, name, failing)
    if when == "training":
        saved = "--init_from=resume goes on from out/ckpt.pt"
        begin = checkpoint.Saver.save  # in the background: here it is over when the memory ends
        monkeypatch.setattr(checkpoint.Saver, "save", lambda self, *args: (begin(self, *args), self.wait()))
    code, _, err = command(main, monkeypatch, capsys, *TINY, *flags)
    assert code == 1 and err.startswith("error: out of memory (") and err.count("\n") == 1
    assert (
        "bytes more were wanted): try a smaller batch_size than 4, with gradient_accumulation_steps=2" in err
    )
    assert err.endswith(f"; {saved}\n")


def test_out_of_memory_in_an_evaluation_of_its_own_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: torch.empty(1 << 50, dtype=torch.int8))
    code, _, err = command(evaluate.main, monkeypatch, capsys, "--data=x", "--device=cpu")
    assert (code, err) == (1, "error: out of memory: try a smaller batch_size than 8\n")


def test_a_profile_is_a_trace_of_those_steps_and_a_list_of_what_costs_most(workplace, capsys):
    run("--profile=2:5", "--eval_interval=5", out_dir="profiled")
    run("--eval_interval=5", out_dir="plain")
    assert_same_run("plain", "profiled")
    events = json.loads(Path("profiled/trace-2-4.json").read_text())["traceEvents"]
    count = sum(event.get("name") == "aten::_fused_adamw_" for event in events)
    assert count == 3 * 2, "a call for each of two groups in each of three steps, and no evaluation's"
    out = capsys.readouterr().out
    assert out.index("iter 4:") < out.index("profile of steps 2 to 4: profiled/trace-2-4.json")
    listed = re.findall(r"^ +([\d.]+)% +([\d.]+) ms +([\d,]+) times  (.+)$", out, re.MULTILINE)
    shares = [float(share) for share, *_ in listed]
    assert len(listed) == 12 and shares == sorted(shares, reverse=True) and 50 < sum(shares) <= 100.5
    [whole] = map(float, re.findall(r"^([\d.]+) ms a step in operations on cpu", out, re.MULTILINE))
    assert float(listed[0][1]) == pytest.approx(whole * shares[0] / 100, rel=0.02, abs=0.01)


def test_a_profile_ends_before_an_evaluation_and_where_the_run_stops_and_begins_once(workplace, capsys):
    run("--profile=2:7", "--eval_interval=4", out_dir="evaluated")
    run("--profile=2:7", "--max_iters=4", "--eval_interval=100", out_dir="ended")
    for folder in ("evaluated", "ended"):
        assert [path.name for path in Path(folder).glob("trace-*")] == ["trace-2-3.json"]
    capsys.readouterr()
    run("--profile=1:3", "--init_from=resume", out_dir="ended")
    assert "profile=1:3: those steps were made before" in capsys.readouterr().out
    assert metrics.read(Path("ended/metrics.jsonl"))[-1]["iter"] == 8


def test_a_profile_of_steps_that_are_not_made_is_refused(workplace, monkeypatch, capsys):
    for flag, words in (
        ("5:5", "profile='5:5' must be START:STOP, such as 10:13"),
        ("8:9", "profile=8:9: this run makes the steps 0 to 7"),
    ):
        code, _, err = command(main, monkeypatch, capsys, *TINY, f"--profile={flag}")
        assert code == 1 and words in err


def test_the_first_pass_leaves_no_gradient_and_draws_nothing():
    model = loop.GPT(
        loop.replace(TrainConfig().model, n_layer=1, n_head=1, n_embd=8, vocab_size=9, dropout=0.5)
    )
    before = torch.get_rng_state()
    assert loop.distributed.first_pass(model, 2, 4, Ranks(0, 1, "cpu", None), nullcontext()) > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.gpu
def test_memory_ends_before_the_gpu_does_while_sizes_are_tried():
    ranks = Ranks(0, 1, "cuda:0", None)
    with fit.with_margin(ranks) as total:
        free, everything = torch.cuda.mem_get_info()
        assert total == everything
        with pytest.raises(torch.OutOfMemoryError) as failure:
            torch.empty(int((1 - fit.MARGIN / 2) * free), dtype=torch.int8, device="cuda")
        assert fit.out_of_memory(failure.value)
        torch.empty(free // 4, dtype=torch.int8, device="cuda")
        assert fit.peak_bytes(ranks) >= free // 4
        fit.release("cuda:0")
        assert fit.peak_bytes(ranks) < free // 4
    assert torch.cuda.get_per_process_memory_fraction() == 1.0
