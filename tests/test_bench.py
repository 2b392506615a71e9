"""The figures that the benchmarks publish are those that one computes by hand. No speed is asserted."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench.kernels
import bench.sweep
from bench import generate, judge, report, roofline, throughput, timing
from gpt.model import GPT, GPTConfig
from kernels.cross_entropy import LN2, LOG2E
from kernels.op import record
from tests.test_command_line import command, complaint
from train.distributed import Ranks

ROOT = Path(__file__).parents[1]
OPS = bench.kernels.TIMED
LIMITS = {"copy_bytes_per_s": 1e9, "product_flops_per_s": 1e12}


# ---- the clock


def test_competitors_take_turns():
    """No more than a round apart at any time, and each round has all of them."""
    calls = []

    def slow(name):
        calls.append(name)
        time.sleep(0.002)

    result = timing.interleaved({n: lambda n=n: slow(n) for n in "abc"}, "cpu", seconds=0.02)
    timed = calls[6:]  # after two warm-up calls of each
    rounds = [set(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert len(rounds) >= 5 and all(r == set("abc") for r in rounds)
    assert len({tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)}) > 1, "the order never changes"
    assert all(t.runs == len(rounds) and 2 <= t.low <= t.median <= t.high for t in result.values())
    assert timing.summary([float(i) for i in range(21)][::-1]) == timing.Timing(10.0, 2.0, 18.0, 21)


@pytest.mark.parametrize(
    ("before", "after", "resumed"), [("a1", "a1", [1, 2]), ("a1", "b2", []), ("a1-dirty", "a1-dirty", [])]
)
def test_only_a_run_of_the_same_commit_is_resumed(before, after, resumed, tmp_path, monkeypatch):
    path = tmp_path / "k.json"
    monkeypatch.setenv("TRITONGPT_COMMIT", before)
    assert timing.of_same_commit(path, "cases") == []
    timing.write(path, "kernels", "cpu", cases=[1, 2])
    monkeypatch.setenv("TRITONGPT_COMMIT", after)
    assert timing.of_same_commit(path, "cases") == resumed


# ---- operations


def test_the_judge_sees_one_wrong_element_many_slightly_wrong_ones_and_what_is_missing():
    exact = {
        "output 0": torch.randn(100, 100, dtype=torch.float64),
        "dx": torch.randn(3, dtype=torch.float64),
    }
    peer = {name: tensor.bfloat16() for name, tensor in exact.items()}
    one, many = torch.zeros(100, 100), torch.full((100, 100), 0.015)
    one[7, 7] = 0.2
    assert judge.faults(peer, exact, peer) == []
    for sentence, error in (("is off by 2", one), ("has an error of norm", many)):
        ours = peer | {"output 0": (exact["output 0"] + error).bfloat16()}
        (fault,) = judge.faults(ours, exact, peer)
        assert sentence in fault
    assert judge.faults({"output 0": peer["output 0"]}, exact, peer)
    assert judge.faults(peer | {"dx": torch.zeros(4)}, exact, peer)
    assert judge.faults(peer | {"dx": torch.full((3,), torch.nan)}, exact, peer)


@pytest.mark.parametrize("name", ["add_layer_norm_mixed", "linear_cross_entropy"])
def test_a_wrong_result_is_not_timed_and_a_right_one_is_held_to_its_limit(name, monkeypatch):
    """The wrong one misses three hundredths of a gradient."""
    op, sample, dtype = OPS[name], OPS[name].samples[0], torch.bfloat16

    class Faulty(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 0.97

    call = bench.kernels.make_call(op, dtype, "cpu", sample)
    first = next(argument for argument, value in call.items() if torch.is_floating_point(value))

    def faulty(**call):
        return op.reference(**call | {first: Faulty.apply(call[first])})

    functions = {"right": op.reference, "wrong": faulty, "none": "why"}
    monkeypatch.setattr(bench.kernels, "variants", lambda *_: functions)
    result = bench.kernels.measure(op, sample, dtype, "cpu", LIMITS, 0.001)
    assert result["none"] == "why" and result["wrong"].startswith(f"wrong: d{first} is off by ")
    cost, right = op.cost(**call), result["right"]
    least = {
        "forward": 1e3 * max(cost.forward_bytes / 1e9, cost.forward_flops / 1e12),
        "backward": 1e3 * max(cost.backward_bytes / 1e9, cost.backward_flops / 1e12),
    }
    least["both"] = least["forward"] + least["backward"]
    for direction, ms in least.items():
        assert right[direction]["limit"] == pytest.approx(ms / right[direction]["median"])
    flops, moved = cost.forward_flops + cost.backward_flops, cost.forward_bytes + cost.backward_bytes
    assert right["both"]["flops_per_s"] == pytest.approx(1000 * flops / right["both"]["median"])
    assert right["both"]["bytes_per_s"] == pytest.approx(1000 * moved / right["both"]["median"])
    assert right["sustained"] > 0


def test_what_the_124m_runs_is_timed_first_and_everything_once():
    few, every = (bench.kernels.samples_to_time(OPS.values(), "cuda", few) for few in (True, False))
    assert few == every[: len(few)] and [op.name for op, _ in few] == list(OPS)
    first = {op.name: sample for op, sample in few}
    assert first["causal_attention"] == dict(B=64, T=1024, H=12, D=64)
    cases = [f"{op.name} {sample}" for op, sample in every]
    assert len(set(cases)) == len(cases) == sum(len(op.benchmark_shapes) for op in OPS.values())


def test_pytest_benchmark_has_a_row_for_each_variant_and_the_reason_of_each_that_is_missing(tmp_path):
    flags = "-m pytest bench --benchmark-only -rs -p no:cacheprovider -k".split()
    flags += ["gelu or decode or linear", f"--benchmark-json={tmp_path / 'b.json'}"]
    alone = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    shown = subprocess.run([sys.executable, *flags], cwd=ROOT, env=alone, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    groups = {b["name"]: b["group"] for b in json.loads((tmp_path / "b.json").read_text())["benchmarks"]}
    assert groups["test_operation[gelu-eager-backward]"].startswith("gelu backward")
    assert not any("decode_attention" in name and "backward" in name for name in groups)
    if not torch.cuda.is_available():
        assert "the interpreter's speed says nothing" in shown.stdout


# ---- the training step


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny model is for CPUs")
def test_throughput_makes_the_steps_of_training(monkeypatch):
    """Its step is `train_step`: it clips, accumulates, and changes the weights."""
    ranks = Ranks(0, 1, "cpu", None)
    calls = []
    train_step = throughput.train_step

    def counted(model, *rest):
        loss, norm = train_step(model, *rest)
        calls.append((loss.item(), norm.item()))
        return loss, norm

    monkeypatch.setattr(throughput, "train_step", counted)
    ours = (
        "ours",
        {"kernels": "torch"},
        False,
        GPTConfig(16, 64, 1, 2, 32, bias=False),
        "float32",
        ranks,
        64,
        2,
    )
    variant = throughput.warmed_up(lambda: throughput.our_variant(*ours), ranks)
    assert variant.tokens == 2 * 2 * 16
    *_, figures = throughput.measure([variant], 0.0, 1, ranks)
    result = figures["ours"]
    assert len(calls) == 2 + 1 + 3 and calls[-1][0] < calls[0][0] and all(norm > 0 for _, norm in calls)
    assert result["steps"] == 3 and result["tokens_per_s"] == pytest.approx(64e3 / result["step_ms"])


def test_mfu_is_of_all_gpus_peak(monkeypatch):
    """Two H200 at half a second a step of 1M tokens, 0.4 GFLOP each: of twice 989 TFLOP/s."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    variant = throughput.Variant("x", lambda: None, 1_000_000, peak_bytes=7)
    result = throughput.figures_of(variant, [500.0, 400.0, 900.0], 400_000_000, Ranks(0, 2, "cuda:0", None))
    assert (result["tokens_per_s"], result["step_ms"], result["steps"]) == (2e6, 500.0, 3)
    assert (result["step_ms_low"], result["step_ms_high"], result["peak_bytes"]) == (400.0, 900.0, 7)
    assert result["mfu"] == pytest.approx(2e6 * 4e8 / (2 * 989e12))


