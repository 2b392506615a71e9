"""Bad input: one sentence that names the operation, the shape and what is allowed; never a silent result."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch

import kernels
from kernels import op as kernels_op

X = torch.randn(4, 8)
W = torch.randn(8)
QKV = torch.randn(1, 5, 3, 2, 16)
TARGET = torch.tensor([0, 1, 2, 3])
HEAD = torch.randn(6, 8)
QUERY, CACHE, LENGTHS = torch.randn(2, 3, 16), torch.randn(2, 3, 9, 16), torch.tensor([9, 4])

# operation, arguments, what the sentence says
WRONG = [
    ("layer_norm", (X, (4, 8)), r"normalized_shape is \(4, 8\) and input \(4, 8\)"),
    ("layer_norm", (torch.zeros(1, 8193), (8193,)), r"input \(1, 8193\) must be .* C from 1 to 8192"),
    ("layer_norm", (X, (8,), W[:7]), r"weight is \(7,\); input \(4, 8\) needs \(8,\)"),
    ("layer_norm", (X.double(), (8,)), "input is torch.float64; float32, float16, bfloat16 are allowed"),
    ("layer_norm", (X, (8,), W.to("meta")), "not input on cpu, weight on meta"),
    ("add_layer_norm", (X, X, W, W[:1]), r"bias is \(1,\); input \(4, 8\) needs \(8,\)"),
    ("add_layer_norm", (X, X[:3], W), r"input \(4, 8\) and residual \(3, 8\) must have the same shape"),
    ("add_layer_norm_mixed", (X, X.half(), X, W), "residual is torch.float16; it must be float32"),
    ("add_layer_norm_mixed", (X, X, X.half(), W), "carrier is torch.float16"),
    ("add_layer_norm_mixed", (X.bfloat16(), X, X, W), r"input is \(4, 8\) torch.bfloat16; it must have"),
    ("add_layer_norm_mixed", (None, X, X[:3], W), r"carrier is \(3, 8\) torch.float32; it must have"),
    ("causal_attention", (QKV.long(),), "qkv is torch.int64"),
    ("causal_attention", (QKV[:, :, :2],), r"qkv \(1, 5, 2, 2, 16\) must be \(B, T, 3, H, D\)"),
    ("causal_attention", (QKV[..., :8],), "has D=8; D must be from 16 to 128"),
    ("causal_attention", (QKV, 1.0), "dropout_p=1.0 must be at least 0 and less than 1"),
    ("cross_entropy", (X[None], TARGET), r"input \(1, 4, 8\) must be \(N, V\)"),
    ("cross_entropy", (X[:, :0], TARGET), "V at least 1"),
    ("cross_entropy", (X, TARGET[:3]), r"target is \(3,\) torch.int64; input \(4, 8\) needs \(4,\)"),
    ("cross_entropy", (X, TARGET.int()), r"target is \(4,\) torch.int32"),
    ("cross_entropy", (X, TARGET.to("meta")), "target is on meta and input on cpu"),
    ("linear_cross_entropy", (X, HEAD[:, :7], TARGET), r"input \(4, 8\) and linear_weight \(6, 7\) must be"),
    ("linear_cross_entropy", (X, HEAD[:0], TARGET), r"linear_weight \(0, 8\) has no classes"),
    ("linear_cross_entropy", (X.half(), HEAD, TARGET), "input is torch.float16 and linear_weight torch.f"),
    ("decode_attention", (QUERY, CACHE[:, :1], CACHE[:, :1], LENGTHS), r"k_cache \(2, 1, 9, 16\) must be"),
    ("decode_attention", (QUERY, CACHE[:, :, :0], CACHE[:, :, :0], LENGTHS), "with T at least 1"),
    ("decode_attention", (QUERY, CACHE, CACHE[:, :, :8], LENGTHS), r"\(2, 3, 8, 16\) must have one shape"),
    ("decode_attention", (QUERY.half(), CACHE, CACHE, LENGTHS), "torch.float16, .* must have one dtype"),
    ("decode_attention", (QUERY, CACHE, CACHE, LENGTHS.int()), r"lengths is \(2,\) torch.int32 on cpu; q"),
    ("decode_attention", (QUERY[..., :8], CACHE[..., :8], CACHE[..., :8], LENGTHS), "has D=8"),
    ("gelu", (X, "sigmoid"), "approximate='sigmoid' must be one of none, tanh"),
]


@pytest.mark.parametrize(("name", "arguments", "sentence"), WRONG, ids=[f"{n}: {s}" for n, _, s in WRONG])
def test_one_sentence(name, arguments, sentence):
    with pytest.raises(ValueError, match=f"^{name}: .*{sentence}") as error:
        getattr(kernels, name)(*arguments)
    assert "\n" not in str(error.value)


def test_one_sentence_for_a_wrong_option_of_the_loss():
    with pytest.raises(ValueError, match="reduction='avg' must be one of mean, sum, none"):
        kernels.cross_entropy(X, TARGET, reduction="avg")
    with pytest.raises(ValueError, match="chunk_size=0 must be at least 1"):
        kernels.linear_cross_entropy(X, HEAD, TARGET, chunk_size=0)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize("wrong", [-1, 8, 10**12])
def test_target_out_of_range(wrong, name, reduction, device):
    """On a CPU it is an error. On a GPU loss and gradient are NaN, because a check would wait for the GPU."""
    x, target = X.to(device).requires_grad_(), TARGET.to(device).clone()
    target[2] = wrong
    head = () if name == "cross_entropy" else (torch.eye(8, device=device),)
    loss = partial(getattr(kernels, name), x, *head, target, reduction=reduction)
    if device == "cpu":
        with pytest.raises(ValueError, match=f"^{name}: target {wrong} is neither a class from 0 to 7"):
            loss()
    else:
        loss = loss().sum()
        loss.backward()
        assert loss.isnan()
        assert x.grad[2].isnan().all()
        assert x.grad[0].isfinite().all()


# ---- load(spec)


def test_load_names_every_operation(device):
    torch_only, ours = kernels.load("torch"), kernels.load("triton", device)
    for op in kernels.OPS:
        assert getattr(torch_only, op.name) is op.reference
        assert getattr(ours, op.name) is getattr(kernels, op.name)
    mixed = kernels.load("triton,attention=torch", device)
    assert mixed.causal_attention is torch_only.causal_attention
    assert mixed.cross_entropy is ours.cross_entropy
    assert mixed.spec == "triton,attention=torch"
    assert kernels.load("auto", device).spec == ("torch" if device == "cpu" else "triton")


@pytest.fixture
def gpu(monkeypatch):
    """Makes this machine one with a GPU of that architecture, as far as `load` asks."""

    def pretend(architecture):
        monkeypatch.setattr(kernels, "unavailable", lambda device: None)
        monkeypatch.setattr(kernels, "INTERPRETED", False)
        monkeypatch.setattr(kernels_op, "_gpu", lambda device: (architecture, 132))

    return pretend


@pytest.mark.parametrize(
    ("architecture", "head_size", "dtype", "spec"),
    [
        (90, 8, torch.bfloat16, "triton,attention=torch"),
        (90, 16, torch.bfloat16, "triton"),
        (90, 64, torch.float16, "triton"),
        (90, 64, torch.float32, "triton,attention=torch"),
        (90, 80, torch.bfloat16, "triton,attention=torch"),
        (80, 128, torch.float16, "triton"),
        (80, 256, torch.bfloat16, "triton,attention=torch"),
    ],
)
def test_auto_leaves_to_pytorch_the_attention_that_ours_would_lose(architecture, head_size, dtype, spec, gpu):
    gpu(architecture)
    assert kernels.load("auto", "cuda", head_size, dtype).spec == spec


@pytest.mark.parametrize("spec", ["triton", "torch,attention=triton"])
def test_an_explicit_request_is_met_or_refused(spec, gpu):
    gpu(90)
    assert kernels.load(spec, "cuda", 128).spec == spec  # auto would choose PyTorch's attention
    with pytest.raises(ValueError, match="head sizes n_embd / n_head from 16 to 128, not 8; choose") as error:
        kernels.load(spec, "cuda", head_size=8)
    way_out = str(error.value).split("--kernels=")[1]
    assert kernels.load(way_out, "cuda", head_size=8).spec == way_out


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("tritn", "no implementation of layer_norm is called 'tritn'; did you mean 'triton'?"),
        ("torch,atention=triton", "no operation is called 'atention'; did you mean 'attention'?"),
        ("torch,attention=cudnn", "no implementation of attention is called 'cudnn'; choose one of triton"),
        ("torch,attention=flash_attn", "flash-attn is not installed (pip install flash-attn)"),
    ],
)
def test_unknown_spec(spec, sentence, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError) as error:
        kernels.load(spec)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("device", "head_size", "dtype", "sentence"),
    [
        ("cpu", 64, torch.bfloat16, "flash-attn needs a GPU, and the device is cpu"),
        ("cuda", 64, torch.float32, "flash-attn computes in float16 or bfloat16, not in float32"),
        ("cuda:0", 264, torch.float16, "flash-attn takes head sizes n_embd / n_head up to 256, not 264"),
    ],
)
def test_flash_attn_that_cannot_run_is_refused(device, head_size, dtype, sentence, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "installed")
    spec = "torch,attention=flash_attn"
    with pytest.raises(ValueError, match=sentence):
        kernels.load(spec, device, head_size, dtype)
    assert kernels.load(spec, "cuda", 256, torch.bfloat16).spec == spec


def test_auto_does_not_train_in_the_interpreter(gpu, monkeypatch):
    gpu(90)
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    assert kernels.load("auto", "cuda").spec == "torch"
    assert kernels.load("triton", "cuda").spec == "triton"


def test_old_gpu(monkeypatch):
    monkeypatch.setattr(kernels_op, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match="the GPU cuda:0 is sm_75 and the Triton kernels need sm_80"):
        kernels.load("triton", "cuda:0")
    assert kernels.load("auto", "cuda:0").spec == "torch"


def test_a_cpu_without_the_interpreter(monkeypatch):
    """Neither load nor the operation itself falls back."""
    monkeypatch.setattr(kernels_op, "INTERPRETED", False)
    kernels_op._gpu.cache_clear()
    for call in (
        lambda: kernels.load("triton"),
        lambda: kernels.layer_norm(X, (8,)),
        lambda: kernels.causal_attention(QKV),
        lambda: kernels.linear_cross_entropy(X, HEAD, TARGET),
    ):
        with pytest.raises(ValueError, match="set TRITON_INTERPRET=1 before Python starts"):
            call()
    kernels_op._gpu.cache_clear()


def test_import_without_triton():
    code = """if True:
        import sys
        sys.modules["triton"] = None  # import triton raises ImportError
        import torch, kernels
        operations = kernels.load("auto")
        assert operations.spec == kernels.load("auto", "cuda").spec == "torch"
        operations.layer_norm(torch.randn(2, 8), (8,))
        for call in (lambda: kernels.load("triton"), lambda: kernels.layer_norm(torch.randn(2, 8), (8,))):
            try:
                call()
            except ValueError as error:
                assert "Triton is not installed" in str(error)
            else:
                raise AssertionError("a silent fallback")
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
