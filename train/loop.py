"""A training run from top to bottom: `train` is all of it, and what it calls follows below.

The order is that of nanoGPT's train.py. What is different: a resumed run makes the same steps, bit for bit,
as one that never stopped; a signal ends a run with a checkpoint; a step without a finite gradient is skipped.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import count, islice, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt import cli
from gpt.checkpoint import Checkpoint
from gpt.device import autocast
from gpt.model import GPT
from gpt.sample import SampleConfig, generate
from gpt.tokenizer import GPT2_VOCAB_SIZE, Tokenizer, from_dict, unknown
from train import checkpoint, distributed, fit
from train.checkpoint import Progress
from train.config import TrainConfig, resolve, resume_command, save_config, twice_as_long
from train.data import TokenFile, describe, preflight, to_device
from train.distributed import Ranks
from train.metrics import Metrics
from train.optim import (
    Optimizer,
    SkippedSteps,
    clip_gradient,
    learning_rate,
    optimizer_for,
    step_if_finite,
)
from train.profiler import Profile
from train.signals import StopRequest
from train.view import Lines

Batch = tuple[Tensor, Tensor]
Precision = Callable[[], AbstractContextManager]

HOPELESS = 20  # steps skipped in a row; float16 needs a few to find its loss scale


def train(
    config: TrainConfig,
    ranks: Ranks,
    given: Mapping[str, Sequence[str]] | None = None,
    stop: StopRequest | None = None,
    view: Lines | None = None,
) -> None:
    """The whole run, from `config` to the last checkpoint, or until `stop` asks for an end.

    `given` are the values of the flags that were set explicitly, `view` is where the run is shown.
    Raises ValueError and OSError, a sentence each.
    """
    given = given or {}
    out_dir = Path(config.out_dir)
    # Each rank draws dropout masks of its own. It draws weights too, but those of rank 0 are taken.
    torch.manual_seed((config.seed + ranks.rank) % 2**64)  # the largest seed has ranks too
    # Where float32 is asked for on a GPU, TF32 is good enough for matrix products. A CPU has none.
    torch.backends.cuda.matmul.allow_tf32 = True

    # The beginning: new weights, the run's own checkpoint, or weights from elsewhere. Settings that this
    # machine cannot meet are refused before anything is written.
    config = resolve(config, ranks)
    with cli.IfSlow("checking the checkpoint", ranks.is_main):
        start = checkpoint.find_start(config, given, ranks)
    if ranks.is_main:
        checkpoint.make_folder(out_dir)
    config = replace(config, dataset=start.dataset)
    data_dir = Path("data", config.dataset)
    tokenizer = describe(data_dir)
    resumes = start.source == "resume"
    with cli.IfSlow("making the model", ranks.is_main):
        model, before = checkpoint.initial_model(config, given, tokenizer, ranks, start)
    config = replace(config, model=model.config)
    tokenizer = known_tokenizer(tokenizer, before.tokenizer or tokenizer, model, data_dir)
    if ranks.differ(before.iter_num):
        raise ValueError(
            f"the ranks found different checkpoints: all machines must share out_dir={config.out_dir!r}"
        )
    if resumes and before.iter_num >= config.max_iters and not config.eval_only:
        if ranks.is_main:
            print(nothing_to_do(start.latest, before, config, ranks))
        return

    # What is trained, and by what.
    precision = partial(autocast, ranks.device, config.dtype)
    fitted = ""
    if "auto" in given.get("batch_size", ())[-1:]:
        steps_on = partial(trial, config=config, ranks=ranks, precision=precision)
        config, fitted = fit.micro_batch(config, model, ranks, steps_on)
    trained, optimizer, scaler = prepare(model, config, ranks)
    progress = Progress.after(before, config)
    if resumes:
        checkpoint.restore(before, optimizer, scaler, ranks)

    # The data. Evaluation has another seed: its windows are not those that training is about to see.
    train_file = TokenFile(data_dir / "train.bin", config.model, config.seed)
    eval_files = {
        split: TokenFile(data_dir / f"{split}.bin", config.model, config.seed + 1)
        for split in ("train", "val")
    }
    same_data = before.config.get("dataset") == config.dataset
    with cli.IfSlow("checking the data", ranks.is_main):
        data = preflight(eval_files, before.data if same_data else {})
    micro_batches = read_ahead(train_file, progress.position, config.micro_batch, ranks)
    # gradient_accumulation_steps counts over all ranks, so that the step is the same on one GPU and on eight.
    accumulation = config.gradient_accumulation_steps // ranks.world_size

    # Logging. A run compiles before its first step, so that no step's time includes the compiler.
    metrics = Metrics(config, ranks, model, view or Lines(), progress, before.config)
    resumed = f"resumed {start.latest} at step {progress.iter_num:,}" if resumes else ""
    del before, start  # their tensors are the old file, mapped into memory
    metrics.start(len(train_file), len(eval_files["val"]))
    for line in filter(None, (resumed, fitted)):
        metrics.print(line)
    if not config.eval_only:
        with metrics.paused("compiling" if config.compile else "starting"):
            seconds = distributed.first_pass(
                trained, config.micro_batch, config.model.block_size, ranks, precision()
            )
        if config.compile:
            metrics.print(f"compiled, with a first pass, in {seconds:.1f} s, which are in no step's time")
        if ranks.is_main:
            save_config(replace(config, init_from=progress.began), out_dir)
    profile = Profile(config, progress.iter_num, ranks, metrics)
    saver = checkpoint.Saver(model, optimizer, scaler, config, ranks, tokenizer, data)
    sample_tokenizer = tokenizer_for_samples(tokenizer, model, config, ranks, metrics)
    skips = SkippedSteps(progress.skipped, ranks.device)

    while True:
        # The rate is a function of the step alone: a resumed run needs no state for it.
        lr = learning_rate(progress.iter_num, config)
        last = progress.iter_num >= config.max_iters or config.eval_only

        # Evaluate now and then, and save what was evaluated. A run that resumes from there has done it.
        due = progress.iter_num % config.eval_interval == 0 and not progress.evaluated
        if due or last:
            profile.finish(progress.iter_num)
            with metrics.paused("evaluating"):
                losses = estimate_loss(model, eval_files, config, ranks, precision, metrics.part)
                progress.evaluated = True
                metrics.evaluation(progress.iter_num, losses, lr)
                if sample_tokenizer is not None:
                    metrics.print(sample_text(model, sample_tokenizer, config))
                # Weights that give no loss are not worth what they would replace.
                if progress.iter_num > 0 and not config.eval_only and math.isfinite(losses["val"]):
                    is_best = losses["val"] < progress.best_val_loss
                    progress.best_val_loss = min(losses["val"], progress.best_val_loss)
                    progress.skipped = int(skips.total)
                    metrics.flush()
                    saver.save(progress, is_best)
            if last or asked_to_stop(stop, ranks):
                break

        profile.before(progress.iter_num)
        for group in optimizer.param_groups:
            group["lr"] = lr
        share = islice(micro_batches, accumulation)
        loss, grad_norm = train_step(
            trained, optimizer, scaler, share, accumulation, config.grad_clip, precision
        )
        # Asked before anything waits for a GPU: a rank that is lost is noticed here.
        stopping = asked_to_stop(stop, ranks)
        skips.count(grad_norm)
        # A GPU is waited for only in the steps that are logged.
        if progress.iter_num % config.log_interval == 0 and skips.in_a_row >= HOPELESS:
            raise ValueError(no_longer_learns(progress, skips, config))
        metrics.step(progress.iter_num, loss, grad_norm, lr, skips.total)
        profile.after(progress.iter_num)
        progress.iter_num += 1
        progress.position += config.sequences
        progress.evaluated = False
        saver.check()

        # Stop between two steps, but not after one that was skipped: float16 may be looking for its scale.
        if stopping and progress.iter_num < config.max_iters and not skips.in_a_row:
            progress.skipped = int(skips.total)
            metrics.flush()
            saver.save(progress, best=False)
            break

    with metrics.paused("saving"):
        saver.wait()
    profile.finish(progress.iter_num)
    if not last:
        metrics.stop(progress.iter_num, stop.received if stop else None)
    elif not config.eval_only:
        metrics.done(progress.iter_num, progress.best_val_loss)
    metrics.close()


def prepare(
    model: GPT, config: TrainConfig, ranks: Ranks
) -> tuple[nn.Module, Optimizer, torch.amp.GradScaler]:
    """What is trained (the model, compiled, in its strategy), what trains it, and its loss scale."""
    trained = distributed.parallel(model, config.strategy, config.compile, config.dtype, ranks)
    optimizer = optimizer_for(model, config, ranks.device_type)
    # float16 has few exponents: the loss is scaled up so that small gradients do not become zero.
    return trained, optimizer, torch.amp.GradScaler(ranks.device_type, enabled=config.dtype == "float16")


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    micro_batches: Iterable[Batch],
    accumulation: int,
    grad_clip: float,
    precision: Precision,
) -> tuple[Tensor, Tensor]:
    """One step of the optimizer over `accumulation` micro-batches of (inputs, targets).

    Returns (mean loss on this rank, norm of the whole gradient before clipping) as tensors on the device:
    nothing here waits for a GPU. Where the norm is not finite, the step is skipped.
    """
    losses = []
    for i, (idx, targets) in enumerate(micro_batches, start=1):
        # Gradients add up in .grad; ranks need to exchange them only once, in the last backward pass.
        with distributed.exchange(model, i == accumulation):
            with precision():
                _, loss = model(idx, targets)
            # The sum of the micro-batches' gradients is to be that of the mean over all of them.
            loss = loss / accumulation
            scaler.scale(loss).backward()
        losses.append(loss.detach())
    scaler.unscale_(optimizer)
    grad_norm = clip_gradient(model.parameters(), grad_clip)
    step_if_finite(optimizer, scaler, grad_norm)
    # None instead of zeros: the memory is free until the next backward pass.
    optimizer.zero_grad(set_to_none=True)
    return torch.stack(losses).sum(), grad_norm


def read_ahead(file: TokenFile, position: int, size: int, ranks: Ranks) -> Iterator[Batch]:
    """This rank's micro-batches of `size` windows, from `position` of the run on.

    Each is assembled, and sent to the device, while the one before is computed. The windows of a step are
    dealt out by micro-step, then by rank, so a step has the same ones whatever the number of ranks.
    """

    def assemble(i: int) -> Batch:
        start = position + (i * ranks.world_size + ranks.rank) * size
        return to_device(file.batch(start, size), ranks.device)

    start_thread = partial(torch.cuda.set_device, ranks.device) if ranks.device_type == "cuda" else None
    with ThreadPoolExecutor(1, initializer=start_thread) as thread:
        ahead = thread.submit(assemble, 0)
        for i in count(1):
            batch = ahead.result()
            ahead = thread.submit(assemble, i)
            yield batch


@torch.no_grad()
def estimate_loss(
    model: GPT,
    files: dict[str, TokenFile],
    config: TrainConfig,
    ranks: Ranks,
    precision: Precision,
    part: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Mean loss over the first eval_iters micro-batches of each file: always the same, shared by all ranks.

    Draws no random numbers: how often a run is evaluated changes nothing else in it. Calls `part` with the
    micro-batches that are done, and with all of them.
    """
    model.eval()
    losses = {}
    for number, (split, file) in enumerate(files.items()):
        total = torch.zeros((), device=ranks.device)
        for first in range(0, config.eval_iters, ranks.world_size):
            part(number * config.eval_iters + first, len(files) * config.eval_iters)
            i = first + ranks.rank
            batch = file.batch(i * config.micro_batch, config.micro_batch)
            idx, targets = to_device(batch, ranks.device)
            # Shards are gathered by all ranks together, so those to spare in the last round compute as well.
            with precision():
                _, loss = model(idx, targets)
            if i < config.eval_iters:
                total += loss
        losses[split] = ranks.sum(total).item() / config.eval_iters
    model.train()
    return losses


