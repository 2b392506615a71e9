"""Every operation and every sample against fp64, strided, compiled; on a GPU the same bits every time.

bfloat16 has a right path in Triton's interpreter (`kernels.op.round_to` and `dot`), so it is tested there
too.
"""

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels import OPS
from kernels.attention import DESCRIPTOR_TILES
from kernels.cross_entropy import loss_and_gradient_
from kernels.op import Op, architecture, record
from tests.kernel_cases import (
    CASE_IDS,
    CASES,
    TRAINED,
    backpropagate,
    distance,
    floating,
    judge,
    leaves,
    make,
    outputs,
    run,
    upstream,
)

BY_NAME = {op.name: op for op in OPS}
every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
every_trained_op = pytest.mark.parametrize("op", TRAINED, ids=lambda op: op.name)


@pytest.mark.parametrize(("op", "sample", "dtype"), CASES, ids=CASE_IDS)
def test_output_and_gradients(
    op: Op, sample: dict[str, Any], dtype: torch.dtype, device: str, poisoned: None
) -> None:
    """And the arguments are left alone: in-place logits corrupted what others still read (Liger 343)."""
    call = make(op, dtype, device, sample)
    gradients = upstream(op, call)
    before = {k: v.clone() for k, v in call.items() if isinstance(v, Tensor)}
    gradients_before = [g.clone() for g in gradients]
    slack = 0.0
    if sample.get("shape", ())[-1:] == (1,):
        # A norm of one column has rstd = 1 / sqrt(eps) = 316 and a dinput of 0, which PyTorch gives exactly.
        # A GPU fuses (g - mean(g)) * rstd into g * rstd - mean(g) * rstd, so ours keeps a rounding of 316 g.
        slack = 317 * max(g.abs().max().item() for g in gradients) * torch.finfo(torch.float32).eps / 2
    judge(op, run(op.implementations["triton"], call, gradients), call, gradients, slack)
    assert all(torch.equal(call[k], v) for k, v in before.items())
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_before))


def _rows_apart(x: Tensor) -> Tensor:
    """The same values in the middle of wider rows."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), torch.nan, dtype=x.dtype, device=x.device)
    wide[..., 3:-2] = x
    return wide[..., 3:-2]


def _columns_apart(x: Tensor) -> Tensor:
    """The same values in every second column."""
    wide = torch.full((*x.shape, 2), torch.nan, dtype=x.dtype, device=x.device)
    wide[..., 0] = x
    return wide[..., 0]


def _transposed(x: Tensor) -> Tensor:
    return x.t().contiguous().t() if x.dim() == 2 else x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("layout", [_rows_apart, _columns_apart, _transposed])
@every_op
def test_strided_inputs(op: Op, layout: Any, device: str, poisoned: None) -> None:
    call = make(op, torch.float32, device, op.samples[0])
    gradients = upstream(op, call)
    strided = {
        k: layout(v) if floating(v) and (v.dim() > 1 or layout is not _transposed) else v
        for k, v in call.items()
    }
    judge(op, run(op.implementations["triton"], strided, gradients), call, gradients)


@every_trained_op
def test_gradient_of_stride_zero(op: Op, device: str, poisoned: None) -> None:
    """`.sum().backward()` sends one number, expanded."""
    call = make(op, torch.float32, device, op.samples[0])
    gradients = tuple(torch.ones_like(r) for r in outputs(op.reference(**call)))
    expanded = tuple(torch.ones((), device=device).expand(g.shape) for g in gradients)
    judge(op, run(op.implementations["triton"], call, expanded), call, gradients)


@every_trained_op
def test_gradient_that_is_a_view(op: Op, device: str, poisoned: None) -> None:
    call = make(op, torch.float32, device, op.samples[0])
    gradients = upstream(op, call)
    views = tuple(_columns_apart(g) if g.dim() else g for g in gradients)
    judge(op, run(op.implementations["triton"], call, views), call, gradients)


@every_trained_op
def test_second_backward_of_a_retained_graph(op: Op, device: str) -> None:
    call = leaves(make(op, torch.float32, device, op.samples[0]))
    results = [r for r in outputs(op.implementations["triton"](**call)) if r.requires_grad]
    inputs = [v for v in call.values() if floating(v)]
    gradients = [torch.randn_like(r) for r in results]
    grad = partial(torch.autograd.grad, results, inputs, allow_unused=True)
    first = grad(gradients, retain_graph=True)
    double = grad([2 * g for g in gradients], retain_graph=True)
    again = grad(gradients)
    for a, b, c in zip(first, double, again):
        if a is None:  # an argument without a gradient
            continue
        assert torch.equal(a, c)
        torch.testing.assert_close(b, 2 * a)


@every_op
def test_kernels_are_launched(op: Op, device: str) -> None:
    """Torch is never tested against torch: ours launches these kernels, and torch's launches none."""
    call = make(op, torch.float32, device, op.samples[0])
    call = leaves(call) if op.differentiable else call
    with record() as forward:
        results = outputs(op.implementations["triton"](**call))
    with record() as backward:
        if op.differentiable:
            backpropagate(results, [torch.ones_like(r) for r in results])
    for launches, expected in zip((forward, backward), op.launches, strict=True):
        assert [launch.kernel.__name__ for launch in launches] == [kernel.__name__ for kernel in expected]
    with record() as launches:
        run(op.implementations["torch"], call, upstream(op, call))
    assert not launches


