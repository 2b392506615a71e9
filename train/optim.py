"""The learning rate as a function of the step."""

import math

from train.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then the schedule down to min_lr at lr_decay_iters, and min_lr after that.

    cosine: half a cosine from the end of the warm-up, as nanoGPT.
    wsd: constant (stable) until wsd_decay_iters before the end, then linear; Hu et al., 2024,
    https://arxiv.org/abs/2404.06395
    """
    peak, end = config.learning_rate, config.lr_decay_iters
    if not config.decay_lr:
        return peak
    if step < config.warmup_iters:
        return peak * (step + 1) / (config.warmup_iters + 1)
    if step >= end:
        return config.min_lr
    if config.schedule == "cosine":
        progress = (step - config.warmup_iters) / (end - config.warmup_iters)
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        descent = min(config.wsd_decay_iters or end // 5, end - config.warmup_iters)
        share = min(1.0, (end - step) / descent) if descent else 1.0
    return config.min_lr + share * (peak - config.min_lr)
