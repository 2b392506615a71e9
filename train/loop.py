"""A training run from top to bottom: `train`, then its helpers.

The order is that of nanoGPT's train.py. The main differences: a resumed run makes the same steps, bit for
bit, as a run that never stopped; a signal ends a run with a checkpoint; a step whose gradient is not finite
is skipped. docs/from-nanogpt.md has the full list.
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
from torch.distributed.tensor import DTensor

from gpt import atomic, cli
from gpt.checkpoint import Checkpoint
from gpt.device import autocast
from gpt.model import GPT
from gpt.sample import SampleConfig, generate
from gpt.tokenizer import Tokenizer, from_dict, if_large_enough
from train import checkpoint, distributed, fit
from train.checkpoint import Progress
from train.config import TrainConfig, config_file, resolve, resume_command, twice_as_long
from train.data import TokenFile, describe, preflight, to_device
from train.distributed import Ranks
from train.metrics import Metrics
from train.optim import SkippedSteps, learning_rate, optimizer_for, step_if_finite
from train.profiler import start_profiler
from train.signals import StopRequest
from train.view import Lines

Batch = tuple[Tensor, Tensor]
Precision = Callable[[], AbstractContextManager]

MAX_SKIPPED_IN_A_ROW = 20  # this many end the run; float16 skips a few to find its loss scale


def train(
    config: TrainConfig,
    ranks: Ranks,
    given: Mapping[str, Sequence[str]] | None = None,
    stop: StopRequest | None = None,
    view: Lines | None = None,
) -> None:
    """Trains until max_iters, or until `stop` receives a signal. With eval_only, only evaluates.

    `given` are the flags that were set, with their values. `view` is the console output. Raises ValueError
    and OSError with a sentence for the user.
    """
    given = given or {}
    out_dir = Path(config.out_dir)
    # Each rank draws its own dropout masks. All ranks initialise weights too, but DDP and FSDP copy
    # rank 0's.
    torch.manual_seed((config.seed + ranks.rank) % 2**64)
    # On a GPU, float32 matrix products may use TF32, as in nanoGPT.
    torch.backends.cuda.matmul.allow_tf32 = True

    # Replace "auto" where the machine decides. This fails early if the machine does not support a setting.
    config = resolve(config, ranks)

    # Start from new weights, from the run's own checkpoint, or from other weights.
    with cli.IfSlow("checking the checkpoint", ranks.is_main):
        start = checkpoint.find_start(config, given, ranks)
    if ranks.is_main and not config.eval_only:
        checkpoint.make_folder(out_dir)
    config = replace(config, dataset=start.dataset)
    data_dir = Path("data", config.dataset)
    tokenizer = describe(data_dir)
    resumes = start.source == "resume"
    with cli.IfSlow("making the model", ranks.is_main):
        # In a new run, `saved` has only defaults.
        model, saved = checkpoint.initial_model(config, given, tokenizer, ranks, start)
    # The checkpoint and config.py of a resumed run say where the run began.
    began_from = saved.config.get("init_from", config.init_from)
    if began_from in ("resume", "auto"):  # auto: a new run; resume: a file of nanoGPT's
        began_from = "scratch"
    config = replace(config, model=model.config, init_from=began_from)
    tokenizer = tokenizer_to_save(tokenizer, saved.tokenizer or tokenizer, model, data_dir)
    if ranks.any(saved.iter_num != ranks.broadcast(saved.iter_num)):
        raise ValueError(
            f"the ranks found different checkpoints: all machines must share out_dir={config.out_dir!r}"
        )
    if resumes and saved.iter_num >= config.max_iters and not config.eval_only:
        if ranks.is_main:
            print(finished_message(start.latest, saved, config, ranks))
        return

    # Wrap the model and make its optimizer.
    precision = partial(autocast, ranks.device, config.dtype)
    fit_message = ""
    # The parser has made batch_size a number. Its last value says whether it was auto.
    if "auto" in given.get("batch_size", ())[-1:]:
        trial = partial(trial_steps, config=config, ranks=ranks, precision=precision)
        config, fit_message = fit.micro_batch(config, model, ranks, trial)
    wrapped, optimizer, scaler = set_up(model, config, ranks)
    progress = Progress.after(saved, config)
    if resumes:
        checkpoint.restore(saved, config, optimizer, scaler, ranks)

    # The data. Evaluation uses a different seed, so it does not score the windows that training reads next.
    train_file = TokenFile(data_dir / "train.bin", config.model, config.seed)
    eval_files = {
        split: TokenFile(data_dir / f"{split}.bin", config.model, config.seed + 1)
        for split in ("train", "val")
    }
    same_data = saved.config.get("dataset") == config.dataset
    with cli.IfSlow("checking the data", ranks.is_main):
        data = preflight(eval_files, saved.data if same_data else {})
    micro_batches = read_ahead(train_file, progress.position, config.micro_batch, ranks)
    # gradient_accumulation_steps is the total over all ranks. So a step has the same windows, however many
    # ranks there are.
    accumulation = config.gradient_accumulation_steps // ranks.world_size

    # Logging. Compile before the first step, so that step times do not include it.
    metrics = Metrics(config, ranks, model, view or Lines(), progress)
    metrics.start(progress, len(train_file), len(eval_files["val"]), saved.config)
    resume_message = f"resumed {start.latest} at step {progress.iter_num:,}" if resumes else ""
    del saved, start  # free the memory maps of the checkpoint file
    for line in filter(None, (resume_message, fit_message)):
        metrics.print(line)
    if not config.eval_only:
        with metrics.paused("compiling" if config.compile else "starting"):
            seconds = distributed.first_pass(
                wrapped, config.micro_batch, config.model.block_size, ranks, precision()
            )
        if config.compile:
            metrics.print(f"compiled in {seconds:.1f} s, including a first pass")
        if ranks.is_main:
            atomic.write(out_dir / "config.py", config_file(config))
    profiler = start_profiler(config, progress.iter_num, ranks, metrics)
    saver = checkpoint.Saver(model, optimizer, scaler, config, ranks, tokenizer, data)
    sample_tokenizer = tokenizer_for_samples(tokenizer, model, config, ranks, metrics)
    skips = SkippedSteps(progress.skipped, ranks.device)

    while True:
        # The learning rate depends on the step alone, so a checkpoint need not store it.
        lr = learning_rate(progress.iter_num, config)
        no_steps_left = progress.iter_num >= config.max_iters or config.eval_only

        # Evaluate at intervals and at the end, then save. A run resumed from there skips the evaluation.
        evaluation_due = progress.iter_num % config.eval_interval == 0 and not progress.evaluated
        if evaluation_due or no_steps_left:
            with metrics.paused("evaluating"):
                losses = estimate_loss(model, eval_files, config, ranks, precision, metrics.part)
                progress.evaluated = True
                metrics.evaluation(progress.iter_num, losses, lr)
                if sample_tokenizer is not None:
                    metrics.print(sample_text(model, sample_tokenizer, config))
                # Weights whose loss is not finite must not replace a good checkpoint.
                if progress.iter_num > 0 and not config.eval_only and math.isfinite(losses["val"]):
                    is_best = losses["val"] < progress.best_val_loss
                    progress.best_val_loss = min(losses["val"], progress.best_val_loss)
                    progress.skipped = int(skips.total)
                    metrics.flush()
                    saver.save(progress, is_best)
            if no_steps_left or asked_to_stop(stop, ranks):
                break

        for group in optimizer.param_groups:
            group["lr"] = lr
        batches = islice(micro_batches, accumulation)
        loss, grad_norm = train_step(
            wrapped, optimizer, scaler, batches, accumulation, config.grad_clip, precision
        )
        # Ask before waiting for the GPU: a dead rank shows up here as an error, not as a hang.
        stopping = asked_to_stop(stop, ranks)
        skips.count(grad_norm)
        # Only logged steps wait for the GPU.
        if progress.iter_num % config.log_interval == 0 and skips.in_a_row >= MAX_SKIPPED_IN_A_ROW:
            saved_at = "there is no checkpoint yet"
            if (latest := out_dir / "ckpt.pt").exists():
                saved_at = f"the last good checkpoint is {latest}"
            raise ValueError(
                f"the gradient has not been finite for the last {skips.in_a_row} steps, up to step "
                f"{progress.iter_num}: try a lower learning_rate than {config.learning_rate}, or a different "
                f"seed; {saved_at}"
            )
        metrics.step(progress.iter_num, loss, grad_norm, lr, skips.total)
        if profiler:
            profiler.step()
        progress.iter_num += 1
        progress.position += config.sequences_per_step
        progress.evaluated = False
        saver.check()

        # Stop after this step, unless it was skipped: float16 may still be searching for its loss scale.
        # After the last step, the final evaluation above saves.
        if stopping and progress.iter_num < config.max_iters and not skips.in_a_row:
            progress.skipped = int(skips.total)
            metrics.flush()
            saver.save(progress, best=False)
            break

    with metrics.paused("saving"):
        saver.wait()
    if profiler:
        profiler.stop()
    if not no_steps_left:
        metrics.stop(progress.iter_num, stop.received if stop else None)
    elif not config.eval_only:
        metrics.done(progress.iter_num, progress.best_val_loss)
    metrics.close()


def set_up(
    model: GPT, config: TrainConfig, ranks: Ranks
) -> tuple[nn.Module, torch.optim.Optimizer, torch.amp.GradScaler]:
    """Returns the compiled and wrapped model, its optimizer and its loss scaler."""
    wrapped = distributed.parallel(model, config.strategy, config.compile, config.dtype, ranks)
    optimizer = optimizer_for(model, config, ranks.device_type)
    # float16 has few exponent bits. The loss is scaled up so that small gradients do not become zero.
    return wrapped, optimizer, torch.amp.GradScaler(ranks.device_type, enabled=config.dtype == "float16")


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    micro_batches: Iterable[Batch],
    accumulation: int,
    grad_clip: float,
    precision: Precision,
) -> tuple[Tensor, Tensor]:
    """Makes one step of the optimizer on `accumulation` micro-batches of (inputs, targets).

    Returns (mean loss on this rank, norm of the gradient over all parameters before clipping) as tensors on
    the device, so nothing here waits for the GPU. If the norm is not finite, the step is skipped.
    """
    losses = []
    for i, (idx, targets) in enumerate(micro_batches, start=1):
        # Gradients add up in .grad, so the ranks exchange them only once, in the last backward pass.
        with distributed.exchange(model, i == accumulation):
            with precision():
                _, loss = model(idx, targets)
            # The gradients of the micro-batches are summed. Dividing the loss makes the sum a mean.
            loss = loss / accumulation
            scaler.scale(loss).backward()
        losses.append(loss.detach())
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
    step_if_finite(optimizer, scaler, grad_norm)
    # None instead of zeros frees the memory until the next backward pass.
    optimizer.zero_grad(set_to_none=True)
    return torch.stack(losses).sum(), grad_norm


def read_ahead(file: TokenFile, position: int, size: int, ranks: Ranks) -> Iterator[Batch]:
    """Yields this rank's micro-batches of `size` windows, starting at `position`.

    A thread assembles the next micro-batch and sends it to the device while the current one is being
    computed. Within a step the windows are numbered by micro-batch, then by rank, so a step has the same
    windows on any number of ranks.
    """

    def assemble(i: int) -> Batch:
        start = position + (i * ranks.world_size + ranks.rank) * size
        return to_device(file.batch(start, size), ranks.device)

    select_gpu = partial(torch.cuda.set_device, ranks.device) if ranks.device_type == "cuda" else None
    with ThreadPoolExecutor(1, initializer=select_gpu) as thread:
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
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Returns the mean loss of eval_iters micro-batches of each file: the same ones every time.

    The micro-batches are divided among the ranks. No random numbers are drawn, so evaluating more often
    changes nothing else in a run. `on_progress` is called with the number of finished micro-batches and their
    total.
    """
    model.eval()
    losses = {}
    for number, (split, file) in enumerate(files.items()):
        total = torch.zeros((), device=ranks.device)
        for first in range(0, config.eval_iters, ranks.world_size):
            on_progress(number * config.eval_iters + first, len(files) * config.eval_iters)
            i = first + ranks.rank
            batch = file.batch(i * config.micro_batch, config.micro_batch)
            idx, targets = to_device(batch, ranks.device)
            # FSDP gathers weights collectively, so every rank must run forward, even for a micro-batch that
            # does not count.
            with precision():
                _, loss = model(idx, targets)
            if i < config.eval_iters:
                total += loss
        losses[split] = ranks.sum(total).item() / config.eval_iters
    model.train()
    return losses


