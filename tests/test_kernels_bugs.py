"""The bugs that others shipped, each with a test that names it; and dropout, which has no reference.

A number after a name is an issue or pull request of that project.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import OPS
from kernels.attention import TILES, Tile
from kernels.cross_entropy import loss_and_gradient_
from kernels.linear_cross_entropy import add_product, chunk_rows
from kernels.op import architecture
from tests.kernel_cases import TRAINED, backpropagate, distance, judge, leaves, make, run, upstream

BY_NAME = {op.name: op for op in OPS}
INT32 = 2**31


# ---- int32 offsets: Liger 803, FlashAttention 714 and 1500, PyTorch 190857. A huge tensor that is touched
# in few places costs nothing; what lies below 2^31 elements before it is where a wrapped offset would read
# and write.


def _far_apart(x: Tensor, stride: int) -> Tensor:
    """The same values with `stride` elements from one row (first dimension) to the next."""
    inner = x[0].numel()
    storage = torch.empty((x.shape[0] - 1) * stride + inner, dtype=x.dtype, device=x.device)
    far = storage.as_strided(x.shape, (stride, *x[0].contiguous().stride()))
    return far.copy_(x)


@pytest.mark.parametrize("name", ["layer_norm", "add_layer_norm"])
def test_offsets_beyond_int32_in_layer_norm(name: str, device: str) -> None:
    op = BY_NAME[name]
    call = make(op, torch.float16, device, {"shape": (4, 59)})
    gradients = upstream(op, call)
    far = call | {k: _far_apart(call[k], INT32 // 3 + 8) for k in ("input", "residual") if k in call}
    apart = tuple(_far_apart(g.half(), INT32 // 3 + 8) for g in gradients)
    judge(op, run(op.implementations["triton"], far, apart), call, gradients)


def test_offsets_beyond_int32_in_cross_entropy(device: str) -> None:
    op = BY_NAME["cross_entropy"]
    call = make(op, torch.float16, device, {"N": 4, "V": 65, "reduction": "none"})
    gradients = upstream(op, call)
    far = call | {"input": _far_apart(call["input"], INT32 // 3 + 8)}
    judge(op, run(op.implementations["triton"], far, gradients), call, gradients)
    # The gradient in place: the last row is written where the last row is.
    logits, target = far["input"], call["target"]
    expected = torch.softmax(call["input"].double(), 1) - F.one_hot(target.clamp(0), 65)
    expected[target == -100] = 0
    loss_and_gradient_(logits, target, -100, gradient=True)
    assert distance(logits, expected) < 1e-3


def test_offsets_beyond_int32_in_attention(device: str) -> None:
    """The batch times its stride, and the position times its stride, both pass 2^31."""
    op = BY_NAME["causal_attention"]
    call = make(op, torch.float16, device, {"B": 4, "T": 2, "H": 1, "D": 16})
    gradients = upstream(op, call)
    far = {"qkv": _far_apart(call["qkv"], INT32 // 3 + 16)}
    apart = tuple(_far_apart(g.half(), INT32 // 3 + 16) for g in gradients)
    judge(op, run(op.implementations["triton"], far, apart), call, gradients)

    T, stride = 160, (1 << 24) - 16  # as far apart as the kernels go without a copy
    call = make(op, torch.float16, device, {"B": 1, "T": T, "H": 1, "D": 16})
    gradients = upstream(op, call)
    rows = _far_apart(call["qkv"][0], stride)
    assert T * stride > INT32
    judge(op, run(op.implementations["triton"], {"qkv": rows[None]}, gradients), call, gradients)


# ---- the loss


def test_unreduced_loss_has_the_right_weight_gradient(device: str, poisoned: None) -> None:
    """Liger 968: reduction="none" scaled every row of the weight's gradient alike."""
    op = BY_NAME["linear_cross_entropy"]
    sample = {"N": 9, "C": 16, "V": 33, "reduction": "none", "chunk_size": 4}
    call = make(op, torch.float32, device, sample)
    gradients = (torch.arange(1, 10, dtype=torch.float64, device=device) ** 2,)
    judge(op, run(op.implementations["triton"], call, gradients), call, gradients)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_fused_loss_without_gradients(reduction: str, device: str, poisoned: None) -> None:
    """Liger 930: the fused loss failed under no_grad. Evaluation forms no gradient, and no graph."""
    op = BY_NAME["linear_cross_entropy"]
    call = leaves(make(op, torch.float32, device, {"N": 7, "C": 8, "V": 33, "reduction": reduction}))
    with torch.no_grad():
        loss = kernels.linear_cross_entropy(**call)
    with torch.inference_mode():
        again = kernels.linear_cross_entropy(**call)
    assert not loss.requires_grad
    assert torch.equal(loss, again)
    torch.testing.assert_close(loss, op.reference(**call).detach())


