"""The bugs that others shipped, each with a test that names it; and what only one operation promises.

A number after a name is an issue or pull request of that project.
"""

import pytest
import torch
import torch.nn.functional as F

import kernels
from bench.judge import distance, floating, leaves, run, upstream
from kernels.attention import TILES
from kernels.cross_entropy import loss_and_gradient_
from kernels.gelu import APPROXIMATIONS, GELU
from kernels.linear_cross_entropy import chunk_rows
from kernels.op import INTERPRETER, launch
from tests.kernel_cases import BY_NAME, judge, make

# ---- int32 offsets: Liger 803, FlashAttention 714 and 1500, PyTorch 190857. A huge tensor that is touched
# in few places costs nothing; what lies below 2^31 elements before it is where a wrapped offset would read
# and write.


def _beyond_int32(x, dim=0):
    """The same values, so far from each other along `dim` that the last ones lie beyond 2^31 elements."""
    strides = list(x.contiguous().stride())
    # Attention makes a copy from a stride of 2^24 on, and its last tile must begin beyond 2^31, too.
    strides[dim] = int(1.2 * 2**31) // (x.shape[dim] - 1) // 8 * 8
    storage = x.new_empty((x.shape[dim] - 1) * strides[dim] + x.select(dim, 0).numel())
    return storage.as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize(
    ("name", "sample", "dim"),
    [
        ("layer_norm", {"shape": (4, 59)}, 0),
        ("add_layer_norm", {"shape": (4, 59)}, 0),
        ("causal_attention", {"B": 4, "T": 2, "H": 1, "D": 16}, 0),
        ("causal_attention", {"B": 1, "T": 160, "H": 1, "D": 16}, 1),
        ("cross_entropy", {"N": 4, "V": 65, "reduction": "none"}, 0),
        ("decode_attention", {"B": 4, "H": 2, "T": 3, "D": 16}, 0),
    ],
)
def test_offsets_beyond_int32(name, sample, dim, device):
    op = BY_NAME[name]
    call = make(op, torch.bfloat16, device, sample)
    gradients = upstream(op, call)
    strided_call = {k: _beyond_int32(v, dim) if floating(v) and v.dim() > 1 else v for k, v in call.items()}
    strided_gradients = [_beyond_int32(g.bfloat16(), dim) if g.dim() > 1 else g for g in gradients]
    judge(op, run(op.implementations["triton"], strided_call, strided_gradients), call, gradients)


# ---- the embedding


def test_the_gradient_of_an_embedding_is_an_operator_that_inductor_cannot_replace(device):
    weight = torch.randn(5, 8, device=device).requires_grad_()
    with torch.profiler.profile() as profile:
        kernels.embedding(torch.tensor([1, 1, 3], device=device), weight).sum().backward()
    assert "tritongpt::embedding_backward" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradient_of_an_embedding_is_summed_in_fp32_or_better(dtype, ids_dtype, device):
    """A stream in bfloat16 sends a gradient in bfloat16, but an fp32 weight gets an unrounded sum.

    The sums of these gradients have at most 18 bits, so fp32 is exact. The result is rounded once at most.
    """
    torch.manual_seed(0)
    weight = torch.randn(5, 40, device=device).to(dtype).requires_grad_()
    ids = torch.randint(4, (7, 300), device=device)  # row 4 is not used
    dout = (torch.rand(7, 300, 40, device=device) + 1).bfloat16()
    out = kernels.embedding(ids.to(ids_dtype), weight)
    assert torch.equal(out, weight[ids])
    out.bfloat16().backward(dout)
    exact = torch.zeros(5, 40, device=device, dtype=torch.float64)
    exact.index_add_(0, ids.flatten(), dout.double().flatten(0, 1))
    assert torch.equal(weight.grad, exact.to(dtype))
    gradient = torch.randn(7, 300, 40, device=device, dtype=dtype)
    torch.library.opcheck(torch.ops.tritongpt.embedding_backward.default, (gradient, ids, 5))


# ---- the norms


