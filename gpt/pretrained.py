"""Weights from elsewhere: checkpoints, this project's and nanoGPT's, and OpenAI's GPT-2 from Hugging Face."""

import difflib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from gpt.model import GPT, GPTConfig

# nanoGPT calls GPTConfig(**model_args): these seven and no eighth.
MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
ACTIVATION = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}  # theirs -> ours
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASKS = (".attn.bias", ".attn.masked_bias")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A ckpt.pt of this project or of nanoGPT, on the CPU; a compiled model's prefix is taken off its keys.

    Only plain values and tensors are read: a file that would run code is refused. Raises ValueError, OSError.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (
        RuntimeError,
        EOFError,
        LookupError,
        TypeError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        size = path.stat().st_size
        if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
            raise ValueError(
                f"{path} holds more than plain values and tensors; it could run code, so it is refused "
                f"({_first_line(error)})"
            ) from None
        raise ValueError(
            f"{path} ({size:,} bytes) is truncated or no checkpoint: {_first_line(error)}"
        ) from None
    missing = {"model", "model_args"} - checkpoint.keys() if isinstance(checkpoint, dict) else {"model"}
    if missing:
        raise ValueError(f"{path} is no GPT checkpoint: it lacks {', '.join(sorted(missing))}")
    if not all(isinstance(checkpoint[name], dict) for name in ("model", "model_args")):
        raise ValueError(f"{path} is no GPT checkpoint: its model and model_args are no dicts")
    prefix = "_orig_mod."
    checkpoint["model"] = {key.removeprefix(prefix): value for key, value in checkpoint["model"].items()}
    return checkpoint


def model_config(checkpoint: dict[str, Any], **overrides: Any) -> GPTConfig:
    """The GPTConfig a checkpoint was made with; `kernels` is the run's to choose, not the checkpoint's."""
    args = checkpoint["model_args"]
    if missing := [name for name in MODEL_ARGS if name not in args and name not in ("dropout", "bias")]:
        raise ValueError(f"the checkpoint's model_args lack {', '.join(missing)}")
    args = {name: args[name] for name in MODEL_ARGS if name in args}
    return GPTConfig(**{**args, "activation": checkpoint.get("activation", "gelu"), **overrides})


def load_weights(model: GPT, weights: dict[str, torch.Tensor], source: str | Path) -> None:
    """Copies `weights` into the model. Raises ValueError naming the first tensor that does not fit."""
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        have, want = (tuple(d[name].shape) if name in d else "missing" for d in (weights, own))
        if have != want:
            raise ValueError(f"{source} does not fit the model: {name} is {have} there and {want} here")
    model.load_state_dict(weights)


def from_checkpoint(path: Path, device: str = "cpu", **overrides: Any) -> tuple[GPT, dict[str, Any]]:
    """(model on `device`, checkpoint); `overrides` are fields of GPTConfig, such as dropout or kernels."""
    checkpoint = read_checkpoint(path)
    model = GPT(model_config(checkpoint, **overrides), device)
    load_weights(model, checkpoint["model"], path)
    return model.to(device), checkpoint


def best_or_latest(out_dir: Path) -> Path:
    """best.pt of a run with always_save_checkpoint=False, ckpt.pt of any other."""
    latest, best = out_dir / "ckpt.pt", out_dir / "best.pt"
    wants_best = not read_checkpoint(latest).get("config", {}).get("always_save_checkpoint", True)
    return best if wants_best and best.exists() else latest


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


def from_hugging_face(name: str, override_args: dict[str, Any], device: str = "cpu") -> GPT:
    """A GPT2LMHeadModel by name or folder. Its weights were trained with the tanh GELU, so that is set."""
    allowed = {"dropout", "kernels"}
    if not override_args.keys() <= allowed:
        raise ValueError(f"only {', '.join(sorted(allowed))} may be overridden, not {sorted(override_args)}")
    try:
        from transformers import GPT2LMHeadModel
    except ImportError:
        raise ValueError(f"loading {name!r} needs the package transformers: pip install -e '.[hf]'") from None
    try:
        hf = GPT2LMHeadModel.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name!r} could not be loaded by transformers: {_first_line(error)}") from None
    c = hf.config
    if c.activation_function not in ACTIVATION:
        raise ValueError(
            f"{name!r} has the activation {c.activation_function!r}; known: {', '.join(ACTIVATION)}"
        )
    config = GPTConfig(
        block_size=c.n_positions, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head,
        n_embd=c.n_embd, bias=True, activation=ACTIVATION[c.activation_function],
        **override_args,
    )  # fmt: skip
    weights = {
        key: value.t() if key.endswith(CONV1D) else value  # GPT-2's Conv1D holds (in, out), Linear (out, in)
        for key, value in hf.state_dict().items()
        if not key.endswith(MASKS)
    }
    model = GPT(config, device)
    load_weights(model, weights, name)
    return model.to(device)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]
