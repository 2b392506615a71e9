"""The benchmarks measure what they say, and nothing that is wrong. No speed is asserted."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels
from bench import curve, generate, roofline, sdpa, throughput, timing
from bench import kernels as suite
from bench import sweep as tuner
from gpt.model import GPT, GPTConfig
from kernels.op import record
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


READINGS = "1980, 690.50, 55, 0x0000000000000004\n1710, 700.10, 57, 0x0000000000000000\n"


def test_clocks_and_power_are_read_while_a_step_runs(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        f"#!/bin/sh\necho \"$*\" > {tmp_path}/asked\nprintf '{READINGS}1, [N/A], 1, 0x0\n17'\nexec sleep 9"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="abc"))
    with timing.clocks("cuda") as found:
        deadline = time.monotonic() + 20
        while not (tmp_path / "asked").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert found == {}
    assert found["mhz"] == {"median": 1845.0, "low": 1710.0, "high": 1980.0, "runs": 2}
    assert found["watts"]["high"] == 700.1 and found["celsius"]["low"] == 55.0
    assert found["power_capped"] == 0.5 and "--id=GPU-abc" in (tmp_path / "asked").read_text()


def test_without_nvidia_smi_or_without_a_gpu_no_clock_is_reported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="abc"))
    monkeypatch.setenv("PATH", "")
    for device in ("cuda", "cpu"):
        with timing.clocks(device) as found:
            pass
        assert found == {}
    assert timing.summary_of_clocks("No devices were found\n1, 2, 3, 4, 0x0\n1, 0x0\n") == {}


def test_a_result_says_which_attention_pytorch_chose(monkeypatch):
    found = timing.environment("cpu", ["x"])
    assert found["cudnn"] == torch.backends.cudnn.version() and found["sdpa"] == "FLASH_ATTENTION"
    monkeypatch.delattr(torch, "_fused_sdp_choice")
    assert timing.environment("cpu", ["x"])["sdpa"] is None


def test_every_function_gets_a_contiguous_gradient():
    """PyTorch keeps cuDNN's backward for the layout of the first gradient that it gets."""
    reference, strides = OPS["causal_attention"].reference, []

    def as_on_a_gpu(qkv):  # in fp64 its output lies in memory head by head
        return reference(qkv).transpose(1, 2).contiguous().transpose(1, 2)

    op = replace(OPS["causal_attention"], reference=as_on_a_gpu)

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            strides.append(gradient.is_contiguous())
            return gradient

    call = suite.make_call(op, torch.bfloat16, "cpu", suite.SMALL[op.name])
    function = lambda qkv: Watched.apply(reference(qkv))  # noqa: E731
    assert suite.wrong(op, call, {"watched": function}) == {}
    suite.directions(function, call)["both"]()
    assert strides == [True, True]


@pytest.mark.parametrize("probed", [torch.nn.functional.scaled_dot_product_attention, None])
def test_the_probe_of_sdpa_tells_a_right_gradient_from_a_wrong_one(probed, monkeypatch):
    qkv = torch.randn(2, 20, 3, 2, 16).bfloat16()
    upstream = torch.randn(2, 2, 20, 16).bfloat16() + 1.5
    backend = torch.nn.attention.SDPBackend.MATH
    if probed is None:  # q is taken for k
        monkeypatch.setattr(torch, "compile", lambda f, **_: lambda q, k, v: f(k, q, v))
    else:
        monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    for layout in ("THD", "HTD"):
        errors = sdpa.errors("compiled", layout, backend, qkv, upstream)
        assert len(errors) == 4 and (max(errors) < 0.01 if probed else min(errors) > 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.differentiable])
