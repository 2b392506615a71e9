"""A training run small enough for a test, and the environment of one in another process."""

import os
from pathlib import Path
from typing import Any

import torch

from train import distributed
from train.config import parse
from train.loop import train

TINY = """
    --dataset=tiny --device=cpu --n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=4
    --gradient_accumulation_steps=2 --max_iters=8 --lr_decay_iters=8 --warmup_iters=2 --learning_rate=1e-2
    --eval_interval=4 --eval_iters=2
""".split()


def surroundings(**more: str) -> dict[str, str]:
    """The environment in which a program of the project starts in any folder.

    What PYTHONPATH names already stays in it.
    """
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"} | more


def run(*flags: str, out_dir: str = "out") -> dict[str, Any]:
    """Trains in this process with TINY's settings and `flags`; returns the checkpoint."""
    config, given = parse([*TINY, f"--out_dir={out_dir}", *flags])
    train(config, distributed.start("auto", config.device), given)
    return torch.load(f"{out_dir}/ckpt.pt", weights_only=True)
