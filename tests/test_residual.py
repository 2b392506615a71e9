"""residual_dtype: losses and gradients are as near to fp32's as autocast's; mixed saves no fp32 sum."""

import pytest
import torch

import kernels
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


@pytest.mark.parametrize("zero_weights", [False, True])
@pytest.mark.parametrize("spec", [NORMS, "torch"])
@pytest.mark.parametrize("residual_dtype", ["mixed", "bfloat16"])
def test_gradients_are_as_near_to_fp32s_as_those_of_autocast(residual_dtype, spec, zero_weights, device):
    models = [
        build("float32", device, "torch"),
        build("float32", device, "torch"),
        build(residual_dtype, device, spec),
    ]
    if zero_weights:
        for model in models:
            for name, p in model.named_parameters():
                if ".ln_" in name:
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


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_in_one_graph_and_with_activation_checkpointing(checkpointing, device):
    torch._dynamo.reset()
    eager = build("mixed", device)
    compiled = build("mixed", device, activation_checkpointing=checkpointing)
    compiled.compile(fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    expected, ours = step(eager, device)[0], step(compiled, device)[0]
    for name, value in expected.items():
        torch.testing.assert_close(
            ours[name], value, rtol=2e-2, atol=2e-2 * value.abs().max().item(), msg=name
        )


def test_activation_checkpointing_has_the_same_bits(device):
    plain, again = (build("mixed", device, activation_checkpointing=on) for on in (False, True))
    expected, ours = step(plain, device)[0], step(again, device)[0]
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


def test_auto_is_mixed_for_our_norms_in_bfloat16_without_biases(device):
    def chosen(spec=NORMS, dtype="bfloat16", **changes):
        return build("auto", device, spec, dtype, **changes).config.residual_dtype

    assert chosen() == "mixed"
    assert (
        chosen(bias=True)
        == chosen("torch")
        == chosen(dtype="float16")
        == chosen(dtype="float32")
        == "float32"
    )


@pytest.mark.parametrize(
    ("residual_dtype", "changes", "sentence"),
    [
        ("mixed", {"bias": True}, "residual_dtype=mixed needs bias=False; float32 and bfloat16 work"),
        ("mixed", {"dtype": "float16"}, "residual_dtype=mixed needs dtype=bfloat16, not float16"),
        ("bfloat16", {"dtype": "float32"}, "residual_dtype=bfloat16 needs dtype=bfloat16, not float32"),
        ("float16", {}, "residual_dtype='float16' must be auto, float32, mixed or bfloat16"),
    ],
)
def test_what_does_not_go_together_is_refused(residual_dtype, changes, sentence, device):
    with pytest.raises(ValueError, match=sentence):
        build(residual_dtype, device, **changes)


def test_the_gradient_of_a_mixed_stream_is_rounded_once(device):
    """Of the sum of the norm's own gradient and of that of the layers above, not of each."""
    torch.manual_seed(0)
    residual, above = (torch.randn(5, 96, device=device) for _ in range(2))
    weight = torch.ones(96, device=device)
    carrier = torch.zeros(5, 96, device=device, dtype=torch.bfloat16).requires_grad_()
    branch = torch.randn(5, 96, device=device).bfloat16()
    normed, summed, following = kernels.add_layer_norm_mixed(branch, residual, carrier, weight)
    dnormed, dfollowing = torch.randn_like(normed), above.bfloat16()
    torch.autograd.backward((normed, following), (dnormed, dfollowing))
    g, xhat = dnormed.float(), normed.float()
    along = g.mean(1, keepdim=True) + xhat * (g * xhat).mean(1, keepdim=True)
    dx = (g - along) * (summed.var(1, correction=0, keepdim=True) + 1e-5).rsqrt()
    once = (dx + dfollowing.float()).bfloat16()
    twice = dx.bfloat16() + dfollowing
    assert (carrier.grad != once).float().mean() < 0.01 < (twice != once).float().mean()


def test_weights_of_bfloat16_have_a_stream_of_bfloat16(device):
    model = build("auto", device).bfloat16()
    gradients, _ = step(model, device)
    assert model.config.residual_dtype == "mixed"
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_a_run_records_it_and_goes_on_with_the_same_bits(workplace, capsys):
    flags = ["--dtype=bfloat16", "--bias=False", "--residual_dtype=mixed", "--kernels=torch"]
    flags += ["--n_layer=1", "--eval_interval=2", "--compile=False", "--init_from=auto"]
    whole = run(*flags, "--max_iters=4", out_dir="whole")
    assert ", residual_dtype mixed" in capsys.readouterr().out
    run(*flags, "--max_iters=2", out_dir="resumed")
    resumed = run(*flags, "--max_iters=4", out_dir="resumed")
    assert whole["config"]["residual_dtype"] == "mixed"
    for name, weight in whole["model"].items():
        assert torch.equal(resumed["model"][name], weight), name
    single = run(*flags, "--residual_dtype=auto", "--max_iters=4", out_dir="float32")
    assert single["config"]["residual_dtype"] == "float32"
    assert any(not torch.equal(single["model"][n], w) for n, w in whole["model"].items())