def test_a_wrong_result_is_not_timed(name, dtype, monkeypatch):
    """A gradient of which three hundredths are missing."""
    op = OPS[name]

    class Faulty(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 0.97

    call = suite.make_call(op, dtype, "cpu", suite.SMALL[name])
    first = next(argument for argument, value in call.items() if torch.is_floating_point(value))

    def faulty(**call):
        return op.reference(**call | {first: Faulty.apply(call[first])})

    monkeypatch.setattr(
        suite, "variants", lambda *_: [("right", op.reference), ("wrong", faulty), ("none", "why")]
    )
    limits = {"copy_bytes_per_s": 1e9, "product_flops_per_s": 1e12}
    found = suite.measure(op, suite.SMALL[name], dtype, "cpu", limits, 0.001)
    assert found["none"] == "why" and found["wrong"].startswith(f"wrong: d{first} is off by ")
    cost = op.cost(**suite.make_call(op, dtype, "cpu", suite.SMALL[name]))
    by_bytes, by_flops = cost.backward_bytes / 1e9, cost.backward_flops / 1e12
    backward = found["right"]["backward"]
    assert backward["limit"] == pytest.approx(1000 * max(by_bytes, by_flops) / backward["median"])
    assert found["right"]["sustained"] > 0, "the fastest peer is timed without a pause, as is ours"
    both = found["right"]["both"]
    flops, moved = cost.forward_flops + cost.backward_flops, cost.forward_bytes + cost.backward_bytes
    assert both["flops_per_s"] == pytest.approx(1000 * flops / both["median"])
    assert both["bytes_per_s"] == pytest.approx(1000 * moved / both["median"])
    forward = max(cost.forward_bytes / 1e9, cost.forward_flops / 1e12)
    assert both["limit"] == pytest.approx(1000 * (forward + max(by_bytes, by_flops)) / both["median"])


def test_an_operation_without_gradients_is_judged_and_timed_forward(monkeypatch):
    op = OPS["decode_attention"]

    def faulty(q, **rest):
        return op.reference(q=q, **rest) * 0.999

    monkeypatch.setattr(suite, "variants", lambda *_: [("right", op.reference), ("wrong", faulty)])
    limits = {"copy_bytes_per_s": 1e9, "product_flops_per_s": 1e12}
    found = suite.measure(op, suite.SMALL[op.name], torch.float32, "cpu", limits, 0.001)
    assert found["wrong"].startswith("wrong: output 0 is off by 1.0e-03")
    assert found["right"].keys() == {"bytes", "forward", "sustained"}
    assert found["right"]["forward"]["median"] > 0


def test_a_run_that_was_cut_short_goes_on_where_it_stopped(bench_command, tmp_path, monkeypatch):
    out, asked, measure = tmp_path / "k.json", [], suite.measure

    def interrupted(op, *rest):
        asked.append(op.name)
        if op.name == "cross_entropy":
            raise KeyboardInterrupt
        return measure(op, *rest)

    monkeypatch.setattr(suite, "measure", interrupted)
    flags = ["layer_norm", "cross_entropy", "--seconds", 0.001, "--dtype", "fp32", "--out", out]
    for commit, expected in (
        ("one", ["layer_norm", "cross_entropy"]),
        ("one", ["cross_entropy"]),
        ("another", ["layer_norm", "cross_entropy"]),
    ):
        monkeypatch.setenv("TRITONGPT_COMMIT", commit)
        asked.clear()
        with pytest.raises(KeyboardInterrupt):
            bench_command("kernels", *flags)
        assert asked == expected
        assert [case["operation"] for case in json.loads(out.read_text())["cases"]] == ["layer_norm"]


def test_the_shapes_that_decide_come_first_and_each_comes_once():
    names = list(suite._OPS)
    every = suite.samples_to_time(names, "cuda", few=False)
    few = suite.samples_to_time(names, "cuda", few=True)
    assert every[: len(few)] == few and len(few) == len(suite.DECIDING)
    assert {op.name for op, _ in few} == suite._OPS.keys(), "one of each operation"
    asked = [f"{op.name} {sample}" for op, sample in every]
    assert len(set(asked)) == len(asked) == sum(map(len, suite.SHAPES.values()))
    assert all(sample == json.loads(json.dumps(sample)) for _, sample in every), "a file has it otherwise"
    assert suite.samples_to_time(["layer_norm"], "cpu", few=False) == [
        (OPS["layer_norm"], {"shape": [256, 768]})
    ]
    assert all(op.name == "layer_norm" for op, _ in suite.samples_to_time(["layer_norm"], "cuda", few=False))


def test_ours_and_the_fastest_peer_also_run_on_end(monkeypatch):
    """Warming up compiles and judges the same, and times nothing."""
    op, timed = OPS["layer_norm"], []
    slow = lambda **call: (time.sleep(0.02), op.reference(**call))[1]  # noqa: E731
    functions = [("tritongpt", slow), ("slow", slow), ("fast", op.reference)]
    monkeypatch.setattr(suite, "variants", lambda *_: functions)
    limits = {"copy_bytes_per_s": 1e9, "product_flops_per_s": 1e12}
    sample = suite.SMALL[op.name]
    found = suite.measure(op, sample, torch.float32, "cpu", limits, 0.001)
    assert [name for name, v in found.items() if "sustained" in v] == ["tritongpt", "fast"]
    assert found["tritongpt"]["sustained"] >= 20 and "sustained" in suite._line("x", found["fast"], limits)
    monkeypatch.setattr(timing, "interleaved", lambda *a, **k: timed.append(a))
    suite.warm([(op, sample)], ["fp32"], "cpu")
    assert not timed


def test_every_operation_has_shapes_that_it_accepts():
    every = suite._OPS
    assert suite.SHAPES.keys() == suite.SMALL.keys() == every.keys() and every.keys() > OPS.keys()
    for name, samples in suite.SHAPES.items():
        for sample in samples:
            call = every[name].make(dtype=torch.bfloat16, device="meta", **sample)
            cost = every[name].cost(**call)
            assert (cost.backward_bytes if every[name].differentiable else cost.forward_bytes) > 0


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
    """Its step is `train_step`: it clips, accumulates, and changes the weights."""
    ranks = Ranks(0, 1, "cpu", None)
    calls = []
    train_step = throughput.train_step

    def counted(model, *rest):
        loss, norm = train_step(model, *rest)
        calls.append((loss.item(), norm.item()))
        return loss, norm

    monkeypatch.setattr(throughput, "train_step", counted)
    config = GPTConfig(16, 64, 1, 2, 32, bias=False)
    variant = throughput.prepare(
        lambda: throughput.our_variant("ours", "torch", False, config, "float32", ranks, 2), ranks
    )
    assert (
        variant.tokens == 2 * 2 * 16
        and variant.flops_per_token == 6 * (64 * 32 + 12 * 32**2 + 3 * 32) + 12 * 32 * 16
    )
    found = throughput.measure([variant], 0.0, ranks)["ours"]
    assert len(calls) == 2 + 1 + 3 and calls[-1][0] < calls[0][0] and all(norm > 0 for _, norm in calls)
    assert found["steps"] == 3 and found["tokens_per_s"] == pytest.approx(64e3 / found["step_ms"])


def test_warming_up_holds_one_variant_at_a_time_and_makes_one_micro_batch(monkeypatch, capsys):
    ranks, alive = Ranks(0, 1, "cpu", None), []

    class Held(throughput.Variant):
        pass

    def build(name, batch_size, step_tokens):
        assert [reference() for reference in alive] == [None] * len(alive), "two variants in memory"
        gpu = Ranks(0, 1, "cuda", None)
        assert throughput._accumulation(step_tokens, batch_size * 16, gpu) == 1
        assert throughput._accumulation(throughput.TOKENS_PER_STEP, batch_size * 16, gpu) > 1
        if name == "bad":
            raise ValueError("it does not compile")
        found = Held(name, lambda: None, 1, 1)
        alive.append(weakref.ref(found))
        return found

    builds = {name: partial(build, name) for name in ("one", "bad", "two")}
    throughput.warm(builds, 4, 16, ranks)
    said = capsys.readouterr().out.splitlines()
    assert len(alive) == 2 and said[0].startswith("prepared one in ") and "does not compile" in said[1]


def test_figures_are_kept_after_every_round():
    ranks, kept = Ranks(0, 1, "cpu", None), []
    variants = [throughput.Variant(name, lambda: time.sleep(0.001), 10, 1) for name in "ab"]
    found = throughput.measure(variants, 0.0, ranks, kept.append)
    assert [figures["a"]["steps"] for figures in kept] == [1, 2, 3] and kept[-1] == found
    assert all(figures.keys() == {"a", "b"} for figures in kept)


# (name, milliseconds) of the kernels that cost most in a step of ours and of nanoGPT's, profiled on an H200
# with torch 2.11 on 2026-11-26. The forward passes of attention and norms shared a name then.
OURS = [
    ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_TNN", 103.078),
    ("nvjet_sm90_tst_192x192_64x3_1x2_h_bz_coopB_splitK_NTN", 90.674),
    ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", 85.009),
    ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT", 83.613),
    ("_attention_dkdv_kernel", 72.725),
    ("_attention_forward_kernel", 36.0),
    ("_norm_forward_kernel", 34.162),
    ("nvjet_sm90_tst_192x128_64x5_1x2_h_bz_coopB_NNT", 51.546),
    ("nvjet_sm90_tst_192x192_64x3_2x1_v_bz_coopB_NNN", 47.819),
    ("_norm_backward_kernel", 46.768),
    ("nvjet_sm90_tss_192x192_64x3_1x2_h_badd_coopB_NTN", 45.940),
    ("_attention_dq_kernel", 44.426),
    ("triton_poi_fused__unsafe_view_gelu_gelu_backward_view_2", 44.195),
    ("nvjet_sm90_tst_256x128_64x4_1x4_h_bz_coopA_splitK_NTT", 35.370),
    ("_loss_kernel", 34.983),
    ("triton_poi_fused__unsafe_view_gelu_4", 31.318),
    ("nvjet_sm90_tss_192x192_64x3_1x2_h_bz_coopB_NTN", 6.414),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>", 3.412),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float> >", 3.402),
    ("triton_per_fused_add_embedding_dense_backward_sum_view_7", 1.707),
    ("_norm_sum_kernel", 0.700),
    ("Memset (Device)", 0.895),
    ("triton_poi_fused__to_copy_div_layer_norm_backward_mul_view_0", 0.378),
]
NANOGPT = [
    ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", 134.579),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x64_1x4x1_kernel0_0", 90.296),
    ("triton_poi_fused__unsafe_view_gelu_gelu_backward_view_4", 43.196),
    ("triton_red_fused__log_softmax__log_softmax_backward_data__to_copy_add_arange_eq_expand_nll_loss_backward_nll_"
     "loss_forward_scalar_tensor_view_where_0", 42.174),
    ("triton_red_fused__log_softmax__unsafe_view_prepare_softmax_online_view_15", 38.594),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_kernel0_0", 32.855),
    ("triton_per_fused__to_copy_add_native_layer_norm_backward_view_5", 32.488),
    ("triton_poi_fused__unsafe_view_gelu_6", 31.265),
    ("void at::native::vectorized_elementwise_kernel<8, at::native::FillFunctor<c10::BFloat16> >", 15.726),
    ("triton_poi_fused__to_copy_view_2", 13.309),
    ("triton_poi_fused_cat_transpose_view_7", 13.245),
    ("void cudnn::fusion::compute_dot_do_o_specialized<true, 64>(void const*, void const*)", 10.872),
    ("triton_per_fused__to_copy__unsafe_view_add_native_layer_norm_native_layer_norm_backward_12", 10.522),
    ("void cudnn::fusion::convert_dq_to_16bits<true>(void const*, void*, unsigned int)", 8.421),
    ("triton_per_fused__to_copy_add_embedding_dense_backward_native_layer_norm_native_layer_norm_backward_nll_loss_"
     "forward_view_10", 2.490),
    ("triton_per_fused__to_copy_add_embedding_native_layer_norm_2", 0.974),
    ("triton_per_fused_embedding_dense_backward_nll_loss_forward_sum_view_12", 0.742),
]  # fmt: skip


