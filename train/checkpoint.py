"""Checkpoints: out_dir/ckpt.pt is the latest, out_dir/best.pt the one of the lowest validation loss.

The format is nanoGPT's, with more beside it: plain values and tensors, read with weights_only. A file is
written under a temporary name, flushed to the disk and renamed, so what is called ckpt.pt is whole whatever
happens.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gpt.model import GPT
from gpt.pretrained import MODEL_ARGS, from_checkpoint, from_hugging_face
from train.config import TrainConfig
from train.distributed import Ranks

GPT2_PADDED_VOCAB_SIZE = 50304  # 50257 rounded up to a multiple of 64, for the tensor cores


def initial_model(config: TrainConfig, tokens: dict[str, Any], device: str) -> tuple[GPT, dict[str, Any]]:
    """The model that `config.init_from` names, on `device`, and the checkpoint to resume ({} for a new run).

    `tokens` describes the tokenizer of the data. Raises ValueError where data, flags and checkpoint disagree.
    """
    source, wanted = config.init_from, config.model
    latest = Path(config.out_dir, "ckpt.pt")
    if source == "auto":
        source = "resume" if latest.exists() else "scratch"
    if source == "scratch":
        vocab_size = wanted.vocab_size or len(tokens.get("symbols", ())) or GPT2_PADDED_VOCAB_SIZE
        return GPT(replace(wanted, vocab_size=vocab_size), device).to(device), {}
    if source.startswith("gpt2"):
        model = from_hugging_face(source, {"dropout": wanted.dropout, "kernels": wanted.kernels}, device)
        return _cropped(model, wanted.block_size), {}

    path = latest if source == "resume" else Path(source)
    if not path.suffix and not path.exists():
        raise ValueError(
            f"init_from={source!r} is none of scratch, resume, auto, gpt2*, or the path of a ckpt.pt"
        )
    model, checkpoint = from_checkpoint(path, device, dropout=wanted.dropout, kernels=wanted.kernels)
    if checkpoint.get("tokenizer", tokens) != tokens:
        raise ValueError(
            f"{path} was trained with another tokenizer or alphabet than data/{config.dataset} has"
        )
    if source != "resume":
        return _cropped(model, wanted.block_size), {}
    default = TrainConfig().model
    for name in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "activation"):
        asked, has = getattr(wanted, name), getattr(model.config, name)
        if asked not in (has, getattr(default, name)):
            raise ValueError(
                f"{path} has {name}={has}, and {name}={asked} was asked for; leave it out to resume"
            )
    return model, checkpoint


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
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own})
    if checkpoint.get("scaler"):
        scaler.load_state_dict(checkpoint["scaler"])
    rng = checkpoint.get("rng", [])
    if ranks.rank < len(rng):
        torch.set_rng_state(rng[ranks.rank]["cpu"])
        if ranks.device_type == "cuda" and "cuda" in rng[ranks.rank]:
            torch.cuda.set_rng_state(rng[ranks.rank]["cuda"], ranks.device)


def save(folder: Path, checkpoint: dict[str, Any], best: bool) -> None:
    """Replaces ckpt.pt and, for the best so far, best.pt. Raises OSError; what was there stays whole."""
    latest = folder / "ckpt.pt"
    temporary = folder / "ckpt.pt.tmp"
    try:
        with temporary.open("wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(latest)
        if best:  # the same bytes under a second name; the next save replaces the name ckpt.pt, not the bytes
            os.link(latest, temporary)
            temporary.replace(folder / "best.pt")
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


def _cropped(model: GPT, block_size: int) -> GPT:
    if block_size < model.config.block_size:
        model.crop_block_size(block_size)
    return model


def _rng_state(device: str) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.startswith("cuda"):
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _flush_folder(folder: Path) -> None:
    """Makes the renames in `folder` outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
