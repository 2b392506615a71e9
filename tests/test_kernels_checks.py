"""Bad input: one sentence that names the operation, the shape and what is allowed; never a silent result."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

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

WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "norm over two dimensions": (
        lambda: kernels.layer_norm(X, (4, 8)),
        r"layer_norm: normalized_shape is \(4, 8\) and input \(4, 8\); only the last dimension",
    ),
    "norm of the wrong width": (
        lambda: kernels.layer_norm(X, (7,)),
        r"layer_norm: normalized_shape is \(7,\) and input \(4, 8\)",
    ),
    "norm too wide": (
        lambda: kernels.layer_norm(torch.zeros(1, 8193), (8193,)),
        r"layer_norm: input \(1, 8193\) must be \(\.\.\., C\) with C from 1 to 8192",
    ),
    "norm of nothing": (lambda: kernels.layer_norm(torch.zeros(3, 0), (0,)), r"C from 1 to 8192"),
    "weight of the wrong width": (
        lambda: kernels.layer_norm(X, (8,), W[:7]),
        r"layer_norm: weight is \(7,\); input \(4, 8\) needs \(8,\)",
    ),
    "bias of the wrong width": (
        lambda: kernels.add_layer_norm(X, X, W, W[:1]),
        r"add_layer_norm: bias is \(1,\); input \(4, 8\) needs \(8,\)",
    ),
    "residual of another shape": (
        lambda: kernels.add_layer_norm(X, X[:3], W),
        r"add_layer_norm: input \(4, 8\) and residual \(3, 8\) must have one shape",
    ),
    "fp64": (
        lambda: kernels.layer_norm(X.double(), (8,)),
        "layer_norm: input is torch.float64; float32, float16, bfloat16 are allowed",
    ),
    "integers": (lambda: kernels.causal_attention(QKV.long()), "causal_attention: qkv is torch.int64"),
    "two devices": (
        lambda: kernels.layer_norm(X, (8,), W.to("meta")),
        "layer_norm: all tensors must be on one device, not input on cpu, weight on meta",
    ),
    "qkv unpacked": (
        lambda: kernels.causal_attention(QKV[:, :, 0]),
        r"causal_attention: qkv \(1, 5, 2, 16\) must be \(B, T, 3, H, D\)",
    ),
    "qkv with two parts": (lambda: kernels.causal_attention(QKV[:, :, :2]), r"must be \(B, T, 3, H, D\)"),
    "heads too small": (
        lambda: kernels.causal_attention(QKV[..., :8]),
        r"causal_attention: qkv \(1, 5, 3, 2, 8\) has D=8; D from 16 to 128 is allowed",
    ),
    "heads too large": (
        lambda: kernels.causal_attention(torch.zeros(1, 2, 3, 1, 160)),
        "has D=160; D from 16 to 128 is allowed",
    ),
    "dropout of everything": (
        lambda: kernels.causal_attention(QKV, dropout_p=1.0),
        "causal_attention: dropout_p=1.0 must be at least 0 and less than 1",
    ),
    "logits of three dimensions": (
        lambda: kernels.cross_entropy(X[None], TARGET),
        r"cross_entropy: input \(1, 4, 8\) must be \(N, V\)",
    ),
    "no classes": (lambda: kernels.cross_entropy(X[:, :0], TARGET), "V at least 1"),
    "too few targets": (
        lambda: kernels.cross_entropy(X, TARGET[:3]),
        r"cross_entropy: target is \(3,\) torch.int64; input \(4, 8\) needs \(4,\) torch.int64",
    ),
    "probabilities as targets": (lambda: kernels.cross_entropy(X, X), r"cross_entropy: target is \(4, 8\)"),
    "int32 targets": (
        lambda: kernels.linear_cross_entropy(X, HEAD, TARGET.int()),
        r"linear_cross_entropy: target is \(4,\) torch.int32",
    ),
    "targets elsewhere": (
        lambda: kernels.cross_entropy(X, TARGET.to("meta")),
        "cross_entropy: target is on meta and input on cpu",
    ),
    "unknown reduction": (
        lambda: kernels.cross_entropy(X, TARGET, reduction="avg"),
        "cross_entropy: reduction='avg' must be one of mean, sum, none",
    ),
    "another inner size": (
        lambda: kernels.linear_cross_entropy(X, HEAD[:, :7], TARGET),
        r"linear_cross_entropy: input \(4, 8\) and linear_weight \(6, 7\) must be \(N, C\) and \(V, C\)",
    ),
    "two dtypes without autocast": (
        lambda: kernels.linear_cross_entropy(X.half(), HEAD, TARGET),
        "linear_cross_entropy: input is torch.float16 and linear_weight torch.float32; without autocast",
    ),
    "no rows in a chunk": (
        lambda: kernels.linear_cross_entropy(X, HEAD, TARGET, chunk_size=0),
        "linear_cross_entropy: chunk_size=0 must be at least 1",
    ),
    "ids that are floats": (
        lambda: kernels.embedding(X, HEAD),
        "embedding: input is torch.float32 on cpu; it must be torch.int64 or torch.int32 on cpu",
    ),
    "ids elsewhere": (
        lambda: kernels.embedding(TARGET.to("meta"), HEAD),
        "embedding: input is torch.int64 on meta; it must be torch.int64 or torch.int32 on cpu",
    ),
    "a weight of one dimension": (
        lambda: kernels.embedding(TARGET, W),
        r"embedding: weight \(8,\) must be \(V, C\)",
    ),
    "a cache of other heads": (
        lambda: kernels.decode_attention(QUERY, CACHE[:, :1], CACHE[:, :1], LENGTHS),
        r"decode_attention: q \(2, 3, 16\) and k_cache \(2, 1, 9, 16\) must be \(B, H, D\) and",
    ),
    "an empty cache": (
        lambda: kernels.decode_attention(QUERY, CACHE[:, :, :0], CACHE[:, :, :0], LENGTHS),
        "with T at least 1",
    ),
    "values of another length": (
        lambda: kernels.decode_attention(QUERY, CACHE, CACHE[:, :, :8], LENGTHS),
        r"decode_attention: v_cache \(2, 3, 8, 16\) torch.float32 must be as k_cache \(2, 3, 9, 16\)",
    ),
    "a cache of another dtype": (
        lambda: kernels.decode_attention(QUERY.half(), CACHE, CACHE, LENGTHS),
        "and q, torch.float16, of their dtype",
    ),
    "lengths of int32": (
        lambda: kernels.decode_attention(QUERY, CACHE, CACHE, LENGTHS.int()),
        r"decode_attention: lengths is \(2,\) torch.int32 on cpu; q \(2, 3, 16\) needs \(2,\) torch.int64",
    ),
    "a query with a head too small": (
        lambda: kernels.decode_attention(QUERY[..., :8], CACHE[..., :8], CACHE[..., :8], LENGTHS),
        r"decode_attention: q \(2, 3, 8\) has D=8; D from 16 to 128 is allowed",
    ),
    "an unknown GELU": (
        lambda: kernels.gelu(X, "sigmoid"),
        "gelu: approximate='sigmoid' must be one of none, tanh",
    ),
    "a GELU of integers": (lambda: kernels.gelu(TARGET), "gelu: input is torch.int64; float32, float16"),
    "a head without classes": (
        lambda: kernels.linear_cross_entropy(X, HEAD[:0], TARGET),
        r"linear_cross_entropy: linear_weight \(0, 8\) has no classes",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_one_sentence(case: str) -> None:
    call, sentence = WRONG[case]
    with pytest.raises(ValueError, match=sentence) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [-1, 8, 10**12])
def test_target_out_of_range(wrong: int, device: str) -> None:
    """A CPU names it. A GPU, where looking would stop the step, answers with NaN: loss and gradient."""
    x, target = X.to(device).requires_grad_(), TARGET.to(device).clone()
    target[2] = wrong
    if device == "cpu":
        with pytest.raises(ValueError, match=f"cross_entropy: target {wrong} is neither a class from 0 to 7"):
            kernels.cross_entropy(x, target)
    else:
        loss = kernels.cross_entropy(x, target)
        loss.backward()
        assert loss.isnan()
        assert x.grad[2].isnan().all()
        assert x.grad[0].isfinite().all()


def test_torch_arguments_that_are_not_accepted() -> None:
    for argument in ("weight", "label_smoothing"):
        with pytest.raises(TypeError, match=argument):
            kernels.cross_entropy(X, TARGET, **{argument: None})
    for argument in ("linear_bias", "weight", "label_smoothing", "options"):
        with pytest.raises(TypeError, match=argument):
            kernels.linear_cross_entropy(X, HEAD, TARGET, **{argument: None})


# ---- load(spec)


def test_load_names_every_operation(device: str) -> None:
    torch_only, ours = kernels.load("torch"), kernels.load("triton", device)
    for op in kernels.OPS:
        assert getattr(torch_only, op.name) is op.reference
        assert getattr(ours, op.name) is getattr(kernels, op.name)
    mixed = kernels.load("triton,attention=torch", device)
    assert mixed.causal_attention is torch_only.causal_attention
    assert mixed.cross_entropy is ours.cross_entropy
    assert mixed.spec == "triton,attention=torch"
    assert kernels.load(mixed.spec, device) == mixed


def test_auto_on_a_cpu_is_torch() -> None:
    assert kernels.load("auto", "cpu").spec == "torch"


@pytest.mark.gpu
def test_auto_on_a_gpu_is_triton() -> None:
    assert kernels.load("auto", "cuda").spec == "triton"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes this machine one with a GPU of that architecture, as far as `load` asks."""

    def pretend(architecture: int) -> None:
        monkeypatch.setattr(kernels, "unavailable", lambda device: None)
        monkeypatch.setattr(kernels_op, "_gpu", lambda device: (architecture, 132))

    return pretend