def asked_to_stop(stop: StopRequest | None, ranks: Ranks) -> bool:
    """Whether a signal has reached any rank: they stop after the same step."""
    return ranks.any(stop is not None and stop.received is not None)


def nothing_to_do(latest: Path, saved: Checkpoint, config: TrainConfig, ranks: Ranks) -> str:
    """Why a run that is resumed makes no step, and what makes some."""
    planned = saved.config.get("max_iters", config.max_iters)
    if saved.iter_num < planned:
        position = f"at step {saved.iter_num:,} of {planned:,}, past max_iters={config.max_iters}"
        return f"{latest} is {position}. To go on:\n  {resume_command(config, ranks, max_iters=planned)}"
    longer = twice_as_long(replace(config, max_iters=saved.iter_num))
    return (
        f"{latest} is of a finished run: all {saved.iter_num:,} steps are made. To train further:\n"
        f"  {resume_command(config, ranks, **longer)}\n"
        f"To start over, delete {latest.parent}/*.pt, or give another --out_dir."
    )


def no_longer_learns(progress: Progress, skips: SkippedSteps, config: TrainConfig) -> str:
    """Why a run is given up, and what it can go on from."""
    latest = Path(config.out_dir, "ckpt.pt")
    good = f"the last good checkpoint is {latest}" if latest.exists() else "there is no checkpoint yet"
    return (
        f"the gradient has not been finite for the last {skips.in_a_row} steps, up to step "
        f"{progress.iter_num}: try a lower learning_rate than {config.learning_rate}, or another seed; {good}"
    )


