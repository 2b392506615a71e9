"""Every operation and every sample against fp64, strided, compiled; on a GPU the same bits every time.

bfloat16 works in Triton's interpreter through `kernels.op.round_to` and `dot`, so it is tested there too.
"""

import pytest
import torch
from torch import Tensor

import kernels
from bench.judge import backpropagate, by_name, floating, leaves, outputs, run, upstream
from kernels import OPS
from kernels.attention import DESCRIPTOR_TILES
from kernels.op import architecture, record
from tests.kernel_cases import BY_NAME, CASE_IDS, CASES, TRAINED, judge, make

every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
every_trained_op = pytest.mark.parametrize("op", TRAINED, ids=lambda op: op.name)


@pytest.mark.parametrize(("op", "sample", "dtype"), CASES, ids=CASE_IDS)
def test_output_and_gradients(op, sample, dtype, device, poisoned):
    """The arguments are left alone: in-place logits corrupted what others still read (Liger 343). Torch is
    never tested against torch: ours launches these kernels, and torch's launches none."""
    call = make(op, dtype, device, sample)
    gradients = upstream(op, call)
    before = {k: v.clone() for k, v in call.items() if isinstance(v, Tensor)}
    gradients_before = [g.clone() for g in gradients]
    with record() as launches:
        judge(op, run(op.implementations["triton"], call, gradients), call, gradients)
    if sample is op.samples[0]:
        assert [launch.kernel for launch in launches] == [*op.launches[0], *op.launches[1]]
    assert all(torch.equal(call[k], v) for k, v in before.items())
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_before))


def _poison(x):
    """What a kernel must not read."""
    return torch.nan if x.is_floating_point() else 10**9


