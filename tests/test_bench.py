"""The benchmarks measure what they say, and nothing that is wrong. No speed is asserted."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import kernels
from bench import kernels as suite
from bench import sweep as tuner
from bench import throughput, timing
from gpt.model import GPTConfig
from train.distributed import Ranks

ROOT = Path(__file__).parents[1]
OPS = {op.name: op for op in kernels.OPS}


def test_summary_is_the_median_and_the_outer_tenths():
    found = timing.summary([float(i) for i in range(21)][::-1])
    assert (found.median, found.low, found.high, found.runs) == (10.0, 2.0, 18.0, 21)
    assert timing.summary([3.0]) == timing.Timing(3.0, 3.0, 3.0, 1)


def test_competitors_take_turns():
    """No more than a round apart at any time, and each round has all of them."""
    calls = []

    def slow(name):
        calls.append(name)
        time.sleep(0.002)

    found = timing.interleaved({n: lambda n=n: slow(n) for n in "abc"}, "cpu", seconds=0.02)
    timed = calls[9:]  # after three warm-up calls of each
    rounds = [set(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert len(rounds) >= 5 and all(r == set("abc") for r in rounds)
    assert len({tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)}) > 1, "the order never changes"
    assert all(t.runs == len(rounds) and 2 <= t.low <= t.median <= t.high for t in found.values())


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.differentiable])
def test_a_wrong_result_is_not_timed(name, monkeypatch):
    """A gradient of which a thousandth is missing."""
    op = OPS[name]

    class Faulty(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 0.999

    first = next(iter(suite.make_call(op, torch.float32, "cpu", suite.SMALL[name])))

    def faulty(**call):
        return op.reference(**call | {first: Faulty.apply(call[first])})

    monkeypatch.setattr(
        suite, "variants", lambda *_: [("right", op.reference), ("wrong", faulty), ("none", "why")]
    )
    limits = {"copy_bytes_per_s": 1e9, "product_flops_per_s": 1e12}
    found = suite.measure(op, suite.SMALL[name], torch.float32, "cpu", limits, 0.001)
    assert found["none"] == "why" and found["wrong"].startswith(f"wrong: d{first} is off by 1.0e-03")
    cost = op.cost(**suite.make_call(op, torch.float32, "cpu", suite.SMALL[name]))
    least = max(cost.backward_bytes / 1e9, cost.backward_flops / 1e12)
    backward = found["right"]["backward"]
    assert backward["limit"] == pytest.approx(1000 * least / backward["median"])


def test_an_operation_without_gradients_is_judged_and_timed_forward(monkeypatch):
    op = OPS["decode_attention"]

    def faulty(q, **rest):
        return op.reference(q=q, **rest) * 0.999

    monkeypatch.setattr(suite, "variants", lambda *_: [("right", op.reference), ("wrong", faulty)])
    limits = {"copy_bytes_per_s": 1e9, "product_flops_per_s": 1e12}
    found = suite.measure(op, suite.SMALL[op.name], torch.float32, "cpu", limits, 0.001)
    assert found["wrong"].startswith("wrong: output 0 is off by 1.0e-03")
    assert found["right"].keys() == {"bytes", "forward"}
    assert found["right"]["forward"]["median"] > 0


def test_every_operation_has_shapes_that_it_accepts():
    assert suite.SHAPES.keys() == suite.SMALL.keys() == OPS.keys()
    for name, samples in suite.SHAPES.items():
        for sample in samples:
            call = OPS[name].make(dtype=torch.bfloat16, device="meta", **sample)
            cost = OPS[name].cost(**call)
            assert (cost.backward_bytes if OPS[name].differentiable else cost.forward_bytes) > 0


def test_the_suite_runs_from_a_bare_checkout_and_says_what_is_missing(tmp_path):
    """No command-line library, no GPU: the CPU's figures, with a note."""
    run = "import runpy; runpy.run_module('bench.kernels', run_name='__main__')"
    script = f"import sys; sys.modules['tyro'] = None; {run}"
    flags = ["layer_norm", "--dtype", "fp32", "--seconds", "0.001", "--out", tmp_path / "k"]
    result = subprocess.run(
        [sys.executable, "-c", script, *flags],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    if not torch.cuda.is_available():
        assert "There is no GPU" in result.stdout
    found = json.loads((tmp_path / "k").read_text())
    assert found["environment"]["torch"] == torch.__version__
    case = found["cases"][0]["variants"]
    assert case["eager"]["both"]["median"] > 0
    assert isinstance(case["liger"], str | dict)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny model is for CPUs")
def test_throughput_makes_the_steps_of_training(monkeypatch):
    """Its step is `train.update`: it clips, accumulates, and changes the weights."""
    ranks = Ranks(0, 1, "cpu", None)
    calls = []
    update = throughput.update

    def counted(model, *rest):
        loss, norm = update(model, *rest)
        calls.append((loss.item(), norm.item()))
        return loss, norm

    monkeypatch.setattr(throughput, "update", counted)
    config = GPTConfig(16, 64, 1, 2, 32, bias=False)
    variant = throughput.prepare(
        lambda: throughput.our_variant("ours", "torch", False, config, 2, "float32", ranks), ranks
    )
    assert (
        variant.tokens == 2 * 2 * 16
        and variant.flops_per_token == 6 * (64 * 32 + 12 * 32**2 + 3 * 32) + 12 * 32 * 16
    )
    found = throughput.measure([variant], 0.0, ranks)["ours"]
    assert len(calls) == 2 + 1 + 3 and calls[-1][0] < calls[0][0] and all(norm > 0 for _, norm in calls)
    assert found["steps"] == 3 and found["tokens_per_s"] == pytest.approx(64e3 / found["step_ms"])


@pytest.mark.parametrize(
    "name", ["layer_norm", "add_layer_norm", "cross_entropy", "causal_attention", "decode_attention"]
)
def test_a_sweep_launches_each_candidate_and_leaves_the_table_as_it_was(name, monkeypatch):
    """On tensors without data, as an H100 would be given them."""
    from kernels.op import record

    op = OPS[name]
    call = op.make(**{"dtype": torch.bfloat16, "device": "meta"} | op.shipped[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "interleaved", lambda calls, *_: {n: c() for n, c in calls.items()})
    with record(assume=90) as launches:
        found_slots = list(tuner.slots(op, call))
        assert found_slots
        for slot in found_slots:
            before, table = slot.get(), dict(slot.table)
            launches.clear()
            found = tuner.sweep(op, call, slot, 0.01)
            assert slot.get() == before and slot.table == table
            assert found.keys() >= {str(tuple(c)) for c in slot.candidates}
            used = {(launch.num_warps, launch.num_stages) for launch in launches}
            assert len(used) > 2, "every candidate was launched with the same settings"
