"""Drawing a token from the logits of a model."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How to draw a token. Raises ValueError for a value out of range."""

    temperature: float = 1.0  # 1: the model's probabilities; lower is less random; 0: the likeliest token
    top_k: int | None = None  # draw from the k likeliest tokens only
    top_p: float | None = None  # draw from the smallest set of tokens with a total probability of at least p

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            bound = "finite" if self.temperature == math.inf else ">= 0"
            raise ValueError(f"temperature={self.temperature} must be {bound}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be >= 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")


def draw_ids(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """logits (B, V) -> ids (B,): applies top_k, then temperature, then top_p, and draws once per row.

    The id is -1 if a row's logits are NaN or infinite. `check_drawn` raises an error for it later, so that
    nothing waits for the GPU here.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    highest = logits.amax(-1, keepdim=True)
    can_draw = highest.isfinite()
    if sampling.temperature == 0:
        return logits.argmax(-1).where(can_draw[:, 0], -1)
    if sampling.top_k is not None:
        kth = torch.topk(logits, min(sampling.top_k, logits.size(-1))).values[:, [-1]]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    # The highest logit becomes 0, so the division cannot overflow. The bounds keep 1 / temperature finite in
    # float32.
    logits = (logits - highest).where(can_draw, 0) / min(max(sampling.temperature, 1e-30), 1e30)
    probabilities = F.softmax(logits, dim=-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        # A token stays if the likelier ones together have less than p. multinomial normalises what is left.
        sorted_probabilities, order = probabilities.sort(descending=True)
        likelier = sorted_probabilities.cumsum(-1) - sorted_probabilities
        nucleus = sorted_probabilities.masked_fill(likelier >= sampling.top_p, 0)
        probabilities = torch.zeros_like(nucleus).scatter(1, order, nucleus)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].where(can_draw[:, 0], -1)


def check_drawn(ids: Tensor) -> None:
    """Raises ValueError if `draw_ids` could not draw an id. Waits for the GPU."""
    if (ids < 0).any():
        raise ValueError(
            "the logits of the model are not finite: a weight is NaN, or a number is too large for float16; "
            "try --dtype=float32, or a checkpoint from before the loss became NaN (see metrics.jsonl)"
        )
