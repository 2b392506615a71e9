"""python -m bench.generate: tokens/s of reading a prompt (prefill) and of sampling tokens (decode).

With --nanogpt=PATH, a checkout of nanoGPT, its model takes turns with ours, with the same weights. Both must
first give the same greedy tokens in fp32. The floor is the time of the matrix products of one token alone,
with all weights read from memory: sampling one token a step cannot be faster.

Without a GPU the model is small, and the figures say nothing about a GPU.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import timing
from bench.roofline import SIZES
from bench.throughput import nanogpt_model
from gpt import cli
from gpt.cli import UserPath
from gpt.device import autocast, resolve_dtype
from gpt.generate import stream
from gpt.model import GPT, GPTConfig
from gpt.sampling import Sampling

MORE_SIZES = SIZES | {"10M": (6, 6, 384)}  # nanoGPT's character model


def with_weights_of(ours: GPT, theirs: nn.Module) -> nn.Module:
    weights = ours.state_dict()
    # nanoGPT without flash attention has its causal mask among the buffers.
    theirs.load_state_dict({k: weights.get(k, v) for k, v in theirs.state_dict().items()})
    return theirs.eval().to(ours.lm_head.weight.device)


def floor(model: GPT, batch_size: int) -> Callable[[], Any]:
    """The linear layers of one token of each sequence, one after the other."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    device = model.lm_head.weight.device
    inputs = [torch.randn(batch_size, m.in_features, device=device) for m in linear]
    return lambda: [m(x) for m, x in zip(linear, inputs)]


def continued(model: nn.Module, idx: Tensor, new: int, top_k: int | None = None) -> Tensor:
    """Ids (B, T + new): by our cache, or by nanoGPT's generate."""
    if isinstance(model, GPT):
        ids = stream(model, list(idx), new, Sampling(top_k=top_k))
        return torch.cat((idx, torch.stack(list(ids), dim=1)), dim=1)
    return model.generate(idx, new, top_k=top_k)  # type: ignore[operator]


def measure(
    models: dict[str, nn.Module], idx: Tensor, new: int, dtype: str, seconds: float
) -> dict[str, dict[str, float]]:
    """{model: {"prefill", "decode"}} in tokens/s over all sequences, and "ms" a decoded token."""
    device = idx.device.type

    def ready(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            with torch.no_grad(), autocast(device, dtype):
                call()

        run()  # compiles, allocates
        return run

    B, T = idx.shape
    figures: dict[str, dict[str, float]] = {}
    prefill = {name: ready(partial(model, idx)) for name, model in models.items()}
    generation = {name: ready(partial(continued, model, idx, new)) for name, model in models.items()}
    prompt_times = timing.interleaved(prefill, device, seconds, cold=False)
    generation_times = timing.interleaved(generation, device, seconds, cold=False)
    for name in models:
        # The prefill gives the first new token.
        decoding = max(generation_times[name].median - prompt_times[name].median, 1e-6) / max(new - 1, 1)
        figures[name] = {
            "prefill": 1e3 * B * T / prompt_times[name].median,
            "decode": 1e3 * B / decoding,
            "ms": decoding,
            "generate_ms": generation_times[name].median,
        }
    return figures


@dataclass
class GenerateConfig:
    """Time reading a prompt (prefill) and sampling tokens (decode)."""

    size: str = ""  # 10M, 124M, 350M, 774M, 1.5B or tiny; default: 124M on a GPU, 10M on a CPU
    batch_size: str = ""  # sequences, or several sizes with commas; default: 1,32 on a GPU, 1 on a CPU
    prompt: int = 64  # tokens of the prompt
    new: int = 256  # tokens to sample
    seconds: float = 5.0  # of each model
    nanogpt: UserPath = ""  # a checkout of nanoGPT, to time beside ours
    out: UserPath = ""  # a JSON file for the results


def main() -> None:
    options = cli.parse(GenerateConfig, sys.argv[1:], prog="python -m bench.generate")
    cli.check_bounds(vars(options), {"prompt": (1, 1023), "new": (2, 1 << 20)})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = (options.batch_size or ("1,32" if device == "cuda" else "1")).split(",")
    batch_sizes = [int(size) for size in sizes if size.isdecimal()]
    if len(batch_sizes) < len(sizes) or min(batch_sizes) < 1:
        raise ValueError(f"batch_size={options.batch_size} must be whole numbers of at least 1")
    size = options.size or ("124M" if device == "cuda" else "10M")
    layers, heads, width = cli.choose(MORE_SIZES, size, "size")
    block_size = 1024 if size in SIZES else 256
    vocab_size = 50304 if size in SIZES else 65
    config = GPTConfig(block_size, vocab_size, layers, heads, width, bias=False)
    dtype = resolve_dtype("auto", device)
    torch.manual_seed(0)
    ours = GPT(config, device).to(device).eval()
    models: dict[str, nn.Module] = {"tritongpt": ours}
    if options.nanogpt:
        models["nanogpt"] = with_weights_of(ours, nanogpt_model(Path(options.nanogpt), config))
    cases = []
    if device == "cpu":
        print("There is no GPU: the figures say nothing about a GPU.")
    for batch_size in batch_sizes:
        idx = torch.randint(vocab_size, (batch_size, options.prompt), device=device)
        shape = f"{batch_size} sequences, prompt {options.prompt}, {options.new} new tokens"
        print(f"{size}, {shape}, {dtype}", flush=True)
        # nanoGPT is greedy with top_k=1.
        ids = [continued(model, idx[:1], min(32, options.new), top_k=1) for model in models.values()]
        if not torch.equal(ids[0], ids[-1]):
            raise ValueError("the greedy tokens of both models differ: nothing was timed")
        figures = measure(models, idx, options.new, dtype, options.seconds)
        products = floor(ours, batch_size)
        with torch.no_grad(), autocast(device, dtype):
            floor_ms = timing.interleaved({"floor": products}, device, 1.0)["floor"].median
        cases.append({"batch_size": batch_size, "floor_ms": floor_ms, "models": figures})
        for name, f in figures.items():
            prefill, decode = f"{f['prefill']:12,.0f} tokens/s", f"{f['decode']:10,.0f} tokens/s"
            print(f"  {name:12} prefill {prefill}  decode {decode}, {f['ms']:.3f} ms a token")
        fastest = 1e3 * batch_size / floor_ms
        print(f"  {'at least':12} {'':37}{fastest:10,.0f} tokens/s, {floor_ms:.3f} ms a token")
        if options.out:
            timing.write(
                options.out, "generate", device, size=size, dtype=dtype, prompt=options.prompt,
                new=options.new, cases=cases,
            )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
