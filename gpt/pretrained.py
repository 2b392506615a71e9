"""Trained models in and out: checkpoints, see gpt/checkpoint.py, and Hugging Face's GPT-2."""

import difflib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gpt import checkpoint, hugging_face, tokenizer
from gpt.atomic import replacing
from gpt.checkpoint import Checkpoint
from gpt.model import GPT, RUN_OPTIONS, GPTConfig
from gpt.reading import read_json

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def from_checkpoint(
    path: Path,
    device: str = "cpu",
    dtype: str = "bfloat16",
    saved: Checkpoint | None = None,
    **overrides: Any,
) -> tuple[GPT, Checkpoint]:
    """(model on `device`, checkpoint): `saved`, where `path` was read before.

    `overrides` are values for some of RUN_OPTIONS.
    """
    saved = saved or checkpoint.read(path)
    own = {name: value for name, value in saved.gpt_config.items() if name not in RUN_OPTIONS}
    dropout = {"dropout": saved.gpt_config.get("dropout", 0.0)}
    model = GPT(GPTConfig(**own | dropout | overrides), device, dtype)
    model.load_weights(saved.model, path)
    return model.to(device), saved


def best_or_latest(out_dir: Path) -> Path:
    """best.pt of a run with always_save_checkpoint=False, ckpt.pt of any other."""
    latest, best = out_dir / "ckpt.pt", out_dir / "best.pt"
    others = sorted(out_dir.glob("*.pt"), key=lambda path: path.stat().st_mtime)
    if others and not latest.exists():
        raise FileNotFoundError(
            f"there is no checkpoint {latest}, but there is {others[-1]}: name that file, not its folder"
        )
    if not best.exists():
        return latest
    wants_best = not checkpoint.read(latest).config.get("always_save_checkpoint", True)
    return best if wants_best else latest


def source_of(init_from: str, out_dir: str) -> str:
    """What sampling and evaluation load: "resume" is the checkpoint in `out_dir`."""
    return str(best_or_latest(Path(out_dir))) if init_from == "resume" else init_from


def checkpoint_in(source: str) -> str:
    """The path of the checkpoint where `source` is the folder of a run; else `source`.

    What lies in a folder decides: config.json makes it Hugging Face's. Raises ValueError, OSError.
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
    """Whether `source` is one of OpenAI's GPT-2s or a folder, rather than a checkpoint.

    Raises ValueError for a name that is only close to one.
    """
    if source in GPT2_NAMES or Path(source).is_dir():
        return True
    if source.startswith("gpt2") and not Path(source).exists():
        close = difflib.get_close_matches(source, GPT2_NAMES, n=1) or ["gpt2"]
        raise ValueError(f"{source!r} is no GPT-2: did you mean {close[0]!r} of {', '.join(GPT2_NAMES)}?")
    return False


def hugging_face_tokenizer(name: str) -> dict[str, Any]:
    """The tokenizer of one of OpenAI's GPT-2s or of a folder: unknown where it has none."""
    if not Path(name).is_dir():
        return {"kind": "gpt2"}
    rows = read_json(Path(name, "config.json")).get("vocab_size", 50257)
    if type(rows) is not int or rows < 1:
        raise ValueError(f"{name}/config.json has vocab_size={rows!r}, which must be a whole number above 0")
    return tokenizer.describe_folder(Path(name), rows)


def load(
    source: str, device: str = "cpu", dtype: str = "bfloat16", **overrides: Any
) -> tuple[GPT, dict[str, Any]]:
    """The model that `source` names, on `device`, and the description of the tokenizer it was trained with.

    `source` is the path of a ckpt.pt, of a run's folder, of a folder of Hugging Face's, or the name of one of
    OpenAI's GPT-2s; `dtype` is the precision that it will compute in, `overrides` are dropout and kernels.
    Raises ValueError, OSError.
    """
    source = checkpoint_in(source)
    if is_hugging_face(source):
        model = GPT.from_pretrained(source, overrides, device, dtype)
        described = hugging_face_tokenizer(source)
        size = model.config.vocab_size or 0
        if size < tokenizer.vocab_size(described):
            raise ValueError(
                f"{source} knows {size} symbols: its tokenizer is not {tokenizer.name(described)}"
            )
        return model, described
    model, saved = from_checkpoint(Path(source), device, dtype, **overrides)
    recorded, dataset = saved.tokenizer, saved.config.get("dataset", "")
    # nanoGPT's checkpoints look for the data set by name; so do those whose data set lacked its symbols.
    if recorded is not None and not (recorded["kind"] == "unknown" and dataset):
        return model, recorded
    size, folder = model.config.vocab_size or 0, Path("data", dataset)
    described = tokenizer.describe_dataset(folder)
    if described["kind"] == "gpt2" and size < tokenizer.GPT2_VOCAB_SIZE:
        described = recorded or tokenizer.unknown(
            size,
            f"{source} knows {size} symbols and does not say which, and there is no "
            f"{folder / 'meta.pkl'} to tell",
        )
    return model, described


def resize_vocabulary(model: GPT, vocab_size: int, symbols: int) -> GPT:
    """A copy of `model` with `vocab_size` rows of embedding, of which the first `symbols` are in use.

    Rows of padding are left out, or added as the mean of those in use, so that none is likelier than they
    are. Raises ValueError where a symbol in use would be lost.
    """
    if vocab_size < symbols:
        raise ValueError(f"vocab_size={vocab_size} is too small: the tokenizer has {symbols} symbols")
    weights = model.state_dict()
    used = weights["lm_head.weight"][:vocab_size]
    mean = used[:symbols].mean(0, keepdim=True)
    wte = torch.cat((used, mean.expand(vocab_size - len(used), -1)))
    resized = GPT(replace(model.config, vocab_size=vocab_size))
    resized.load_weights(weights | {"lm_head.weight": wte, "transformer.wte.weight": wte}, "the model")
    return resized


def save_checkpoint(model: GPT, described: dict[str, Any], path: Path) -> None:
    """Writes a ckpt.pt that this project and nanoGPT open: weights and tokenizer, no optimizer."""
    saved = Checkpoint(
        model=model.state_dict(),
        model_args=checkpoint.model_args(model.config),
        gpt_config=dict(vars(model.config)),
        tokenizer=described,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        checkpoint.write(saved, temporary)


def save_hugging_face(model: GPT, described: dict[str, Any], folder: Path) -> None:
    """Writes a folder that `transformers` opens as a GPT2LMHeadModel with its tokenizer: the same logits.

    Raises ValueError for a model that GPT-2's format cannot express.
    """
    for name, value in checkpoint.beyond_gpt2(model.config).items():
        raise ValueError(
            f"GPT-2's format cannot say {name}={value}, which this model has, and its logits would differ: "
            "convert it to a ckpt.pt"
        )
    hugging_face.write(vars(model.config), model.state_dict(), described, folder)
