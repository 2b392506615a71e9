"""Checkpoints: out_dir/ckpt.pt is the latest, out_dir/best.pt the one of the lowest validation loss.

What is in them is described in gpt/checkpoint.py; it is the same for every strategy and number of ranks. A
file is written under a temporary name, flushed to the disk and renamed, so what is called ckpt.pt is whole
whatever happens. ckpt-STEP.pt are the last few, ckpt.pt among them under a
second name: where a disk has damaged the latest, resuming goes back to the one before.
"""

import fcntl
import math
import os
import re
import shutil
import socket
from collections.abc import Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from gpt import tokenizer
from gpt.atomic import flush, replacing
from gpt.checkpoint import Checkpoint, missing, model_args, read, write
from gpt.model import GPT, RUN_OPTIONS
from gpt.pretrained import (
    GPT2_NAMES,
    checkpoint_in,
    from_checkpoint,
    hugging_face_tokenizer,
    is_hugging_face,
)
from train.config import SHAPE, TrainConfig
from train.distributed import Ranks
from train.optim import Optimizer


@dataclass
class Progress:
    """How far a run is, beside its weights and optimizer; the fields are keys of `Checkpoint`."""

    # updates made: the number of the step that comes next
    iter_num: int = 0
    # windows of the training data that were read, where the next batch begins
    position: int = 0
    best_val_loss: float = math.inf
    # updates left out, as their gradient was not finite
    skipped: int = 0
    # whether the evaluation due at iter_num is done
    evaluated: bool = False
    # init_from of the run's first process, which config.py has to repeat
    began: str = "scratch"

    @classmethod
    def after(cls, saved: Checkpoint, config: TrainConfig) -> "Progress":
        """Of the run that goes on from `saved`; one of defaults alone is that of a new run."""
        progress = cls(**{key.name: getattr(saved, key.name) for key in fields(cls)})
        if saved.position is None:
            # nanoGPT draws its windows at random: go on where a run of ours would be after as many steps.
            progress.position = saved.iter_num * config.sequences
        if saved.began is None:
            progress.began = saved.config.get("init_from", config.init_from)
        return progress


class Start(NamedTuple):
    """What a run starts from."""

    source: str  # scratch, resume, or what else init_from says
    latest: Path  # the checkpoint to resume
    dataset: str  # the data to train on
    saved: Checkpoint | None = (
        None  # what the first rank has read of `latest`: to check a large one takes time
    )


def find_start(config: TrainConfig, given: Container[str], ranks: Ranks) -> Start:
    """Looks at the disk on the first rank, so that all ranks agree. `given` are the flags that were set.

    Raises ValueError where a new run would replace the checkpoints of another one.
    """
    start = _find_start(config, given) if ranks.is_main else None
    shared = ranks.broadcast(start and start._replace(saved=None))
    return start or shared


def _find_start(config: TrainConfig, given: Container[str]) -> Start:
    source, dataset, latest = config.init_from, config.dataset, Path(config.out_dir, "ckpt.pt")
    saved = None
    if source == "auto":
        source = "resume" if _candidates(latest) else "scratch"
    if source == "resume":
        latest, saved = newest_whole(latest)
        recorded = saved.config.get("dataset")
        if recorded and "dataset" not in given and recorded != dataset:
            print(f"dataset: {recorded}, as in {latest}", flush=True)
            dataset = recorded
    elif not config.eval_only:
        _refuse_to_replace(latest)
    if config.init_from == "scratch" and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        print(
            "torchrun starts this run again if a rank dies, and a run from scratch does not replace a "
            "checkpoint: --init_from=auto goes on",
            flush=True,
        )
    return Start(source, latest, dataset, saved)


