"""python -m bench.curve: train on our kernels and on PyTorch's operations, and print the losses side by side.

Both trainings have the same initial weights, batches and schedule, and take turns. By default the 124M makes
1,000 steps of 64K tokens on the sources of Python's standard library, one token a byte, which every machine
has. --data=FOLDER takes a prepared corpus. Without a GPU the model is tiny, and our kernels need
TRITON_INTERPRET=1.
"""

import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from bench import timing
from bench.roofline import SIZES
from gpt import cli
from gpt.cli import UserPath
from gpt.device import autocast
from gpt.model import GPT, GPTConfig
from train import distributed
from train.config import TrainConfig, resolve
from train.data import TokenFile
from train.distributed import Ranks
from train.loop import estimate_loss, read_ahead, set_up, train_step
from train.optim import learning_rate
from train.prepare import corpora


def write_bytes(folder: Path) -> None:
    ids = np.frombuffer(corpora.stdlib().encode("ascii"), np.uint8).astype(np.uint16)
    ids[: len(ids) * 9 // 10].tofile(folder / "train.bin")
    ids[len(ids) * 9 // 10 :].tofile(folder / "val.bin")


def train(
    config: TrainConfig, specs: list[str], data: Path, ranks: Ranks
) -> dict[str, dict[str, list[float]]]:
    """{"losses": {spec: one a step}, "validation": {spec: [the last]}}. Prints 20 lines."""
    config = resolve(config, ranks)
    file, val = (TokenFile(data / f"{split}.bin", config.model, config.seed) for split in ("train", "val"))
    precision = partial(autocast, ranks.device, config.dtype)
    accumulation = config.gradient_accumulation_steps
    models, trained = {}, {}
    for spec in specs:
        torch.manual_seed(config.seed)
        models[spec] = GPT(replace(config.model, kernels=spec), ranks.device, config.dtype).to(ranks.device)
        trained[spec] = set_up(models[spec], config, ranks)
    losses: dict[str, list[torch.Tensor]] = {spec: [] for spec in specs}
    micro_batches = read_ahead(file, 0, config.micro_batch, ranks)
    print("step" + "".join(f"{spec:>25}" for spec in specs))
    for step in range(config.max_iters):
        batches = list(islice(micro_batches, accumulation))
        for spec, (model, optimizer, scaler) in trained.items():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            loss, _ = train_step(model, optimizer, scaler, batches, accumulation, config.grad_clip, precision)
            losses[spec].append(loss)
        if (step + 1) % max(1, config.max_iters // 20) == 0:
            print(f"{step + 1:4}" + "".join(f"{losses[spec][-1].item():25.4f}" for spec in specs), flush=True)
    validation = {
        spec: [estimate_loss(model, {"val": val}, config, ranks, precision)["val"]]
        for spec, model in models.items()
    }
    return {
        "losses": {s: torch.stack(values).tolist() for s, values in losses.items()},
        "validation": validation,
    }


@dataclass
class CurveConfig:
    """Train once on our kernels and once on PyTorch's operations, and print the losses side by side."""

    data: UserPath = ""  # a folder with train.bin and val.bin; default: the standard library's sources
    steps: int = 1000  # of each training
    specs: str = "triton torch"  # values of --kernels, with spaces between them
    out: UserPath = ""  # a JSON file for the results


def main() -> None:
    options = cli.parse(CurveConfig, sys.argv[1:], prog="python -m bench.curve")
    ranks = distributed.start("auto", "auto")
    on_gpu = ranks.device_type == "cuda"
    layers, heads, width = SIZES["124M" if on_gpu else "tiny"]
    config = TrainConfig(
        batch_size=64 if on_gpu else 4, gradient_accumulation_steps=1, eval_iters=20,
        max_iters=options.steps, lr_decay_iters=options.steps, warmup_iters=options.steps // 10,
        model=GPTConfig(1024 if on_gpu else 64, 50304, layers, heads, width, bias=False),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        if not options.data:
            write_bytes(Path(folder))
        result = train(config, options.specs.split(), Path(options.data or folder), ranks)
    for spec, (loss,) in result["validation"].items():
        print(f"validation loss, {spec}: {loss:.4f}")
    if options.out:
        timing.write(options.out, "curve", ranks.device, steps=options.steps, **result)


if __name__ == "__main__":
    cli.run(main)
