"""Logging: the console (train/view.py), metrics.jsonl and wandb.

metrics.jsonl has one JSON object per line. `iter` is the number of steps made before. Numbers that are not
finite are null.

- A step: iter, loss (mean over the global batch, in nats), lr, grad_norm (before clipping), skipped (steps so
  far that were skipped because the gradient was not finite), ms (milliseconds per step, mean since the last
  line), tokens_per_s (from ms), mfu (percent, a running mean; null in the first 5 steps after a start, and
  where the peak is unknown), memory_gb (peak, in 10^9 bytes: tensors on rank 0's GPU, or the process on a
  CPU).
- An evaluation: iter, train/loss, val/loss, lr.
- An event: event (its name), iter, time (ISO 8601, UTC). "start", when a run begins or is resumed, has
  evaluated (whether the evaluation at iter is done), config (every flag), parameters, flops_per_token,
  tokens_per_step, train_tokens, val_tokens, ranks, gpu (null on a CPU), torch. "stop", after a signal, has
  reason. A run that finishes ends with an evaluation.

A run only appends, after removing a half-written last line. After a crash it repeats the steps since its last
checkpoint. So at each "start", `read` drops what came before with the same or a later iter, except an
evaluation that is already done.
"""

import json
import math
import operator
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from gpt import cli
from gpt.model import GPT
from gpt.reading import regular
from train.checkpoint import Progress
from train.config import TrainConfig, resume_command, twice_as_long
from train.distributed import Ranks
from train.view import Lines

WARMUP_STEPS = 5  # steps left out of the estimates: the first ones are slower


