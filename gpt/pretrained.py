"""Loads and saves trained models, as checkpoints (gpt/checkpoint.py) or in Hugging Face's format of GPT-2."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gpt import checkpoint, cli, hugging_face, tokenizer
from gpt.atomic import replacing
from gpt.checkpoint import Checkpoint
from gpt.model import GPT, RUN_OPTIONS, GPTConfig

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def from_checkpoint(
    path: Path,
    device: str = "cpu",
    dtype: str = "bfloat16",
    saved: Checkpoint | None = None,
    **overrides: Any,
) -> tuple[GPT, Checkpoint]:
    """(model on `device`, checkpoint). Pass the checkpoint as `saved` if it was read before.

    `overrides` are values for options in RUN_OPTIONS.
    """
    saved = saved or checkpoint.read(path)
    # Options that each run chooses do not come from the checkpoint, except dropout.
    options = {k: v for k, v in saved.gpt_config.items() if k not in RUN_OPTIONS or k == "dropout"}
    model = GPT(GPTConfig(**options | overrides), device, dtype)
    model.load_weights(saved.model, path)
    return model.to(device), saved


# ---- which model


def source_of(init_from: str, out_dir: str) -> str:
    """The model that sampling and evaluation load. For "resume" it is the checkpoint in `out_dir`."""
    return str(best_or_latest(Path(out_dir))) if init_from == "resume" else checkpoint_in(init_from)


def best_or_latest(out_dir: Path) -> Path:
    """best.pt if the run has always_save_checkpoint=False, otherwise ckpt.pt."""
    latest, best = out_dir / "ckpt.pt", out_dir / "best.pt"
    others = sorted(out_dir.glob("*.pt"), key=lambda path: path.stat().st_mtime)
    if others and not latest.exists():
        raise FileNotFoundError(
            f"there is no checkpoint {latest}, but there is {others[-1]}: give its name, not the folder"
        )
    return best if best.exists() and not _always_saves(latest) else latest


def _always_saves(path: Path) -> bool:
    """The flag always_save_checkpoint of a checkpoint's run. Reads neither weights nor checksums."""
    with suppress(Exception):  # `load` will say what is wrong with a damaged file
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return bool(saved["config"]["always_save_checkpoint"])
    return True


def checkpoint_in(source: str) -> str:
    """The checkpoint in a run's folder. Any other `source` is returned unchanged.

    A folder with a config.json has a Hugging Face model. Raises ValueError, OSError.
    """
    folder = Path(source)
    if not folder.is_dir() or (folder / "config.json").is_file():
        return source
    if not any(folder.glob("*.pt")):
        raise ValueError(
            f"the folder {source} has neither a run's ckpt.pt nor the config.json of a Hugging Face model"
        )
    return str(best_or_latest(folder))


def is_hugging_face(source: str) -> bool:
    """Whether `source` is one of OpenAI's GPT-2s or a folder, and not a checkpoint.

    Raises ValueError for a misspelled name, such as gpt2-medum.
    """
    is_path = "/" in source or source.endswith(".pt") or Path(source).exists()
    if source.startswith("gpt2") and not is_path:
        return cli.choose(dict.fromkeys(GPT2_NAMES, True), source, "model")
    return Path(source).is_dir()


# ---- load


def load(
    source: str, device: str = "cpu", dtype: str = "bfloat16", **overrides: Any
) -> tuple[GPT, dict[str, Any]]:
    """The model that `source` names, on `device`, and the description of the tokenizer it was trained with.

    `source` is a ckpt.pt, a run's folder, a Hugging Face folder, or the name of one of OpenAI's GPT-2s.
    `dtype` is the precision of the computation. `overrides` are values for options in RUN_OPTIONS.
    Raises ValueError, OSError.
    """
    source = checkpoint_in(source)
    if is_hugging_face(source):
        model = GPT.from_pretrained(source, overrides, device, dtype)
        description = tokenizer.describe_hugging_face(source)
        size, n_symbols = model.config.vocab_size or 0, tokenizer.vocab_size(description)
        if size < n_symbols:
            raise ValueError(f"{source} has vocab_size={size}, but its tokenizer has {n_symbols} symbols")
        return model, description
    model, saved = from_checkpoint(Path(source), device, dtype, **overrides)
    recorded, dataset = saved.tokenizer, saved.config.get("dataset", "")
    if recorded is not None and not (recorded["kind"] == "unknown" and dataset):
        return model, recorded
    # nanoGPT's checkpoints have no tokenizer, so we look for the data set, as its sample.py does. A meta.pkl
    # may also have got its symbols only after the training.
    size, folder = model.config.vocab_size or 0, Path("data", dataset)
    description = tokenizer.if_large_enough(tokenizer.describe_dataset(folder), size, folder)
    if description["kind"] == "unknown" and recorded:
        description = recorded
    return model, description


# ---- save


def cut_vocabulary(model: GPT, vocab_size: int, n_symbols: int) -> GPT:
    """A copy of `model` with the first `vocab_size` rows of the embedding. The first `n_symbols` are in use.

    Raises ValueError if a row in use would be lost.
    """
    weights = model.state_dict()
    rows = weights["lm_head.weight"]
    if not n_symbols <= vocab_size <= len(rows):
        raise ValueError(
            f"vocab_size={vocab_size} must be from {n_symbols}, the symbols of the tokenizer, "
            f"to {len(rows)}, the rows of the model"
        )
    wte = rows[:vocab_size]
    smaller = GPT(replace(model.config, vocab_size=vocab_size))
    smaller.load_weights(weights | {"lm_head.weight": wte, "transformer.wte.weight": wte}, "the model")
    return smaller


def save_checkpoint(model: GPT, description: dict[str, Any], path: Path) -> None:
    """Writes a ckpt.pt with weights and tokenizer, but without an optimizer. nanoGPT reads it too."""
    saved = Checkpoint(
        model=model.state_dict(),
        model_args=checkpoint.model_args(model.config),
        gpt_config=dict(vars(model.config)),
        tokenizer=description,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        checkpoint.write(saved, temporary)


def save_hugging_face(model: GPT, description: dict[str, Any], folder: Path) -> None:
    """Writes a folder that `transformers` reads as a GPT2LMHeadModel with the same logits and its tokenizer.

    Raises ValueError for a model that GPT-2's format cannot express.
    """
    for name, value in checkpoint.beyond_gpt2(model.config).items():
        raise ValueError(
            f"GPT-2's format cannot express {name}={value}, which this model has: convert it to a ckpt.pt"
        )
    hugging_face.write(vars(model.config), model.state_dict(), description, folder)