def known_tokenizer(
    data: dict[str, Any], before: dict[str, Any], model: GPT, data_dir: Path
) -> dict[str, Any]:
    """The tokenizer to record: that of the data, or of the run `before` where the data do not name it.

    Data without a tokenizer are GPT-2's, unless the model has fewer symbols than that.
    """
    vocab_size = model.config.vocab_size or 0
    if data["kind"] == "gpt2" and vocab_size < GPT2_VOCAB_SIZE:
        data = unknown(
            vocab_size,
            f"vocab_size={vocab_size} is too small for GPT-2's encoding, and {data_dir} has no "
            "tokenizer.json or meta.pkl that names another",
        )
    return before if data["kind"] == "unknown" and before["kind"] not in ("unknown", "gpt2") else data


def tokenizer_for_samples(
    described: dict[str, Any], model: GPT, config: TrainConfig, ranks: Ranks, metrics: Metrics
) -> Tokenizer | None:
    """The tokenizer of eval_sample's texts; None, and a line that says why, where none can be written."""
    tokenizer, reason = None, ""
    # With fsdp all ranks take part in a sample, or none does.
    if config.eval_sample > 0 and (ranks.is_main or config.strategy == "fsdp"):
        try:
            tokenizer = from_dict(described)
        except (ValueError, OSError) as error:
            reason = str(error)
    vocab_size = model.config.vocab_size or 0
    if tokenizer is not None and tokenizer.start_id >= vocab_size:
        reason = f"they would start from the id {tokenizer.start_id}, and vocab_size={vocab_size}"
    if described["kind"] == "unknown" or reason:
        metrics.print(f"samples are left out: {reason or described['why']}")
    return None if ranks.any(bool(reason)) else tokenizer