@pytest.mark.parametrize(
    ("architecture", "head_size", "dtype", "attention"),
    [
        (90, 8, torch.bfloat16, "torch"),
        (90, 16, torch.bfloat16, "triton"),
        (90, 64, torch.float16, "triton"),
        (90, 64, torch.float32, "torch"),
        (90, 80, torch.bfloat16, "torch"),
        (90, 128, torch.bfloat16, "torch"),
        (90, 256, torch.bfloat16, "torch"),
        (80, 80, torch.bfloat16, "triton"),
        (80, 128, torch.float16, "triton"),
        (80, 256, torch.bfloat16, "torch"),
        (80, 128, torch.float32, "torch"),
    ],
)
def test_auto_leaves_to_pytorch_the_attention_that_ours_would_lose(
    architecture: int, head_size: int, dtype: torch.dtype, attention: str, gpu: Callable[[int], None]
) -> None:
    gpu(architecture)
    operations = kernels.load("auto", "cuda", head_size, dtype)
    assert operations.spec == ("triton" if attention == "triton" else "triton,attention=torch")
    implementations = kernels.FAMILIES["attention"][attention]
    assert operations.causal_attention is implementations["causal_attention"]
    assert operations.decode_attention is implementations["decode_attention"]


@pytest.mark.parametrize("spec", ["triton", "triton,layer_norm=torch", "torch,attention=triton"])
@pytest.mark.parametrize("head_size", [8, 256])
def test_an_explicit_request_for_a_head_size_that_ours_does_not_take_is_refused(
    spec: str, head_size: int, gpu: Callable[[int], None]
) -> None:
    gpu(90)
    with pytest.raises(ValueError) as error:
        kernels.load(spec, "cuda", head_size)
    sentence = f"attention takes head sizes n_embd / n_head from 16 to 128, not {head_size}; choose another"
    assert sentence in str(error.value)
    way_out = str(error.value).split("--kernels=")[1]
    assert kernels.load(way_out, "cuda", head_size).spec == way_out