def test_the_kernels_of_a_step_are_summed_by_part(capsys):
    ours = throughput.by_part(OURS, 923.2)
    assert list(ours) == list(throughput.PARTS)
    measured = sum(ms for _, ms in OURS)
    assert ours == pytest.approx({
        "matrix products": 552.875, "attention, forward": 36.0, "attention, backward": 117.151,
        "norms, forward": 34.162, "norms, backward": 47.468, "GELU, forward": 31.318,
        "GELU, backward": 44.195, "loss": 34.983, "rest": 6.382, "between kernels": 923.2 - measured,
    })  # fmt: skip
    theirs = throughput.by_part(NANOGPT, 500.0)
    assert theirs == pytest.approx({
        "matrix products": 134.579, "attention, forward": 32.855, "attention, backward": 109.589 + 13.245,
        "norms, forward": 11.496, "norms, backward": 34.978, "GELU, forward": 31.265,
        "GELU, backward": 43.196, "loss": 80.768, "rest": 29.777, "between kernels": 0.0,
    })  # fmt: skip
    assert (
        throughput.by_part([("flash_fwd_kernel<cutlass::bfloat16_t>", 1.0)], 2.0)["attention, forward"] == 1.0
    )
    for direction in ("forward", "backward"):
        assert throughput.by_part([(f"_gelu_{direction}_kernel", 1.0)], 2.0)[f"GELU, {direction}"] == 1.0
    throughput.print_parts({"tritongpt": ours, "nanogpt": theirs}, {"loss": 25.0})
    table = {line[:20].strip(): line[20:].split() for line in capsys.readouterr().out.splitlines()}
    assert table["ms a step"] == ["tritongpt", "nanogpt", "at", "least"]
    assert table["loss"] == ["35.0", "80.8", "25.0"] and table["GELU, forward"] == ["31.3", "31.3"]
    assert table["step"] == ["923.2", f"{sum(theirs.values()):.1f}"]


def test_two_trainings_of_one_spec_have_the_same_losses_to_the_bit(tmp_path):
    ranks = Ranks(0, 1, "cpu", None)
    for split in ("train", "val"):
        (np.arange(400) % 7).astype(np.uint16).tofile(tmp_path / f"{split}.bin")
    config = curve.TrainConfig(
        batch_size=2, gradient_accumulation_steps=2, eval_iters=1, max_iters=3, lr_decay_iters=3,
        warmup_iters=1, learning_rate=1e-2, model=GPTConfig(8, 32, 1, 2, 32, bias=False),
    )  # fmt: skip
    specs = ["torch", "torch,layer_norm=torch", "triton"]
    found = curve.train(config, specs, tmp_path, ranks)
    one, same, other = (found["losses"][spec] for spec in specs)
    assert one == same and len(one) == 3 and one[-1] < one[0]
    assert other == pytest.approx(one, rel=1e-3) and other != one
    validation = found["validation"]
    assert validation["torch"] == validation["torch,layer_norm=torch"] and 2 < validation["torch"][0] < 4


def test_a_sweep_times_no_ignored_rows(monkeypatch):
    """Such a row is not read: with a third of them, a tile seemed to reach 98% and not 82% of the limit."""
    monkeypatch.setattr(tuner, "DEVICE", "cpu")
    call = tuner.arguments(OPS["cross_entropy"], {"N": 300, "V": 7, "dtype": torch.float16})
    assert call["input"].dtype == torch.float16 and not call["input"].requires_grad
    assert call["target"].unique().tolist() == list(range(7))