def _rows_apart(x):
    """The same values in the middle of wider rows."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 5), _poison(x))
    wide[..., 3:-2] = x
    return wide[..., 3:-2]


def _columns_apart(x):
    """The same values in every second column."""
    wide = x.new_full((*x.shape, 2), _poison(x))
    wide[..., 0] = x
    return wide[..., 0]


def _transposed(x):
    second = min(1, x.dim() - 1)
    return x.transpose(0, second).contiguous().transpose(0, second)


def _one_number(x):
    """What `.sum().backward()` sends."""
    return x.flatten()[:1].expand(x.shape)


@pytest.mark.parametrize("layout", [_rows_apart, _columns_apart, _transposed, _one_number])
@every_op
def test_strided_inputs_and_gradients(op, layout, device, poisoned):
    call = make(op, torch.float32, device, op.samples[0])
    gradients = [layout(g.float()) if g.dim() else g for g in upstream(op, call)]
    strided = call
    if layout is not _one_number:
        strided = {k: layout(v) if isinstance(v, Tensor) else v for k, v in call.items()}
    judge(op, run(op.implementations["triton"], strided, gradients), call, gradients)


@every_trained_op
def test_backward_scales_with_the_upstream_gradient_and_runs_again(op, device, poisoned):
    """modded-nanogpt: a backward ignored it. Liger: a backward overwrote what forward had saved."""
    call = leaves(make(op, torch.float32, device, op.samples[0]))
    results = [r for r in outputs(op.implementations["triton"](**call)) if r.requires_grad]
    inputs = [v for v in call.values() if floating(v)]
    gradients = [torch.randn_like(r) for r in results]

    def backward(factor):
        scaled = [factor * g for g in gradients]
        grads = torch.autograd.grad(results, inputs, scaled, retain_graph=True, allow_unused=True)
        return [g for g in grads if g is not None]

    for once, twice, never, again in zip(backward(1), backward(2), backward(0), backward(1), strict=True):
        torch.testing.assert_close(twice, 2 * once)
        assert not never.any()
        assert torch.equal(again, once)


@every_trained_op
def test_each_gradient_alone_has_the_same_bits(op, device, poisoned):
    """unsloth: a gradient was silently None when no other gradient was asked for."""
    call = make(op, torch.float32, device, op.samples[0])
    gradients = upstream(op, call)
    full = run(op.implementations["triton"], call, gradients)
    names = [k for k in call if f"d{k}" in full]
    for name in names:
        alone = {k: v.detach().requires_grad_(k == name) if k in names else v for k, v in call.items()}
        backpropagate(outputs(op.implementations["triton"](**alone)), gradients)
        assert torch.equal(alone[name].grad, full[f"d{name}"])
        assert all(alone[k].grad is None for k in names if k != name)


@pytest.mark.parametrize("unused", [0, 1])
def test_an_output_of_add_layer_norm_may_be_unused(unused, device, poisoned):
    op = BY_NAME["add_layer_norm"]
    call = make(op, torch.float32, device, op.samples[0])
    gradients = [g * (i != unused) for i, g in enumerate(upstream(op, call))]
    ours = run(kernels.add_layer_norm, call, [g if g.any() else None for g in gradients])
    judge(op, ours, call, gradients)


@every_op
def test_output_is_the_same_without_gradients(op, device, poisoned):
    """Liger 930: the fused loss failed under no_grad."""
    call = make(op, torch.float32, device, op.samples[0])
    call = leaves(call) if op.differentiable else call
    expected = outputs(op.implementations["triton"](**call))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            results = outputs(op.implementations["triton"](**call))
        assert not any(r.requires_grad for r in results)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@every_op
def test_cost_is_at_least_that_of_reading_the_arguments_and_writing_their_gradients(op):
    for sample in op.benchmark_shapes:
        call = op.make(**{"dtype": torch.bfloat16, "device": "meta"} | sample)
        cost, read = op.cost(**call), sum(v.nbytes for v in call.values() if floating(v) and v.dim() > 1)
        assert read <= cost.forward_bytes <= 3 * read
        assert cost.backward_bytes >= read * op.differentiable
        assert cost.backward_flops >= cost.forward_flops * op.differentiable


QKV_LAYOUTS = {  # how qkv lies in memory, and whether a descriptor can read it
    "packed": (lambda x: x, True),
    "q, k, v one after another": (lambda x: torch.stack(x.unbind(2)).permute(1, 2, 0, 3, 4), True),
    "2 bytes into its storage": (lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x), False),
    "rows apart by 2 bytes more": (lambda x: torch.cat([x, x[..., :1]], -1)[..., :-1], False),
    "one sequence, seen twice": (lambda x: x[:1].expand_as(x), False),
}


@pytest.mark.parametrize("layout", QKV_LAYOUTS)
def test_attention_reads_by_descriptor_what_it_can(layout, device, poisoned):
    arrange, readable = QKV_LAYOUTS[layout]
    op = BY_NAME["causal_attention"]
    call = make(op, torch.bfloat16, device, {"B": 2, "T": 37, "H": 2, "D": 32})
    call["qkv"] = arrange(call["qkv"])
    gradients = upstream(op, call)
    with record() as launches:
        results = run(op.implementations["triton"], call, gradients)
    judge(op, results, call, gradients)
    has_descriptors = architecture(call["qkv"]) in DESCRIPTOR_TILES
    assert (launches[0].arguments["DESC"] is not None) == (readable and has_descriptors)


# ---- torch.library, torch.compile, autocast


def test_opcheck(device):
    """Schema, fake implementation and autograd registration of every operator; each is checked once."""
    calls = {}

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
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


def test_compiles_without_a_graph_break(device):
    """LayerNorm under compile returned zeros: Liger issue 871. All operations are in one graph.

    Inductor must not meet an operator that it has to describe. Up to PyTorch 2.12 it makes that text even
    when nobody logs it, and the text doubles with every add_layer_norm: 12 layers never finished compiling.
    """
    torch._dynamo.reset()
    calls = [make(op, torch.float32, device, op.samples[0]) for op in OPS]
    calls = [leaves(call) if op.differentiable else call for op, call in zip(OPS, calls)]

    @torch.compile(fullgraph=True)
    def every_operation(calls):
        return [op.implementations["triton"](**call) for op, call in zip(OPS, calls)]

    gradients = [upstream(op, call) for op, call in zip(OPS, calls)]
    explicit = torch._inductor.config.patch(implicit_fallbacks=False, force_disable_caches=True)
    with explicit, record() as launches:
        results = [outputs(result) for result in every_operation(calls)]
        assert len(launches) == sum(len(op.launches[0]) for op in OPS)
        backpropagate(*zip(*((r, g) for rs, gs in zip(results, gradients) for r, g in zip(rs, gs))))
    for op, call, result, upstream_gradients in zip(OPS, calls, results, gradients):
        judge(op, by_name(result, call), call, upstream_gradients)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_autocast(backend, device, poisoned):
    """The dtypes that `kernels` documents; the gradient of a fp32 parameter is fp32.

    The seed of dropout is drawn by the compiled program, not by its compilation.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    N, C, V = 6, 32, 50

    def step(x, table, w, head, target):
        with torch.autocast(device, torch.bfloat16):
            embedded = kernels.embedding(target, table)
            activated = kernels.gelu(x)
            normed, summed = kernels.add_layer_norm(activated, kernels.gelu(embedded), w)
            again = kernels.layer_norm(summed, (C,), w)
            mixed = kernels.causal_attention(summed.view(1, 2, 3, 1, C), dropout_p=0.5)
            loss = kernels.linear_cross_entropy(normed + again, head, target)
        return embedded, activated, normed, summed, again, mixed, loss

    x = torch.randn(N, C, device=device, dtype=torch.bfloat16).requires_grad_()
    table, w, head = (torch.randn(n, C, device=device).requires_grad_() for n in (V, 1, V))
    target = torch.randint(V, (N,), device=device)
    function = step if backend is None else torch.compile(step, backend=backend, fullgraph=True)
    results, others = (function(x, table, w[0], head, target) for _ in range(2))
    half, full = torch.bfloat16, torch.float32
    assert [r.dtype for r in results] == [full, half, half, full, half, half, full]
    assert [torch.equal(a, b) for a, b in zip(results, others)] == [True] * 5 + [False, True]
    torch.autograd.backward([results[5].float().sum(), results[6]])
    assert [t.grad.dtype for t in (x, table, w, head)] == [half, full, full, full]
    assert all(t.grad.isfinite().all() for t in (x, table, w, head))


# ---- what needs a GPU: real tiles, real races


@pytest.mark.gpu
@every_op
def test_large_samples_have_the_same_bits_a_hundred_times(op, device, poisoned):
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
def test_attention_tiles(T, D, device, poisoned):
    op = BY_NAME["causal_attention"]
    call = make(op, torch.bfloat16, device, {"B": 2, "T": T, "H": 3, "D": D})
    gradients = upstream(op, call)
    judge(op, run(op.implementations["triton"], call, gradients), call, gradients)


@pytest.mark.gpu
@every_op
def test_cuda_graph(op, device):
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