def asked_to_stop(stop: StopRequest | None, ranks: Ranks) -> bool:
    """Whether any rank has received a signal. All ranks get the same answer and stop after the same step."""
    return ranks.any(stop is not None and stop.received is not None)


def finished_message(latest: Path, saved: Checkpoint, config: TrainConfig, ranks: Ranks) -> str:
    """The message for a resumed run that has no steps left: why, and the command that trains longer."""
    longer = twice_as_long(replace(config, max_iters=saved.iter_num))
    # If the run has not reached the max_iters of its checkpoint, the command names that number.
    if saved.iter_num < saved.config.get("max_iters", 0):
        longer = {"max_iters": saved.config["max_iters"]}
    return (
        f"the run in {latest} has made {saved.iter_num:,} steps, and max_iters={config.max_iters} leaves no "
        f"more. To train longer:\n  {resume_command(config, ranks, **longer)}\n"
        f"To start over, delete {latest.parent}/*.pt, or give another --out_dir."
    )


def tokenizer_to_save(
    data: dict[str, Any], saved: dict[str, Any], model: GPT, data_dir: Path
) -> dict[str, Any]:
    """The description of the data's tokenizer. If that is unknown, the checkpoint's, unless it is GPT-2's."""
    data = if_large_enough(data, model.config.vocab_size or 0, data_dir)
    return saved if data["kind"] == "unknown" and saved["kind"] not in ("unknown", "gpt2") else data