@pytest.mark.parametrize("spec", ["triton", "auto,attention=triton"])
@pytest.mark.parametrize(("head_size", "dtype"), [(128, torch.bfloat16), (64, torch.float32)])
def test_an_explicit_request_is_met_where_auto_would_choose_another(
    spec: str, head_size: int, dtype: torch.dtype, gpu: Callable[[int], None]
) -> None:
    gpu(90)
    assert kernels.load(spec, "cuda", head_size, dtype).spec == "triton"


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("tritn", "no implementation of layer_norm is called 'tritn'; did you mean 'triton'?"),
        ("torch,atention=triton", "no operation is called 'atention'; did you mean 'attention'?"),
        ("torch,attention=cudnn", "no implementation of attention is called 'cudnn'"),
        ("torch,layer_norm=flash_attn", "no implementation of layer_norm is called 'flash_attn'"),
        ("", "no implementation of layer_norm is called ''"),
    ],
)
def test_unknown_spec(spec: str, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        kernels.load(spec)
    assert sentence in str(error.value)


def test_flash_attention_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"the package is not installed \(pip install flash-attn\)"):
        kernels.load("torch,attention=flash_attn")


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_op, "triton", None)
    with pytest.raises(ValueError, match="Triton is not installed"):
        kernels.load("triton")
    assert kernels.load("auto", "cuda").spec == "torch"


