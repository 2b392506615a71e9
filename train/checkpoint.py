"""Checkpoints of a run: out_dir/ckpt.pt is the latest, out_dir/best.pt has the lowest validation loss.

Their format is in gpt/checkpoint.py. It does not depend on the strategy or the number of ranks.

A checkpoint is written under a temporary name, flushed to the disk and then renamed, so a crash cannot damage
the previous one. ckpt-STEP.pt are the last few checkpoints. The newest of them is a hard link to ckpt.pt. So
if the disk damages ckpt.pt, a run resumes from the next older one.
"""

import fcntl
import math
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from gpt import pretrained, tokenizer
from gpt.atomic import flush, replacing
from gpt.checkpoint import Checkpoint, missing, model_args, read, runs_here, write
from gpt.model import GPT, RUN_OPTIONS
from train.config import MODEL_FIELDS, TrainConfig
from train.distributed import Ranks


@dataclass
class Progress:
    """How far a run is. These fields are saved as keys of `Checkpoint`, beside weights and optimizer."""

    iter_num: int = 0  # steps made, and so the number of the next step
    position: int = 0  # windows of the training data read so far
    best_val_loss: float = math.inf
    skipped: int = 0  # steps whose gradient was not finite
    evaluated: bool = False  # whether the evaluation at iter_num is done

    @classmethod
    def after(cls, saved: Checkpoint, config: TrainConfig) -> "Progress":
        """The progress in `saved`. For a new run, `saved` has only defaults."""
        progress = cls(**{key.name: getattr(saved, key.name) for key in fields(cls)})
        if saved.position is None:
            # nanoGPT reads windows at random. Continue where a run of ours would be after that many steps.
            progress.position = saved.iter_num * config.sequences_per_step
        return progress


class Start(NamedTuple):
    """Where a run starts: the answer of `find_start`."""

    source: str  # scratch, resume, or another value of init_from
    latest: Path  # the checkpoint to resume
    dataset: str  # the data to train on
    saved: Checkpoint | None = None  # the content of `latest`, on rank 0


def find_start(config: TrainConfig, given: Container[str], ranks: Ranks) -> Start:
    """Decides what to start from: new weights, the run's own checkpoint, or other weights.

    `given` are the flags that were set. Only rank 0 reads the disk, and it broadcasts the answer. Raises
    ValueError if a new run would replace the checkpoints of another.
    """
    if not ranks.is_main:
        return ranks.broadcast(None)
    source, dataset, latest = config.init_from, config.dataset, Path(config.out_dir, "ckpt.pt")
    saved = None
    if source == "auto":
        source = "resume" if _candidates(latest) else "scratch"
    if source == "resume":
        latest, saved = newest_intact(latest)
        recorded = saved.config.get("dataset")
        if recorded and "dataset" not in given and recorded != dataset:
            print(f"dataset: {recorded}, as in {latest}", flush=True)
            dataset = recorded
    elif not config.eval_only:
        _refuse_to_replace(latest)
    start = Start(source, latest, dataset)
    ranks.broadcast(start)
    return start._replace(saved=saved)


def _refuse_to_replace(latest: Path) -> None:
    """Raises ValueError if there are checkpoints, which a new run would replace."""
    if candidates := _candidates(latest):
        newest = candidates[0]
        time = datetime.fromtimestamp(newest.stat().st_mtime).isoformat(" ", "minutes")
        raise ValueError(
            f"{newest} is the checkpoint of another run (saved {time}), and a new run would replace it: "
            "--init_from=resume continues it, --out_dir=FOLDER starts in a different folder; to start again "
            f"in {latest.parent}, delete its checkpoints first"
        )


def newest_intact(latest: Path) -> tuple[Path, Checkpoint]:
    """The path and content of `latest`, or of the newest undamaged checkpoint beside it.

    Prints a line for each damaged one. Raises FileNotFoundError if there is no checkpoint, PermissionError
    for one that may not be read, and ValueError if all are damaged.
    """
    problems: list[Exception] = []
    candidates = _candidates(latest)
    if candidates and not latest.exists():
        print(f"{latest} is missing: trying the previous checkpoint", flush=True)
    for path in candidates:
        try:
            return path, read(path)
        except ValueError as error:
            problems.append(error)
            print(f"{path} is damaged and is skipped: {error}", flush=True)
    raise problems[0] if problems else missing(latest)


def _candidates(latest: Path) -> list[Path]:
    """The checkpoints in the folder, newest first: `latest`, the numbered ones, the best."""
    numbered = sorted(_numbered(latest.parent).items(), reverse=True)
    paths = [latest, *(path for _, path in numbered), latest.with_name("best.pt")]
    return [path for path in paths if path.exists()]


def _numbered(folder: Path) -> dict[int, Path]:
    """{step: path} of the ckpt-STEP.pt files."""
    matches = ((re.fullmatch(r"ckpt-(\d+)\.pt", path.name), path) for path in folder.glob("ckpt-*.pt"))
    return {int(match[1]): path for match, path in matches if match}


