"""Causal multi-head attention over the packed projection of queries, keys and values.

    out[t] = sum_{s <= t} softmax_s(q[t] . k[s] * softmax_scale) v[s]        per batch element and head

`qkv` is what one `nn.Linear(C, 3C)` gives, viewed as (B, T, 3, H, D): no transpose, no copy.
Source: Vaswani et al., 2017, https://arxiv.org/abs/1706.03762
"""

import torch.nn.functional as F
from torch import Tensor


def causal_attention_reference(
    qkv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None
) -> Tensor:
    """qkv (B, T, 3, H, D) -> (B, T, H, D), by `F.scaled_dot_product_attention`.

    `dropout_p` is the probability of dropping an attention weight; `softmax_scale` defaults to 1 / sqrt(D).
    """
    q, k, v = qkv.transpose(1, 3).unbind(2)  # each (B, H, T, D), a view
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True, scale=softmax_scale)
    return out.transpose(1, 2)