def test_a_sweep_starts_with_what_a_step_launches_and_owns_whole_blocks():
    (first, sample), *rest = tuner.samples_to_sweep([])
    assert first.name == "causal_attention" and sample["B"] == 64
    assert [op.name for op, _ in rest[:3]] == ["add_layer_norm", "cross_entropy", "linear_cross_entropy"]
    assert {op.name for op, _ in rest} == OPS.keys() and rest[-1][0].name == "layer_norm"
    assert {op.name for op, _ in tuner.samples_to_sweep(["layer_norm"])} == {"layer_norm"}
    call = first.make(dtype=torch.bfloat16, device="meta", **sample)
    with record(assume=90):
        for slot, owned, walked in zip(tuner.slots(first, call), (0, 0, 1), (1, 1, 0)):
            assert all(tile[owned] % tile[walked] == 0 for tile in slot.candidates)


@pytest.mark.parametrize(
    "name", ["layer_norm", "add_layer_norm", "cross_entropy", "causal_attention", "decode_attention", "gelu"]
)
def test_a_sweep_launches_each_candidate_and_leaves_the_table_as_it_was(name, monkeypatch):
    """On tensors without data, as an H100 would be given them."""
    op, sample = OPS[name], OPS[name].shipped[name == "cross_entropy"]
    call = op.make(**{"dtype": torch.bfloat16, "device": "meta"} | sample)
    monkeypatch.setattr(tuner, "arguments", lambda *_: call)
    monkeypatch.setattr(tuner, "_wrong", lambda *_: None)  # there are no values to judge
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "interleaved", lambda calls, *_: {n: c() for n, c in calls.items()})
    with record(assume=90) as launches:
        found_slots = list(tuner.slots(op, call))
        assert found_slots
        for position, slot in enumerate(found_slots):
            before, table = slot.get(), dict(slot.table)
            launches.clear()
            tried = {tile: tuner.attempt(name, sample, position, tile) for tile in slot.candidates}
            assert set(tried.values()) == {None} and slot.get() == before and slot.table == table
            in_pool = [(launch.num_warps, launch.num_stages, launch.arguments) for launch in launches]
            launches.clear()
            tried[slot.candidates[0]] = "why"
            found = tuner.sweep(call, slot, tried, 0.01)
            assert slot.get() == before and slot.table == table
            assert found.keys() == {str(tuple(c)) for c in slot.candidates}
            assert found[str(tuple(slot.candidates[0]))] == "why"
            here = [(launch.num_warps, launch.num_stages, launch.arguments) for launch in launches]
            kernels_a_call = len(in_pool) // len(slot.candidates)
            assert str(here) == str(in_pool[kernels_a_call:]), "another thing is timed than was compiled"
            used = {(warps, stages) for warps, stages, _ in here}
            assert len(used) > 2, "every candidate was launched with the same settings"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's tiles")
@pytest.mark.parametrize("fault", ["LOG2E", "LN2", None])
def test_a_tile_that_computes_something_else_is_not_timed(fault, monkeypatch):
    """The in-place kernel and the one of the functional backward are both judged, against fp64."""
    file = sys.modules["kernels.cross_entropy"]
    monkeypatch.setattr(tuner, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    if fault:
        bad = getattr(file, fault)
        monkeypatch.setattr(bad, "value", bad.value * 1.02)
    reason = tuner.attempt("cross_entropy", {"N": 3, "V": 5003}, 0, (4096, 1, 1))
    assert (reason is None) == (fault is None), reason
    assert fault is None or reason.startswith("wrong: ")


def test_chunks_of_the_loss_are_swept_by_their_rows(monkeypatch):
    """Each candidate launches the loss kernel once a chunk."""
    op, sample = OPS["linear_cross_entropy"], {"N": 32768, "C": 8, "V": 50304}
    call = op.make(dtype=torch.bfloat16, device="meta", **sample)
    with record(assume=90) as launches:
        (slot,) = tuner.slots(op, call)
        for (rows,) in slot.candidates:
            launches.clear()
            slot.set((rows,))
            slot.launch(**call)
            assert len(launches) == 32768 // rows
    slot.set((16384,))


def test_a_candidate_that_kills_or_holds_its_process_takes_no_other_with_it(monkeypatch):
    dies, hangs, pools = (2, 2), (5, 5), []
    released = threading.Event()

    class Executor(ThreadPoolExecutor):
        def __init__(self):
            super().__init__(1)
            self.dead = False
            pools.append(self)

        def submit(self, function, name, sample, position, tile):
            def work():
                if tile == hangs:
                    released.wait(20)
                self.dead |= tile == dies
                if self.dead:
                    raise BrokenProcessPool
                return "too large" if tile == (4, 4) else None

            return super().submit(work)

    tiles = [(1, 1), dies, (3, 3), (4, 4), hangs, (6, 6)]
    pool = tuner.Pool(Executor, patience=0.5)
    found = pool.attempts(OPS["layer_norm"], {}, 0, tiles)
    released.set()
    guilty = dict.fromkeys([dies, hangs], "its process died or did not answer")
    assert found == {(1, 1): None, (3, 3): None, (4, 4): "too large", (6, 6): None} | guilty
    assert len(pools) == 1 + 1 + 2, "none but the guilty cost a pool"


def compiled_as(launch):
    """What Triton compiles anew for: types, constants, and whether a number is 1 or divides by 16."""

    def kind(name, value):
        if hasattr(value, "block_shape"):  # a descriptor
            return value.base.dtype, value.block_shape
        if name.isupper() and not isinstance(value, torch.Tensor):
            return value
        if isinstance(value, torch.Tensor):
            return value.dtype
        return (value == 1, value % 16 == 0) if isinstance(value, int) else type(value)

    arguments = {name: kind(name, value) for name, value in launch.arguments.items()}
    return launch.kernel.__name__, launch.num_warps, launch.num_stages, arguments


@pytest.mark.parametrize("name", OPS)
def test_what_is_compiled_on_fewer_rows_is_what_is_timed(name):
    op = OPS[name]
    for sample in op.shipped:
        builds = []
        for rows in (sample, tuner.fewer(op, sample)):
            call = op.make(**{"dtype": torch.bfloat16, "device": "meta"} | rows)
            with record(assume=90) as launches:
                op.launchers(**call)
            builds.append([compiled_as(launch) for launch in launches])
        assert builds[0] == builds[1], sample


# ---- roofline

TINY = GPTConfig(16, 64, 2, 2, 32, bias=False)


@pytest.mark.parametrize("again", [0, 1], ids=["kept", "computed again"])
def test_the_products_of_the_roofline_are_those_that_pytorch_counts(again):
    config = GPTConfig(**vars(TINY) | {"activation_checkpointing": bool(again)})
    model = GPT(GPTConfig(**vars(config) | {"kernels": "torch"}))
    idx = torch.randint(64, (3, 16))
    with FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert set(counted) >= {"aten.mm"}
    found = {part.name: part for part in roofline.parts(config, batch_size=3, accumulation=5)}
    assert (*found, "between kernels") == roofline.PARTS
    assert found["matrix products"].flops == 5 * counted["aten.mm"]
    # 2 products forward, once or twice, and 5 backward of the causal half, the diagonal included
    pairs = sum(range(1, 16 + 1))
    product = 5 * 3 * 2 * 2 * (2 * 16 * pairs)
    assert found["attention, forward"].flops == 2 * (1 + again) * product
    assert found["attention, backward"].flops == 5 * product
    no_tensor_cores = ("norms", "GELU", "loss", "rest")
    assert all(part.flops == 0 for name, part in found.items() if name.startswith(no_tensor_cores))


def test_the_roofline_knows_what_a_step_keeps_in_memory():
    """Counted by autograd, of the model on our kernels in bf16 autocast."""
    model = GPT(GPTConfig(**vars(TINY) | {"kernels": "triton"}))
    idx = torch.randint(64, (3, 16))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        model(idx, idx)
    counted = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)
    predicted = roofline.memory(TINY, 3)
    of_weights = predicted["weights, bf16"] - 2 * (64 + 16) * 32  # the embeddings are read in fp32
    count = 8  # of the targets that are not ignored
    saved = sum(size for what, size in predicted.items() if what.startswith("activations"))
    assert counted == saved + predicted["gradient of lm_head"] + of_weights + count
    assert predicted["logits, a chunk"] == 3 * 16 * 64 * 2
    tokens, C = 3 * 16, 32
    again = roofline.activations(GPTConfig(**vars(TINY) | {"activation_checkpointing": True}), 3)
    kept = roofline.activations(TINY, 3)
    assert again.pop("activations, inputs of blocks") == 2 * tokens * (
        4 * C + 2 * C
    )  # fp32 stream, bf16 update
    assert all(2 * again[what] == kept[what] for what in again if "after" not in what), "of one block in two"
    n = sum(p.numel() for p in model.parameters())
    assert (predicted["weights, fp32"], predicted["AdamW, fp32"]) == (4 * n, 8 * n)


