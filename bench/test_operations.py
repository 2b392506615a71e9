"""pytest bench --benchmark-only: every operation and its peers in the tables of pytest-benchmark.

The shapes are GPT-2 124M's on a GPU, those of the tests on a CPU. A call is timed by the host's clock until
the GPU is done, so launching is included; `python -m bench.kernels` has the GPU's own time. A wrong
result is not timed.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.judge import failures
from bench.kernels import DTYPES, directions, fewer, honest_compilation, make_call, variants
from kernels import OPS
from kernels.op import Op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = DTYPES["bf16" if DEVICE == "cuda" else "fp32"]
CASES = [
    pytest.param(op, function, direction, id=f"{op.name}-{name}-{direction}")
    for op in OPS
    for name, function in variants(op, DEVICE).items()
    for direction in (("forward", "backward") if op.differentiable else ("forward",))
]


@pytest.mark.parametrize(("op", "function", "direction"), CASES)
def test_operation(benchmark: Any, op: Op, function: Callable[..., Any] | str, direction: str) -> None:
    if isinstance(function, str):
        pytest.skip(function)
    sample = op.benchmark_shapes[0] if DEVICE == "cuda" else op.samples[0]
    with honest_compilation():
        if reasons := failures(op, make_call(op, DTYPE, DEVICE, fewer(op, sample)), {"it": function}):
            pytest.fail(reasons["it"])
        call = directions(function, make_call(op, DTYPE, DEVICE, sample))[direction]

        def until_done() -> None:
            call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark.group = f"{op.name} {direction} {', '.join(f'{k}={v}' for k, v in sample.items())}"
        benchmark.pedantic(until_done, rounds=20, iterations=1, warmup_rounds=3)
