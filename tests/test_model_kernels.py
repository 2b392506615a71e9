"""The model on our kernels against the same model on PyTorch's operations; residual_dtype."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpt.model import GPT, GPTConfig
from kernels.op import record
from tests.runs import run
from tests.test_faults import assert_same_run
from train.config import parse, resolve
from train.distributed import Ranks
from train.metrics import read

# kernel -> launches in one forward and backward of a model of L layers
LAUNCHES = {
    "layer_norm": dict.fromkeys(("_norm_forward_kernel", "_norm_backward_kernel"), lambda L: 2 * L + 1),
    "attention": dict.fromkeys(
        ("_attention_forward_kernel", "_attention_dq_kernel", "_attention_dkdv_kernel"), lambda L: L
    ),
    "activation": dict.fromkeys(("_gelu_forward_kernel", "_gelu_backward_kernel"), lambda L: L),
    "cross_entropy": {"_loss_kernel": lambda L: 1},
}


NORMS = "torch,layer_norm=triton"
MIXED = {"bias": False, "residual_dtype": "mixed"}


def build(spec, device, dtype="bfloat16", **changes):
    torch.manual_seed(0)
    config = dict(block_size=16, vocab_size=37, n_layer=2, n_head=2, n_embd=32, kernels=spec) | changes
    return GPT(GPTConfig(**config), device, dtype).to(device)


def batch(device, B=2, T=7, V=37, seed=1):
    tokens = torch.randint(0, V, (B, T + 1), generator=torch.Generator().manual_seed(seed)).to(device)
    targets = tokens[:, 1:].clone()
    targets[0, 2] = -1
    return tokens[:, :-1].contiguous(), targets


def autocast(device, dtype):
    return torch.autocast(device, dtype, enabled=dtype != torch.float32)


@pytest.mark.parametrize(
    ("spec", "dtype", "options"),
    [
        ("triton", torch.float32, {}),
        ("triton", torch.float16, {}),
        ("triton", torch.bfloat16, {}),
        ("triton,attention=torch", torch.bfloat16, {}),
        (NORMS, torch.bfloat16, MIXED),
        ("torch", torch.bfloat16, MIXED),
        (NORMS, torch.bfloat16, {"bias": False, "residual_dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_loss_and_gradients_are_pytorchs_by_the_kernels_that_are_named(spec, dtype, options, device):
    """In half precision ours may be twice as far from float32 as PyTorch's operations are."""
    idx, targets = batch(device)

    def gradients(spec, dtype, **options):
        model = build(spec, device, **options)
        for name, p in model.named_parameters():
            if ".ln_" in name:
                p.data[::3] = 0  # a norm must not lose the gradient of a weight that is 0
        with autocast(device, dtype):
            _, loss = model(idx, targets)
        scale = 1024.0 if dtype == torch.float16 else 1.0  # as GradScaler has it
        (loss * scale).backward()
        return {"loss": loss.detach()} | {n: p.grad / scale for n, p in model.named_parameters()}

    plain = options | {"residual_dtype": "float32"}
    exact = gradients("torch", torch.float32, **plain)
    peer = gradients("torch", dtype, **plain)
    with record() as launches:
        ours = gradients(spec, dtype, **options)
    default, *exceptions = spec.split(",")
    chosen = dict.fromkeys(LAUNCHES, default) | dict(exception.split("=") for exception in exceptions)
    counts = {k: n(2) for f, kernels in LAUNCHES.items() if chosen[f] == "triton" for k, n in kernels.items()}
    assert Counter(launch.kernel.__name__ for launch in launches) == counts
    roundings = 4 if options else 2  # the gradient of the stream is rounded at each add
    for name, expected in exact.items():
        assert ours[name].dtype == expected.dtype, name
        small = 1e-6 + roundings * torch.finfo(dtype).eps * expected.abs().max()
        error, allowed = ((t[name] - expected).abs().max() for t in (ours, peer))
        assert error <= 2 * allowed + small, name


# ---- residual_dtype