def test_each_kernel_waits_for_the_slower_of_its_two_limits():
    part = roofline.Part("both", ((100.0, 1.0, 3), (1.0, 50.0, 2)))
    limits = roofline.Limits(copy=10.0, product=20.0, link=8.0, memory=0, source="")
    assert part.least(limits) == 3 * 5.0 + 2 * 5.0
    assert (part.flops, part.bytes) == (302.0, 103.0)
    # a ring of 4 sends three quarters of the gradients twice, 4 bytes each
    assert roofline.exchange(100, 4, limits) == 2 * 0.75 * 400 / 8.0


def environment(device="NVIDIA H100 80GB HBM3", date="2026-01-01 00:00"):
    return {
        "device": device, "torch": "2.11.0", "triton": "3.6.0", "commit": "abc", "date": date,
        "command": "python -m bench.x",
    }  # fmt: skip


def kernels_result(ms=1.0, limit=0.5, **where):
    def timed(median):
        rates = {"bytes_per_s": 2e12, "flops_per_s": 1e12, "same_copy_ms": 0.5}
        return {"median": median, "low": median, "high": median, "runs": 5, "limit": limit} | rates

    ours = {"bytes": 2_000_000, "forward": timed(ms), "backward": timed(2 * ms), "both": timed(3 * ms)}
    eager = {"bytes": None} | {d: timed(6.0) for d in ("forward", "backward", "both")}
    cases = [
        {
            "operation": "add_layer_norm", "sample": {"shape": [64, C]}, "dtype": "bf16",
            "variants": {"tritongpt": ours | {"both": timed(3 * ms) | {"limit": limit * C / 768}},
                         "eager": eager, "liger": "is not installed"},
        }
        for C in (768, 1600)
    ]  # fmt: skip
    limits = {"copy_bytes_per_s": 1e12, "product_flops_per_s": 1e14}
    return {"benchmark": "kernels", "environment": environment(**where), "limits": limits, "cases": cases}


def throughput_result(tokens_per_s=300e3, **where):
    def of(rate):
        ms = 524288e3 / rate
        figures = {"step_ms": ms, "step_ms_low": ms - 1, "step_ms_high": ms + 1, "steps": 9}  # 0.1% apart
        return figures | {"tokens_per_s": rate, "mfu": 0.4, "peak_bytes": 25_000_000_000}

    variants = {"torch eager": of(100e3), "tritongpt": of(tokens_per_s), "nanogpt": of(200e3)}
    return {
        "benchmark": "throughput", "environment": environment(**where), "ranks": 1, "dtype": "bfloat16",
        "model": vars(GPTConfig()), "batch_size": {"tritongpt": 64, "nanogpt": 32},
        "variants": variants | {"tritongpt eager": "out of memory"}, "sweep": {},
    }  # fmt: skip


def with_parts(result, ms):
    """Every part but the last takes `ms`, and the gaps a tenth of all the kernels."""
    parts = dict.fromkeys(roofline.PARTS[:-1], ms) | {"between kernels": 0.9 * ms}
    return result | {"parts": {"tritongpt": parts, "nanogpt": dict.fromkeys(roofline.PARTS, 2 * ms)}}


def save(folder, *results):
    folder.mkdir(exist_ok=True)
    for i, result in enumerate(results):
        (folder / f"{9 - i}.json").write_text(json.dumps(result))  # not in the order of time


@pytest.fixture
def bench_command(monkeypatch, capsys):
    """Runs `python -m bench.NAME FLAGS` in this process."""

    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", [f"bench.{name}", *map(str, flags)])
        try:
            importlib.import_module(f"bench.{name}").main()
            code, reason = 0, ""
        except SystemExit as stopped:
            code, reason = (stopped.code, "") if isinstance(stopped.code, int) else (1, str(stopped.code))
        shown = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=shown.out, stderr=shown.err + reason)

    return run