@every_op
def test_cost_is_that_of_the_tensors(op: Op) -> None:
    """At the least, forward reads its arguments once and backward writes their gradients."""
    for sample in (op.production_shapes[0], *op.benchmark_shapes):
        call = op.make(**{"dtype": torch.bfloat16, "device": "meta"} | sample)
        cost, read = op.cost(**call), sum(v.nbytes for v in call.values() if floating(v) and v.dim() > 1)
        assert read <= cost.forward_bytes <= 3 * read
        assert cost.forward_flops > 0 or op.name == "embedding"  # a gather computes nothing
        if op.differentiable:
            assert cost.backward_bytes >= read
            assert cost.backward_flops >= cost.forward_flops


QKV_LAYOUTS: dict[str, tuple[Any, bool]] = {  # how qkv lies in memory, and whether a descriptor can read it
    "packed": (lambda x: x, True),
    "in wider rows": (lambda x: torch.cat([x, x], 2)[:, :, :3], True),
    "q, k, v one after another": (lambda x: torch.stack(x.unbind(2)).permute(1, 2, 0, 3, 4), True),
    "16 bytes into its storage": (lambda x: torch.cat([x.new_zeros(8), x.flatten()])[8:].view_as(x), True),
    "2 bytes into its storage": (lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x), False),
    "rows apart by 2 bytes more": (lambda x: torch.cat([x, x[..., :1]], -1)[..., :-1], False),
    "one sequence, seen twice": (lambda x: x[:1].expand_as(x), False),
}


@pytest.mark.parametrize("layout", QKV_LAYOUTS)
def test_attention_reads_by_descriptor_what_it_can(layout: str, device: str, poisoned: None) -> None:
    arrange, readable = QKV_LAYOUTS[layout]
    op = BY_NAME["causal_attention"]
    call = make(op, torch.bfloat16, device, {"B": 2, "T": 37, "H": 2, "D": 32})
    call["qkv"] = arrange(call["qkv"])
    gradients = upstream(op, call)
    with record() as launches:
        results = run(op.implementations["triton"], call, gradients)
    judge(op, results, call, gradients)
    has_descriptors = architecture(call["qkv"]) in DESCRIPTOR_TILES
    assert (launches[0].arguments["ROWS"] is not None) == (readable and has_descriptors)


@pytest.mark.parametrize(
    ("D", "dtype", "dropout_p"),
    [(80, torch.bfloat16, 0.0), (32, torch.float32, 0.0), (32, torch.float16, 0.5)],
)
def test_attention_reads_by_pointers_where_they_are_faster(
    D: int, dtype: torch.dtype, dropout_p: float, device: str
) -> None:
    qkv = torch.randn(1, 20, 3, 1, D, device=device).to(dtype)
    with record() as launches:
        kernels.causal_attention(qkv, dropout_p)
    assert launches[0].arguments["ROWS"] is None


# ---- torch.library, torch.compile, autocast