class Metrics:
    """Only rank 0 writes, but all ranks must call `step`, which averages the loss over them."""

    def __init__(self, config: TrainConfig, ranks: Ranks, model: GPT, view: Lines, progress: Progress):
        """`progress` is where the run starts."""
        self.config, self.ranks, self.model, self.view = config, ranks, model, view
        self.first_step = self.last_log_step = progress.iter_num
        self.skipped = progress.skipped
        self.mfu: float | None = None
        self.seconds: float | None = None  # of a step, smoothed
        self.pauses: dict[str, list[float]] = {}  # seconds of each evaluation, compilation, ...
        self.wandb = self.file = None
        if ranks.is_main:
            if config.wandb_log:
                self.wandb = _start_wandb(config)
            if not config.eval_only:
                self.file = _open(Path(config.out_dir, "metrics.jsonl"))
        self.last_log_time = time.perf_counter()

    def print(self, text: str) -> None:
        if self.ranks.is_main:
            self.view.print(text)

    def start(
        self, progress: Progress, train_tokens: int, val_tokens: int, saved_flags: dict[str, Any]
    ) -> None:
        """Prints what will be trained, on which data, and which settings differ from the checkpoint's.

        `saved_flags` are those of a resumed checkpoint, or {}.
        """
        if not self.ranks.is_main:
            return
        config, c = self.config, self.config.model
        tokens_per_step = config.sequences_per_step * c.block_size
        tokens, epoch = tokens_per_step * config.max_iters, train_tokens / tokens_per_step
        parameters, flops = self.model.get_num_params(), self.model.flops_per_token()
        gpu = torch.cuda.get_device_name(config.device) if self.ranks.device_type == "cuda" else None
        self._write(_event(
            "start", progress.iter_num, evaluated=progress.evaluated, config=config.flat(),
            parameters=parameters, flops_per_token=flops, tokens_per_step=tokens_per_step,
            train_tokens=train_tokens, val_tokens=val_tokens, ranks=self.ranks.world_size, gpu=gpu,
            torch=torch.__version__,
        ))  # fmt: skip
        shape = f"{c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, block {c.block_size}"
        settings = f"dtype {config.dtype}, compile {config.compile}, kernels {c.kernels}"
        if c.residual_dtype != "float32":
            settings += f", residual_dtype {c.residual_dtype}"
        named = f" ({gpu})" if gpu else ""
        backend = f", backend {self.ranks.backend}, strategy {config.strategy}" if self.ranks.backend else ""
        summary = {
            "parameters": f"{parameters / 1e6:.2f}M ({shape}, {c.vocab_size} symbols)",
            "tokens per step": f"{tokens_per_step:,} ({epoch:,.0f} steps = one epoch)",
            "data": f"{config.dataset}: {train_tokens:,} tokens to train on, {val_tokens:,} to validate",
            "run": f"{config.max_iters:,} steps, {tokens:,} tokens: {tokens / train_tokens:.2f} epochs, "
            f"{tokens / parameters:.1f} tokens per parameter (Chinchilla-optimal: 20)",
            "cost": f"{flops:.2e} FLOPs per token, {flops * tokens:.2e} in the run",
            "device": f"{config.device} x {self.ranks.world_size}{named}{backend}, {settings}",
        }
        if config.eval_only:
            del summary["run"], summary["cost"]
        steps = 0 if config.eval_only else config.max_iters
        self.view.start(summary, min(progress.iter_num, steps), steps, progress.best_val_loss)
        saved, now = saved_flags, config.flat()
        if saved:  # an older checkpoint may have no residual_dtype
            saved.setdefault("residual_dtype", "float32")
        compared = saved.keys() & now.keys() - {"init_from", "out_dir", "device", "backend", "profile"}
        for name in sorted(compared):
            if saved[name] != now[name]:
                self.print(f"changed since the checkpoint: {name} {saved[name]!r} -> {now[name]!r}")

    def step(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float, skipped: Tensor | int = 0) -> None:
        """Called after each step. Only a step that is logged waits for the GPU.

        `loss` is this rank's. `skipped` counts the skipped steps so far.
        """
        config = self.config
        if self.ranks.is_main:
            self.view.advance(step + 1)
        if step % config.log_interval:
            return
        mean_loss = (self.ranks.sum(loss.clone()) / self.ranks.world_size).item()
        if not self.ranks.is_main:
            return
        seconds = (time.perf_counter() - self.last_log_time) / (step + 1 - self.last_log_step)
        sequences = config.sequences_per_step
        if step - self.first_step >= WARMUP_STEPS:
            mfu = self.model.estimate_mfu(sequences // self.ranks.world_size, seconds, config.dtype)
            self.mfu = mfu if self.mfu is None or mfu is None else 0.9 * self.mfu + 0.1 * mfu
            self.seconds = seconds if self.seconds is None else 0.9 * self.seconds + 0.1 * seconds
        if new := int(skipped) - self.skipped:
            noun = "step" if new == 1 else "steps"
            self.print(f"iter {step}: skipped {new} {noun} with a non-finite gradient")
            self.skipped += new
        record = {
            "iter": step, "loss": mean_loss, "lr": lr, "grad_norm": grad_norm.item(), "skipped": self.skipped,
            "ms": 1000 * seconds, "tokens_per_s": sequences * config.model.block_size / seconds,
            "mfu": None if self.mfu is None else 100 * self.mfu, "memory_gb": _memory(config.device) / 1e9,
        }  # fmt: skip
        self._write(record)
        self.view.step(record, self._seconds_left(step + 1))
        self.last_log_step, self.last_log_time = step + 1, time.perf_counter()

    def evaluation(self, step: int, losses: dict[str, float], lr: float) -> None:
        if not self.ranks.is_main:
            return
        record = {"iter": step, "train/loss": losses["train"], "val/loss": losses["val"], "lr": lr}
        self._write(record)
        self.view.evaluation(record)
        if self.wandb is not None:
            self.wandb.log(record | ({} if self.mfu is None else {"mfu": 100 * self.mfu}))

    def stop(self, step: int, signal: str | None) -> None:
        """Reports that a signal ends the run early. `signal` is None if another rank received it."""
        if self.ranks.is_main:
            reason = f"stopped by {signal}" if signal else "stopped with another rank"
            latest = Path(self.config.out_dir, "ckpt.pt")
            how = "nothing is saved yet, so the same command starts over"
            if latest.exists():
                how = f"to resume from {latest}:\n  {resume_command(self.config, self.ranks)}"
            self._write(_event("stop", step, reason=reason))
            self.view.close()
            self.print(f"{reason} after {step:,} steps: {how}")

    def done(self, step: int, best_val_loss: float) -> None:
        """Prints where the checkpoint of the finished run is, and what to do with it."""
        latest = Path(self.config.out_dir, "ckpt.pt")
        if self.ranks.is_main and latest.exists():
            self.view.close()
            self.print(
                f"finished after {step:,} steps: {latest}, lowest validation loss {best_val_loss:.4f}\n"
                f"  sample from it  {cli.command('gpt.sample', self.config.out_dir)}\n"
                f"  train further   {resume_command(self.config, self.ranks, **twice_as_long(self.config))}"
            )

    @contextmanager
    def paused(self, doing: str) -> Iterator[None]:
        """Time spent inside is not counted as step time."""
        self._synchronize()
        paused = time.perf_counter()
        with self.view.busy(doing) if self.ranks.is_main else nullcontext():
            yield
        self._synchronize()
        seconds = time.perf_counter() - paused
        self.pauses.setdefault(doing, []).append(seconds)
        self.last_log_time += seconds

    def part(self, done: int, total: int) -> None:
        """Reports the progress of the code inside `paused`."""
        if self.ranks.is_main:
            self.view.part(done, total)

    def flush(self) -> None:
        """Forces metrics.jsonl onto the disk: before each checkpoint, so that it is never older than that."""
        if self.file is not None:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        self.view.close()
        if self.file is not None:
            self.file.close()
        if self.wandb is not None:
            self.wandb.finish()

    def _seconds_left(self, done: int) -> float | None:
        """An estimate from the running mean of the step time and from the last evaluation."""
        evaluations = self.pauses.get("evaluating", [])
        times = evaluations[1:] if self.config.compile else evaluations  # the first includes compiling
        if self.seconds is None:
            return None
        last, interval = self.config.max_iters, self.config.eval_interval
        to_come = (last - 1) // interval - (done - 1) // interval + 1
        return (last - done) * self.seconds + to_come * (times[-1] if times else 0.0)

    def _write(self, record: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.write(to_json(record) + "\n")
            self.file.flush()

    def _synchronize(self) -> None:
        if self.ranks.device_type == "cuda":
            torch.cuda.synchronize()


def to_json(record: dict[str, Any], indent: int | None = None) -> str:
    """JSON with null for numbers that are not finite, which JSON cannot write."""
    return json.dumps(json.loads(json.dumps(record), parse_constant=lambda name: None), indent=indent)


def _event(name: str, step: int, **fields: Any) -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"event": name, "iter": step, "time": now} | fields


# A line about a step has these keys, one about an evaluation those. Their values are numbers or null.
STEP = ("loss", "lr", "grad_norm", "tokens_per_s", "ms")
EVALUATION = ("train/loss", "val/loss")


def read(path: Path) -> list[dict[str, Any]]:
    """The steps and evaluations in a metrics.jsonl, each once. A half-written last line is skipped.

    Raises OSError, and ValueError for a line that a run did not write.
    """
    records: list[dict[str, Any]] = []
    for number, line in enumerate(regular(path).read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
            if "event" not in record:
                names = EVALUATION if "val/loss" in record else STEP
                # These raise TypeError for what is not a whole number, and for what is not a number.
                operator.index(record["iter"])
                math.fsum(record[name] for name in names if record[name] is not None)
                records.append(record)
            elif record["event"] == "start":
                first, evaluated = record["iter"], record["evaluated"]
                records = [
                    r for r in records
                    if r["iter"] < first or (evaluated and r["iter"] == first and "val/loss" in r)
                ]  # fmt: skip
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}, is not a step, an evaluation or an event "
                f"({type(error).__name__}: {error}); repair the line or remove it"
            ) from None
    return records