def test_a_micro_batch_is_halved_until_it_fits():
    ranks, sizes = Ranks(0, 1, "cpu", None), []

    def build(size):
        sizes.append(size)
        if size > 3:
            raise torch.OutOfMemoryError
        return throughput.Variant("x", lambda: None, 1)

    variant, size = throughput.largest_that_fits(build, 16, ranks)
    assert (variant.name, size, sizes) == ("x", 2, [16, 8, 4, 2])


def test_ours_and_nanogpt_are_built_first_and_halved_when_they_do_not_fit_together():
    ranks, config = Ranks(0, 1, "cuda:0", None), GPTConfig(16, 64, 1, 2, 32)
    options = throughput.ThroughputConfig(ablate=True, nanogpt="x")
    names = list(throughput.builders(options, config, "bfloat16", ranks))
    assert names[:3] == ["tritongpt", "nanogpt", "torch compiled"] and len(names) == len(set(names))

    def build(batch_size):
        def step():
            if batch_size > 4 and len(session.variants) > 1:
                raise torch.OutOfMemoryError

        return throughput.Variant("x", step, 1)

    builds = {"tritongpt": build, "nanogpt": build}
    session = throughput.Session(GPT(config), "float32", Ranks(0, 1, "cpu", None), builds, "")
    for name in builds:
        session.add(name, 16)
    session.fit_together()
    assert session.results["batch_size"] == {"tritongpt": 4, "nanogpt": 4}


