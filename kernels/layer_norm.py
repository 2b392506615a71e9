"""LayerNorm over the last dimension, alone and fused with the residual add before it.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

with the biased estimate of the variance, and statistics in fp32.

Source: Ba, Kiros and Hinton, 2016, https://arxiv.org/abs/1607.06450
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def layer_norm_reference(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`F.layer_norm`: input (..., C), weight and bias (C,) or None, result (..., C)."""
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


def add_layer_norm_reference(
    input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Adds `input` (..., C) to the residual stream (..., C) and normalises the sum.

    Returns (normed, summed): what the next layer reads, and the new residual stream.
    """
    summed = residual + input
    return F.layer_norm(summed, summed.shape[-1:], weight, bias, eps), summed