def test_a_mixed_stream_has_the_bits_of_fp32_forward_and_saves_no_fp32_activation(device):
    idx, targets = batch(device)

    def forward(residual_dtype):
        model, saved = build(NORMS, device, bias=False, residual_dtype=residual_dtype), []
        remember = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
        with remember, torch.autocast(device, torch.bfloat16):
            loss = model(idx, targets)[1]
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            logits = model(idx)[0]
        return loss, logits, sum(t.dtype == torch.float32 and t.numel() == idx.numel() * 32 for t in saved)

    (loss, logits, count), (mixed_loss, mixed_logits, mixed_count) = map(forward, ("float32", "mixed"))
    assert torch.equal(mixed_loss, loss) and torch.equal(mixed_logits, logits)
    assert (count, mixed_count) == (5, 0)  # the input of the first norm and the sums of the others


def test_weights_of_bfloat16_have_a_stream_of_bfloat16(device):
    """As under FSDP."""
    losses = []
    for model in (build(NORMS, device, **MIXED), build(NORMS, device, **MIXED).bfloat16()):
        with torch.autocast(device, torch.bfloat16):
            losses.append(model(*batch(device))[1])
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)


def test_auto_is_mixed_for_our_norms_in_bfloat16_without_biases(device):
    def choose(spec=NORMS, dtype="bfloat16", bias=False):
        return build(spec, device, dtype, bias=bias).config.residual_dtype

    assert choose() == "mixed"
    assert {choose("torch"), choose(dtype="float16"), choose(dtype="float32"), choose(bias=True)} == {
        "float32"
    }


@pytest.mark.parametrize(
    ("residual_dtype", "dtype", "sentence"),
    [
        ("mixed", "bfloat16", "residual_dtype=mixed needs bias=False; float32 and bfloat16 work"),
        ("bfloat16", "float16", "residual_dtype=bfloat16 needs dtype=bfloat16, not float16"),
        ("float16", "float16", "residual_dtype='float16' must be auto, float32, mixed or bfloat16"),
    ],
)
def test_a_residual_dtype_that_does_not_go_with_the_model_is_refused(residual_dtype, dtype, sentence, device):
    with pytest.raises(ValueError, match=sentence):
        build(NORMS, device, dtype, residual_dtype=residual_dtype)


def test_a_run_records_the_residual_dtype_and_trains_with_it(workplace, capsys):
    flags = ["--dtype=bfloat16", "--bias=False", "--kernels=torch", "--max_iters=2"]
    mixed = run(*flags, "--residual_dtype=mixed", out_dir="mixed")
    assert ", residual_dtype mixed" in capsys.readouterr().out
    single = run(*flags, "--residual_dtype=auto", out_dir="float32")
    assert [state["config"]["residual_dtype"] for state in (mixed, single)] == ["mixed", "float32"]
    assert any(not torch.equal(single["model"][n], w) for n, w in mixed["model"].items())


# ---- runs


def test_a_run_with_loss_scaling_has_the_losses_of_pytorchs_operations(workplace, device):
    """Micro-batches, evaluation and the kernels' name in the checkpoint included."""
    flags = ["--dtype=float16", "--max_iters=2", "--eval_iters=1", "--n_layer=1", "--batch_size=2"]
    flags += ["--block_size=6", "--compile=False", f"--device={device}"]
    ours, theirs = (run(f"--kernels={spec}", *flags, out_dir=spec) for spec in ("triton", "torch"))
    assert [state["gpt_config"]["kernels"] for state in (ours, theirs)] == ["triton", "torch"]
    assert ours["scaler"]["scale"] == theirs["scaler"]["scale"]
    for a, b in zip(*(read(Path(d, "metrics.jsonl")) for d in ("triton", "torch")), strict=True):
        for key in a.keys() & {"loss", "grad_norm", "train/loss", "val/loss"}:
            assert a[key] == pytest.approx(b[key], rel=5e-3), key


