"""Generation with a key-value cache: the tokens of `GPT.generate`, without computing them again each time.

The prompts go through the model once, whatever the number of samples of each, and fill the cache. Then each
step computes one token per row. The tensors of the cache never move or change size, so on a GPU a step is one
replayed CUDA graph.

The model sees the last block_size tokens, as in nanoGPT. Beyond block_size, each step moves every token in
the window to another position. Positions are learned and absolute, so all keys and values change and a cache
is of no use: each token then costs a pass over the whole window, as in nanoGPT.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from gpt.model import GPT, Attend
from gpt.sampling import Sampling, draw_ids
from kernels.op import autocast_dtype


@torch.no_grad()
def stream(
    model: GPT,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    sampling: Sampling,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Continues each of `prompts`, ids (T,) on the model's device, `samples` times.

    Yields the next id of every row, (len(prompts) * samples,) on the device, `max_new_tokens` times. The
    samples of the first prompt come first. An id is -1 if the logits are not finite: see `check_drawn`.
    Nothing here waits for a GPU. Raises ValueError for an empty prompt, and for a model with active dropout.
    """
    if model.training and model.config.dropout:
        raise ValueError("the model is in training mode, with dropout: call model.eval() first")
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt is empty: give at least one token to continue")
    if max_new_tokens < 1:
        return
    block_size = model.config.block_size
    device = prompts[0].device
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest + max_new_tokens, dtype=torch.int64, device=device)
    for row, prompt in zip(ids, prompts):
        row[: len(prompt)] = prompt
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    lengths = prompt_lengths.repeat_interleave(samples)

    cache = None
    size = min(block_size, longest + max_new_tokens - 1)  # the last token is never an input
    if longest < size:
        same_length = all(len(prompt) == longest for prompt in prompts)
        cache = Cache(model, samples, size, lengths, same_length)
    logits = _window(model, ids, prompt_lengths, longest, cache).repeat_interleave(samples, 0)
    ids = ids.repeat_interleave(samples, 0)
    for remaining in reversed(range(max_new_tokens)):
        next_ids = draw_ids(logits, sampling, generator)
        yield next_ids
        if not remaining:
            return
        next_ids = next_ids.clamp(min=0)  # the embedding has no row -1
        ids.scatter_(1, lengths[:, None], next_ids[:, None])
        lengths += 1
        longest += 1
        if cache is not None and longest <= block_size:
            logits = cache.step(next_ids, longest)
        else:
            cache = None  # frees its memory
            logits = _window(model, ids, lengths, longest)


def _window(model: GPT, ids: Tensor, lengths: Tensor, longest: int, cache: "Cache | None" = None) -> Tensor:
    """The logits (B, V) after the first lengths[b] ids of each row, of which the model sees block_size.

    Shorter rows are padded on the right. No token of the sequence attends to the padding.
    """
    T = min(longest, model.config.block_size)
    first = (lengths - T).clamp(min=0)
    idx = ids.gather(1, first[:, None] + torch.arange(T, device=ids.device))
    x = model.transformer(idx, attend=None if cache is None else cache.prompt_attention())
    rows = torch.arange(len(x), device=x.device)
    return model.lm_head(x[rows, lengths - 1 - first])


class Cache:
    """The keys and values of up to `size` tokens per row. Each prompt has `samples` rows, side by side.

    `lengths` (B,) is the number of tokens in each row. The caller changes it in place before each step, which
    takes the last token. If all rows have the `same_length`, attention on a CPU needs no mask.
    """

    def __init__(self, model: GPT, samples: int, size: int, lengths: Tensor, same_length: bool):
        c, weight = model.config, model.lm_head.weight
        shape = len(lengths), 2, c.n_head, size, c.n_embd // c.n_head  # (B, 2, H, T, D)
        self.layers = [
            torch.zeros(shape, dtype=autocast_dtype(weight), device=weight.device) for _ in range(c.n_layer)
        ]
        self.model = model
        self.samples = samples
        self.lengths = lengths
        # A CUDA graph cannot change the size of a tensor from step to step, so there we always mask.
        self.same_length = same_length and not lengths.is_cuda
        self.rows = torch.arange(len(lengths), device=lengths.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def prompt_attention(self) -> list[Attend]:
        """Causal attention for each block, which also writes the prompts' keys and values to the cache."""
        return [partial(self._fill, layer) for layer in self.layers]

    def _fill(self, layer: Tensor, qkv: Tensor) -> Tensor:
        """qkv (B / samples, T, 3, H, D) of the prompts."""
        rows = layer.unflatten(0, (-1, self.samples))[..., : qkv.size(1), :]
        rows.copy_(qkv[:, :, 1:].permute(0, 2, 3, 1, 4)[:, None])
        return self.model.ops.causal_attention(qkv)

    def _append(self, layer: Tensor, qkv: Tensor) -> Tensor:
        """Adds each row's last token, qkv (B, 1, 3, H, D), to the cache and attends to the whole row."""
        q, new_kv = qkv[:, 0, 0], qkv[:, 0, 1:]
        k, v = layer[:, :, :, : self.visible].unbind(1)
        if self.same_length:
            layer[:, :, :, self.visible - 1] = new_kv
            return self.model.ops.decode_attention(q, k, v)[:, None]
        layer[self.rows, :, :, self.position] = new_kv
        return self.model.ops.decode_attention(q, k, v, self.lengths)[:, None]

    def step(self, ids: Tensor, longest: int) -> Tensor:
        """The last id of each row (B,) -> logits (B, V). The longest row has `longest` tokens."""
        if not ids.is_cuda:
            return self._step(ids, longest)
        if self.graph is None:
            size = self.layers[0].size(3)
            self.ids = ids.clone()
            # The first pass compiles and allocates work space, which a capture cannot. It writes the same
            # keys and values as the first replay.
            side_stream = torch.cuda.Stream()
            side_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side_stream):
                self._step(self.ids, size)
            torch.cuda.current_stream().wait_stream(side_stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self._step(self.ids, size)
        self.ids.copy_(ids)
        self.graph.replay()
        return self.logits

    def _step(self, ids: Tensor, longest: int) -> Tensor:
        self.position, self.visible = self.lengths - 1, longest
        attend = [partial(self._append, layer) for layer in self.layers]
        x = self.model.transformer(ids[:, None], self.position[:, None], attend)
        return self.model.lm_head(x[:, 0])