def test_the_roofline_predicts_the_h200_from_its_step_and_others_from_the_h200(bench_command, tmp_path):
    for name in ("throughput", "kernels"):
        shutil.copy(ROOT / "bench" / "results" / f"h200-ef3d0650-{name}.json", tmp_path)
    shown = {
        gpu: bench_command("roofline", "--gpu", gpu, "--results", tmp_path)
        for gpu in ("H200", "H100", "A100")
    }
    assert all(command.returncode == 0 for command in shown.values()), shown
    h200, h100, a100 = (command.stdout for command in shown.values())
    step = re.compile(r"^(at least|expected|measured) +([\d.]+) ms a step, .*\((.*)\)$", re.MULTILINE)
    figures = {what: float(ms) for what, ms, _ in step.findall(h200)}
    assert figures["expected"] == pytest.approx(923.3, rel=0.05) and figures["measured"] == 923.31
    # By hand: 12 layers of 12 C^2 and a head of V C weights, 6 FLOPs each a token, at the measured rate.
    C, V, tokens = 768, 50304, 8 * 64 * 1024
    least = 1e3 * 6 * tokens * (12 * 12 * C * C + V * C) / 798.961490436e12
    line = re.search(r"^matrix products .*", h200, re.MULTILINE)[0].split()
    assert float(line[4]) == pytest.approx(least, abs=0.01)
    assert float(line[5].rstrip("%")) == pytest.approx(100 * least / 552.875, abs=0.1)
    assert line[6:8] == ["552.88", "552.88"]
    assert h200.count("measured in the step, h200-ef3d0650-throughput.json") == len(roofline.PARTS)
    for gpu, other in (("H100", h100), ("A100", a100)):
        assert "measured in the step" not in other and "TFLOP/s (predicted: 89% of the datasheet" in other
        shares = other.count("share measured on NVIDIA H200, h200-ef3d0650-throughput.json")
        assert shares == len(roofline.PARTS), gpu
        assert [(what, note) for what, _, note in step.findall(other)] == [
            ("at least", "every part at its limit"), ("expected", "predicted"),
        ]  # fmt: skip
    # the product's 798.96 of 989 TFLOP/s, the copy's 4.2933 of 4.8 TB/s
    assert "limits: copy 2,996 GB/s, product 799.0 TFLOP/s" in h100
    assert "87% of its 312 TFLOP/s" in a100 and "product assumed" in a100
    larger = bench_command("roofline", "--gpu", "H200", "--size", "350M", "--results", tmp_path).stdout
    assert "measured in the step" not in larger and "share measured on NVIDIA H200" in larger
    assert "expected" in larger and not re.search("^measured", larger, re.MULTILINE)


def test_the_roofline_takes_the_newest_step_by_part_of_the_gpu_itself(bench_command, tmp_path):
    def shown(*flags):
        done = bench_command("roofline", *flags, "--results", tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert shown("--gpu", "H100").count("assumed") == 1 + len(roofline.PARTS), "nothing is measured"
    later = {"date": "2026-01-02 00:00"}
    save(
        tmp_path, with_parts(throughput_result(), 80.0), with_parts(throughput_result(**later), 100.0),
        with_parts(throughput_result(device="NVIDIA H200", date="2026-01-03 00:00"), 50.0),
        throughput_result(310e3, date="2026-01-04 00:00"), kernels_result(),
    )  # fmt: skip
    out = shown("--gpu", "H100", "--batch_size", "64")
    assert "limits: copy 1,000 GB/s, product 100.0 TFLOP/s (measured, 5.json)" in out
    # The newest of the kind; its model has biases, so it is not this step.
    assert out.count("share measured on NVIDIA H100 80GB HBM3, 8.json") == len(roofline.PARTS)
    told = [line for line in shown("--gpu", "H100", "--gpus", "8", "--tokens", "1e9").splitlines() if line]
    runs = [line for line in told if re.search(r"\d GPUs, |days", line)]
    assert len(runs) == 2 and all("predicted" in line for line in runs), told
    for name in ("P100", "H100 PCIe"):
        refused = bench_command("roofline", "--gpu", name)
        assert refused.returncode == 1 and f"there is no datasheet of '{name}'" in refused.stderr
    refused = bench_command("roofline", "--gpu", "H100", "--batch_size", "-1")
    assert refused.returncode == 1 and "must be at least 1" in refused.stderr


def test_the_roofline_says_what_fits_into_memory(bench_command, tmp_path):
    flags = ["--gpu=A100", "--gpus=2", "--batch_size=64", "--results", tmp_path]
    out = bench_command("roofline", *flags).stdout
    assert "12 layers, 768 wide, 4 micro-batches of 64 x 1024 tokens on one A100" in out
    model = GPTConfig(1024, 50304, 12, 12, 768, bias=False)
    held = {n: sum(roofline.memory(model, n, 2, 80e9).values()) for n in (64, 128, 256)}
    parts = re.findall(r"^  (\w.*?)  +([\d.]+) GB$", out, re.MULTILINE)
    assert [what for what, _ in parts] == list(roofline.memory(model, 64, 2))
    assert sum(float(size) for _, size in parts) == pytest.approx(held[64] / 1e9, abs=0.05)
    assert "\nfits into 80 GB less 7%, predicted\n" in out
    assert "largest micro-batch of 512 sequences: 128, predicted" in out
    between = (held[128] + held[256]) / 2 / (1 - roofline.MARGIN)
    assert roofline.largest_micro_batch(model, 512, 2, between) == 128
    assert roofline.largest_micro_batch(model, 512, 2, 1e9) is None
    huge = bench_command("roofline", "--gpu=A100", "--size=1.5B", "--block_size=65536", "--results", tmp_path)
    assert (
        "does not fit into 80 GB less 7%, predicted" in huge.stdout and "not one sequence fits" in huge.stdout
    )


# ---- report


def test_tables_hold_the_newest_results_and_where_they_are_from(bench_command, tmp_path):
    old = throughput_result(1.0, date="2025-12-31 23:59")
    tiles = {
        "operation": "gelu", "sample": "{'N': 3}", "slot": "forward", "now": "(1, 2)", "failed": {},
        "ms": {"(1, 2)": 0.5, "(2, 2)": 0.25},
    }  # fmt: skip
    tuned = {"sweeps": [tiles], "environment": environment(), "benchmark": "sweep", "note": "as it was"}
    save(
        tmp_path / "results", with_parts(throughput_result(), 10.0), old, kernels_result(), tuned,
        throughput_result(1e6, device="NVIDIA H200"),
    )  # fmt: skip
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench.report -->\nold text\n<!-- /bench.report -->\nafter\n")
    flags = "--results", tmp_path / "results", "--readme", readme
    shown = bench_command("report", *flags)
    assert shown.returncode == 0, shown.stderr
    full = (tmp_path / "results" / "README.md").read_text()
    line = "| add_layer_norm bf16 | 64 x 1600 | 1.000 | 2.000 | 104%, 2,000 GB/s | eager, 6.000 | 2.00x | 2 |"
    assert line in full and "- liger, from add_layer_norm 64 x 768 on: is not installed" in full
    assert "| gelu | N=3 | forward | (1, 2) 0.500 | (2, 2) 0.250 |" in full
    assert re.search(r"^- \S+\.json: as it was$", full, re.MULTILINE)
    source = "torch 2.11.0, triton 3.6.0, commit abc, 2026-01-01 00:00 UTC: `python -m bench.x`"
    assert full.count(source) == 2 and "Training step" not in full
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("<!-- /bench.report -->\nafter\n")
    assert "| tritongpt | 300,000 | 1.50x | 1747.6 (1746.6 to 1748.6) | 40.0% | 25.0 |" in text
    assert "old text" not in text and "| tritongpt | 1,000,000 | 5.00x |" in text
    assert "tritongpt, not compiled: out of memory." in text and text.count(source) == 2
    assert re.search(r"\| loss \| 10 \| 20 \| \d+ \|", text) and "| all | 99 | 200 |" in text
    pictures = {p.name: p.read_text() for p in (tmp_path / "results").glob("*.svg")}
    linked = re.findall(r"\]\(bench/results/(\S+\.svg)\)", text)
    assert set(linked) == pictures.keys() and len(linked) == 4, "two of each GPU"
    rates = next(picture for name, picture in pictures.items() if "h200" in name and "through" in name)
    assert "1,000,000  (5.00x)" in rates.replace("&#160;", " ")
    bars = {"ours": "#ff7f0e", "nanoGPT's": "#1f77b4", "the third": "#d3d3d3"}
    assert all(rates.count(f"fill: {colour}") == 1 for colour in bars.values())
    assert bench_command("report", *flags).returncode == 0
    assert pictures == {p.name: p.read_text() for p in (tmp_path / "results").glob("*.svg")}


@pytest.mark.parametrize(
    ("rate", "ms", "worse"), [(292e3, 1.02, []), (290e3, 1.0, ["step"]), (300e3, 1.04, ["norm"])]
)
def test_a_loss_of_more_than_3_percent_is_a_failure(bench_command, tmp_path, rate, ms, worse):
    later = {"date": "2026-01-02 00:00"}
    elsewhere = {"date": "2026-01-03 00:00", "device": "NVIDIA A100-SXM4-80GB"}
    older = {"date": "2025-01-01 00:00"}
    save(
        tmp_path, throughput_result(rate, **later), throughput_result(), throughput_result(900e3, **older),
        throughput_result(10.0, **elsewhere), kernels_result(ms, **later), kernels_result(),
    )  # fmt: skip
    shown = bench_command("report", "--compare", "--results", tmp_path)
    assert shown.returncode == (1 if worse else 0), shown.stderr
    told = [line for line in shown.stdout.splitlines() if "->" in line]
    assert bool(told) == bool(worse) and all(worse[0] in line for line in told)
    assert "5 figures compared" in shown.stdout


def test_the_readme_has_what_the_results_say(bench_command, tmp_path):
    """Nobody writes a figure into it by hand."""
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text())
    results = shutil.copytree(ROOT / "bench" / "results", tmp_path / "results")
    shown = bench_command("report", "--results", results, "--readme", copy)
    assert shown.returncode == 0, shown.stderr
    assert copy.read_text() == (ROOT / "README.md").read_text()
    assert (results / "README.md").read_text() == (ROOT / "bench" / "results" / "README.md").read_text()