def test_opcheck(device: str) -> None:
    """Schema, fake implementation and autograd registration of every operator; each is checked once."""
    calls: dict[Any, tuple[Any, ...]] = {}

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "tritongpt":
                calls.setdefault(func, args)
            return func(*args, **(kwargs or {}))

    trained = set()
    for op in OPS:
        call, before = make(op, torch.float32, device, op.samples[0]), set(calls)
        with Spy():
            run(op.implementations["triton"], call, upstream(op, call))
        if op.differentiable:
            trained |= {func for func in calls.keys() - before if "backward" not in func.__name__}
    assert len(calls) >= len(OPS)
    for func, args in calls.items():
        fresh = tuple(
            a.detach().clone().requires_grad_(func in trained and floating(a)) if isinstance(a, Tensor) else a
            for a in args
        )
        # test_compiles_without_a_graph_break has what opcheck's fourth test has, in a tenth of the time.
        utils = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(func, fresh, test_utils=utils)


@pytest.fixture
def implicit_fallbacks() -> Iterator[list[str]]:
    """What Inductor logs for an operator that it knows no lowering of: one message for each."""
    messages: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        messages.append(record.msg)
        # Nobody formats the message: its text describes the whole graph below.
        return False

    logger = logging.getLogger("torch._inductor.graph")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addFilter(keep)
    with torch.compiler.config.patch(force_disable_caches=True):
        yield messages
    logger.removeFilter(keep)
    logger.setLevel(level)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(backend: str, device: str, implicit_fallbacks: list[str]) -> None:
    """LayerNorm under compile returned zeros: Liger issue 871. All operations are in one graph.

    Inductor must not meet an operator that it has to describe. Up to PyTorch 2.12 it makes that text even
    when nobody logs it, and the text doubles with every add_layer_norm: 12 layers never finished compiling.
    """
    torch._dynamo.reset()
    calls = [make(op, torch.float32, device, op.samples[0]) for op in OPS]
    calls = [leaves(call) if op.differentiable else call for op, call in zip(OPS, calls)]

    @torch.compile(backend=backend, fullgraph=True)
    def every_operation(calls: list[dict[str, Any]]) -> list[Any]:
        return [op.implementations["triton"](**call) for op, call in zip(OPS, calls)]

    with record() as launches:
        results = every_operation(calls)
    assert len(launches) == sum(len(op.launches[0]) for op in OPS)
    gradients = [upstream(op, call) for op, call in zip(OPS, calls)]
    pairs = [(r, g.to(r.dtype)) for rs, gs in zip(results, gradients) for r, g in zip(outputs(rs), gs)]
    backpropagate(*zip(*pairs))
    for op, call, result, upstream_gradients in zip(OPS, calls, results, gradients):
        ours = {f"output {i}": r.detach() for i, r in enumerate(outputs(result))}
        if op.differentiable:
            ours |= {f"d{k}": v.grad for k, v in call.items() if floating(v) and v.grad is not None}
        judge(op, ours, {k: v.detach() if floating(v) else v for k, v in call.items()}, upstream_gradients)
    assert not [message for message in implicit_fallbacks if "implicit fallback" in message]