def _refuse_to_replace(latest: Path) -> None:
    """Raises ValueError where there are checkpoints, which a new run would replace."""
    folder = latest.parent
    newest = max(_candidates(latest), key=_modified, default=None)
    if newest is None:
        return
    try:
        step = f"step {read(newest).iter_num}"
    except (ValueError, OSError):
        step = "unreadable"
    when = datetime.fromtimestamp(_modified(newest)).isoformat(" ", "minutes")
    raise ValueError(
        f"{newest} is the checkpoint of another run ({step}, saved {when}), and a new run would replace it: "
        f"--init_from=resume goes on from it, --out_dir=FOLDER starts in another folder; to start again in "
        f"{folder}, delete its checkpoints first"
    )


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def initial_model(
    config: TrainConfig, given: Container[str], tokens: dict[str, Any], ranks: Ranks, start: Start
) -> tuple[GPT, Checkpoint]:
    """The model that `start` names, and the checkpoint to resume; a new run gets one of defaults alone.

    `given` are the flags that were set, `tokens` describes the tokenizer of the data. Raises ValueError where
    flags, checkpoint and data disagree.
    """
    options, device = config.model, ranks.device
    source, latest, _, saved_before = start
    nothing = Checkpoint(model={}, model_args={})
    if source == "scratch":
        vocab_size = options.vocab_size or tokenizer.padded_vocab_size(tokens)
        return GPT(replace(options, vocab_size=vocab_size), device, config.dtype).to(device), nothing

    source = checkpoint_in(source)
    overrides = {name: getattr(options, name) for name in RUN_OPTIONS}
    if is_hugging_face(source):
        saved = nothing
        model = GPT.from_pretrained(source, overrides, device, config.dtype)
        trained_with = hugging_face_tokenizer(source)
    else:
        source_path = latest if source == "resume" else Path(source)
        if not source_path.suffix and not source_path.exists():
            known = ", ".join(("scratch", "resume", "auto", *GPT2_NAMES))
            raise ValueError(f"init_from={source!r} is none of {known}, or the path of a ckpt.pt")
        model, saved = from_checkpoint(source_path, device, config.dtype, saved_before, **overrides)
        trained_with = saved.tokenizer or tokens
    where = str(latest) if source == "resume" else source
    if not tokenizer.fits(trained_with, tokens):
        raise ValueError(
            f"{where} was trained with another tokenizer or alphabet than data/{config.dataset} has: "
            f"{tokenizer.name(trained_with)}, and the data {tokenizer.name(tokens)}"
        )
    if trained_with["kind"] == "unknown" != tokens["kind"] and source != "resume" and ranks.is_main:
        print(
            f"{where} does not say which tokenizer it was trained with: that of data/{config.dataset} "
            f"is taken, {tokenizer.name(tokens)}",
            flush=True,
        )
    if source != "resume" and options.block_size < model.config.block_size and "block_size" in given:
        model.crop_block_size(options.block_size)
    for name in SHAPE:
        flag, has = getattr(options, name), getattr(model.config, name)
        if name in given and flag not in (None, has):
            raise ValueError(f"{where} has {name}={has}, and {name}={flag} was asked for; leave it out")
    return model, saved if source == "resume" else nothing


def newest_whole(latest: Path) -> tuple[Path, Checkpoint]:
    """(path, content) of `latest`, or of the newest undamaged checkpoint beside it.

    Prints a line for each damaged one. Raises FileNotFoundError where there are no checkpoints, ValueError
    where none is whole.
    """
    problems: list[Exception] = []
    candidates = _candidates(latest)
    if candidates and not latest.exists():
        print(f"{latest} is not there: looking for the one before", flush=True)
    for path in candidates:
        try:
            return path, read(path)
        except PermissionError:
            raise
        except (ValueError, OSError) as error:
            problems.append(error)
            print(f"{path} is damaged ({error}): looking for the one before", flush=True)
    if not problems:
        raise missing(latest)
    raise ValueError(
        f"{problems[0]}; no checkpoint beside it is whole either: put a copy of one in its place, or start a "
        "new run in another --out_dir"
    )


def _candidates(latest: Path) -> list[Path]:
    """The checkpoints that are there, the newest first: `latest`, the numbered ones beside it, the best."""
    numbered = sorted(_numbered(latest.parent).items(), reverse=True)
    paths = [latest, *(path for _, path in numbered), latest.with_name("best.pt")]
    return [path for path in paths if path.exists()]


def contents(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    config: TrainConfig,
    ranks: Ranks,
    progress: Progress,
    tokenizer: dict[str, Any],
    data: dict[str, Any],
) -> Checkpoint:
    """All of a run: a copy on the CPU of rank 0, which later steps leave alone.

    All ranks call it: shards are put together.
    """
    optimized, weights = optimizer.state_dict(), model.state_dict()
    weights = {name: _copy(weight, ranks) for name, weight in weights.items() if name != "lm_head.weight"}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]  # tied: written once
    moments = {
        i: {name: _copy(value, ranks) for name, value in state.items()}
        for i, state in optimized["state"].items()
    }
    state = Checkpoint(
        model=weights,
        model_args=model_args(model.config),
        gpt_config=dict(vars(model.config)),
        optimizer={"state": moments, "param_groups": optimized["param_groups"]},
        config=config.flat(),
        tokenizer=tokenizer,
        data=data,
        scaler=scaler.state_dict(),
        rng=ranks.gather(_rng_state(ranks.device)),
        **vars(progress),
    )
    if ranks.device_type == "cuda":
        torch.cuda.synchronize()  # the copies
    return state