def initial_model(
    config: TrainConfig, given: Container[str], data_tokenizer: dict[str, Any], ranks: Ranks, start: Start
) -> tuple[GPT, Checkpoint]:
    """Makes the model that `start` names, on the rank's device. Returns it and the checkpoint to resume.

    For a new run this is an empty checkpoint, with defaults only. `given` are the flags that were set. Raises
    ValueError if flags, checkpoint and data do not fit together.
    """
    options, device = config.model, ranks.device
    empty = Checkpoint(model={}, model_args={})
    if start.source == "scratch":
        vocab_size = options.vocab_size or tokenizer.padded_vocab_size(data_tokenizer)
        return GPT(replace(options, vocab_size=vocab_size), device, config.dtype).to(device), empty

    resumes = start.source == "resume"
    source = str(start.latest) if resumes else pretrained.checkpoint_in(start.source)
    overrides = {name: getattr(options, name) for name in RUN_OPTIONS}
    saved = empty
    if not resumes and pretrained.is_hugging_face(source):
        model = GPT.from_pretrained(source, overrides, device, config.dtype)
        model_tokenizer = tokenizer.describe_hugging_face(source)
    else:
        if not Path(source).exists() and resumes:  # rank 0, perhaps on a different machine, has found it
            raise ValueError(
                f"there is no {source} on this machine: all machines must share out_dir={config.out_dir!r}"
            )
        if not Path(source).exists():
            raise ValueError(
                f"init_from={source!r} must be scratch, resume, auto, gpt2* or a path that exists; "
                f"{runs_here()}"
            )
        path, dtype = Path(source), config.dtype
        model, saved = pretrained.from_checkpoint(path, device, dtype, start.saved, **overrides)
        model_tokenizer = saved.tokenizer or data_tokenizer
    if not tokenizer.fits(model_tokenizer, data_tokenizer):
        raise ValueError(
            f"{source} and data/{config.dataset} have different tokenizers or alphabets: the model uses "
            f"{tokenizer.name(model_tokenizer)}, the data {tokenizer.name(data_tokenizer)}"
        )
    if model_tokenizer["kind"] == "unknown" != data_tokenizer["kind"] and not resumes and ranks.is_main:
        print(
            f"{source} names no tokenizer; assuming that of data/{config.dataset}, "
            f"{tokenizer.name(data_tokenizer)}",
            flush=True,
        )
    # A shorter context is the only change of shape that keeps the weights.
    if not resumes and options.block_size < model.config.block_size and "block_size" in given:
        model.crop_block_size(options.block_size)
    for name in MODEL_FIELDS:
        flag, actual = getattr(options, name), getattr(model.config, name)
        if name in given and flag not in (None, actual):
            raise ValueError(f"{source} has {name}={actual}; leave out {name}={flag}")
    return model, saved if resumes else empty


def restore(
    saved: Checkpoint,
    config: TrainConfig,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    ranks: Ranks,
) -> None:
    """Restores the optimizer's moments and step counts, the loss scale and this rank's random numbers.

    Learning rate, weight decay and betas are those of this run. Raises ValueError if the optimizer differs or
    does not fit.
    """
    way_out = "load only the weights with --init_from=PATH/ckpt.pt"
    trained_with = saved.config.get("optimizer", "adamw")  # nanoGPT has no other
    if saved.optimizer and trained_with != config.optimizer:
        raise ValueError(
            f"the checkpoint was trained with {trained_with}, whose state {config.optimizer} cannot use: "
            f"give --optimizer={trained_with}, or {way_out}"
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = saved.optimizer["state"] if saved.optimizer else {}
    # Before the first step there are none. PyTorch does not check moments: it fails later, or starts afresh.
    for i, p in enumerate(parameters if moments else ()):
        values = moments.get(i, {}).items()
        names = {name for name, value in values if isinstance(value, Tensor) and value.shape == p.shape}
        if not (names >= {"exp_avg", "exp_avg_sq"} or "momentum_buffer" in names):
            raise ValueError(
                f"the checkpoint's optimizer has no moments of shape {tuple(p.shape)} for tensor {i}; "
                f"{way_out}"
            )
    try:
        state = {
            i: {name: _shard_like(value, parameters[i]) for name, value in values.items()}
            for i, values in moments.items()
        }
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        if saved.scaler:
            scaler.load_state_dict(saved.scaler)
        if ranks.rank < len(saved.rng):
            rng = saved.rng[ranks.rank]
            torch.set_rng_state(rng["cpu"])
            if ranks.device_type in rng.keys() - {"cpu"}:
                torch.get_device_module(ranks.device).set_rng_state(rng[ranks.device_type])
    except (RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the checkpoint's optimizer, scaler or rng cannot be restored ({error}); resume from a "
            f"different checkpoint, or {way_out}"
        ) from None


def _shard_like(value: Any, parameter: Tensor) -> Any:
    """This rank's shard of a moment, if the parameter is sharded."""
    if not isinstance(parameter, DTensor) or value.dim() == 0:
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(mesh.device_type), mesh, placements, src_data_rank=None)