def _products(frozen: tuple[str, ...], reduction: str, device: str) -> int:
    """The matrix products of one training step with these arguments frozen."""
    op = BY_NAME["linear_cross_entropy"]
    call = leaves(make(op, torch.float32, device, {"N": 7, "C": 8, "V": 33, "reduction": reduction}))
    for name in frozen:
        call[name].requires_grad_(False)
    with torch.profiler.profile() as profile:
        kernels.linear_cross_entropy(**call).sum().backward()
    assert all((call[name].grad is None) == (name in frozen) for name in ("input", "linear_weight"))
    products = "aten::mm", "aten::addmm", "aten::addmm_"
    return sum(event.count for event in profile.key_averages() if event.key in products)


@pytest.mark.parametrize(("reduction", "forward"), [("mean", 1), ("none", 2)])
def test_frozen_arguments_save_their_product(reduction: str, forward: int, device: str) -> None:
    """unsloth: gradients silently None. Here one that is not asked for is None, and costs nothing."""
    assert _products((), reduction, device) == forward + 2
    assert _products(("input",), reduction, device) == forward + 1
    assert _products(("linear_weight",), reduction, device) == forward + 1


def test_weight_gradient_is_accumulated_in_fp32(device: str, poisoned: None) -> None:
    """llm.c 476: in bf16 a sum over many chunks stops growing. A fp32 weight gets it unrounded."""
    torch.manual_seed(0)
    N, C, V = 128, 4, 8
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


@pytest.mark.parametrize(
    ("V", "sentinel"), [(33, -1), (33, -100), (33, 33), (33, 63), (33, 64), (4097, 4097)]
)
def test_sentinel_never_reads_a_column(V: int, sentinel: int, device: str, poisoned: None) -> None:
    """CCE 59: ignore_index hit the padding. The padding of a private chunk is NaN here."""
    op = BY_NAME["linear_cross_entropy"]
    call = make(op, torch.float32, device, {"N": 4, "C": 4, "V": V, "ignore_index": sentinel})
    gradients = upstream(op, call)
    judge(op, run(op.implementations["triton"], call, gradients), call, gradients)


def test_strided_logits_and_targets(device: str, poisoned: None) -> None:
    """unsloth 10713: strides were taken for granted. FlashAttention: so was the alignment of targets."""
    op = BY_NAME["cross_entropy"]
    call = make(op, torch.float32, device, {"N": 6, "V": 50, "reduction": "none"})
    gradients = upstream(op, call)
    wide = torch.full((6, 7, 53), torch.nan, device=device)
    wide[:, 2, 1:51] = call["input"]
    targets = torch.full((13,), 10**9, device=device)
    targets[1::2] = call["target"]
    strided = call | {"input": wide[:, 2, 1:51], "target": targets[1::2]}
    judge(op, run(op.implementations["triton"], strided, gradients), call, gradients)
    shifted = torch.cat([call["target"][:1], call["target"]])[1:]
    assert shifted.data_ptr() % 16
    found = run(op.implementations["triton"], call | {"target": shifted}, gradients)
    judge(op, found, call, gradients)


@pytest.mark.parametrize("V", [1, 7, 8, 9, 17, 70])
def test_rows_that_start_at_any_two_bytes(V: int, device: str, poisoned: None) -> None:
    """Up to 14 bytes before a row's first 16-byte boundary and after its last are read by themselves."""
    torch.manual_seed(0)
    logits = torch.randn(9, V, device=device).half()
    target = torch.randint(V, (9,), device=device)
    target[4] = -1
    call = {"input": logits, "target": target, "ignore_index": -1, "reduction": "sum"}
    gradients = (torch.full((), 2.5, device=device, dtype=torch.float64),)
    judge(BY_NAME["cross_entropy"], run(kernels.cross_entropy, call, gradients), call, gradients)
    expected = torch.softmax(logits.double(), 1) - F.one_hot(target.clamp(0), V)
    expected[4] = 0
    logits[4] = torch.nan  # whatever an ignored row holds, its gradient is 0
    assert (run(kernels.cross_entropy, call, gradients)["dinput"][4] == 0).all()
    loss_and_gradient_(logits, target, -1, gradient=True)
    assert distance(logits, expected) < 1e-3