# ---- generate, the suite of pytest-benchmark, gpu.sh


def test_a_decoded_token_is_what_the_prompt_does_not_explain(monkeypatch):
    model = GPT(TINY).eval()
    calls = []

    def interleaved(timed, *_, cold):
        calls.append(timed)
        milliseconds = 10.0 if len(calls) == 1 else 40.0
        return {name: timing.Timing(milliseconds, 0, 0, 1) for name in timed}

    monkeypatch.setattr(timing, "interleaved", interleaved)
    found = generate.measure({"ours": model}, torch.zeros(2, 5, dtype=torch.long), 7, "float32", 1.0)["ours"]
    # 7 tokens, the first of them out of the prompt
    assert found == {"prefill": 1000.0, "decode": 2 / 5e-3, "ms": 5.0, "generate_ms": 40.0}


@pytest.mark.parametrize("fault", [0.0, 1.0])
def test_nothing_is_timed_when_nanogpt_would_say_something_else(bench_command, tmp_path, fault):
    (tmp_path / "model.py").write_text(
        "import torch\nfrom gpt.model import GPTConfig\nfrom gpt.model import GPT as Ours\n"
        "class GPT(Ours):\n"
        "    def load_state_dict(self, state):\n        super().load_state_dict(state)\n"
        f"        torch.nn.init.normal_(self.transformer.ln_f.weight, std=1.0) if {fault} else None\n"
        "        return self\n"
    )
    flags = ["--nanogpt", tmp_path, "--prompt", 4, "--new", 8, "--seconds", 0.01, "--size", "tiny"]
    shown = bench_command("generate", *flags)
    assert shown.returncode == (1 if fault else 0), shown.stderr
    assert ("the greedy tokens of both models differ" in shown.stderr) == bool(fault)
    assert shown.stdout.count("tokens/s, ") == (0 if fault else 3)


def test_pytest_benchmark_has_a_row_for_each_variant_and_the_reason_of_each_that_is_missing(tmp_path):
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-rs", "-k", "layer_norm"]
    command += [f"--benchmark-json={tmp_path / 'b.json'}", "-p", "no:cacheprovider"]
    alone = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    shown = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    groups = {b["name"]: b["group"] for b in json.loads((tmp_path / "b.json").read_text())["benchmarks"]}
    assert groups["test_operation[add_layer_norm-eager-backward]"].startswith("add_layer_norm backward")
    if not torch.cuda.is_available():
        assert "the interpreter is no GPU" in shown.stdout