@dataclass
class Saver:
    """Saves a run. Writes in a background thread, one checkpoint at a time."""

    model: GPT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    config: TrainConfig
    ranks: Ranks
    tokenizer: dict[str, Any]
    # the description of the data by train.data.preflight
    data: dict[str, Any]
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    pending: Future[None] | None = None

    def save(self, progress: Progress, best: bool) -> None:
        """Copies the state of the run, then writes it in the background. All ranks must call it.

        Waits for the previous checkpoint first. Raises OSError if that could not be written.
        """
        self.wait()
        state = self._copy_state(progress)
        if self.ranks.is_main:
            folder, keep_last = Path(self.config.out_dir), self.config.keep_last
            self.pending = self.thread.submit(save, folder, state, best, keep_last)

    def wait(self) -> None:
        """Waits for the last checkpoint. Raises OSError if it could not be written."""
        if self.pending is not None:
            self.pending.result()

    def check(self) -> None:
        """Like `wait`, unless the last checkpoint is still being written."""
        if self.pending is not None and self.pending.done():
            self.pending.result()

    def _copy_state(self, progress: Progress) -> Checkpoint:
        """Copies the state of the run to rank 0's CPU.

        All ranks must call it: each has its own random numbers, and with FSDP a shard of every tensor.
        """
        optimized = self.optimizer.state_dict()
        weights = self.model.state_dict()
        del weights["lm_head.weight"]  # tied: copy it once, write it once
        weights = {name: self._copy(weight) for name, weight in weights.items()}
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
        moments = {
            i: {name: self._copy(value) for name, value in state.items()}
            for i, state in optimized["state"].items()
        }
        rng = {"cpu": torch.get_rng_state()}
        if self.ranks.device_type != "cpu":
            rng[self.ranks.device_type] = torch.get_device_module(self.ranks.device).get_rng_state()
        state = Checkpoint(
            model=weights,
            model_args=model_args(self.model.config),
            gpt_config=dict(vars(self.model.config)),
            optimizer={"state": moments, "param_groups": optimized["param_groups"]},
            config=self.config.flat(),
            tokenizer=self.tokenizer,
            data=self.data,
            scaler=self.scaler.state_dict(),
            rng=self.ranks.gather(rng),
            **vars(progress),
        )
        if self.ranks.device_type == "cuda":
            torch.cuda.synchronize()  # all copies are complete
        return state

    def _copy(self, value: Any) -> Any:
        """The full tensor on rank 0's CPU; None on other ranks. Other values are returned unchanged."""
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if not isinstance(value, Tensor):
            return value
        if not self.ranks.is_main:
            return None
        return value.detach().to("cpu", copy=True, non_blocking=value.is_cuda)


def save(folder: Path, checkpoint: Checkpoint, best: bool, keep_last: int = 0) -> None:
    """Replaces ckpt.pt, and best.pt if `best`. Raises OSError and leaves the old files intact."""
    latest = folder / "ckpt.pt"
    try:
        # ckpt.pt is replaced last. If the run is killed before that, it resumes from the previous checkpoint.
        with replacing(latest) as temporary:
            write(checkpoint, temporary)
            flush(temporary)
            if best:
                _duplicate(temporary, folder / "best.pt")
            if keep_last:
                _duplicate(temporary, folder / f"ckpt-{checkpoint.iter_num}.pt")
        flush(folder)
        # Also delete checkpoints of later steps: they are from before the run was resumed at an earlier step.
        steps = sorted(_numbered(folder).items())
        last = [step for step, _ in steps if step <= checkpoint.iter_num][-keep_last or len(steps) :]
        for step, path in steps:
            if step not in last:
                path.unlink()
    except OSError as error:
        previous = "the previous one is intact" if latest.exists() else "there is none yet"
        raise OSError(f"the checkpoint {latest} could not be written ({error}); {previous}") from None


def _duplicate(source: Path, target: Path) -> None:
    """Replaces `target` with a hard link to `source`, or with a copy if hard links do not work.

    We never write into an existing file, so the linked files cannot change together.
    """
    with replacing(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
            flush(temporary)


def make_folder(folder: Path) -> None:
    """Makes `folder`. Raises OSError if that is not possible, or if files in it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(
            f"out_dir={str(folder)!r} cannot be written to ({error.strerror}); choose a different --out_dir"
        ) from None


@contextmanager
def locked_folder(config: TrainConfig, ranks: Ranks) -> Iterator[None]:
    """Makes out_dir and locks it. The system releases the lock when the process dies.

    eval_only writes nothing, so it needs no lock. Raises ValueError if another run holds the lock, and
    OSError if out_dir cannot be written to.
    """
    if config.eval_only or not ranks.is_main:
        yield
        return
    folder = Path(config.out_dir)
    make_folder(folder)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "an unknown process"
            raise ValueError(
                f"another run writes to {folder} now ({holder}): wait until it ends, or give this run "
                "a different --out_dir"
            ) from None
        except OSError:
            pass  # Some network file systems have no locks.
        else:
            file.truncate(0)
            now = datetime.now().isoformat(" ", "minutes")
            print(
                f"process {os.getpid()} on {socket.gethostname()}, since {now}", end="", file=file, flush=True
            )
        yield