@pytest.mark.parametrize("first", [True, False])
def test_products_are_added_to_what_is_there_but_the_first(first: bool, device: str) -> None:
    """What is there before the first may be NaN. In half precision too, and where PyTorch cannot mix."""
    torch.manual_seed(0)
    a, b = (torch.randn(2 * shape[0], shape[1], device=device)[::2] for shape in ((24, 16), (16, 40)))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, b = a.to(dtype), b.to(dtype)
        before = torch.full((24, 40), torch.nan if first else 7.0, device=device)
        add_product(before, a, b, first)
        exact = a.double() @ b.double() + (0 if first else 7)
        assert distance(before, exact) < 1e-4


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("V", [65, 5000])
def test_infinite_logits(V: int, device: str, poisoned: None) -> None:
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


def test_loss_is_that_of_the_logits_before_their_gradient(device: str, poisoned: None) -> None:
    """llm.c: the loss was computed after the logits were overwritten. Large logits make the two far apart."""
    torch.manual_seed(0)
    logits = torch.randn(5, 40, device=device) * 30
    target = logits.argmin(1)
    exact = F.cross_entropy(logits, target, reduction="none")
    losses, _ = loss_and_gradient_(logits, target, -100, gradient=True)
    torch.testing.assert_close(losses, exact)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
def test_all_targets_ignored(name: str, reduction: str, device: str, poisoned: None) -> None:
    """torch: the mean over nothing is NaN, the sum 0."""
    op = BY_NAME[name]
    call = make(op, torch.float32, device, op.samples[0] | {"reduction": reduction, "ignore_index": -1})
    call["target"].fill_(-1)
    loss = op.implementations["triton"](**call)
    assert torch.equal(loss.isnan(), op.reference(**call).isnan())
    assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()


def test_half_precision_mean_does_not_underflow(device: str, poisoned: None) -> None:
    """In fp16, (p - y) / N is 0 for most of a vocabulary; here 1 / N comes in fp32, after the products."""
    torch.manual_seed(0)
    N, C, V = 64, 8, 4096
    call: dict[str, Any] = {
        "input": (torch.randn(N, C, device=device) * 0.1).half(),
        "linear_weight": (torch.randn(V, C, device=device) * 0.1).half(),
        "target": torch.zeros(N, dtype=torch.int64, device=device),
    }
    scale = (torch.full((), 2.0**10, device=device, dtype=torch.float64),)
    ours = run(kernels.linear_cross_entropy, call, scale)["dlinear_weight"]
    reference = BY_NAME["linear_cross_entropy"].reference
    expected = run(reference, leaves(call, torch.float64), scale)["dlinear_weight"]
    assert distance(ours[1:], expected[1:]) < 2e-3 * expected[1:].abs().max().item()


# ---- the cache of a generation


def test_what_lies_beyond_a_length_is_never_read(device: str, poisoned: None) -> None:
    """The cache holds there what was there before; a length beyond the cache is that of the cache."""
    op = BY_NAME["decode_attention"]
    call = make(op, torch.float32, device, {"B": 6, "H": 2, "T": 70, "D": 32})
    call["lengths"] = torch.tensor([1, 2, 16, 17, 69, 70], device=device)
    unread = torch.arange(70, device=device) >= call["lengths"][:, None]
    poison = {k: call[k].masked_fill(unread[:, None, :, None], torch.nan) for k in ("k_cache", "v_cache")}
    found = run(op.implementations["triton"], call | poison, ())
    judge(op, found, call, ())
    longer = call | {"lengths": torch.tensor([1, 2, 16, 17, 69, 1000], device=device)}
    assert torch.equal(run(op.implementations["triton"], longer, ())["output 0"], found["output 0"])


def test_more_programs_than_keys(device: str, poisoned: None) -> None:
    """The heads are cut for the longest a sequence may become: most parts of a short one are empty."""
    op = BY_NAME["decode_attention"]
    call = make(op, torch.float32, device, {"B": 1, "H": 1, "T": 1000, "D": 16})
    for length in (1, 3, 40):
        call["lengths"] = torch.tensor([length], device=device)
        judge(op, run(op.implementations["triton"], call, ()), call, ())