def test_an_operator_without_a_lowering_would_be_seen(device: str, implicit_fallbacks: list[str]) -> None:
    torch._dynamo.reset()
    unknown = torch.library.custom_op(
        "tritongpt_tests::unknown", torch.clone, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    unknown.register_fake(torch.empty_like)
    torch.compile(lambda x: unknown(x) + 1)(torch.zeros(3, device=device))
    assert [message for message in implicit_fallbacks if "implicit fallback" in message]


def test_dropout_compiles_without_a_graph_break(device: str, poisoned: None) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(kernels.causal_attention, backend="aot_eager", fullgraph=True)
    qkv = torch.randn(1, 20, 3, 1, 16, device=device).requires_grad_()
    first, second = compiled(qkv, 0.5), compiled(qkv, 0.5)
    assert not torch.equal(first, second)  # the seed is drawn by the compiled program, not by its compilation
    first.sum().backward()
    assert qkv.grad is not None
    assert qkv.grad.isfinite().all()


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_autocast(backend: str | None, device: str, poisoned: None) -> None:
    """The dtypes that `kernels` documents; the gradient of a fp32 parameter is fp32."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    N, C, V = 6, 32, 50

    def step(x: Tensor, residual: Tensor, w: Tensor, head: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(device, torch.bfloat16):
            normed, summed = kernels.add_layer_norm(x, residual, w)
            again = kernels.layer_norm(summed, (C,), w)
            mixed = kernels.causal_attention(summed.view(1, 2, 3, 1, C))
            loss = kernels.linear_cross_entropy(normed + again, head, target)
        return normed, summed, again, mixed, loss

    x = torch.randn(N, C, device=device, dtype=torch.bfloat16).requires_grad_()
    residual, w, head = (torch.randn(n, C, device=device).requires_grad_() for n in (N, 1, V))
    target = torch.randint(V, (N,), device=device)
    function = step if backend is None else torch.compile(step, backend=backend, fullgraph=True)
    results = function(x, residual, w[0], head, target)
    half, full = torch.bfloat16, torch.float32
    assert [r.dtype for r in results] == [half, full, half, half, full]
    torch.autograd.backward([results[3].float().sum(), results[4]])
    assert [t.grad.dtype for t in (x, residual, w, head)] == [half, full, full, full]
    assert all(t.grad.isfinite().all() for t in (x, residual, w, head))


def test_layer_norm_mixes_dtypes(device: str, poisoned: None) -> None:
    """A bf16 branch on a fp32 stream with fp32 parameters: each gradient in its own dtype."""
    torch.manual_seed(0)
    op = BY_NAME["add_layer_norm"]
    call = op.make(dtype=torch.float32, device=device, shape=(5, 111))
    call["input"] = call["input"].bfloat16()
    gradients = upstream(op, call)
    found = run(kernels.add_layer_norm, call, gradients)
    assert found["dinput"].dtype == torch.bfloat16
    assert found["dresidual"].dtype == torch.float32
    judge(op, found, call, gradients)


def test_only_one_output_of_add_layer_norm_is_used(device: str, poisoned: None) -> None:
    op = BY_NAME["add_layer_norm"]
    for used in (0, 1):
        call = leaves(make(op, torch.float32, device, {"shape": (3, 59)}))
        exact = leaves(call, torch.float64)
        op.implementations["triton"](**call)[used].square().sum().backward()
        op.reference(**exact)[used].square().sum().backward()
        for name in ("input", "residual"):
            assert distance(call[name].grad, exact[name].grad) < 1e-4


# ---- what needs a GPU: real tiles, real races


@pytest.mark.gpu
@every_op
def test_large_samples_have_the_same_bits_a_hundred_times(op: Op, device: str, poisoned: None) -> None:
    call = make(op, torch.bfloat16, device, op.large_sample)
    gradients = upstream(op, call)
    first = run(op.implementations["triton"], call, gradients)
    judge(op, first, call, gradients)
    for _ in range(100):
        again = run(op.implementations["triton"], call, gradients)
        assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


@pytest.mark.gpu
@pytest.mark.parametrize("D", [16, 24, 32, 64, 80, 96, 128])
@pytest.mark.parametrize("T", [1, 2, 97, 1000, 1024])
def test_attention_tiles(T: int, D: int, device: str, poisoned: None) -> None:
    op = BY_NAME["causal_attention"]
    call = make(op, torch.bfloat16, device, {"B": 2, "T": T, "H": 3, "D": D})
    gradients = upstream(op, call)
    judge(op, run(op.implementations["triton"], call, gradients), call, gradients)


@pytest.mark.gpu
def test_gradient_written_over_logits_whose_rows_share_16_byte_blocks(device: str) -> None:
    logits = torch.randn(2048, 50257, device=device).bfloat16()
    target = torch.randint(50257, (2048,), device=device)
    expected = torch.softmax(logits.float(), -1)
    expected[torch.arange(2048, device=device), target] -= 1
    first = None
    for _ in range(20):
        ours = logits.clone()
        loss_and_gradient_(ours, target, -100, gradient=True)
        first = ours if first is None else first
        assert torch.equal(ours, first)
    torch.testing.assert_close(ours.float(), expected, rtol=1e-2, atol=1e-4)


@pytest.mark.gpu
@every_op
def test_cuda_graph(op: Op, device: str) -> None:
    call = make(op, torch.bfloat16, device, op.samples[0])
    gradients = upstream(op, call)
    eager = run(op.implementations["triton"], call, gradients)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(op.implementations["triton"], call, gradients)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = run(op.implementations["triton"], call, gradients)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(tensor, captured[name]) for name, tensor in eager.items())