def test_an_interpreter_that_fails_with_this_numpy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_op, "INTERPRETED", True)
    reason = "the interpreter of Triton 3.6.0 fails with numpy 2.4.6; install numpy<2.4"
    for triton, numpy, expected in (
        ("3.6.0", "2.4.6", reason),
        ("3.6.0", "2.3.9", None),
        ("3.7.1", "2.4.6", None),
    ):
        monkeypatch.setattr("triton.__version__", triton)
        monkeypatch.setattr("numpy.__version__", numpy)
        assert kernels_op.unavailable(torch.device("cpu")) == expected


def test_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_op, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match="the GPU cuda:0 is sm_75 and the Triton kernels need sm_80"):
        kernels.load("triton", "cuda:0")
    assert kernels.load("auto", "cuda:0").spec == "torch"


def _python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_cpu_without_the_interpreter() -> None:
    """Neither load nor the operation itself falls back; nothing asks for a GPU at import."""
    result = _python("""if True:
        import torch, kernels
        assert not torch.cuda.is_initialized()
        x = torch.randn(4, 32)
        calls = [
            lambda: kernels.load("triton"),
            lambda: kernels.layer_norm(x, (32,)),
            lambda: kernels.causal_attention(torch.randn(1, 2, 3, 1, 16)),
            lambda: kernels.linear_cross_entropy(x, x, torch.zeros(4, dtype=torch.int64)),
        ]
        for call in calls:
            try:
                call()
            except ValueError as error:
                assert "TRITON_INTERPRET=1" in str(error), error
            else:
                raise AssertionError("a silent fallback")
    """)
    assert result.returncode == 0, result.stderr


def test_import_without_triton() -> None:
    result = _python("""if True:
        import sys
        sys.modules["triton"] = None  # import triton raises ImportError
        import torch, kernels
        operations = kernels.load("auto")
        assert operations.spec == "torch"
        operations.layer_norm(torch.randn(2, 8), (8,))
        try:
            kernels.layer_norm(torch.randn(2, 8), (8,))
        except ValueError as error:
            assert "Triton is not installed" in str(error)
        else:
            raise AssertionError("a silent fallback")
    """)
    assert result.returncode == 0, result.stderr