def sample_text(model: GPT, tokenizer: Tokenizer, config: TrainConfig) -> str:
    """A text of eval_sample tokens; the random numbers of the training stay untouched."""
    settings = SampleConfig(max_new_tokens=config.eval_sample)
    generator = torch.Generator(config.device).manual_seed(config.seed)
    model.eval()
    with torch.compiler.set_stance("force_eager"), autocast(config.device, config.dtype):
        try:
            text = generate(model, tokenizer, [tokenizer.start_id], settings, generator)
        except ValueError as error:  # logits that are not finite: the training goes on without a sample
            text = f"no sample: {error}"
    model.train()
    return text


def trial(size: int, model: GPT, config: TrainConfig, ranks: Ranks, precision: Precision) -> None:
    """Two steps of micro-batches of `size` by this rank alone. At the end memory is as full as in any step:
    the moments are there, the gradients of the micro-batch before, and DDP's buckets beside them."""
    alone = replace(ranks, world_size=1, backend=None, hosts=None)
    buckets = torch.empty_like(nn.utils.parameters_to_vector(model.parameters())) if ranks.backend else None
    trained, optimizer, scaler = prepare(model, config, alone)
    idx = torch.zeros(size, model.config.block_size, dtype=torch.int64)
    batch = to_device((idx, idx.clone()), ranks.device)
    for _ in range(2):
        train_step(trained, optimizer, scaler, repeat(batch, 2), 2, config.grad_clip, precision)
    del buckets