def test_scores_far_from_zero(device: str, poisoned: None) -> None:
    """Maxima are subtracted within a tile, between tiles and between parts, whichever comes first."""
    op = BY_NAME["decode_attention"]
    for order in (1, -1):
        call = make(op, torch.float32, device, {"B": 1, "H": 1, "T": 130, "D": 16})
        call["k_cache"] = (
            call["q"][:, :, None] * torch.linspace(-300, 300, 130, device=device)[:, None] * order
        )
        judge(op, run(op.implementations["triton"], call, ()), call, ())


def test_offsets_beyond_int32_in_the_cache(device: str) -> None:
    op = BY_NAME["decode_attention"]
    call = make(op, torch.float16, device, {"B": 4, "H": 2, "T": 3, "D": 16})
    far = {k: _far_apart(call[k], INT32 // 3 + 16) for k in ("k_cache", "v_cache")}
    judge(op, run(op.implementations["triton"], call | far, ()), call, ())


def test_no_gradient_is_pretended(device: str) -> None:
    op = BY_NAME["decode_attention"]
    call = leaves(make(op, torch.float32, device, op.samples[0]))
    with pytest.raises(RuntimeError):
        op.implementations["triton"](**call).sum().backward()


# ---- every backward


@pytest.mark.parametrize("op", TRAINED, ids=lambda op: op.name)
def test_gradients_follow_the_upstream_gradient(op: Any, device: str, poisoned: None) -> None:
    """modded-nanogpt: a backward ignored it. Doubled, the gradients double; zero, they are zero."""
    call = make(op, torch.float32, device, op.samples[0])
    gradients = upstream(op, call)
    once, twice, never = (
        run(op.implementations["triton"], call, tuple(f * g for g in gradients)) for f in (1, 2, 0)
    )
    for name in once:
        if name.startswith("d"):
            torch.testing.assert_close(twice[name], 2 * once[name])
            assert (never[name] == 0).all()


@pytest.mark.parametrize("op", TRAINED, ids=lambda op: op.name)
def test_every_subset_of_gradients(op: Any, device: str, poisoned: None) -> None:
    """unsloth: a gradient was silently None when another one was not wanted."""
    call = make(op, torch.float32, device, op.samples[0])
    gradients = upstream(op, call)
    full = run(op.implementations["triton"], call, gradients)
    wanted = [k for k in call if f"d{k}" in full]
    for alone in wanted:
        one = {k: v.detach().requires_grad_(k == alone) if k in wanted else v for k, v in call.items()}
        results = op.implementations["triton"](**one)
        results = results if isinstance(results, tuple) else (results,)
        backpropagate(results, [g.to(r.dtype) for g, r in zip(gradients, results)])
        assert torch.equal(one[alone].grad, full[f"d{alone}"])
        assert all(one[k].grad is None for k in wanted if k != alone)


def test_norm_without_bias_has_none(device: str) -> None:
    """Liger: bias=False trained a bias. Without one, the output is that of a bias of zero."""
    torch.manual_seed(0)
    x, w = torch.randn(3, 59, device=device), torch.randn(59, device=device)
    zero = torch.zeros(59, device=device)
    assert torch.equal(kernels.layer_norm(x, (59,), w), kernels.layer_norm(x, (59,), w, zero))
    dy, _, mean, rstd, _ = torch.ops.tritongpt.layer_norm_forward(x, None, w, None, 1e-5, x.dtype)
    *_, dbias = torch.ops.tritongpt.layer_norm_backward(dy, None, x, w, None, mean, rstd, x.dtype, x.dtype)
    assert dbias.numel() == 0


def test_norm_parameters_gradients_are_accumulated_in_fp32(device: str, poisoned: None) -> None:
    """llm.c 476 again: a bf16 sum over 300 rows would stop at 256."""
    x = torch.randn(300, 8, device=device).bfloat16()
    w, b = (torch.ones(8, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    kernels.layer_norm(x, (8,), w, b).sum().backward()
    assert (b.grad == 300).all()


# ---- attention


@pytest.mark.parametrize(("T", "D"), [(1, 16), (2, 40), (31, 64), (32, 112), (33, 128)])
def test_lengths_and_head_sizes(T: int, D: int, device: str, poisoned: None) -> None:
    """FlashAttention 334: NaN in dq at T=1. Triton 621: right for a head of 64 only."""
    op = BY_NAME["causal_attention"]
    call = make(op, torch.float32, device, {"B": 1, "T": T, "H": 1, "D": D})
    gradients = upstream(op, call)
    judge(op, run(op.implementations["triton"], call, gradients), call, gradients)


OTHER_TILES = [  # forward, dq, dk and dv
    (Tile(16, 16, 4, 1), Tile(64, 16, 4, 1), Tile(16, 64, 4, 1)),
    (Tile(64, 32, 4, 1), Tile(16, 16, 4, 1), Tile(32, 32, 4, 1)),
    (Tile(32, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1)),
]


@pytest.mark.parametrize(("T", "dropout_p"), [(64, 0.0), (77, 0.4)])
def test_result_does_not_depend_on_the_tiles(
    T: int, dropout_p: float, device: str, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashAttention 2337: the tiles of the preprocessing and of the main kernel disagreed. A dropout mask
    that is drawn in tiles would change with them, too."""
    op = BY_NAME["causal_attention"]
    call = make(op, torch.float32, device, {"B": 1, "T": T, "H": 1, "D": 16, "dropout_p": dropout_p})
    gradients = upstream(op, call)
    found = []
    for tiles in OTHER_TILES:
        monkeypatch.setitem(TILES, architecture(call["qkv"]), {64: tiles})
        monkeypatch.setattr("kernels.attention.FP32_TILES", tiles)  # a GPU has these in fp32
        torch.manual_seed(3)
        found.append(run(op.implementations["triton"], call, gradients))
    for other in found[1:]:
        for name, tensor in other.items():
            torch.testing.assert_close(tensor, found[0][name], atol=2e-6, rtol=2e-5)


def _kept(B: int, T: int, H: int, D: int, p: float, seed: int, device: str) -> Tensor:
    """The dropout mask (B, H, T, T), read off with values that are unit vectors."""
    qkv = torch.zeros(B, T, 3, H, D, device=device)
    qkv[:, :, 2] = torch.eye(T, D, device=device)[None, :, None]
    torch.manual_seed(seed)
    return kernels.causal_attention(qkv, p).permute(0, 2, 1, 3)[..., :T] != 0


def test_dropout_against_an_explicit_mask(device: str, poisoned: None) -> None:
    """The same mask forward and backward: the results are those of attention with that mask, in fp64."""
    B, T, H, D, p = 2, 33, 2, 48, 0.3
    kept = _kept(B, T, H, D, p, 1, device)
    torch.manual_seed(0)
    qkv = torch.randn(B, T, 3, H, D, device=device).requires_grad_()
    upstream_gradient = torch.randn(B, T, H, D, device=device)
    torch.manual_seed(1)
    out = kernels.causal_attention(qkv, p)
    out.backward(upstream_gradient)

    exact = qkv.detach().double().requires_grad_()
    q, k, v = exact.transpose(1, 3).unbind(2)
    scores = (q @ k.transpose(-1, -2) * D**-0.5).masked_fill(
        torch.ones(T, T, device=device).triu(1).bool(), -torch.inf
    )
    expected = ((scores.softmax(-1) * kept / (1 - p)) @ v).transpose(1, 2)
    expected.backward(upstream_gradient.double())
    assert distance(out, expected) < 1e-5
    assert distance(qkv.grad, exact.grad) < 1e-5


def test_dropout_is_random_where_it_should_be(device: str) -> None:
    """Independent masks of the right density over heads and batch; torch's seed repeats them."""
    kept = _kept(2, 64, 3, 64, 0.25, 1, device)
    causal = torch.ones(64, 64, device=device).tril().bool()
    assert not (kept & ~causal).any()
    drawn = kept[..., causal].flatten(0, 1).float()  # (B * H, pairs)
    assert abs(drawn.mean() - 0.75) < 0.02  # five standard deviations
    correlation = torch.corrcoef(drawn).fill_diagonal_(0)
    assert correlation.abs().max() < 0.12
    first, again, other = (_kept(1, 16, 1, 16, 0.25, seed, device) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("gigabytes", "rows"), [(None, 16384), (141, 16384), (80, 13184), (42, 8192), (24, 4736), (1, 128)]
)
def test_chunks_of_the_loss_follow_the_memory(gigabytes: int | None, rows: int) -> None:
    """At most 2% of it, and equal chunks of 65536 rows of GPT-2's logits."""
    memory = None if gigabytes is None else gigabytes * 1e9
    assert chunk_rows(65536, 50304, 2, memory) == rows
    assert memory is None or rows == 128 or rows * 50304 * 2 <= memory / 50
