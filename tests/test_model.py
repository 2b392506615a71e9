"""The model against a reference written here, against Hugging Face's GPT-2, and against nanoGPT's numbers."""

import math
from functools import partial

import pytest
import torch

from gpt.flops import peak_flops
from gpt.model import GPT, GPTConfig

SMALL = GPTConfig(block_size=32, vocab_size=65, n_layer=3, n_head=4, n_embd=64, bias=True, kernels="torch")


def small(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**vars(SMALL), **changes}))


def tokens(*shape, vocab_size=65, seed=1):
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def reference(weights, config, idx):
    """GPT-2 in plain formulas, from a state dict: no module, no fused operation."""

    def norm(x, name):
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-5) * weights[f"{name}.weight"] + bias(name)

    def bias(name):
        return weights.get(f"{name}.bias", 0.0)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + bias(name)

    T = idx.size(1)
    D = config.n_embd // config.n_head
    x = weights["transformer.wte.weight"][idx] + weights["transformer.wpe.weight"][:T]
    for i in range(config.n_layer):
        h = f"transformer.h.{i}"
        q, k, v = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").split(config.n_embd, dim=-1)
        heads = []
        for j in range(config.n_head):
            qj, kj, vj = (t[..., j * D : (j + 1) * D] for t in (q, k, v))
            if config.qk_norm:
                qj, kj = (t / torch.sqrt((t * t).mean(-1, keepdim=True) + 1e-5) for t in (qj, kj))
            scores = qj @ kj.mT / math.sqrt(D)
            scores = scores + torch.full((T, T), -math.inf, dtype=x.dtype).triu(1)
            weight = torch.exp(scores - scores.max(-1, keepdim=True).values)
            heads.append(weight / weight.sum(-1, keepdim=True) @ vj)
        x = x + linear(torch.cat(heads, -1), f"{h}.attn.c_proj")
        u = linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")
        if config.activation == "gelu":
            u = u * 0.5 * (1 + torch.erf(u / math.sqrt(2)))
        else:
            u = u * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + linear(u, f"{h}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ weights["lm_head.weight"].T


def reference_losses(logits, targets):
    """The loss of each target, 0 where it is -1."""
    losses = torch.logsumexp(logits, -1) - logits.gather(-1, targets.clamp(0)[..., None])[..., 0]
    return losses * (targets != -1)


OPTIONS = [{"bias": True}, {"activation": "gelu_tanh"}, {"bias": False, "qk_norm": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_loss_and_every_gradient_equal_the_formulas(options):
    model = small(**options).double()
    for p in model.parameters():  # biases and norms away from 0 and 1, where a mistake could hide
        p.data += 0.1 * torch.randn_like(p)
    idx, targets = tokens(2, 20), tokens(2, 20, seed=2)
    targets[0, 3] = targets[1, 7] = -1
    logits, loss = model(idx, targets, return_logits=True)
    loss.backward()

    leaves = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    weights = leaves | {"lm_head.weight": leaves["transformer.wte.weight"]}
    expected = reference(weights, model.config, idx)
    expected_losses = reference_losses(expected, targets)
    expected_loss = expected_losses.sum() / 38
    expected_loss.backward()
    assert_close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-10)
    assert_close(logits, expected)
    assert_close(loss, expected_loss)
    for name, p in model.named_parameters():
        assert_close(p.grad, leaves[name].grad, atol=1e-12, msg=name)

    for return_logits in (True, False):
        assert_close(model(idx, targets, return_logits, reduction="none")[1], expected_losses)
    no_logits, fused_loss = model(idx, targets)
    assert no_logits is None
    assert_close(fused_loss, expected_loss)
    last, no_loss = model(idx)
    assert no_loss is None
    assert_close(last, expected[:, -1:])


@pytest.mark.parametrize("function", ["gelu", "gelu_new"])
def test_hugging_face_gpt2_gives_the_same_logits(function, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=65, n_positions=32, n_layer=3, n_head=4, n_embd=64, activation_function=function
    )
    hf = GPT2LMHeadModel(config).eval()
    for p in hf.parameters():
        p.data += 0.05 * torch.randn_like(p)
    hf.save_pretrained(tmp_path)
    model = GPT.from_pretrained(str(tmp_path), {"kernels": "torch"}).eval()
    assert model.config.activation == {"gelu": "gelu", "gelu_new": "gelu_tanh"}[function]
    idx = tokens(2, 32)
    with torch.no_grad():
        expected = hf(idx).logits
        logits, _ = model(idx, idx, return_logits=True)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="only dropout"):
        GPT.from_pretrained(str(tmp_path), {"n_layer": 2})


def test_ten_golden_losses_of_nanogpt():
    """Printed by nanoGPT's own model.py and AdamW, seeded 1337: the initial weights are the same bits."""
    golden = [
        4.195092, 4.178197, 3.879323, 3.949849, 3.73646, 3.786206, 3.650189, 3.666365, 3.568411, 3.571745,
    ]  # fmt: skip
    model = small(seed=1337)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    stream = (torch.arange(10 * 4 * 33) ** 2 * 7919 % 10007) % 65
    losses = []
    for step in range(10):
        rows = stream.view(10, 4, 33)[step % 2]
        _, loss = model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(golden, abs=1e-4)


def test_state_dict_names_and_order_are_nanogpts():
    block = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    names = ["transformer.wte.weight", "transformer.wpe.weight"]
    for i in range(3):
        names += [f"transformer.h.{i}.{layer}.{kind}" for layer in block for kind in ("weight", "bias")]
    names += ["transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight"]
    model = small()
    assert list(model.state_dict()) == names
    assert model.lm_head.weight is model.transformer.wte.weight
    assert [n for n, _ in model.named_parameters()] == names[:-1]  # tied: once, in the place of wte
    assert [n for n in small(bias=False).state_dict() if n.endswith("bias")] == []


def test_the_124m_has_nanogpts_size_and_flops():
    with torch.device("meta"):
        model = GPT(GPTConfig(bias=False, kernels="torch"))
    assert model.get_num_params() == 123_587_328
    assert model.get_num_params(non_embedding=False) == 123_587_328 + 1024 * 768
    assert model.flops_per_token() == pytest.approx(8.548e8, rel=1e-3)


def test_dropout_is_for_training_only_and_after_the_embedding_and_both_halves_of_a_block(monkeypatch):
    model = small(dropout=0.5)
    idx = tokens(2, 32)
    assert model(idx, idx)[1] != model(idx, idx)[1]
    model.eval()
    assert model(idx, idx)[1] == model(idx, idx)[1]
    expected = reference(dict(model.state_dict()), model.config, idx)
    torch.testing.assert_close(model(idx, idx, return_logits=True)[0], expected, rtol=1e-4, atol=1e-5)
    calls = []
    monkeypatch.setattr("torch.nn.functional.dropout", lambda x, p, *_: calls.append(p) or x)
    model.train()(idx, idx)
    assert calls == [0.5] * (1 + 2 * 3)


def test_crop_block_size_changes_no_prediction():
    model = small().eval()
    idx = tokens(1, 8)
    before = model(idx)[0]
    model.crop_block_size(8)
    assert torch.equal(model(idx)[0], before)
    with pytest.raises(ValueError, match="9 tokens does not fit block_size=8"):
        model(tokens(1, 9))
    with pytest.raises(ValueError, match="cannot crop"):
        model.crop_block_size(16)


def test_peak_is_that_of_the_named_gpu():
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16") == 312e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "float16") == 756e12
    assert peak_flops("NVIDIA H200", "float32") == 989e12 / 2
    assert peak_flops("NVIDIA GeForce RTX 4070 Ti SUPER", "bfloat16") == 88.2e12
    assert peak_flops("Tesla V100-SXM2-16GB", "float16") == 125e12
    assert peak_flops("Tesla V100-SXM2-16GB", "bfloat16") is None  # it has no bfloat16
    assert peak_flops("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16") is None
    assert peak_flops("NVIDIA L4", "bfloat16") != peak_flops("NVIDIA L40S", "bfloat16")
    assert peak_flops("Some GPU", "bfloat16") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 65}, "n_embd=65 is not divisible by n_head=4"),
        ({"n_head": 0}, "n_embd=64 is not divisible by n_head=0"),
        ({"activation": "relu"}, "activation='relu' must be gelu or gelu_tanh"),
        ({"vocab_size": None}, "vocab_size is not set"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_a_dtype_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="dtype='bf16' must be float32 or bfloat16 or float16"):
        GPT(SMALL, "cpu", "bf16")
