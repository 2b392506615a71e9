"""The cases of every operation of `kernels.OPS`, whatever its arguments are."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.judge import faults, leaves, run
from kernels import OPS
from kernels.op import DTYPES, Op

BY_NAME = {op.name: op for op in OPS}
TRAINED = [op for op in OPS if op.differentiable]
# fp16 needs nothing that bf16 does not need: one sample shows that nothing is bf16 by mistake.
CASES = [
    (op, sample, dtype)
    for op in OPS
    for i, sample in enumerate(op.samples)
    for dtype in ((torch.float32, torch.bfloat16) if i else DTYPES)
]
CASE_IDS = [f"{op.name}-{'-'.join(f'{k}={v}' for k, v in s.items())}-{dtype}" for op, s, dtype in CASES]


def make(op: Op, dtype: torch.dtype, device: str, sample: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    return op.make(dtype=dtype, device=device, **sample)


def judge(op: Op, ours: dict[str, Tensor], call: dict[str, Any], gradients: Sequence[Tensor]) -> None:
    """Asserts that the results of `run` are right, by the rule of the benchmarks."""
    exact = run(op.reference, leaves(call, torch.float64), gradients)
    wrong = faults(ours, exact, run(op.reference, call, gradients))
    assert not wrong, f"{op.name}: {wrong}"