def restore(saved: Checkpoint, optimizer: Optimizer, scaler: torch.amp.GradScaler, ranks: Ranks) -> None:
    """Optimizer, loss scale and this rank's random numbers, as they were. Raises ValueError.

    Of the optimizer, moments and step counts; learning rate, weight decay and betas stay those of this run.
    """
    own = optimizer.state_dict()["param_groups"]
    moments_then = saved.optimizer or {"state": {}, "param_groups": []}
    trained_with = saved.config.get("optimizer", "adamw")  # nanoGPT knows no other
    if saved.optimizer and trained_with != optimizer.name:
        raise ValueError(
            f"the checkpoint was trained with {trained_with}, and {optimizer.name} cannot go on from its "
            f"moments: give --optimizer={trained_with}, or take the weights alone by --init_from=PATH/ckpt.pt"
        )
    groups_then = moments_then["param_groups"]
    if not all(isinstance(group.get("params"), list) for group in groups_then):
        raise ValueError("the checkpoint's optimizer: the params of each group must be a list of numbers")
    sizes = [[len(group["params"]) for group in groups] for groups in (groups_then, own)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the checkpoint's optimizer has groups of {sizes[0]} tensors, this run's of {sizes[1]}"
        )
    params = [p for group in optimizer.param_groups for p in group["params"]]
    names_of = [optimizer.moments(group) for group in optimizer.param_groups for _ in group["params"]]
    for i, (p, names) in enumerate(zip(params, names_of, strict=True)):
        moments = moments_then["state"].get(i, dict.fromkeys(names, p))  # none before the first step
        for name in names:
            moment = moments.get(name)
            if not isinstance(moment, Tensor) or moment.shape != p.shape:
                shape = tuple(moment.shape) if isinstance(moment, Tensor) else moment or "missing"
                raise ValueError(
                    f"the checkpoint's optimizer: {name} of tensor {i} is {shape}, not {tuple(p.shape)}"
                )
    state = {
        i: {name: _shard_like(value, params[i]) for name, value in values.items()}
        for i, values in moments_then["state"].items()
    }
    try:
        optimizer.load_state_dict({"state": state, "param_groups": own})
        if saved.scaler:
            scaler.load_state_dict(saved.scaler)
        if ranks.rank < len(saved.rng):
            rng = saved.rng[ranks.rank]
            torch.set_rng_state(rng["cpu"])
            if ranks.device_type in rng.keys() - {"cpu"}:
                _device_rng(ranks.device).set_rng_state(rng[ranks.device_type])
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(
            f"the checkpoint's optimizer, scaler or rng is not the state of one ({error}); go on from "
            "another checkpoint, or take the weights alone by --init_from=PATH/ckpt.pt"
        ) from None


class Saver:
    """Saves a run. The file is written on a thread, one at a time, while training goes on."""

    def __init__(
        self,
        model: GPT,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        config: TrainConfig,
        ranks: Ranks,
        tokenizer: dict[str, Any],
        data: dict[str, Any],
    ):
        """`tokenizer` describes the run's tokenizer, `data` is what `train.data.preflight` returned."""
        self.state = model, optimizer, scaler, config, ranks
        self.tokenizer, self.data = tokenizer, data
        self.config, self.ranks = config, ranks
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None

    def save(self, progress: Progress, best: bool) -> None:
        """Copies the run as it is now, and returns while the copy is written; for all ranks to call.

        Waits for the checkpoint before it, and raises OSError where that could not be written.
        """
        self.wait()
        state = contents(*self.state, progress, self.tokenizer, self.data)
        if self.ranks.is_main:
            folder, keep_last = Path(self.config.out_dir), self.config.keep_last
            self.pending = self.thread.submit(save, folder, state, best, keep_last)

    def wait(self) -> None:
        """Returns when all is written. Raises OSError where that failed."""
        if self.pending is not None:
            self.pending.result()

    def check(self) -> None:
        """Raises OSError if the last one is known to have failed."""
        if self.pending is not None and self.pending.done():
            self.pending.result()