def _open(path: Path) -> TextIO:
    """Opens for appending, after removing a half-written last line. Raises ValueError for a file not ours."""
    content = regular(path).read_bytes() if path.exists() else b""
    if b"\n" in content and not content.startswith((b'{"event": ', b'{"iter": ')):
        raise ValueError(
            f"{path} was not written by a training run of this project (it begins with {content[:60]!r}), "
            "and is left unchanged: move it elsewhere, or choose a different --out_dir"
        )
    file = path.open("a", encoding="utf-8")
    file.truncate(content.rfind(b"\n") + 1)
    return file


def _memory(device: str) -> int:
    """Peak bytes of tensors on the GPU, or of the process on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _start_wandb(config: TrainConfig) -> Any:
    """Starts a run of wandb. Raises ValueError if wandb is not installed or does not start."""
    try:
        import wandb

        # Offline runs leave a folder ./wandb, which imports as an empty package. It has no `init`.
        from wandb import init
    except ImportError:
        raise ValueError(
            f"wandb_log=True needs the package wandb: {cli.install('wandb')}, or give --wandb_log=False"
        ) from None
    try:
        return init(project=config.wandb_project, name=config.wandb_run_name, config=config.flat())
    except wandb.Error as error:
        raise ValueError(
            f"wandb did not start ({error}); "
            "set WANDB_MODE=offline to log to the disk, or --wandb_log=False to turn it off"
        ) from error