# Kernels of a step of ours and of nanoGPT's, as torch 2.11's profiler named them on an H200.
OF_PART = {
    "matrix products": [
        "nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_TNN",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>",
    ],
    "attention, forward": [
        "_attention_forward_kernel",
        "flash_fwd_kernel<cutlass::bfloat16_t>",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_kernel0_0",
    ],
    "attention, backward": [
        "_attention_dkdv_kernel",
        "_attention_dq_kernel",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x64_1x4x1_kernel0_0",
        "void cudnn::fusion::compute_dot_do_o_specialized<true, 64>(void const*, void const*)",
        "void cudnn::fusion::convert_dq_to_16bits<true>(void const*, void*, unsigned int)",
        "triton_poi_fused_cat_transpose_view_7",
    ],
    "norms, forward": [
        "_norm_forward_kernel",
        "triton_per_fused__to_copy__unsafe_view_add_native_layer_norm_native_layer_norm_backward_12",
        "triton_per_fused__to_copy_add_embedding_native_layer_norm_2",
    ],
    "norms, backward": [
        "_norm_backward_kernel",
        "triton_per_fused__to_copy_add_native_layer_norm_backward_view_5",
        "triton_per_fused__to_copy_add_embedding_dense_backward_native_layer_norm_native_layer_norm_backward_nll_loss_"
        "forward_view_10",
    ],
    "GELU, forward": ["triton_poi_fused__unsafe_view_gelu_4", "_gelu_forward_kernel"],
    "GELU, backward": ["triton_poi_fused__unsafe_view_gelu_gelu_backward_view_2", "_gelu_backward_kernel"],
    "loss": ["_loss_kernel", "triton_red_fused__log_softmax__unsafe_view_prepare_softmax_online_view_15"],
    "rest": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float> >",
        "triton_per_fused_add_embedding_dense_backward_sum_view_7",
        "triton_poi_fused__to_copy_div_layer_norm_backward_mul_view_0",
        "Memset (Device)",
    ],
}  # fmt: skip


def test_the_kernels_of_a_step_are_summed_by_part():
    for part, names in OF_PART.items():
        for name in names:
            parts = throughput.by_part([(name, 2.0), ("_loss_kernel", 1.0)], 10.0)
            expected = dict.fromkeys(throughput.PARTS, 0.0) | {"loss": 1.0, "between kernels": 7.0}
            assert parts == expected | {part: expected[part] + 2.0}, name


# ---- tiles


def test_a_sweep_times_no_ignored_rows(monkeypatch):
    """Such a row is not read: with a third of them, a tile seemed to reach 98% and not 82% of the limit."""
    monkeypatch.setattr(bench.sweep, "DEVICE", "cpu")
    sample = {"N": 300, "V": 7, "dtype": torch.float16}
    call = bench.sweep.arguments(OPS["cross_entropy"], sample, bench.kernels.make_inputs)
    assert call["input"].dtype == torch.float16 and not call["input"].requires_grad
    assert call["target"].unique().tolist() == list(range(7))


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if "slots" in vars(op)])
def test_a_sweep_launches_each_candidate_and_leaves_the_table_as_it_was(name, monkeypatch):
    """On tensors without data, as an H100 would be given them."""
    op, sample = OPS[name], OPS[name].production_shapes[0]
    call = op.make(**{"dtype": torch.bfloat16, "device": "meta"} | sample)
    monkeypatch.setattr(bench.sweep, "arguments", lambda *_: call)
    monkeypatch.setattr(bench.sweep, "failures", lambda *_: {})  # there are no values to judge
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "interleaved", lambda calls, *_: {n: c() for n, c in calls.items()})
    with record(assume=90) as launches:
        for position, slot in enumerate(op.slots(**call)):
            before, table = slot.get(), dict(slot.table)
            launches.clear()
            answers = {tile: bench.sweep.attempt(name, sample, position, tile) for tile in slot.candidates}
            assert set(answers.values()) == {None} and slot.get() == before and slot.table == table
            in_pool = [(launch.num_warps, launch.num_stages, launch.arguments) for launch in launches]
            launches.clear()
            answers[slot.candidates[0]] = "why"
            result = bench.sweep.sweep(op, call, slot, answers, 0.01)
            assert slot.get() == before and slot.table == table
            assert result.keys() == {str(tuple(c)) for c in slot.candidates}
            assert result[str(tuple(slot.candidates[0]))] == "why"
            here = [(launch.num_warps, launch.num_stages, launch.arguments) for launch in launches]
            kernels_a_call = len(in_pool) // len(slot.candidates)
            assert str(here) == str(in_pool[kernels_a_call:]), "another thing is timed than was compiled"
            used = {(warps, stages) for warps, stages, _ in here}
            assert len(used) > 2, "every candidate was launched with the same settings"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's tiles")
