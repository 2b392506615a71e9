"""The last linear layer and the cross-entropy of its logits, as one operation.

    loss = cross_entropy(input @ linear_weight.T, target)

The argument order is that of `F.linear_cross_entropy` of torch 2.13.
"""

import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy_reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
) -> Tensor:
    """input (N, C), linear_weight (V, C), target (N,) int64; the loss is () or, for "none", (N,).

    Forms all the (N, V) logits at once, whatever `chunk_size` says.
    """
    logits = F.linear(input, linear_weight)
    return F.cross_entropy(
        logits, target, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
