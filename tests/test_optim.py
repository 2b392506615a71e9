"""Muon against its definition; weight decay; skipped steps; resuming with another optimizer."""

import math

import pytest
import torch

from gpt.model import GPT, GPTConfig
from tests.runs import run
from train.config import TrainConfig
from train.optim import optimizer_for, orthogonal, step_if_finite

SETTINGS = dict(learning_rate=0.02, weight_decay=0.3, beta1=0.8, beta2=0.9)


def small(optimizer="muon"):
    """A model and its optimizer, with the same weights every time."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=21, kernels="torch"))
    return model, optimizer_for(model, TrainConfig(optimizer=optimizer, **SETTINGS), "cpu")


def is_muons(name):
    return name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


def by_definition(matrix):
    """Jordan's quintic polynomial, applied five times to the singular values in double precision."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / matrix.double().norm().clamp(min=1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ vt


def test_orthogonal_computes_jordans_iteration():
    """Each matrix separately, at any scale. Zeros stay zeros."""
    matrices = torch.randn(4, 40, 10, generator=torch.Generator().manual_seed(1))
    matrices *= torch.logspace(-2, 0, 10) * torch.tensor([0, 1e-3, 1.0, 1e3])[:, None, None]
    for matrix, direction in zip(matrices, orthogonal(matrices), strict=True):
        torch.testing.assert_close(direction.double(), by_definition(matrix), rtol=0, atol=1e-4)


def test_muon_follows_its_definition_and_other_parameters_follow_adamw():
    """Four steps with a changing learning rate. Queries, keys and values are separate matrices."""
    model, optimizer = small()
    twin, adamw = small("adamw")
    twins = dict(twin.named_parameters())
    parts = {name: 3 if "c_attn" in name else 1 for name in twins if is_muons(name)}
    expected = {name: list(twins[name].detach().double().chunk(n)) for name, n in parts.items()}
    means = {name: [torch.zeros_like(w) for w in weights] for name, weights in expected.items()}
    for lr in (0.01, 0.02, 0.02, 0.005):
        for group in (*optimizer.param_groups, *adamw.param_groups):
            group["lr"] = lr
        for name, p in model.named_parameters():
            p.grad, twins[name].grad = torch.randn_like(p), None
            if name not in parts:
                twins[name].grad = p.grad.clone()
                continue
            for i, grad in enumerate(p.grad.chunk(parts[name])):
                means[name][i] = 0.95 * means[name][i] + 0.05 * grad
                direction = by_definition(0.95 * means[name][i] + 0.05 * grad)
                scale = 0.2 * math.sqrt(max(grad.shape))
                expected[name][i] = (1 - 0.3 * lr) * expected[name][i] - lr * scale * direction
        for each in (optimizer, adamw):
            each.step()
    for name, p in model.named_parameters():
        if name not in parts:
            assert torch.equal(p, twins[name]), name
            continue
        weight = p.detach().double()
        torch.testing.assert_close(weight, torch.cat(expected[name]), rtol=0, atol=1e-5, msg=name)
        mean = optimizer.state[p]["momentum_buffer"]
        torch.testing.assert_close(mean.double(), torch.cat(means[name]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_matrices_and_embeddings_are_decayed_norms_and_biases_are_not(name):
    model, optimizer = small(name)
    names = {p: name for name, p in model.named_parameters()}
    decay = [(names[p], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(decay) == sorted((name, 0.3 if p.dim() == 2 else 0.0) for p, name in names.items())
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)


@pytest.mark.parametrize("enabled", [False, True], ids=["plain", "scaled"])
def test_a_skipped_step_leaves_weights_and_moments_alone(enabled):
    """With and without loss scaling. The other steps are those of a run without the skipped step."""
    ends = []
    for gradients in ((1.0, torch.nan, 2.0), (1.0, 2.0)):
        model, optimizer = small()
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=4.0, backoff_factor=1.0 - 1e-7)
        for factor in gradients:
            draws = torch.Generator().manual_seed(3)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=draws)
            first = model.transformer.wpe.weight.grad
            first *= factor  # a parameter of AdamW's; Muon must skip the step too
            scale = scaler.scale(torch.ones(()))
            for p in model.parameters():
                p.grad *= scale
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            step_if_finite(optimizer, scaler, norm)
        ends.append((model, optimizer))
    (a, first), (b, second) = ends
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        for name, moment in second.state[q].items():
            torch.testing.assert_close(first.state[p][name], moment, rtol=1e-6, atol=1e-7)


def test_an_optimizer_does_not_resume_from_the_state_of_another(workplace):
    run("--optimizer=adamw", "--max_iters=4")
    with pytest.raises(
        ValueError,
        match=r"trained with adamw, whose state muon cannot use: .* --optimizer=adamw, or .* --init_from=",
    ):
        run("--optimizer=muon", "--init_from=resume")