@pytest.mark.parametrize("fault", [LOG2E, LN2, None])
def test_a_tile_that_computes_something_else_is_not_timed(fault, monkeypatch):
    monkeypatch.setattr(bench.sweep, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    if fault is not None:
        monkeypatch.setattr(fault, "value", fault.value * 1.02)
    reason = bench.sweep.attempt("cross_entropy", {"N": 3, "V": 5003}, 0, (4096, 1, 1))
    assert (reason is None) == (fault is None), reason
    assert fault is None or reason.startswith("wrong: ")


# ---- roofline

TINY = GPTConfig(16, 64, 2, 2, 32, bias=False, residual_dtype="mixed")


def test_the_products_of_the_roofline_are_those_that_pytorch_counts():
    model = GPT(replace(TINY, kernels="torch"))
    idx = torch.randint(64, (3, 16))
    with FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    parts = {part.name: part for part in roofline.parts(TINY, batch_size=3, accumulation=5)}
    assert (*parts, "between kernels") == roofline.PARTS
    assert parts["matrix products"].flops == 5 * counted["aten.mm"]
    # 2 products forward and 5 backward of the causal half, the diagonal included
    pairs = sum(range(1, 16 + 1))
    product = 5 * 3 * 2 * 2 * (2 * 16 * pairs)
    assert parts["attention, forward"].flops == 2 * product
    assert parts["attention, backward"].flops == 5 * product
    no_tensor_cores = ("norms", "GELU", "loss", "rest")
    assert all(part.flops == 0 for name, part in parts.items() if name.startswith(no_tensor_cores))


def test_each_kernel_waits_for_the_slower_of_its_two_limits():
    part = roofline.Part("both", ((100.0, 1.0, 3), (1.0, 50.0, 2)))
    assert part.least_time({"copy_bytes_per_s": 10.0, "product_flops_per_s": 20.0}) == 3 * 5.0 + 2 * 5.0
    assert (part.flops, part.bytes) == (302.0, 103.0)


def test_the_roofline_stands_beside_the_measured_step_and_predicts_others(monkeypatch, capsys):
    """By hand: 12 layers of 12 C^2 and a head of V C weights, 6 FLOPs each a token, at the measured rate."""
    fp32 = ["--residual_dtype=float32"]  # as it was measured
    h200, a100 = (
        command(roofline.main, monkeypatch, capsys, *flags)[1] for flags in (fp32, [*fp32, "--gpu=A100"])
    )
    C, V, tokens = 768, 50304, 8 * 64 * 1024
    flops = 6 * tokens * (12 * 12 * C * C + V * C)
    for shown, rate, ms in ((h200, 798.961490436e12, 552.875), (a100, 798.961490436e12 / 989 * 312, None)):
        line = re.search(r"^matrix products .*", shown, re.MULTILINE)[0].split()
        least, share, took = float(line[4]), float(line[5].rstrip("%")), float(line[6])
        assert least == pytest.approx(1e3 * flops / rate, abs=0.01)
        assert share == pytest.approx(100e3 * flops / 798.961490436e12 / 552.875, abs=0.1)
        assert took == pytest.approx(ms or 100 * least / share, rel=1e-3)
    assert re.search(r"^measured +923\.31 ms a step, 567,837 tokens/s, MFU 49\.1%$", h200, re.MULTILINE)
    # The memory is counted by autograd in a dry run. 25.5 GB were measured with smaller chunks of the loss.
    assert re.search(r"^memory, predicted: 26\.1 GB, which fits into 141 GB$", h200, re.MULTILINE)
    assert re.search("^expected +", a100, re.MULTILINE)
    assert "(predicted: 89% of the datasheet's bytes/s" in a100
    for flags, sentence in (
        (["--gpu=P100"], "there is no datasheet of 'P100'"),
        (["--batch_size=-1"], "must be at least 1"),
        (["--results=nowhere"], "no step was measured by part"),
    ):
        assert sentence in complaint(roofline.main, monkeypatch, capsys, *flags)


def test_the_shares_are_those_of_the_same_step_and_a_part_may_have_no_kernel(capsys):
    results = timing.read(ROOT / "bench" / "results")
    measured = roofline.measured_step("H200", None, results)
    larger = measured | {"model": measured["model"] | {"n_layer": 48}}
    assert roofline.measured_step("H200", None, [*results, larger]) is larger
    assert roofline.measured_step("H200", roofline.step_of(measured), [*results, larger]) is measured
    measured["parts"]["tritongpt"]["loss"] = 0.0  # a new version of Triton names the kernel otherwise
    roofline.print_step(roofline.step_of(measured), "H200", results)
    assert re.search(r"^loss .* 24\.57 +0\.00$", capsys.readouterr().out, re.MULTILINE)


# ---- report


def test_the_page_has_the_step_with_most_variants_of_the_newest_commit():
    def result(commit, *names):
        variants = {name: {"tokens_per_s": 1.0} for name in names}
        model = {"n_layer": 1, "n_embd": 2, "block_size": 3}
        step = {"benchmark": "throughput", "ranks": 1, "model": model, "batch_size": {"tritongpt": 4}}
        return step | {"environment": {"device": "H100", "commit": commit}, "variants": variants}

    old, ablated, longer = result("a", *"xyz"), result("b", *"xy"), result("b", *"x")
    assert report.newest([old, ablated, longer]) == report.newest([longer, ablated]) == {"H100": [ablated]}


def test_the_readme_has_what_the_results_say(monkeypatch, capsys, tmp_path):
    """Nobody writes a figure into it by hand; the same results give the same pictures to the byte."""
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text())
    results = shutil.copytree(ROOT / "bench" / "results", tmp_path / "results")
    code, _, err = command(report.main, monkeypatch, capsys, f"--results={results}", f"--readme={copy}")
    assert code == 0, err
    assert copy.read_text() == (ROOT / "README.md").read_text()
    for path in (ROOT / "bench" / "results").iterdir():
        assert (results / path.name).read_text() == path.read_text(), path.name


