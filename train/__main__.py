"""python -m train: a GPT from tokens to weights, on one device or, under torchrun, on many.

The flags are those of train/config.py. This file is the whole run, to be read from top to bottom.
"""

import math
import sys
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

from gpt import cli, tokenizer
from gpt.device import autocast
from gpt.model import GPT
from gpt.sample import SampleConfig, generate
from gpt.tokenizer import Tokenizer
from train import checkpoint, distributed, fit
from train.config import TrainConfig, asked_batch_size, config_file, parse, resolve, save_config
from train.data import TokenFile, describe, preflight, to_device
from train.distributed import Ranks
from train.metrics import Metrics
from train.optim import clip_gradient, learning_rate, optimizer_for, step_if_finite
from train.profiler import Profile
from train.signals import StopRequest
from train.view import Lines, open_view

Batch = tuple[Tensor, Tensor]
Precision = Callable[[], AbstractContextManager]


def main() -> None:
    config, given = parse(sys.argv[1:])
    try:
        ranks = distributed.start(config.backend, config.device, config.timeout)
        if config.print_config:
            text = config_file(resolve(config, ranks), given)
            if ranks.is_main:
                print(text, end="")
        else:
            with open_view() as view, checkpoint.locked_folder(config, ranks):
                train(config, ranks, given, StopRequest(), view)
    except (RuntimeError, MemoryError) as error:
        if fit.out_of_memory(error):
            raise ValueError(fit.explain(error, config)) from error
        if not distributed.lost_rank(error):
            raise
        raise OSError(
            f"another rank died or did not answer within timeout={config.timeout} s ({error}); "
            "--init_from=resume goes on from the last checkpoint"
        ) from error
    distributed.stop(ranks)


