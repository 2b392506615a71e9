"""The learning rate as a function of the step; steps of the optimizer."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

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


def clip_gradient(parameters: Iterable[Tensor], most: float) -> Tensor:
    """Scales the gradient down to the norm `most` (0 is off). Returns its norm before, on the device."""
    parameters = list(parameters)
    if most:
        norm = torch.nn.utils.clip_grad_norm_(parameters, most)
    else:
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def step_if_finite(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, grad_norm: Tensor) -> None:
    """A step, or none where the norm of the gradient is not finite: weights and moments stay as they are."""
    if scaler.is_enabled():  # it looks for itself
        scaler.step(optimizer)
        scaler.update()
    elif optimizer.defaults["fused"]:
        # The fused kernel is told on the device, as a GradScaler tells it: nobody waits.
        vars(optimizer).update(grad_scale=None, found_inf=(~grad_norm.isfinite()).float())
        optimizer.step()
    elif grad_norm.isfinite():
        optimizer.step()
