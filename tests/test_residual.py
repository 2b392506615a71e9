"""residual_dtype: losses and gradients are as near to fp32's as autocast's; mixed saves no fp32 sum."""

import pytest
import torch

from gpt.model import GPT, GPTConfig
from tests.runs import run

B, T, C, V = 2, 7, 32, 37


# The other operations have no part in it, and PyTorch's are faster than an interpreter.
NORMS = "torch,layer_norm=triton"


def build(residual_dtype, device, spec=NORMS, dtype="bfloat16", **changes):
    torch.manual_seed(0)
    size = dict(block_size=16, vocab_size=V, n_layer=2, n_head=2, n_embd=C, bias=False) | changes
    return GPT(GPTConfig(**size, kernels=spec, residual_dtype=residual_dtype), device, dtype).to(device)


def step(model, device, dtype=torch.bfloat16, enabled=True):
    """-> the loss and the gradients, by name, and what was saved between."""
    ids = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(1)).to(device)
    saved = []

    def remember(tensor):
        saved.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor)
    with hooks, torch.autocast(device, dtype, enabled=enabled):
        _, loss = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}, saved


def error(ours, exact):
    return {name: (ours[name] - value).abs().max().item() for name, value in exact.items()}


@pytest.mark.parametrize(
    ("residual_dtype", "spec", "zero_weights"),
    [("mixed", NORMS, True), ("mixed", "torch", False), ("bfloat16", NORMS, False)],
)
def test_gradients_are_as_near_to_fp32s_as_those_of_autocast(residual_dtype, spec, zero_weights, device):
    models = [
        build("float32", device, "torch"),
        build("float32", device, "torch"),
        build(residual_dtype, device, spec),
    ]
    for name, p in (named for model in models for named in model.named_parameters()):
        if zero_weights and ".ln_" in name:
            p.data[::3] = 0
    exact, _ = step(models[0], device, enabled=False)
    peer, ours = (step(model, device)[0] for model in models[1:])
    allowed = error(peer, exact)
    for name, off in error(ours, exact).items():
        # The gradient of the stream is rounded at each add.
        small = 4 * torch.finfo(torch.bfloat16).eps * exact[name].abs().max().item()
        assert ours[name].dtype == torch.float32, name
        assert off <= 2 * allowed[name] + small, name


def test_a_mixed_stream_is_fp32_in_forward(device):
    """The loss has the bits of float32's, and in evaluation too."""
    mixed, single = (build(dtype, device) for dtype in ("mixed", "float32"))
    assert torch.equal(step(mixed, device)[0]["loss"], step(single, device)[0]["loss"])
    idx = torch.arange(T, device=device)[None]
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        assert torch.equal(mixed(idx)[0], single(idx)[0])


def test_a_mixed_stream_keeps_no_fp32_activation(device):
    def fp32_activations(residual_dtype):
        _, saved = step(build(residual_dtype, device), device)
        return sum(t.dtype == torch.float32 and t.numel() == B * T * C for t in saved)

    assert fp32_activations("mixed") == 0
    assert fp32_activations("float32") == 5  # the input of the first norm and the sums of the others


def test_auto_is_mixed_for_our_norms_in_bfloat16_without_biases(device):
    def chosen(spec=NORMS, dtype="bfloat16", **changes):
        return build("auto", device, spec, dtype, **changes).config.residual_dtype

    assert chosen() == "mixed"
    others = chosen(bias=True), chosen("torch"), chosen(dtype="float16"), chosen(dtype="float32")
    assert set(others) == {"float32"}


@pytest.mark.parametrize(
    ("residual_dtype", "changes", "sentence"),
    [
        ("mixed", {"bias": True}, "residual_dtype=mixed needs bias=False; float32 and bfloat16 work"),
        ("bfloat16", {"dtype": "float16"}, "residual_dtype=bfloat16 needs dtype=bfloat16, not float16"),
        ("float16", {}, "residual_dtype='float16' must be auto, float32, mixed or bfloat16"),
    ],
)
def test_what_does_not_go_together_is_refused(residual_dtype, changes, sentence, device):
    with pytest.raises(ValueError, match=sentence):
        build(residual_dtype, device, **changes)


def test_weights_of_bfloat16_have_a_stream_of_bfloat16(device):
    gradients, _ = step(build("mixed", device).bfloat16(), device)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_a_run_records_what_auto_chose_and_trains_with_it(workplace, capsys):
    pytest.importorskip("tyro")
    flags = ["--dtype=bfloat16", "--bias=False", "--kernels=torch", "--max_iters=2"]
    mixed = run(*flags, "--residual_dtype=mixed", out_dir="mixed")
    assert ", residual_dtype mixed" in capsys.readouterr().out
    single = run(*flags, "--residual_dtype=auto", out_dir="float32")
    for state, residual_dtype in ((mixed, "mixed"), (single, "float32")):
        assert state["config"]["residual_dtype"] == residual_dtype
    assert any(not torch.equal(single["model"][n], w) for n, w in mixed["model"].items())
