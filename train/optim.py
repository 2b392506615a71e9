"""The optimizers, the learning rate as a function of the step, and what is done around a step."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from gpt.model import GPT
from train.config import TrainConfig


class AdamW(torch.optim.AdamW):
    """nanoGPT's: matrices and embeddings are decayed, norms and biases are not."""

    name = "adamw"

    def __init__(self, model: GPT, config: TrainConfig, device_type: str):
        lr, betas = config.learning_rate, (config.beta1, config.beta2)
        plain = model.configure_optimizers(config.weight_decay, lr, betas, device_type)
        super().__init__(plain.param_groups, lr, betas, fused=plain.defaults["fused"])

    @staticmethod
    def moments(group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the tensors that are kept for each tensor of `group`, and have its shape."""
        return ("exp_avg", "exp_avg_sq")


class Muon(torch.optim.Optimizer):
    """Muon for the matrices of the blocks, AdamW for the rest: embeddings (the head is one), norms, biases.

    A matrix moves along its gradient's running mean, made orthogonal: all of its singular values become
    about one, so that rare directions count as much as frequent ones. Scaled to the size that AdamW's updates
    have, so that one learning rate and weight decay serve both. Queries, keys and values lie in one tensor
    and are made orthogonal apart. Shards are put together first, and every rank does the same work.

    It computes what torch.optim.Muon does. We do not use that one because we skip a step whose gradient is
    not finite on the device, without a sync, and because it works in bfloat16, which is slow on CPUs.

    Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/; the scale is that of Liu et al., 2025,
    https://arxiv.org/abs/2502.16982
    """

    name = "muon"

    def __init__(self, model: GPT, config: TrainConfig, device_type: str, momentum: float = 0.95):
        adamw = AdamW(model, config, device_type)
        decayed, plain = adamw.param_groups
        blocks = {name: p for name, p in model.transformer.h.named_parameters() if p.dim() == 2}
        packed = [p for name, p in blocks.items() if name.endswith("c_attn.weight")]
        single = [p for name, p in blocks.items() if not name.endswith("c_attn.weight")]
        own = set(blocks.values())
        rest = [p for p in decayed["params"] if p not in own]
        groups = [
            decayed | {"params": packed, "momentum": momentum, "matrices": 3},
            decayed | {"params": single, "momentum": momentum, "matrices": 1},
            decayed | {"params": rest},
            plain,
        ]
        super().__init__(groups, adamw.defaults)
        self.adamw = adamw
        self._step_supports_amp_scaling = adamw.defaults["fused"]  # a GradScaler then says found_inf

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Nothing moves where `found_inf`, set as a GradScaler sets it, is not zero."""
        assert closure is None
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for p in group["params"] if "momentum" in group else ():
                if p.grad is not None:
                    self._step_matrix(p, p.grad, group, found_inf)
        self.adamw.param_groups = [group for group in self.param_groups if "momentum" not in group]
        vars(self.adamw).update(state=self.state, grad_scale=None, found_inf=found_inf)
        self.adamw.step()

    def _step_matrix(
        self, p: Tensor, gradient: Tensor, group: dict[str, Any], found_inf: Tensor | None
    ) -> None:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        weight, grad, buffer = _local(p), _local(gradient), _local(state["momentum_buffer"])
        mean = buffer.lerp(grad, 1 - group["momentum"])
        direction = grad.lerp(mean, group["momentum"])  # Nesterov's
        direction = direction.bfloat16() if direction.is_cuda else direction
        if isinstance(p, DTensor):
            direction = DTensor.from_local(
                direction, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()
            )
            direction = direction.full_tensor()
        direction = orthogonal(direction.view(group["matrices"], -1, p.size(1)))
        # The root mean square of AdamW's updates is about 0.2.
        scale = 0.2 * math.sqrt(max(direction.shape[1:]))
        direction = direction.reshape(p.shape).type_as(weight)
        if isinstance(p, DTensor):
            direction = _local(distribute_tensor(direction, p.device_mesh, p.placements, src_data_rank=None))
        moved = weight * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * scale * direction
        if found_inf is not None:
            skip = found_inf.bool()
            mean, moved = torch.where(skip, buffer, mean), torch.where(skip, weight, moved)
        buffer.copy_(mean)
        weight.copy_(moved)

    @staticmethod
    def moments(group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if "momentum" in group else AdamW.moments(group)


# An optimizer is its class, which says its name and its moments, and its entry here and in TrainConfig.
Optimizer = AdamW | Muon
OPTIMIZERS: tuple[type[Optimizer], ...] = (AdamW, Muon)


def optimizer_for(model: GPT, config: TrainConfig, device_type: str) -> Optimizer:
    """The one that `config` names, for the parameters of `model`."""
    (optimizer,) = (each for each in OPTIMIZERS if each.name == config.optimizer)
    return optimizer(model, config, device_type)


def orthogonal(matrices: Tensor) -> Tensor:
    """(N, A, B): each matrix with its singular values moved to about one, U V^T of its decomposition nearly.

    Five steps of a Newton-Schulz iteration, with the polynomial and coefficients of Jordan, who chose them to
    lift small values fast: those above 1/500 of the matrix's norm end between 0.68 and 1.21.
    """
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def _local(tensor: Tensor) -> Tensor:
    """This rank's part, where a tensor has parts."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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


class SkippedSteps:
    """The number of steps that `step_if_finite` skipped, counted on the device without a sync."""

    def __init__(self, total: int, device: str):
        """`total` were skipped before."""
        self.total, self.in_a_row = torch.tensor([total, 0], device=device)

    def count(self, grad_norm: Tensor) -> None:
        failed = ~grad_norm.isfinite()
        self.total, self.in_a_row = self.total + failed, (self.in_a_row + 1) * failed