def test_throughput_keeps_its_headline_before_it_tries_the_rest(bench_command, tmp_path, monkeypatch):
    """A kernel that does not compile is a line of the result; what the budget leaves no time for, too."""
    (tmp_path / "model.py").write_text(
        "from gpt.model import GPTConfig\nfrom gpt.model import GPT as Ours\n"
        "class GPT(Ours):\n    def get_num_params(self):\n        return 7\n"
    )
    variants = [
        ("tritongpt", "torch", False),
        ("torch compiled", "no such spec", False),
        ("late", "torch", False),
    ]
    monkeypatch.setattr(throughput, "wanted", lambda *_: iter(variants))
    kept = []
    write = timing.write
    monkeypatch.setattr(
        timing, "write", lambda path, *a, **k: (kept.append(dict(k["variants"])), write(path, *a, **k))
    )
    clock, prepare, seconds = [0.0], throughput.prepare, iter([0.0, 0.0, 1.0])

    def slow(*arguments):
        clock[0] += next(seconds)
        return prepare(*arguments)

    monkeypatch.setattr(throughput, "prepare", slow)
    watch = SimpleNamespace(monotonic=lambda: clock[0], perf_counter=time.perf_counter)
    monkeypatch.setattr(throughput, "time", watch)
    flags = ["--seconds", 0.05, "--budget", 1.5, "--nanogpt", tmp_path, "--out", tmp_path / "t.json"]
    shown = bench_command("throughput", *flags)
    assert shown.returncode == 0, shown.stderr
    told = [line.split(" in ")[0] for line in shown.stdout.splitlines()[1:3]]
    assert told == ["prepared tritongpt", "prepared nanogpt"]
    assert list(kept[0]) == ["tritongpt", "nanogpt"] and kept[0]["nanogpt"]["tokens_per_s"] > 0
    found = json.loads((tmp_path / "t.json").read_text())["variants"]
    assert found["torch compiled"].startswith("ValueError: kernels='no such spec'")
    assert found["late"] == "no time was left for it" and found["tritongpt"]["steps"] >= 3


def test_a_micro_batch_is_halved_until_it_fits():
    ranks, tried = Ranks(0, 1, "cpu", None), []

    def build(size):
        tried.append(size)
        if size > 3:
            raise torch.OutOfMemoryError
        return throughput.Variant("x", lambda: None, 1, 1)

    variant, size = throughput.prepare_largest(build, 16, ranks)
    assert (variant.name, size, tried) == ("x", 2, [16, 8, 4, 2])


FAKE_GPU_MACHINE = """#!/bin/sh
case "$*" in
    *get_device_name*) echo nvidia-x ;;
    *commit*) echo "$TRITONGPT_COMMIT" | cut -c1-8 ;;
    *"import pytest"*) exit 0 ;;
    *xdist*) exit 1 ;;
    *) echo "$*" >> "$LOG"; case "$*" in *"$FAILS"*) exit 3 ;; esac ;;
esac
"""


def test_one_command_measures_everything_and_goes_on_where_it_stopped(tmp_path):
    python = tmp_path / "python3"
    python.write_text(FAKE_GPU_MACHINE)
    python.chmod(0o755)

    def measure(*flags, fails="nothing"):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "LOG": str(log), "FAILS": fails}
        command = ["bash", str(ROOT / "bench" / "gpu.sh"), f"--out={tmp_path / 'out'}", *flags]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done, log.read_text() if log.exists() else ""

    given = ["--nanogpt=elsewhere", "--commit=0123456789"]
    done, log = measure(*given, fails="--budget")
    lines = log.splitlines()
    assert done.returncode == 1 and "== step failed" in done.stdout
    # what compiles runs side by side, in any order, before anything is timed
    beside = ["-m bench.kernels --warm", "-m bench.throughput --nanogpt", "-m pytest"]
    assert [line[: len(start)] for line, start in zip(sorted(lines[:3]), beside)] == beside
    assert sum("--warm" in line for line in lines[:3]) == 2
    assert lines[3].startswith(f"-m bench.throughput --nanogpt {Path.cwd() / 'elsewhere'} --ablate")
    assert f"{tmp_path}/out/nvidia-x-01234567-kernels.json" in lines[4] and len(lines) == 5
    done, log = measure(*given)
    assert done.returncode == 0 and log.count("\n") == 1 and "--budget" in log
    assert len(list((tmp_path / "out").iterdir())) <= 8 - 2  # as many JSON files come beside them
    done, log = measure("--parts=curve,sdpa", "--commit=0123456789", fails="bench.curve")
    assert done.returncode == 1 and [line.split()[1] for line in log.splitlines()] == [
        "bench.curve",
        "bench.sdpa",
    ]
    done, log = measure("--parts=tests", "--commit=another", fails="pytest")
    assert done.returncode == 1 and "== tests failed" in done.stdout
    for flag, said in (
        ("--parts=step,typo", "'typo' is not one of the parts"),
        ("step", "'step' is not one of"),
    ):
        done, log = measure(flag)
        assert done.returncode == 2 and said in done.stderr and log == ""


def test_the_parts_of_one_command_fit_into_its_time():
    script = (ROOT / "bench" / "gpu.sh").read_text()
    deadline = int(re.search(r"^deadline=(\d+)", script, re.MULTILINE)[1])
    limits = {name: int(seconds) for name, seconds in re.findall(r"run ([\w$-]+) (\d+)", script)}
    (default,) = re.findall(r"^parts=(.*)$", script, re.MULTILINE)
    assert default == "tests,warm,step,kernels"
    beside = max(limits["tests"], limits["warm-step"], limits["warm-kernels"])
    assert beside + limits["step"] + limits["kernels"] <= 360
    assert all(seconds <= deadline for seconds in limits.values())
    assert 2 * limits["sanitizer-$tool"] <= deadline and 3 * limits["large-$size"] <= deadline
    assert int(re.search(r"--seconds 5 --budget (\d+)", script)[1]) < limits["step"]
    # every part is known, described and run
    (known,) = re.findall(r'^known=" (.*) "$', script, re.MULTILINE)
    for part in known.split():
        assert re.search(rf"^#   {part} ", script, re.MULTILINE), part
        assert re.search(rf"^        {part}\)", script, re.MULTILINE), part


@pytest.mark.gpu
def test_the_clock_waits_for_the_gpu_and_empties_its_cache():
    clock = timing._GpuClock(cold=True)
    assert clock(lambda: torch.cuda._sleep(10_000_000)) > 2.0  # at 2 GHz, 5 ms
    x = torch.zeros(10 << 18, device="cuda")  # 10 MB
    found = {cold: timing.interleaved({"x": x.sum}, "cuda", 0.2, cold)["x"].median for cold in (True, False)}
    assert found[True] > found[False]
    assert (
        timing.peak_extra_bytes(lambda: torch.empty(64 << 20, dtype=torch.int8, device="cuda"), "cuda")
        == 64 << 20
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_every_variant_is_timed_in_every_direction(name):
    limits = {"copy_bytes_per_s": 1e12, "product_flops_per_s": 1e14}
    for C in (768, 1024, 1280, 1600, 2048, 4096):  # as many shapes as the compiler's limit would stop at
        sample = {"shape": (512, C)} if "norm" in name else suite.SMALL[name]
        with suite.honest_compilation():
            found = suite.measure(OPS[name], sample, torch.bfloat16, "cuda", limits, 0.01)
        for variant in ("tritongpt", "eager", "compile"):
            assert {"forward", "backward", "both"} <= found[variant].keys(), found[variant]