def test_auto_asks_for_the_heads_of_the_model_and_for_its_precision(monkeypatch):
    """As on an H100, where attention is PyTorch's at a head size of 128 and in float32."""
    monkeypatch.setattr("kernels.unavailable", lambda device: None)
    monkeypatch.setattr("kernels.INTERPRETED", False)
    monkeypatch.setattr("kernels.op._gpu", lambda device: (90, 132))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (9, 0))
    on_gpu, no_attention = Ranks(0, 1, "cuda:0", None), "triton,attention=torch"
    for n_head, dtype, spec in (
        (2, "bfloat16", "triton"), (1, "bfloat16", no_attention), (2, "float32", no_attention),
    ):  # fmt: skip
        config, _ = parse([f"--n_head={n_head}", "--n_embd=128", f"--dtype={dtype}", "--compile=False"])
        assert resolve(config, on_gpu).model.kernels == spec
        model = GPT(replace(config.model, vocab_size=9, n_layer=1), "cuda", dtype)
        assert model.config.kernels == spec
        assert resolve(replace(config, init_from="resume"), on_gpu).model.kernels == "auto"


@pytest.mark.gpu
def test_two_runs_have_the_same_bits_and_a_resumed_one_too(workplace):
    """Compiled, in bf16, on our kernels. PyTorch's attention differs each time.

    So would the gradient of an embedding if Inductor could replace it by additions with atomics. Inductor may
    choose the tile of a reduction by timing it, and keeps the choice on disk: the runs share it.
    """
    flags = """
        --device=cuda --dtype=bfloat16 --compile=True --kernels=triton --n_layer=4 --n_head=2 --n_embd=128
        --block_size=128 --batch_size=32 --eval_interval=10 --lr_decay_iters=20 --max_iters=20 --bias=True
    """.split()
    for out_dir, lengths in (("first", [20]), ("second", [20]), ("resumed", [10, 20])):
        for length in lengths:
            torch.compiler.reset()
            run(*flags, f"--max_iters={length}", "--init_from=auto", out_dir=out_dir)
    assert_same_run("first", "second")
    assert_same_run("first", "resumed")


@pytest.mark.parametrize(
    ("spec", "options", "compiled_options", "dtype"),
    [
        ("triton", {"n_layer": 1}, {}, torch.float32),
        ("torch", {"qk_norm": True}, {}, torch.float32),
        (NORMS, MIXED, {"activation_checkpointing": True}, torch.bfloat16),
    ],
)
def test_a_model_computes_the_same_with_activation_checkpointing_and_compiled(
    spec, options, compiled_options, dtype, device
):
    """Forward and backward as one graph each; on a CPU without PyTorch's code generation."""
    idx, targets = batch(device)
    torch._dynamo.reset()
    eager = build(spec, device, **options)
    checkpointed = build(spec, device, **options, activation_checkpointing=True)
    compiled = build(spec, device, **options, **compiled_options)
    compiled.compile(fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    with autocast(device, dtype):
        for model in (eager, checkpointed, compiled):
            model(idx, targets)[1].backward()
        with torch.no_grad():
            expected, logits = (model(idx, targets, return_logits=True)[0] for model in (eager, compiled))
    pairs = [
        (logits, expected),
        *((p.grad, q.grad) for p, q in zip(compiled.parameters(), eager.parameters())),
    ]
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-3
    for ours, exact in pairs:
        atol = tolerance * exact.abs().max().item()
        torch.testing.assert_close(ours, exact, rtol=tolerance, atol=atol)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(checkpointed.parameters(), eager.parameters()))


def test_dropout_runs_in_the_kernel_and_only_in_training(device):
    model = build("triton", device, dropout=0.5, n_layer=1)
    idx, targets = batch(device)
    torch.manual_seed(5)
    first = model(idx, targets)[1]
    torch.manual_seed(5)
    assert model(idx, targets)[1] == first != model(idx, targets)[1]
    expected = build("torch", device, dropout=0.5, n_layer=1).eval()(idx, targets)[1]
    torch.testing.assert_close(model.eval()(idx, targets)[1], expected, rtol=1e-5, atol=1e-6)
