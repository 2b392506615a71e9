import os

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import pytest
import torch

from train import distributed
from train.__main__ import train
from train.config import parse


@pytest.fixture(scope="session")
def text():
    """About 60,000 characters that a small model can learn something from."""
    words = "the king and queen of hearts went down to sea in a boat of ice".split()
    generator = np.random.default_rng(0)
    return "\n".join(" ".join(generator.choice(words, 8)) + "." for _ in range(1600))


@pytest.fixture
def workplace(tmp_path, monkeypatch, text):
    """An empty folder as the working directory, with the text prepared by character as data/tiny."""
    from train.prepare.__main__ import write

    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "tiny", text, "char")
    return tmp_path


TINY = """
    --dataset=tiny --device=cpu --n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=4
    --gradient_accumulation_steps=2 --max_iters=8 --lr_decay_iters=8 --warmup_iters=2 --learning_rate=1e-2
    --eval_interval=4 --eval_iters=2
""".split()


def run(*flags: str, out_dir: str = "out") -> dict:
    """Trains in this process with TINY's settings and `flags`; returns the checkpoint."""
    ranks = distributed.start("auto", "cpu")
    train(parse([*TINY, f"--out_dir={out_dir}", *flags]), ranks)
    return torch.load(f"{out_dir}/ckpt.pt", weights_only=True)
