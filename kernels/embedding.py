"""The embedding of token ids, with a gradient that has the same bits every run.

Forward:

    y[i] = weight[id[i]]

Backward:

    dweight[v] = sum of dy[i] over all i with id[i] = v

Both are PyTorch's. On a GPU its backward adds the rows of equal ids in a fixed order: it sorts more than
3072 ids, and walks over fewer. Inductor would replace it by additions with atomics, in a different order
every run, and a sum of floats depends on the order. So backward is a custom operator, which Inductor calls
as it is.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.op import operator


def embedding(input: Tensor, weight: Tensor) -> Tensor:
    """`F.embedding`: input (...) of int64 or int32 ids from 0 to V - 1, weight (V, C) -> (..., C).

    The result and the gradient have the dtype of weight, also under autocast, as in PyTorch. The gradient is
    summed in fp32 or fp64, always in the same order. Bad arguments raise what F.embedding raises. There is no
    second derivative, and no transform of torch.func.
    """
    return _Embedding.apply(input, weight)


def _embedding_backward(dout: Tensor, ids: Tensor, rows: int) -> Tensor:
    """dout (..., C), ids (...) -> dweight (rows, C) in the dtype of dout."""
    # dout has the dtype of weight, because autograd casts a gradient to the dtype of its tensor. For up to
    # 3072 ids PyTorch would add in that dtype. In bfloat16 such a sum stops growing early, so add in fp32.
    wide = dout.to(torch.promote_types(dout.dtype, torch.float32))
    return torch.ops.aten.embedding_dense_backward(wide, ids, rows, -1, False).to(dout.dtype)


def _fake_backward(dout: Tensor, ids: Tensor, rows: int) -> Tensor:
    return dout.new_empty(rows, dout.shape[-1])


_backward_op = operator("embedding_backward", _embedding_backward, _fake_backward)


class _Embedding(torch.autograd.Function):
    """torch.compile traces into the forward of an autograd.Function, but not into a custom operator."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        ctx.rows = weight.shape[0]
        return F.embedding(input, weight)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        return None, _backward_op(dout, ids, ctx.rows)