def tokenizer_for_samples(
    description: dict[str, Any], model: GPT, config: TrainConfig, ranks: Ranks, metrics: Metrics
) -> Tokenizer | None:
    """The tokenizer for eval_sample, or None if that is 0 or this rank does not sample.

    If samples are impossible on any rank, it prints why and returns None.
    """
    if not config.eval_sample:
        return None
    tokenizer, reason = None, ""
    # With FSDP all ranks compute a sample together.
    if ranks.is_main or config.strategy == "fsdp":
        try:
            tokenizer = from_dict(description)
            if tokenizer.start_id >= (model.config.vocab_size or 0):
                raise ValueError(
                    f"the start token {tokenizer.start_id} is outside vocab_size={model.config.vocab_size}"
                )
        except (ValueError, OSError) as error:
            reason = str(error)
    reasons = filter(None, ranks.gather(reason))
    reason = ranks.broadcast(next(reasons, ""))
    if reason:
        metrics.print(f"no samples: {reason}")
        return None
    return tokenizer


def sample_text(model: GPT, tokenizer: Tokenizer, config: TrainConfig) -> str:
    """Samples eval_sample tokens, with a random generator of its own."""
    settings = SampleConfig(max_new_tokens=config.eval_sample)
    generator = torch.Generator(config.device).manual_seed(config.seed)
    model.eval()
    with torch.compiler.set_stance("force_eager"), autocast(config.device, config.dtype):
        try:
            text = generate(model, tokenizer, [tokenizer.start_id], settings, generator)
        except ValueError as error:  # the logits are not finite
            text = f"no sample: {error}"
    model.train()
    return text


def trial_steps(size: int, model: GPT, config: TrainConfig, ranks: Ranks, precision: Precision) -> None:
    """Makes two steps on `model`, a throw-away copy, with micro-batches of `size`, on this rank alone.

    In the second step, memory is as full as it gets in a run: the optimizer has its moments, .grad holds the
    previous micro-batch's gradients, and `buckets` stands in for DDP's.
    """
    alone = replace(ranks, world_size=1, backend=None, hosts=None)
    buckets = torch.empty_like(nn.utils.parameters_to_vector(model.parameters())) if ranks.backend else None
    wrapped, optimizer, scaler = set_up(model, config, alone)
    idx = torch.zeros(size, model.config.block_size, dtype=torch.int64)
    batch = to_device((idx, idx.clone()), ranks.device)
    for _ in range(2):
        train_step(wrapped, optimizer, scaler, repeat(batch, 2), 2, config.grad_clip, precision)
    del buckets
