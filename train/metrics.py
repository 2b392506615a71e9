"""What a run says about itself: nanoGPT's lines (or a progress bar on a terminal), metrics.jsonl, wandb.

metrics.jsonl has one object a line. A step: iter, loss (mean of the whole global batch, in nats), lr,
grad_norm (before clipping), skipped (steps so far whose gradient was not finite: they change no weight),
ms (a step, mean since the last line), tokens_per_s, mfu (percent; null where the peak is unknown). An
evaluation: iter, train/loss, val/loss, lr. `iter` counts the updates made before. What is not finite is
null.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt.model import GPT
from train.config import TrainConfig
from train.distributed import Ranks

SETTLING = 5  # steps after the start whose time says nothing about the rest
HOPELESS = 20  # steps skipped in a row; float16 needs a few to find its loss scale


class Metrics:
    """Only rank 0 writes; `step` and `evaluation` are for all ranks to call."""

    def __init__(
        self, config: TrainConfig, ranks: Ranks, model: GPT, first_step: int, evaluated: bool, skipped: int
    ):
        """`evaluated`: the checkpoint that the run goes on from followed the evaluation of its step."""
        self.config, self.ranks, self.model = config, ranks, model
        self.first_step = self.last_logged = first_step
        # counted on the device: in all, and in a row
        self.skipped, self.in_a_row = torch.tensor([skipped, 0], device=ranks.device)
        self.skipped_before = skipped
        self.mfu: float | None = None
        self.bar = self.wandb = self.file = None
        self.path = Path(config.out_dir, "metrics.jsonl")
        if ranks.is_main:
            if config.wandb_log:
                self.wandb = _start_wandb(config)
            if not config.eval_only:  # looking at a run leaves its record alone
                _keep_before(self.path, first_step, evaluated)
                self.file = self.path.open("a")
            if sys.stdout.isatty() and not config.eval_only:
                self.bar = _progress_bar(first_step, config.max_iters)
        self.started = time.perf_counter()

    def print(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text)
        elif self.ranks.is_main:
            print(text, flush=True)

    def start(self, train_tokens: int, before: dict[str, Any]) -> None:
        """Says what is about to be trained, on what, and which settings differ from those of `before`."""
        config, c = self.config, self.config.model
        tokens = config.sequences * c.block_size
        shape = f"{c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, block {c.block_size}"
        settings = f"dtype {config.dtype}, compile {config.compile}, kernels {c.kernels}"
        millions = self.model.get_num_params() / 1e6
        self.print(f"number of parameters: {millions:.2f}M ({shape}, {c.vocab_size} symbols)")
        self.print(f"tokens per iteration will be: {tokens:,} (1/{train_tokens / tokens:,.1f} of the data)")
        backend = f", backend {config.backend}" if self.ranks.backend else ""
        self.print(f"device {config.device} x {self.ranks.world_size}{backend}, {settings}")
        now = config.flat()
        for name in sorted(before.keys() & now.keys() - {"init_from", "out_dir", "device", "backend"}):
            if before[name] != now[name]:
                self.print(f"not as before: {name} was {before[name]!r} and is {now[name]!r}")

    def step(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float) -> None:
        """Called after each update; the GPU is waited for only when there is something to say.

        Raises ValueError when no step has changed a weight for long.
        """
        config = self.config
        if self.bar is not None:
            self.bar.update()
        failed = ~grad_norm.isfinite()
        self.skipped, self.in_a_row = self.skipped + failed, (self.in_a_row + 1) * failed
        if step % config.log_interval:
            return
        if self.in_a_row >= HOPELESS:
            latest = Path(config.out_dir, "ckpt.pt")
            good = (
                f"the last good checkpoint is {latest}" if latest.exists() else "there is no checkpoint yet"
            )
            raise ValueError(
                f"the gradient has not been finite for the last {self.in_a_row} steps, up to step {step}: "
                f"try a lower learning_rate than {config.learning_rate}, or another seed; {good}"
            )
        mean_loss = (self.ranks.sum(loss.clone()) / self.ranks.world_size).item()
        if not self.ranks.is_main:
            return
        seconds = (time.perf_counter() - self.started) / (step + 1 - self.last_logged)
        sequences = config.sequences
        if step - self.first_step >= SETTLING:
            mfu = self.model.estimate_mfu(sequences // self.ranks.world_size, seconds, config.dtype)
            self.mfu = mfu if self.mfu is None or mfu is None else 0.9 * self.mfu + 0.1 * mfu
        percent = None if self.mfu is None else 100 * self.mfu
        tokens_per_s = sequences * config.model.block_size / seconds
        skipped = self.skipped_steps()
        if skipped > self.skipped_before:
            self.print(f"iter {step}: {skipped - self.skipped_before} skipped, the gradient was not finite")
            self.skipped_before = skipped
        self._write(
            iter=step, loss=mean_loss, lr=lr, grad_norm=grad_norm.item(), skipped=skipped,
            ms=1000 * seconds, tokens_per_s=tokens_per_s, mfu=percent,
        )  # fmt: skip
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {mean_loss:.4f}, {tokens_per_s:,.0f} tokens/s")
        else:
            utilisation = "" if percent is None else f", mfu {percent:.2f}%"
            self.print(f"iter {step}: loss {mean_loss:.4f}, time {1000 * seconds:.2f}ms{utilisation}")
        self.last_logged, self.started = step + 1, time.perf_counter()

    def evaluation(self, step: int, losses: dict[str, float], lr: float) -> None:
        if not self.ranks.is_main:
            return
        self.print(f"step {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        record = {"iter": step, "train/loss": losses["train"], "val/loss": losses["val"], "lr": lr}
        self._write(**record)
        if self.wandb is not None:
            self.wandb.log(record | ({} if self.mfu is None else {"mfu": 100 * self.mfu}))

    def skipped_steps(self) -> int:
        return int(self.skipped)

    def last_was_skipped(self) -> bool:
        return bool(self.in_a_row)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside is not counted into the time of a step."""
        self._synchronize()
        paused = time.perf_counter()
        yield
        self._synchronize()
        self.started += time.perf_counter() - paused

    def flush(self) -> None:
        """Puts what was said onto the disk: called before the checkpoint that makes it history."""
        if self.file is not None:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.file is not None:
            self.file.close()
        if self.wandb is not None:
            self.wandb.finish()

    def _write(self, **record: Any) -> None:
        """What is not finite becomes null: JSON has no name for it."""
        if self.file is not None:
            plain = {
                k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
            }
            self.file.write(json.dumps(plain) + "\n")
            self.file.flush()

    def _synchronize(self) -> None:
        if self.ranks.device.startswith("cuda"):
            torch.cuda.synchronize()


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line cut short by a crash is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _keep_before(path: Path, first_step: int, evaluated: bool) -> None:
    """Drops what a run wrote after the checkpoint it now goes on from: it is about to happen again."""
    records = read(path) if first_step and path.exists() else []
    of_evaluation = {first_step} if evaluated else set()
    kept = [r for r in records if r["iter"] < first_step or ("val/loss" in r and r["iter"] in of_evaluation)]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as f:
        f.writelines(json.dumps(record) + "\n" for record in kept)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def _progress_bar(first_step: int, max_iters: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:  # plain lines then
        return None
    form = "{percentage:3.0f}% |{bar}| step {n_fmt}/{total_fmt}{postfix} [{elapsed}, {remaining} left]"
    return tqdm(total=max_iters, initial=first_step, bar_format=form, dynamic_ncols=True, file=sys.stdout)


def _start_wandb(config: TrainConfig) -> Any:
    try:
        import wandb
    except ImportError:
        raise ValueError("wandb_log=True needs the package wandb: pip install -e '.[wandb]'") from None
    wandb.init(project=config.wandb_project, name=config.wandb_run_name, config=config.flat())
    return wandb