def save(folder: Path, checkpoint: Checkpoint, best: bool, keep_last: int = 0) -> None:
    """Replaces ckpt.pt and, for the best so far, best.pt. Raises OSError; what was there stays whole."""
    latest = folder / "ckpt.pt"
    try:
        # ckpt.pt gets its name last: a run that is killed before goes on from the one before.
        with replacing(latest) as temporary:
            write(checkpoint, temporary)
            flush(temporary)
            if best:
                _duplicate(temporary, folder / "best.pt")
            if keep_last:
                _duplicate(temporary, folder / f"ckpt-{checkpoint.iter_num}.pt")
        flush(folder)
        # Those of later steps are of a run that was given up for one before it.
        steps = sorted(_numbered(folder).items())
        last = [step for step, _ in steps if step <= checkpoint.iter_num][-keep_last or len(steps) :]
        for step, path in steps:
            if step not in last:
                path.unlink()
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError when the disk is full
        kept_whole = "the previous one is whole" if latest.exists() else "there is none yet"
        raise OSError(f"the checkpoint {latest} could not be written ({error}); {kept_whole}") from None


def make_folder(folder: Path) -> None:
    """Makes `folder` and proves that it can be written to. Raises OSError."""
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"out_dir={str(folder)!r} cannot be written to ({error.strerror}); choose another by --out_dir"
        ) from None


@contextmanager
def locked_folder(config: TrainConfig, ranks: Ranks) -> Iterator[None]:
    """Makes out_dir and keeps a second run out of it while the code inside runs. Raises ValueError, OSError.

    The system gives the lock back when the process dies, so that resuming works at once. Where there are no
    locks, as on some network file systems, runs go on without. eval_only writes nothing, and takes no lock.
    """
    if config.eval_only or not ranks.is_main:
        yield
        return
    make_folder(Path(config.out_dir))
    lock = _lock(Path(config.out_dir))
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def _lock(folder: Path) -> TextIO | None:
    """The open file that holds the lock, or None without locks. Raises ValueError where it is taken."""
    try:
        file = (folder / ".lock").open("a+")
    except OSError:  # of another user, who shares the folder
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read() or "an unknown process"
        file.close()
        raise ValueError(
            f"another run writes to {folder} now ({holder}): wait until it ends, or give this run another "
            "--out_dir"
        ) from None
    except OSError:  # some network file systems
        file.close()
        return None
    file.truncate(0)
    now = datetime.now().isoformat(" ", "minutes")
    print(f"process {os.getpid()} on {socket.gethostname()}, since {now}", end="", file=file, flush=True)
    return file


def _numbered(folder: Path) -> dict[int, Path]:
    """The ckpt-STEP.pt by step."""
    matches = ((re.fullmatch(r"ckpt-(\d+)\.pt", path.name), path) for path in folder.glob("ckpt-*.pt"))
    return {int(match[1]): path for match, path in matches if match}


def _copy(value: Any, ranks: Ranks) -> Any:
    """Rank 0's copy on the CPU of a tensor, of all its shards where it has some; other values as they are."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if not isinstance(value, Tensor):
        return value
    in_background = value.is_cuda  # into pinned memory; `contents` waits for all of them at once
    return value.detach().to("cpu", copy=True, non_blocking=in_background) if ranks.is_main else None


def _shard_like(value: Any, parameter: Tensor) -> Any:
    """This rank's part of a moment, where the parameter has parts."""
    if not isinstance(parameter, DTensor) or value.dim() == 0:
        return value
    device = parameter.device_mesh.device_type
    return distribute_tensor(
        value.to(device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def _rng_state(device: str) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device != "cpu":
        state[torch.device(device).type] = _device_rng(device).get_rng_state()
    return state


def _device_rng(device: str) -> Any:
    """torch.cuda or torch.mps: the generator of this rank's device, which is the current one."""
    return getattr(torch, torch.device(device).type)


def _duplicate(source: Path, target: Path) -> None:
    """Replaces `target` by the file `source`: its second name, or a copy where there are no links.

    Saving never writes into a file that has a name, so neither name can change the other's bytes.
    """
    with replacing(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
            flush(temporary)