# ---- generation


def test_a_decoded_token_is_what_the_prompt_does_not_explain(monkeypatch):
    model = GPT(TINY).eval()
    calls = []

    def interleaved(timed, *_, cold):
        calls.append(timed)
        milliseconds = 10.0 if len(calls) == 1 else 40.0
        return {name: timing.Timing(milliseconds, 0, 0, 1) for name in timed}

    monkeypatch.setattr(timing, "interleaved", interleaved)
    result = generate.measure({"ours": model}, torch.zeros(2, 5, dtype=torch.long), 7, "float32", 1.0)["ours"]
    # 7 tokens, the first of them out of the prompt
    assert result == {"prefill": 1000.0, "decode": 2 / 5e-3, "ms": 5.0, "generate_ms": 40.0}


@pytest.mark.parametrize("fault", [0.0, 1.0])
def test_nothing_is_timed_when_nanogpt_would_say_something_else(monkeypatch, capsys, tmp_path, fault):
    (tmp_path / "model.py").write_text(
        "import torch\nfrom gpt.model import GPTConfig\nfrom gpt.model import GPT as Ours\n"
        "class GPT(Ours):\n"
        "    def load_state_dict(self, state):\n        super().load_state_dict(state)\n"
        f"        torch.nn.init.normal_(self.transformer.ln_f.weight, std=1.0) if {fault} else None\n"
        "        return self\n"
    )
    flags = f"--nanogpt={tmp_path} --prompt=4 --new=8 --seconds=0.01 --size=tiny".split()
    code, out, err = command(generate.main, monkeypatch, capsys, *flags)
    assert code == (1 if fault else 0), err
    assert ("the greedy tokens of both models differ" in err) == bool(fault)
    assert out.count("tokens/s, ") == (0 if fault else 3)


@pytest.mark.gpu
def test_the_clock_waits_for_the_gpu_and_empties_its_cache():
    times = timing.interleaved({"x": lambda: torch.cuda._sleep(10_000_000)}, "cuda", 0.1)
    assert times["x"].median > 2.0  # at 2 GHz, 5 ms
    x = torch.zeros(10 << 18, device="cuda")  # 10 MB
    result = {cold: timing.interleaved({"x": x.sum}, "cuda", 0.2, cold)["x"].median for cold in (True, False)}
    assert result[True] > result[False]
    allocate = lambda: torch.empty(64 << 20, dtype=torch.int8, device="cuda")  # noqa: E731
    assert timing.peak_extra_bytes(allocate, "cuda") == 64 << 20
