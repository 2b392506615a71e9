"""Cross-entropy of logits against class indices.

    loss_i = logsumexp(logits_i) - logits_i[target_i]        with label smoothing s, the target is
    (1 - s) one_hot(target_i) + s / V; rows whose target is `ignore_index` count for nothing
"""

import torch.nn.functional as F
from torch import Tensor


def cross_entropy_reference(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`F.cross_entropy`: input (N, V) logits, target (N,) int64; the loss is () or, for "none", (N,).

    As torch has it, the mean is over the targets that are not ignored: NaN when all of them are.
    """
    return F.cross_entropy(
        input, target, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
