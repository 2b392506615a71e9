"""Generation: a model's continuation of prompts, one token at a time.

The keys and values of the tokens so far are kept in a cache whose tensors never move or change size, so
that a step computes one token a sequence and, on a GPU, is one replayed CUDA graph. The prompts go through
the model once, at once, whatever the number of samples of each.

A sequence sees its last block_size tokens, as in nanoGPT. Beyond block_size that moves every token to another
(learned, absolute) position, which changes all keys and values: nothing of a cache would be right, and every
token costs a pass over the whole window, as it does in nanoGPT. Tokens are those of `GPT.generate`, which has
no cache, on the same rows with the same random numbers, as far as rounding lets a draw agree.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from gpt.model import GPT, Attend
from gpt.sampling import Sampling, choose
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

    Yields, `max_new_tokens` times, the next id of every row, (len(prompts) * samples,), on the device: the
    samples of the first prompt, then those of the second; see `check_drawn`. Nothing here waits for a GPU.
    Raises ValueError for an empty prompt, and for a model that is training and would drop out.
    """
    if model.training and model.config.dropout:
        raise ValueError("the model is in training mode and would drop out: call model.eval() first")
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt is empty: give at least one token to go on from")
    if max_new_tokens < 1:
        return
    block_size = model.config.block_size
    longest = max(len(prompt) for prompt in prompts)
    device = prompts[0].device
    tokens = torch.zeros(len(prompts), longest + max_new_tokens, dtype=torch.int64, device=device)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)

    grown = lengths.repeat_interleave(samples)
    size = min(block_size, longest + max_new_tokens - 1)  # the last token drawn is never looked at
    even = all(len(prompt) == longest for prompt in prompts)
    cache = Cache(model, samples, size, grown, even) if longest < size else None
    logits = _window(model, tokens, lengths, longest, cache).repeat_interleave(samples, 0)
    tokens, lengths = tokens.repeat_interleave(samples, 0), grown
    for remaining in reversed(range(max_new_tokens)):
        chosen = choose(logits, sampling, generator)
        yield chosen
        if not remaining:
            return
        chosen = chosen.clamp(min=0)  # -1 is not a row of the embedding
        tokens.scatter_(1, lengths[:, None], chosen[:, None])
        lengths += 1
        longest += 1
        if cache is not None and longest <= block_size:
            logits = cache.step(chosen, longest)
        else:
            cache = None  # gives its memory back
            logits = _window(model, tokens, lengths, longest)


def _window(
    model: GPT, tokens: Tensor, lengths: Tensor, longest: int, cache: "Cache | None" = None
) -> Tensor:
    """The logits (B, V) after the first lengths[b] of tokens[b], of which the last block_size are seen.

    Shorter rows are filled up on the right, where no token that counts can see it.
    """
    T = min(longest, model.config.block_size)
    first = (lengths - T).clamp(min=0)
    idx = tokens.gather(1, first[:, None] + torch.arange(T, device=tokens.device))
    x = model.transformer(idx, attend=None if cache is None else cache.of_prompts())
    rows = torch.arange(len(x), device=x.device)
    return model.lm_head(x[rows, lengths - 1 - first])


class Cache:
    """The keys and values of up to `size` tokens a row; there are `samples` rows, side by side, of a prompt.

    `lengths` (B,), changed in place by the caller, says how many tokens each row has; the last of them is the
    one that `step` takes. `even` says that they are, and stay, the same for all: a CPU then needs no mask.
    """

    def __init__(self, model: GPT, samples: int, size: int, lengths: Tensor, even: bool):
        c, weight = model.config, model.lm_head.weight
        shape = len(lengths), 2, c.n_head, size, c.n_embd // c.n_head  # (B, 2, H, T, D)
        self.layers = [
            torch.zeros(shape, dtype=autocast_dtype(weight), device=weight.device) for _ in range(c.n_layer)
        ]
        self.model = model
        self.samples = samples
        self.lengths = lengths
        self.even = even and not lengths.is_cuda  # a graph has the length of its first token for ever
        self.rows = torch.arange(len(lengths), device=lengths.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def of_prompts(self) -> list[Attend]:
        """What each block attends with when the prompts go through the model: the cache keeps them."""
        return [partial(self._fill, layer) for layer in self.layers]

    def _fill(self, layer: Tensor, qkv: Tensor) -> Tensor:
        """Causal attention of the prompts, qkv (B / samples, T, 3, H, D); their keys and values are kept."""
        rows = layer.unflatten(0, (-1, self.samples))[..., : qkv.size(1), :]
        rows.copy_(qkv[:, :, 1:].permute(0, 2, 3, 1, 4)[:, None])
        return self.model.ops.causal_attention(qkv)

    def _append(self, layer: Tensor, qkv: Tensor) -> Tensor:
        """Attention of the last token of each row, qkv (B, 1, 3, H, D), whose key and value are kept."""
        q, new = qkv[:, 0, 0], qkv[:, 0, 1:]
        k, v = layer[:, :, :, : self.visible].unbind(1)
        if self.even:
            layer[:, :, :, self.visible - 1] = new
            return self.model.ops.decode_attention(q, k, v)[:, None]
        layer[self.rows, :, :, self.position] = new
        return self.model.ops.decode_attention(q, k, v, self.lengths)[:, None]

    def step(self, ids: Tensor, longest: int) -> Tensor:
        """The last token of each row, ids (B,) -> logits (B, V); the longest row has `longest` tokens."""
        if not ids.is_cuda:
            return self._step(ids, longest)
        size = self.layers[0].size(3)
        if self.graph is None:
            self.ids = ids.clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # compiles, and takes work space
                self._step(self.ids, size)  # what it keeps, the first replay keeps again
            torch.cuda.current_stream().wait_stream(stream)
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