def test_the_gradient_of_a_mixed_stream_is_rounded_once(device):
    """Of the sum of the norm's own gradient and of that of the layers above, not of each."""
    torch.manual_seed(0)
    carrier = torch.zeros(5, 96, device=device, dtype=torch.bfloat16).requires_grad_()
    residual, weight = torch.randn(5, 96, device=device), torch.ones(96, device=device)
    results = kernels.add_layer_norm_mixed(torch.randn_like(carrier), residual, carrier, weight)
    normed, summed, _ = results
    dnormed, above = torch.randn_like(normed), torch.randn_like(normed)
    torch.autograd.backward((normed, results[2]), (dnormed, above))
    g, xhat = dnormed.float(), normed.float()
    along = g.mean(1, keepdim=True) + xhat * (g * xhat).mean(1, keepdim=True)
    dx = (g - along) * (summed.var(1, correction=0, keepdim=True) + 1e-5).rsqrt()
    once = (dx + above.float()).bfloat16()
    twice = dx.bfloat16() + above
    assert (carrier.grad != once).float().mean() < 0.01 < (twice != once).float().mean()


# ---- the loss


@pytest.mark.parametrize("V", [1, 7, 8, 17, 65])
def test_gradient_written_over_logits(V, device):
    """Rows start at any two bytes: up to 14 bytes before a row's first 16-byte boundary and after its last
    are read by themselves. llm.c computed the loss after the logits were overwritten."""
    torch.manual_seed(0)
    logits = (torch.randn(9, V, device=device) * 5).half()
    target = torch.randint(V, (9,), device=device)
    target[4] = -1
    exact = F.cross_entropy(logits.double(), target, ignore_index=-1, reduction="none")
    expected = torch.softmax(logits.double(), 1) - F.one_hot(target.clamp(0), V)
    expected[4] = 0
    logits[4] = torch.nan  # whatever an ignored row holds, its gradient is 0
    logits = _beyond_int32(logits) if V == 65 else logits
    losses = loss_and_gradient_(logits, target, -1, gradient=logits)
    assert distance(losses, exact) < 1e-5
    assert distance(logits, expected) < 1e-3