def train(
    config: TrainConfig,
    ranks: Ranks,
    given: Mapping[str, Sequence[str]] | None = None,
    stop: StopRequest | None = None,
    view: Lines | None = None,
) -> None:
    """The whole run, from `config` to the last checkpoint, or until `stop` asks for an end.

    `given` are the values of the flags that were set explicitly, `view` is where the run is shown.
    """
    given = given or {}
    out_dir = Path(config.out_dir)
    torch.manual_seed((config.seed + ranks.rank) % 2**64)  # the largest seed has ranks too
    torch.backends.cuda.matmul.allow_tf32 = True  # where float32 is asked for on a GPU; no effect on a CPU

    # Settings that this machine cannot meet are refused before anything is written.
    config = resolve(config, ranks)
    start = checkpoint.find_start(config, given, ranks)
    if ranks.is_main:
        checkpoint.make_folder(out_dir)
    config = replace(config, dataset=start.dataset)
    data_dir = Path("data", config.dataset)
    tokens = describe(data_dir)
    model, resumed = checkpoint.initial_model(config, given, tokens, ranks, start)
    config = replace(config, model=model.config)
    tokens = known_tokenizer(tokens, resumed.get("tokenizer", tokens), model, data_dir)
    step: int = resumed.get("iter_num", 0)
    best_val_loss = float(resumed.get("best_val_loss", torch.inf))
    before: dict[str, Any] = resumed.get("config", {})
    began: str = resumed.get("began", before.get("init_from", config.init_from))  # what config.py begins from
    if ranks.differ(step):
        raise ValueError(
            f"the ranks found different checkpoints: all machines must share out_dir={config.out_dir!r}"
        )
    if resumed and step >= config.max_iters and not config.eval_only:
        if ranks.is_main:
            print(f"{out_dir} holds a finished run: all max_iters={config.max_iters} steps are made")
        return

    precision = partial(autocast, ranks.device, config.dtype)
    found = ""
    if config.batch_size == "auto":
        steps_on = partial(trial, config=config, ranks=ranks, precision=precision)
        config, found = fit.micro_batch(config, asked_batch_size(given), model, ranks, steps_on)
    trained, optimizer, scaler = prepare(model, config, ranks)
    if resumed:
        checkpoint.restore(resumed, optimizer, scaler, ranks)

    train_file = TokenFile(data_dir / "train.bin", config.model, config.seed)
    eval_files = {  # of another seed: not the windows that training is about to see
        split: TokenFile(data_dir / f"{split}.bin", config.model, config.seed + 1)
        for split in ("train", "val")
    }
    data = preflight(eval_files, resumed, config.dataset)
    accumulation = config.gradient_accumulation_steps // ranks.world_size
    position: int = resumed.get("position", step * config.sequences)
    micro_batches = read_ahead(train_file, position, config.micro_batch, ranks)
    # nanoGPT's checkpoints are not known to follow an evaluation.
    was_evaluated = resumed.get("evaluated", "position" in resumed)
    metrics = Metrics(config, ranks, model, view or Lines(), resumed, was_evaluated)
    metrics.start(len(train_file), len(eval_files["val"]))
    if found:
        metrics.print(found)
    if not config.eval_only:
        with metrics.paused("compiling" if config.compile else "starting"):
            seconds = distributed.first_pass(
                trained, config.micro_batch, config.model.block_size, ranks, precision()
            )
        if config.compile:
            metrics.print(f"compiled, with a first pass, in {seconds:.1f} s, which are in no step's time")
        if ranks.is_main:
            save_config(replace(config, init_from=began), out_dir)
    profile = Profile(config, step, ranks, metrics)
    saver = checkpoint.Saver(out_dir, config.keep_last)
    shows_sample = config.eval_sample > 0 and (ranks.is_main or config.strategy == "fsdp")
    example, why_not = sampler(tokens, model) if shows_sample else (None, "")
    if tokens["kind"] == "unknown" or why_not:
        metrics.print(f"samples are left out: {why_not or tokens['why']}")
    if ranks.any(bool(why_not)):  # with fsdp all ranks draw a sample, or none does
        example = None

    def save(is_best: bool, evaluated: bool) -> None:
        saver.wait()
        state = checkpoint.contents(model, optimizer, scaler, config, ranks) | {
            "iter_num": step, "position": position, "evaluated": evaluated, "tokenizer": tokens,
            "data": data, "best_val_loss": best_val_loss, "skipped": metrics.skipped_steps(),
            "began": began,
        }  # fmt: skip
        if ranks.is_main:
            metrics.flush()
            saver.save(state, is_best)

    def wants_to_stop() -> bool:
        return ranks.any(stop is not None and stop.received is not None)

    def say_where_it_stopped() -> None:
        saver.wait()
        reason = f"stopped by {stop.received}" if stop and stop.received else "stopped with another rank"
        latest = out_dir / "ckpt.pt"
        how = f"--init_from=resume goes on from {latest}" if latest.exists() else "nothing is saved yet"
        metrics.stop(step, reason, how)

    evaluated = step if was_evaluated else -1
    resumed.clear()  # its tensors are the old file, mapped
    while True:
        lr = learning_rate(step, config)
        last = step >= config.max_iters or config.eval_only
        if (step % config.eval_interval == 0 and step != evaluated) or last:
            profile.finish(step)
            with metrics.paused("evaluating"):
                losses = evaluate(model, eval_files, config, ranks, precision)
                metrics.evaluation(step, losses, lr)
                if example is not None:
                    metrics.print(sample(model, example, config))
                # Weights that give no loss are not worth what they would replace.
                if step > 0 and not config.eval_only and math.isfinite(losses["val"]):
                    is_best = losses["val"] < best_val_loss
                    if is_best:
                        best_val_loss = losses["val"]
                    save(is_best, evaluated=True)
            if not last and wants_to_stop():
                say_where_it_stopped()
                break
        if last:
            break

        profile.before(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        share = islice(micro_batches, accumulation)
        loss, grad_norm = update(trained, optimizer, scaler, share, accumulation, config.grad_clip, precision)
        # Asked before anything waits for a GPU: a rank that is lost is noticed here.
        asked = wants_to_stop()
        metrics.step(step, loss, grad_norm, lr)
        profile.after(step)
        position += config.sequences
        step += 1
        saver.check()
        if asked and step < config.max_iters and not metrics.last_was_skipped():
            save(is_best=False, evaluated=False)
            say_where_it_stopped()
            break
    saver.wait()
    profile.finish(step)
    metrics.close()


def prepare(
    model: GPT, config: TrainConfig, ranks: Ranks
) -> tuple[nn.Module, torch.optim.Optimizer, torch.amp.GradScaler]:
    """What is trained (the model, compiled, in its strategy), what trains it, and its loss scale."""
    trained = distributed.parallel(model, config.strategy, config.compile, config.dtype, ranks)
    optimizer = optimizer_for(model, config, ranks.device_type)
    return trained, optimizer, torch.amp.GradScaler(ranks.device_type, enabled=config.dtype == "float16")


def trial(size: int, model: GPT, config: TrainConfig, ranks: Ranks, precision: Precision) -> None:
    """Two steps of micro-batches of `size` by this rank alone. At the end memory is as full as in any step:
    the moments are there, the gradients of the micro-batch before, and DDP's buckets beside them."""
    alone = replace(ranks, world_size=1, backend=None, hosts=None)
    buckets = torch.empty_like(nn.utils.parameters_to_vector(model.parameters())) if ranks.backend else None
    trained, optimizer, scaler = prepare(model, config, alone)
    idx = torch.zeros(size, model.config.block_size, dtype=torch.int64)
    batch = to_device((idx, idx.clone()), ranks.device)
    for _ in range(2):
        update(trained, optimizer, scaler, repeat(batch, 2), 2, config.grad_clip, precision)
    del buckets


def update(
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
        with distributed.exchange(model, i == accumulation):  # ranks exchange gradients once a step
            with precision():
                _, loss = model(idx, targets)
            loss = loss / accumulation
            scaler.scale(loss).backward()
        losses.append(loss.detach())
    scaler.unscale_(optimizer)
    grad_norm = clip_gradient(model.parameters(), grad_clip)
    step_if_finite(optimizer, scaler, grad_norm)
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

    start_thread = partial(torch.cuda.set_device, ranks.device) if ranks.device.startswith("cuda") else None
    with ThreadPoolExecutor(1, initializer=start_thread) as thread:
        ahead = thread.submit(assemble, 0)
        for i in count(1):
            batch = ahead.result()
            ahead = thread.submit(assemble, i)
            yield batch


@torch.no_grad()
def evaluate(
    model: GPT, files: dict[str, TokenFile], config: TrainConfig, ranks: Ranks, precision: Precision
) -> dict[str, float]:
    """Mean loss over the first eval_iters micro-batches of each file: always the same, shared by all ranks.

    Draws no random numbers: how often a run is evaluated changes nothing else in it.
    """
    model.eval()
    losses = {}
    for split, file in files.items():
        total = torch.zeros((), device=ranks.device)
        for first in range(0, config.eval_iters, ranks.world_size):
            i = first + ranks.rank
            batch = file.batch(i * config.micro_batch, config.micro_batch)
            idx, targets = to_device(batch, ranks.device)
            with precision():
                _, loss = model(idx, targets)  # by all ranks, as shards need it, the last ones to spare too
            if i < config.eval_iters:
                total += loss
        losses[split] = ranks.sum(total).item() / config.eval_iters
    model.train()
    return losses


def known_tokenizer(
    data: dict[str, Any], before: dict[str, Any], model: GPT, data_dir: Path
) -> dict[str, Any]:
    """The tokenizer to keep: that of the data, or of the run `before` where the data do not name it.

    Data without a tokenizer are GPT-2's, unless the model has fewer symbols than that.
    """
    vocab_size = model.config.vocab_size or 0
    if data["kind"] == "gpt2" and vocab_size < tokenizer.GPT2_VOCAB_SIZE:
        data = tokenizer.unknown(
            vocab_size,
            f"vocab_size={vocab_size} is too small for GPT-2's encoding, and {data_dir} has no "
            "tokenizer.json or meta.pkl that names another",
        )
    return before if data["kind"] == "unknown" and before["kind"] not in ("unknown", "gpt2") else data


def sampler(described: dict[str, Any], model: GPT) -> tuple[Tokenizer | None, str]:
    """(what samples are written by, ""), or (None, why no sample can be drawn): a run goes on without."""
    vocab_size = model.config.vocab_size or 0
    try:
        tokens = tokenizer.from_dict(described)
    except (ValueError, OSError) as error:
        return None, str(error)
    if tokens.start_id >= vocab_size:
        return None, f"they would start from the id {tokens.start_id}, and vocab_size={vocab_size}"
    return tokens, ""


def sample(model: GPT, tokens: Tokenizer, config: TrainConfig) -> str:
    """A text of eval_sample tokens; the random numbers of the training stay untouched."""
    settings = SampleConfig(max_new_tokens=config.eval_sample)
    generator = torch.Generator(config.device).manual_seed(config.seed)
    model.eval()
    with torch.compiler.set_stance("force_eager"), autocast(config.device, config.dtype):
        try:
            text = generate(model, tokens, [tokens.start_id], settings, generator)
        except ValueError as error:  # logits that are not finite: the training goes on without a sample
            text = f"no sample: {error}"
    model.train()
    return text


if __name__ == "__main__":
    cli.run(main)
