"""The optimizers, the learning-rate schedule and skipped steps."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from gpt.model import GPT
from train.config import TrainConfig


def optimizer_for(model: GPT, config: TrainConfig, device_type: str) -> torch.optim.Optimizer:
    """Makes the optimizer that `config` names, for the parameters of `model`.

    To add an optimizer, write its class, and add its name here and to TrainConfig, and the names of its
    moments to train.checkpoint.restore.
    """
    betas = (config.beta1, config.beta2)
    adamw = model.configure_optimizers(config.weight_decay, config.learning_rate, betas, device_type)
    return Muon(model, adamw) if config.optimizer == "muon" else adamw


class Muon(torch.optim.Optimizer):
    """Muon for the matrices of the blocks; AdamW for embeddings (the head is tied to one), norms and biases.

    Muon moves a matrix along the running mean of its gradient, orthogonalised: all singular values become
    about 1, so rare directions count as much as frequent ones.

    torch.optim.Muon computes the same. We do not use it because we skip non-finite steps on the device,
    without a sync, and because it computes in bfloat16 on CPUs too, where that is slow.

    Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/; Liu et al., 2025,
    https://arxiv.org/abs/2502.16982 (the scale of the update)
    """

    def __init__(self, model: GPT, adamw: torch.optim.AdamW, momentum: float = 0.95):
        """`adamw` optimizes all parameters of `model`, and has a group with and a group without decay."""
        decayed, not_decayed = adamw.param_groups
        matrices = {name: p for name, p in model.transformer.h.named_parameters() if p.dim() == 2}
        # Queries, keys and values are one tensor of three matrices. Each is orthogonalised by itself.
        packed = [p for name, p in matrices.items() if name.endswith("c_attn.weight")]
        single = [p for name, p in matrices.items() if not name.endswith("c_attn.weight")]
        muons = set(matrices.values())
        embeddings = [p for p in decayed["params"] if p not in muons]
        groups = [
            decayed | {"params": packed, "momentum": momentum, "matrices": 3},
            decayed | {"params": single, "momentum": momentum, "matrices": 1},
            decayed | {"params": embeddings},
            not_decayed,
        ]
        super().__init__(groups, adamw.defaults)
        self.adamw = adamw
        # A GradScaler then sets found_inf instead of skipping the step itself.
        self._step_supports_amp_scaling = adamw.defaults["fused"]

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Changes nothing if `found_inf`, which a GradScaler or `step_if_finite` sets, is not zero."""
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
        # Nesterov momentum: a step ahead of the mean.
        direction = grad.lerp(mean, group["momentum"])
        direction = direction.bfloat16() if direction.is_cuda else direction
        if isinstance(p, DTensor):
            # A shard is not a matrix. Every rank gathers the full matrix and computes the same.
            direction = DTensor.from_local(
                direction, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()
            )
            direction = direction.full_tensor()
        direction = orthogonal(direction.view(group["matrices"], -1, p.size(1)))
        # This scale gives updates the root mean square of AdamW's, about 0.2. So one learning rate and one
        # decay work for both.
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


def orthogonal(matrices: Tensor) -> Tensor:
    """Orthogonalises matrices (N, A, B): with the decomposition U S V^T of each, returns about U V^T.

    Five steps of a Newton-Schulz iteration. Jordan's coefficients raise small singular values fast: all above
    1/500 of the matrix's norm end between 0.68 and 1.21.
    """
    # x x^T is smallest if the matrix is wide.
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
    """This rank's shard of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of a step: linear warm-up, a decay down to min_lr at lr_decay_iters, then min_lr.

    cosine, as in nanoGPT: half a cosine, from the end of the warm-up on.
    wsd (warm-up, stable, decay): constant, and then linear over the last wsd_decay_iters steps; Hu et al.,
    2024, https://arxiv.org/abs/2404.06395
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


def step_if_finite(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, grad_norm: Tensor) -> None:
    """Makes a step of the optimizer. If the gradient is not finite, weights and moments stay as they are."""
    if scaler.is_enabled():
        # The scaler looks for infinities itself.
        scaler.step(optimizer)
        scaler.update()
    elif optimizer.defaults["fused"]:
        # The fused kernel reads found_inf on the device, as under a GradScaler: nothing waits for the GPU.
        vars(optimizer).update(grad_scale=None, found_inf=(~grad_norm.isfinite()).float())
        optimizer.step()
    elif grad_norm.isfinite():
        optimizer.step()


class SkippedSteps:
    """Counts the steps that `step_if_finite` skips, on the device, without a sync.

    `total` is the number so far.
    """

    def __init__(self, total: int, device: str):
        self.total, self.in_a_row = torch.tensor([total, 0], device=device)

    def count(self, grad_norm: Tensor) -> None:
        skipped = ~grad_norm.isfinite()
        self.total, self.in_a_row = self.total + skipped, (self.in_a_row + 1) * skipped
