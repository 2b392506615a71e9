"""Checkpoints: out_dir/ckpt.pt is the latest, out_dir/best.pt the one of the lowest validation loss.

The format is nanoGPT's, with more beside it: plain values and tensors, read with weights_only. A file is
written under a temporary name, flushed to the disk and renamed, so what is called ckpt.pt is whole whatever
happens.
"""

import os
import shutil
from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gpt.model import GPT
from gpt.pretrained import (
    GPT2_NAMES,
    MODEL_ARGS,
    from_checkpoint,
    from_hugging_face,
    hugging_face_tokenizer,
    is_hugging_face,
)
from train.config import TrainConfig
from train.distributed import Ranks

GPT2_PADDED_VOCAB_SIZE = 50304  # 50257 rounded up to a multiple of 64, for the tensor cores


def initial_model(
    config: TrainConfig, given: Container[str], tokens: dict[str, Any], device: str
) -> tuple[GPT, dict[str, Any]]:
    """The model that `config.init_from` names, on `device`, and the checkpoint to resume ({} for a new run).

    `given` are the flags that were set, `tokens` describes the tokenizer of the data. Raises ValueError where
    flags, checkpoint and data disagree.
    """
    source, wanted = config.init_from, config.model
    latest = Path(config.out_dir, "ckpt.pt")
    if source == "auto":
        source = "resume" if latest.exists() else "scratch"
    if source == "scratch":
        vocab_size = wanted.vocab_size or len(tokens.get("symbols", ())) or GPT2_PADDED_VOCAB_SIZE
        return GPT(replace(wanted, vocab_size=vocab_size), device).to(device), {}

    if is_hugging_face(source):
        model = from_hugging_face(source, {"dropout": wanted.dropout, "kernels": wanted.kernels}, device)
        checkpoint: dict[str, Any] = {"tokenizer": hugging_face_tokenizer(source)}
    else:
        source_path = latest if source == "resume" else Path(source)
        if not source_path.suffix and not source_path.exists():
            known = ", ".join(("scratch", "resume", "auto", *GPT2_NAMES))
            raise ValueError(f"init_from={source!r} is none of {known}, or the path of a ckpt.pt")
        overrides = {"dropout": wanted.dropout, "kernels": wanted.kernels}
        model, checkpoint = from_checkpoint(source_path, device, **overrides)
    where = str(latest) if source == "resume" else source
    if checkpoint.get("tokenizer", tokens) != tokens:
        raise ValueError(
            f"{where} was trained with another tokenizer or alphabet than data/{config.dataset} has"
        )
    if source != "resume" and wanted.block_size < model.config.block_size and "block_size" in given:
        model.crop_block_size(wanted.block_size)
    for name in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "activation"):
        asked, has = getattr(wanted, name), getattr(model.config, name)
        if name in given and asked != has:
            raise ValueError(f"{where} has {name}={has}, and {name}={asked} was asked for; leave it out")
    return model, checkpoint if source == "resume" else {}


def contents(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    config: TrainConfig,
    ranks: Ranks,
) -> dict[str, Any]:
    """What nanoGPT keeps, under its names, and beside it what resuming exactly needs. All ranks call it."""
    flat = config.flat()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": {name: flat[name] for name in MODEL_ARGS},
        "config": flat,
        "activation": config.model.activation,
        "kernels": config.model.kernels,
        "scaler": scaler.state_dict(),
        "rng": ranks.gather(_rng_state(ranks.device)),
    }


def restore(
    checkpoint: dict[str, Any], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, ranks: Ranks
) -> None:
    """Optimizer, loss scale and this rank's random numbers, as they were. Raises ValueError.

    Of the optimizer, moments and step counts; learning rate, weight decay and betas stay those of this run.
    """
    own = optimizer.state_dict()["param_groups"]
    saved = checkpoint.get("optimizer", {})
    sizes = [[len(group["params"]) for group in groups] for groups in (saved.get("param_groups", []), own)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the checkpoint's optimizer has groups of {sizes[0]} tensors, this run's of {sizes[1]}"
        )
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(params):
        moments = saved.get("state", {}).get(i, {"exp_avg": p, "exp_avg_sq": p})  # none before the first step
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in moments or moments[name].shape != p.shape:
                found = tuple(moments[name].shape) if name in moments else "missing"
                raise ValueError(
                    f"the checkpoint's optimizer: {name} of tensor {i} is {found}, not {tuple(p.shape)}"
                )
    optimizer.load_state_dict({"state": saved.get("state", {}), "param_groups": own})
    if checkpoint.get("scaler"):
        scaler.load_state_dict(checkpoint["scaler"])
    rng = checkpoint.get("rng", [])
    if ranks.rank < len(rng):
        state = rng[ranks.rank]
        torch.set_rng_state(state["cpu"])
        if ranks.device_type in state.keys() - {"cpu"}:
            _device_rng(ranks.device).set_rng_state(state[ranks.device_type])


def save(folder: Path, checkpoint: dict[str, Any], best: bool) -> None:
    """Replaces ckpt.pt and, for the best so far, best.pt. Raises OSError; what was there stays whole."""
    latest, temporary = folder / "ckpt.pt", folder / "ckpt.pt.tmp"
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(latest)
        if best:
            _duplicate(latest, folder / "best.pt")
        _flush_folder(folder)
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError when the disk is full
        temporary.unlink(missing_ok=True)
        kept = "the previous one is whole" if latest.exists() else "there is none yet"
        raise OSError(f"the checkpoint {latest} could not be written ({error}); {kept}") from None


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


def _rng_state(device: str) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device != "cpu":
        state[device.partition(":")[0]] = _device_rng(device).get_rng_state()
    return state


def _device_rng(device: str) -> Any:
    """torch.cuda or torch.mps: the generator of this rank's device, which is the current one."""
    return getattr(torch, device.partition(":")[0])


def _duplicate(source: Path, target: Path) -> None:
    """Replaces `target` by the file `source`: its second name, or a copy where there are no links.

    Saving never writes into a file that has a name, so neither name can change the other's bytes.
    """
    temporary = target.with_name(f"{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
    temporary.replace(target)


def _flush_folder(folder: Path) -> None:
    """Makes the renames in `folder` outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