@pytest.mark.gpu
def test_gradient_written_over_logits_whose_rows_share_16_byte_blocks(device):
    logits = torch.randn(2048, 50257, device=device).bfloat16()
    target = torch.randint(50257, (2048,), device=device)
    expected = torch.softmax(logits.float(), -1)
    expected[torch.arange(2048, device=device), target] -= 1
    first = None
    for _ in range(20):
        ours = logits.clone()
        loss_and_gradient_(ours, target, -100, gradient=ours)
        first = ours if first is None else first
        assert torch.equal(ours, first)
    torch.testing.assert_close(ours.float(), expected, rtol=1e-2, atol=1e-4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("V", [65, 5000])
def test_infinite_logits(V, device, poisoned):
    """PyTorch 195829: a masked class (-inf) is not a NaN. But NaN, +inf and a row of -inf alone give NaN."""
    torch.manual_seed(0)
    logits = torch.randn(6, V, device=device)
    logits[0, 1:] = -torch.inf
    logits[1, : V - 7] = -torch.inf
    logits[2] = -torch.inf
    logits[3, 40] = torch.nan
    logits[4, 40] = torch.inf
    target = torch.tensor([0, V - 1, 0, 0, 0, 3], device=device)
    gradients = (torch.ones(6, device=device),)
    call = {"input": logits, "target": target, "reduction": "none"}
    ours, exact = (run(f, call, gradients) for f in (kernels.cross_entropy, F.cross_entropy))
    for name in exact:
        torch.testing.assert_close(ours[name], exact[name], equal_nan=True)


@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
def test_all_targets_ignored(name, device, poisoned):
    """torch: the mean over nothing is NaN, the sum 0."""
    op = BY_NAME[name]
    call = make(op, torch.float32, device, op.samples[0] | {"ignore_index": -1})
    call["target"].fill_(-1)
    for reduction, expected in (("mean", torch.nan), ("sum", 0.0), ("none", 0.0)):
        loss = op.implementations["triton"](**call | {"reduction": reduction})
        torch.testing.assert_close(loss, torch.full_like(loss, expected), equal_nan=True)


@pytest.mark.parametrize(("reduction", "products"), [("mean", 3), ("none", 4)])
def test_a_frozen_argument_costs_no_product(reduction, products, device):
    op = BY_NAME["linear_cross_entropy"]
    for frozen in (None, "input", "linear_weight"):
        call = leaves(make(op, torch.float32, device, {"N": 7, "C": 8, "V": 33, "reduction": reduction}))
        if frozen:
            call[frozen].requires_grad_(False)
        with torch.profiler.profile() as profile:
            kernels.linear_cross_entropy(**call).sum().backward()
        names = "aten::mm", "aten::addmm", "aten::addmm_"
        count = sum(event.count for event in profile.key_averages() if event.key in names)
        assert count == products - (frozen is not None)


def test_weight_gradient_is_accumulated_in_fp32(device, poisoned):
    """llm.c 476: in bf16 a sum over many chunks stops growing. An fp32 weight gets the fp32 sum."""
    torch.manual_seed(0)
    N, C, V = 64, 4, 8
    x = torch.randn(N, C, device=device).abs().bfloat16()
    weight = torch.randn(V, C, device=device).bfloat16().float().requires_grad_()
    target = torch.zeros(N, dtype=torch.int64, device=device)
    with torch.autocast(device, torch.bfloat16):
        loss = kernels.linear_cross_entropy(x, weight, target, reduction="sum", chunk_size=8)
    loss.backward()
    exact = weight.detach().double().requires_grad_()
    F.cross_entropy(F.linear(x.double(), exact), target, reduction="sum").backward()
    relative = distance(weight.grad, exact.grad) / exact.grad.abs().max().item()
    assert relative < 1e-3  # bf16 itself resolves 4e-3


def test_half_precision_mean_does_not_underflow(device, poisoned):
    """In fp16, (p - y) / N is 0 for most of a vocabulary; here 1 / N comes in fp32, after the products."""
    op = BY_NAME["linear_cross_entropy"]
    call = make(op, torch.float16, device, {"N": 64, "C": 8, "V": 4096})
    call["input"], call["target"] = call["input"] / 10, torch.zeros_like(call["target"])
    scale = (torch.full((), 2.0**10, device=device, dtype=torch.float64),)
    ours = run(kernels.linear_cross_entropy, call, scale)["dlinear_weight"]
    expected = run(op.reference, leaves(call, torch.float64), scale)["dlinear_weight"]
    assert distance(ours[1:], expected[1:]) < 2e-3 * expected[1:].abs().max().item()


@pytest.mark.parametrize(("gigabytes", "rows"), [(None, 16384), (141, 16384), (80, 13184), (1, 128)])
def test_chunks_of_the_loss_follow_the_memory(gigabytes, rows):
    """At most 2% of it, and equal chunks of 65536 rows of GPT-2's logits."""
    assert chunk_rows(65536, 50304, 2, gigabytes and gigabytes * 1e9) == rows


# ---- the cache of a generation


def test_what_lies_beyond_a_length_is_never_read(device, poisoned):
    """The cache is cut into splits for the longest sequence, so most splits of a short one are empty.

    A length beyond the cache is that of the cache.
    """
    op = BY_NAME["decode_attention"]
    call = make(op, torch.float32, device, {"B": 4, "H": 1, "T": 200, "D": 32})
    call["lengths"] = torch.tensor([1, 17, 199, 200], device=device)
    unread = torch.arange(200, device=device) >= call["lengths"][:, None]
    poison = {k: call[k].masked_fill(unread[:, None, :, None], torch.nan) for k in ("k_cache", "v_cache")}
    ours = run(op.implementations["triton"], call | poison, ())
    judge(op, ours, call, ())
    longer = call | {"lengths": torch.tensor([1, 17, 199, 1000], device=device)}
    assert torch.equal(run(op.implementations["triton"], longer, ())["output 0"], ours["output 0"])


@pytest.mark.parametrize("order", [1, -1])
def test_scores_far_from_zero(order, device, poisoned):
    """Scores from -300 to 300, rising or falling: each tile and each split has another maximum."""
    op = BY_NAME["decode_attention"]
    call = make(op, torch.float32, device, {"B": 1, "H": 1, "T": 130, "D": 16})
    scores = torch.linspace(-300, 300, 130, device=device) * order
    call["k_cache"] = call["q"][:, :, None] * scores[:, None]
    judge(op, run(op.implementations["triton"], call, ()), call, ())


# ---- attention with dropout, which has no reference


def _mask(B, T, H, D, p, seed, device):
    """Which weights remain (B, H, T, T), read off with values that are unit vectors."""
    qkv = torch.zeros(B, T, 3, H, D, device=device)
    qkv[:, :, 2] = torch.eye(T, D, device=device)[None, :, None]
    torch.manual_seed(seed)
    return kernels.causal_attention(qkv, p).permute(0, 2, 1, 3)[..., :T] != 0


def test_dropout_against_an_explicit_mask(device, poisoned, monkeypatch):
    """The same mask forward and backward: the results are those of attention with that mask, in fp64.

    FlashAttention 2337: the tiles of two kernels disagreed. Here forward and dq have other tiles than dk and
    dv, so a mask that depended on the tile would differ. On a GPU all tiles of fp32 are the same.
    """
    monkeypatch.setattr("kernels.attention.FP32_TILES", TILES[INTERPRETER][64])
    B, T, H, D, p = 2, 33, 2, 48, 0.3
    mask = _mask(B, T, H, D, p, 1, device)
    torch.manual_seed(0)
    qkv = torch.randn(B, T, 3, H, D, device=device).requires_grad_()
    gradient = torch.randn(B, T, H, D, device=device)
    torch.manual_seed(1)
    out = kernels.causal_attention(qkv, p)
    out.backward(gradient)

    exact = qkv.detach().double().requires_grad_()
    q, k, v = exact.transpose(1, 3).unbind(2)
    future = torch.ones(T, T, device=device).triu(1).bool()
    scores = (q @ k.transpose(-1, -2) * D**-0.5).masked_fill(future, -torch.inf)
    expected = ((scores.softmax(-1) * mask / (1 - p)) @ v).transpose(1, 2)
    expected.backward(gradient.double())
    assert distance(out, expected) < 1e-5
    assert distance(qkv.grad, exact.grad) < 1e-5


def test_dropout_is_random_where_it_should_be(device):
    """Independent masks of the right density over heads and batch; torch's seed repeats them."""
    mask = _mask(2, 64, 3, 64, 0.25, 1, device)
    causal = torch.ones(64, 64, device=device).tril().bool()
    drawn = mask[..., causal].flatten(0, 1).float()  # (B * H, pairs)
    assert abs(drawn.mean() - 0.75) < 0.02  # five standard deviations
    correlation = torch.corrcoef(drawn).fill_diagonal_(0)
    assert correlation.abs().max() < 0.12
    first, again, other = (_mask(1, 16, 1, 16, 0.25, seed, device) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ---- GELU: before rounding, in the tails, at infinity


def _value_and_slope(function, x, approximate):
    x = x.clone().requires_grad_()
    y = function(x, approximate=approximate)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach(), dx


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_gelu_before_rounding_is_within_a_millionth(approximate, device):
    """A wrong digit of a coefficient, the fifth say, is far below a half-precision result's own rounding.

    PyTorch's (1 + erf) / 2 cancels in the left tail: at -5 its result in bf16 has no right digit.
    """
    x = torch.arange(-12, 12, 1 / 64, device=device).bfloat16()
    y, dx = (torch.empty_like(x, dtype=torch.float32) for _ in range(2))
    sizes = {"TANH": approximate == "tanh", "BLOCK": 256, "num_warps": 2}
    grid = (-(-x.numel() // 256),)
    (forward,), (backward,) = GELU.launches
    launch(forward, grid, x, y, x.numel(), **sizes)
    launch(backward, grid, torch.ones_like(x), x, dx, x.numel(), **sizes)
    tail = (x > -5.5) & (x < -1)
    for ours, exact in zip((y, dx), _value_and_slope(F.gelu, x.double(), approximate)):
        error = (ours - exact).abs()
        assert (error / x.double().abs().clamp(min=1)).max() < 1e-6
        assert (error / exact.abs())[tail].max() < 0.005


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_gelu_of_numbers_of_any_size(approximate, dtype, device):
    """gelu(-inf) and both derivatives at infinity are NaN, 0 times infinity."""
    nan, inf = torch.nan, torch.inf
    x, *expected = torch.tensor(
        [
            [-inf, -1e19, -100, -10, 0, 10, 100, 1e19, inf, nan],
            [nan, 0, 0, 0, 0, 10, 100, 1e19, inf, nan],
            [nan, 0, 0, 0, 0.5, 1, 1, 1, nan, nan],
        ],
        device=device,
    ).to(dtype)
    ours = _value_and_slope(kernels.gelu, x, approximate)
    torch.testing.assert_close(list(ours), expected, rtol=0, atol=1e-20, equal_nan=True)


@pytest.mark.gpu
def test_gelu_of_elements_beyond_int32(device):
    x = torch.randn(2**31 + 48, device=device, dtype=torch.float16)
    with torch.no_grad():
        y = kernels.gelu(x)
    for part in (slice(0, 4096), slice(2**31 - 4096, None)):
        torch.testing.assert_close(y[part], F.gelu(x[part]))
