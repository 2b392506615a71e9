"""GPT-2, computed by the operations in kernels/.

    B  batch size     T  tokens in a sequence     C  n_embd, the width of the residual stream
    H  heads          D  C / H, the head size     V  vocabulary size

Parameter names, shapes and initialisation are nanoGPT's: it can load our weights and we can load its, and the
same seed gives the same initial bits. Four things differ, all for speed:

- The residual add is fused with the LayerNorm that follows it; see Block.
- Attention reads q, k and v where the projection wrote them, as one tensor (B, T, 3, H, D).
- The training loss is computed without storing the logits, (B, T, V).
- The residual stream may have a bfloat16 gradient; see Stream.

References: Radford et al., 2019 (GPT-2); https://github.com/karpathy/nanoGPT; Press and Wolf, 2017,
https://arxiv.org/abs/1608.05859 (tied embeddings); Henry et al., 2020, https://arxiv.org/abs/2010.04245, and
Dehghani et al., 2023, https://arxiv.org/abs/2302.05442 (qk_norm; RMSNorm without weights as in
https://github.com/KellerJordan/modded-nanogpt).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kernels
from gpt import hugging_face
from gpt.device import DTYPES
from gpt.flops import peak_flops
from gpt.sampling import Sampling, check_drawn, draw_ids
from kernels.op import autocast_dtype

Residual = Union[Tensor, "Stream"]  # the residual stream, (B, T, C)
Attend = Callable[[Tensor], Tensor]  # qkv (B, T, 3, H, D) -> (B, T, H, D)
ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}  # name -> the `approximate` of F.gelu
# Fields of GPTConfig that each run chooses. All others must match the weights.
RUN_OPTIONS = ("dropout", "kernels", "activation_checkpointing", "residual_dtype")


@dataclass
class GPTConfig:
    block_size: int = 1024  # longest sequence, in tokens
    vocab_size: int | None = 50304  # GPT-2's 50257, padded to a multiple of 64; None: the tokenizer's
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads; divides n_embd
    n_embd: int = 768  # width of the residual stream
    dropout: float = 0.0  # dropout probability: 0 for pretraining, 0.1 or more for fine-tuning
    bias: bool = True  # biases in Linear and LayerNorm, as in GPT-2; False is a bit better and faster
    activation: str = "gelu"  # gelu (erf, nanoGPT's) or gelu_tanh (OpenAI's and Hugging Face's GPT-2)
    qk_norm: bool = False  # normalise the queries and keys of each head to a root mean square of 1
    kernels: str = "auto"  # implementation: auto, triton, torch, or with exceptions: triton,attention=torch
    activation_checkpointing: bool = False  # blocks keep only their input and recompute the rest in backward
    residual_dtype: str = "auto"  # float32, mixed, bfloat16; auto: mixed with Triton, bfloat16 and no biases


class Stream(NamedTuple):
    """A residual stream in fp32 whose gradient is bfloat16, so backward moves half the bytes.

    In autograd, a gradient has the dtype of its tensor. So the gradient goes to a second tensor, the carrier.
    """

    value: Tensor  # (B, T, C) fp32, without a gradient
    carrier: Tensor  # (B, T, C) bfloat16; its values are never read


class AddNorm(nn.Module):
    """Adds the output of a branch to the residual stream, and normalises the sum. The bias is optional."""

    def __init__(self, config: GPTConfig, ops: kernels.Kernels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None
        self.ops = ops

    def forward(self, residual: Residual, branch: Tensor | None) -> tuple[Tensor, Residual]:
        """(B, T, C) each -> (norm(residual + branch), residual + branch). None as branch adds nothing."""
        if isinstance(residual, Stream):
            normed, *stream = self.ops.add_layer_norm_mixed(branch, *residual, self.weight)
            return normed, Stream(*stream)
        if branch is None:
            return self.ops.layer_norm(residual, self.weight.shape, self.weight, self.bias), residual
        return self.ops.add_layer_norm(branch, residual, self.weight, self.bias)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, ops: kernels.Kernels):
        super().__init__()
        # One matrix for the queries, keys and values of all heads.
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.qk_norm = config.qk_norm
        self.dropout = config.dropout
        self.ops = ops

    def forward(self, x: Tensor, attend: Attend | None = None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        if self.qk_norm:
            # q and k are scaled to the norm sqrt(D). With the usual factor 1 / sqrt(D), scores stay within
            # +-sqrt(D), which limits how peaked the softmax can get.
            qk = F.rms_norm(qkv[:, :, :2], qkv.shape[-1:], eps=1e-5).type_as(qkv)
            qkv = torch.cat((qk, qkv[:, :, 2:]), dim=2)
        # Each position attends to itself and to those before it. Generation passes its own `attend`, which
        # reads a cache of earlier keys and values.
        if attend is not None:
            y = attend(qkv)
        else:
            y = self.ops.causal_attention(qkv, dropout_p=self.dropout if self.training else 0.0)
        return F.dropout(self.c_proj(y.reshape(B, T, C)), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig, ops: kernels.Kernels):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.approximate = ACTIVATIONS[config.activation]
        self.dropout = config.dropout
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        x = self.ops.gelu(self.c_fc(x), approximate=self.approximate)
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """A pre-norm block:

        h = x + attn(ln_1(x))
        y = h + mlp(ln_2(h))

    One kernel computes an addition and the norm that follows it, in one pass over memory instead of two. The
    last addition of a block is done by the first norm of the next block. So x comes as two tensors that are
    still to be added, x = residual + branch, and y is returned in the same way.
    """

    def __init__(self, config: GPTConfig, ops: kernels.Kernels):
        super().__init__()
        self.ln_1 = AddNorm(config, ops)
        self.attn = CausalSelfAttention(config, ops)
        self.ln_2 = AddNorm(config, ops)
        self.mlp = MLP(config, ops)

    def forward(
        self, residual: Residual, branch: Tensor | None, attend: Attend | None = None
    ) -> tuple[Residual, Tensor]:
        """(residual, branch) of x, (B, T, C) each -> (residual, branch) of y."""
        normed, x = self.ln_1(residual, branch)
        normed, h = self.ln_2(x, self.attn(normed, attend))
        return h, self.mlp(normed)


class Transformer(nn.Module):
    """All but the head: token ids (B, T) -> (B, T, C).

    Generation passes the `position` (B, T) of each token in its sequence, and an `attend` for each block.
    By default the tokens have the positions 0 to T - 1.
    """

    def __init__(self, config: GPTConfig, ops: kernels.Kernels):
        super().__init__()
        assert config.vocab_size is not None
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config, ops) for _ in range(config.n_layer)])
        self.ln_f = AddNorm(config, ops)
        self.activation_checkpointing = config.activation_checkpointing
        self.residual_dtype = config.residual_dtype
        self.ops = ops

    def forward(
        self, idx: Tensor, position: Tensor | None = None, attend: Sequence[Attend] | None = None
    ) -> Tensor:
        # For positions 0, 1, 2, ... a slice of wpe is enough. Its gradient is a sum, not a scatter.
        positions = self.wpe.weight[: idx.size(1)] if position is None else self.wpe(position)
        x = self.drop(kernels.embedding(idx, self.wte.weight) + positions)
        residual, branch = self._to_residual_dtype(x), None
        for i, block in enumerate(self.h):
            arguments = residual, branch, None if attend is None else attend[i]
            if self.activation_checkpointing and torch.is_grad_enabled():
                residual, branch = checkpoint(block, *arguments, use_reentrant=False)
            else:
                residual, branch = block(*arguments)
        x, _ = self.ln_f(residual, branch)
        return x

    def _to_residual_dtype(self, x: Tensor) -> Residual:
        """The embeddings x (B, T, C) in the dtype of the residual stream."""
        # Without bfloat16 autocast, the stream has the dtype of the weights.
        is_mixed_precision = x.dtype == torch.float32 and autocast_dtype(x) == torch.bfloat16
        if self.residual_dtype == "float32" or not is_mixed_precision:
            return x
        half = x.to(torch.bfloat16)
        if self.residual_dtype == "bfloat16":
            return half
        # A mixed stream differs from a float32 one in its gradient only.
        return Stream(x.detach(), half) if torch.is_grad_enabled() else x


def choose_residual_dtype(config: GPTConfig, dtype: str, ops: kernels.Kernels) -> str:
    """Resolves residual_dtype for a model that computes in `dtype`.

    Raises ValueError if the combination is not supported.
    """
    chosen = config.residual_dtype
    if chosen == "auto":
        # kernels.add_layer_norm_mixed is the Triton version; ops may hold another.
        triton_norms = ops.add_layer_norm_mixed is kernels.add_layer_norm_mixed
        return "mixed" if triton_norms and dtype == "bfloat16" and not config.bias else "float32"
    if chosen not in ("float32", "mixed", "bfloat16"):
        raise ValueError(f"residual_dtype={chosen!r} must be auto, float32, mixed or bfloat16")
    if chosen != "float32" and dtype != "bfloat16":
        raise ValueError(f"residual_dtype={chosen} needs dtype=bfloat16, not {dtype}; float32 works with all")
    if chosen == "mixed" and config.bias:
        raise ValueError("residual_dtype=mixed needs bias=False; float32 and bfloat16 work with biases")
    return chosen


class GPT(nn.Module):
    """The language model.

    `for_device` and `dtype` ("float32", "bfloat16" or "float16") say where and in which precision the model
    will compute. They resolve "auto" in kernels and residual_dtype; `self.config` holds the result. The
    weights are created on the CPU in float32: move the model with `.to(device)`, and compute under autocast.
    """

    def __init__(self, config: GPTConfig, for_device: str = "cpu", dtype: str = "bfloat16"):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size is not set: give the vocabulary size, such as 50304")
        if config.n_head < 1 or config.n_embd % config.n_head:
            raise ValueError(f"n_embd={config.n_embd} is not divisible by n_head={config.n_head}")
        if config.activation not in ACTIVATIONS:
            raise ValueError(f"activation={config.activation!r} must be {' or '.join(ACTIVATIONS)}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} must be {' or '.join(DTYPES)}")
        # This fails here, not in the first step, if attention does not support the head size.
        head_size = config.n_embd // config.n_head
        self.ops = kernels.load(config.kernels, for_device, head_size, DTYPES[dtype])
        residual_dtype = choose_residual_dtype(config, dtype, self.ops)
        self.config = replace(config, kernels=self.ops.spec, residual_dtype=residual_dtype)
        self.transformer = Transformer(self.config, self.ops)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # Weight tying: a token's embedding is also its row of the head. The model predicts better, and the
        # smallest GPT-2 has 124M parameters instead of 163M.
        self.transformer.wte.weight = self.lm_head.weight

        self.apply(self._init_weights)
        # As in GPT-2: the residual stream is a sum of 2 n_layer outputs, two per block. Each is initialised
        # sqrt(2 n_layer) times smaller, so the sum has the same variance at any depth.
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        return_logits: bool = False,
        reduction: Literal["mean", "none"] = "mean",
    ) -> tuple[Tensor | None, Tensor | None]:
        """idx (B, T) are int64 token ids; targets (B, T) are the ids that follow, or -1 for no loss there.

        Returns (logits, loss). With targets, the loss is the mean cross-entropy in nats. With
        reduction="none" it has one value per target, (B, T), 0 where the target is -1. With return_logits
        the logits are (B, T, V), otherwise None. Without targets, the logits are those of the last position,
        (B, 1, V), and the loss is None.
        """
        T = idx.size(1)
        if self.config.block_size < T:
            raise ValueError(f"a sequence of {T} tokens does not fit block_size={self.config.block_size}")
        x = self.transformer(idx)  # (B, T, C)
        if targets is None:
            # Generation needs the last position only. [-1] instead of -1 keeps the dimension T.
            return self.lm_head(x[:, [-1], :]), None
        options: dict[str, Any] = {"ignore_index": -1, "reduction": reduction}
        logits = None
        if return_logits:
            logits = self.lm_head(x)
            loss = self.ops.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), **options)
        else:
            # The fused loss computes the logits in chunks. In full they would be by far the largest tensor.
            rows, weight = x.view(-1, x.size(-1)), self.lm_head.weight
            loss = self.ops.linear_cross_entropy(rows, weight, targets.reshape(-1), **options)
        return logits, loss if reduction == "mean" else loss.view_as(targets)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters, by default without the position embeddings."""
        n_params = sum(p.numel() for p in self.parameters())
        return n_params - self.transformer.wpe.weight.numel() if non_embedding else n_params

    def crop_block_size(self, block_size: int) -> None:
        """Shortens the context in place: drops the position embeddings from `block_size` on."""
        if block_size > self.config.block_size:
            raise ValueError(f"cannot crop block_size={self.config.block_size} to the larger {block_size}")
        self.config.block_size = block_size
        wpe = self.transformer.wpe
        wpe.weight = nn.Parameter(wpe.weight.detach()[:block_size].clone())
        wpe.num_embeddings = block_size

    @classmethod
    def from_pretrained(
        cls,
        model_type: str,
        override_args: dict[str, Any] | None = None,
        device: str = "cpu",
        dtype: str = "bfloat16",
    ) -> "GPT":
        """Loads a GPT-2 by its Hugging Face name (gpt2, gpt2-medium, gpt2-large, gpt2-xl) or folder.

        Returns the model on `device`, in float32, with the logits that transformers computes. `override_args`
        may set RUN_OPTIONS. Needs `transformers` (the extra [hf]). Raises ValueError if the model cannot be
        loaded or does not fit GPT.
        """
        override_args = override_args or {}
        if not override_args.keys() <= set(RUN_OPTIONS):
            raise ValueError(f"only {', '.join(RUN_OPTIONS)} may be overridden, not {sorted(override_args)}")
        values, weights = hugging_face.read(model_type)
        model = cls(GPTConfig(**values | override_args), device, dtype)
        model.load_weights(weights, model_type)
        return model.to(device)

    def load_weights(self, weights: dict[str, Tensor], source: str | Path) -> None:
        """Copies `weights` into the model.

        Raises ValueError for the first name that is missing, unexpected or of another shape.
        """
        own = self.state_dict()
        for name in sorted(own.keys() | weights.keys()):
            there, here = (tuple(d[name].shape) if name in d else "missing" for d in (weights, own))
            if there != here:
                raise ValueError(
                    f"{source} does not fit the model: {name} is {there} in the weights and {here} in the "
                    "model"
                )
        self.load_state_dict(weights)

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> torch.optim.AdamW:
        """AdamW in nanoGPT's two groups."""
        # Matrices and embeddings are decayed. Norms and biases are not: decay would only pull the gain of a
        # norm away from 1.
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        # One kernel for all tensors, instead of several launches for each.
        fused = device_type in ("cuda", "cpu")
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    def flops_per_token(self) -> int:
        """FLOPs of forward and backward for one token, as nanoGPT and PaLM count them.

        See appendix B of https://arxiv.org/abs/2204.02311.
        """
        # A parameter needs one multiply-add in forward (2 FLOPs) and two in backward: 6 FLOPs. Attention
        # needs 2 C multiply-adds per layer for each of the T keys, C for the score and C for the value: 12 C
        # FLOPs with backward. The full T x T matrix counts, although half of it is masked.
        c = self.config
        return 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size

    def estimate_mfu(self, fwdbwd_per_iter: int, dt: float, dtype: str = "bfloat16") -> float | None:
        """Model FLOPs utilisation: the model's FLOPs per second as a share of the GPU's peak in `dtype`.

        `fwdbwd_per_iter` sequences take `dt` seconds. Returns None if the peak is unknown, as on a CPU.
        """
        device = self.lm_head.weight.device
        if device.type != "cuda":
            return None
        peak = peak_flops(torch.cuda.get_device_name(device), dtype)
        flops = self.flops_per_token() * self.config.block_size * fwdbwd_per_iter
        return None if peak is None else flops / dt / peak

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        *,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Appends `max_new_tokens` sampled ids to idx (B, T) -> (B, T + max_new_tokens).

        This is nanoGPT's loop: short, but each new token recomputes all tokens before it.
        `python -m gpt.sample` calls `gpt.generate.stream`, which uses a cache and samples the same tokens.
        Call model.eval() first. Raises ValueError if the logits are not finite.
        """
        sampling = Sampling(temperature, top_k, top_p)
        for _ in range(max_new_tokens):
            # The model sees at most block_size tokens.
            logits, _ = self(idx[:, -self.config.block_size :])
            next_ids = draw_ids(logits[:, -1], sampling, generator)
            check_drawn(next_ids)
            idx = torch.cat((idx, next_ids[:, None]), dim=1)
        return idx
