"""The format of ckpt.pt: all its keys, the one function that writes it, and the one that reads it.

It is nanoGPT's format with more keys: a dict of tensors and plain values, saved by torch.save. nanoGPT's
train.py and sample.py can read our files, unless the model has an option that nanoGPT lacks. `read` fills in
the keys that nanoGPT's files and our older ones lack.
"""

import math
import pickle
import sys
import types
import zipfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gpt import tokenizer
from gpt.hugging_face import MASKS
from gpt.model import RUN_OPTIONS, GPTConfig
from gpt.reading import regular

# nanoGPT's sample.py calls GPTConfig(**model_args) with these seven. Its train.py reads only the first six.
MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
TIED = ("transformer.wte.weight", "lm_head.weight")
# DDP and torch.compile add these to the names of the weights.
WRAPPERS = ("module", "_orig_mod")


class OptimizerState(TypedDict):
    """An optimizer's state_dict: state[index of the parameter][name] is a tensor."""

    state: dict[int, dict[str, Any]]
    param_groups: list[dict[str, Any]]


@dataclass
class Checkpoint:
    """The keys of a ckpt.pt. Missing keys get the defaults.

    Training sets all of them. `gpt.convert` writes a model without a history: the rest keep their defaults.
    """

    # nanoGPT's keys
    model: dict[str, Tensor]  # the weights, by their name in GPT.state_dict()
    model_args: dict[str, Any]  # used if gpt_config is missing
    # train.checkpoint.restore reads moments and step counts; learning rate and decay come from the flags
    optimizer: OptimizerState | None = None
    iter_num: int = 0  # steps made
    best_val_loss: float = math.inf
    config: dict[str, Any] = field(default_factory=dict)  # all flags; a resumed run prints what changed

    # our keys
    # all fields of GPTConfig; the next run overrides those in gpt.model.RUN_OPTIONS
    gpt_config: dict[str, Any] = field(default_factory=dict)
    # the tokenizer's description, for sampling, evaluation and conversion
    tokenizer: dict[str, Any] | None = None
    # describes the data; train.data.preflight compares it with the data of a resumed run
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    # state of float16's loss scaling; empty for other dtypes
    scaler: dict[str, Any] = field(default_factory=dict)
    # by rank, the states of its random number generators: {"cpu": state, device type: state}
    rng: list[dict[str, Tensor]] = field(default_factory=list)
    # how far the run is; train.checkpoint.Progress describes these
    position: int | None = None
    skipped: int = 0
    evaluated: bool = False


def model_args(config: GPTConfig) -> dict[str, Any]:
    """nanoGPT's model_args. If the model has options that nanoGPT lacks, these options alone.

    nanoGPT's train.py ignores such options and would train a different model. So the sizes that it reads
    are left out, and it fails.
    """
    return beyond_gpt2(config) or {name: getattr(config, name) for name in MODEL_ARGS}


def beyond_gpt2(config: GPTConfig) -> dict[str, Any]:
    """The non-default options that neither nanoGPT nor Hugging Face's GPT-2 has."""
    known = (*MODEL_ARGS, *RUN_OPTIONS, "activation")
    others = [option for option in fields(GPTConfig) if option.name not in known]
    return {
        option.name: value for option in others if (value := getattr(config, option.name)) != option.default
    }


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Writes the keys that are not None. Raises OSError, for example if the disk is full."""
    try:
        torch.save({key: value for key, value in vars(checkpoint).items() if value is not None}, path)
    except RuntimeError as error:  # torch's writer does not say that the disk is full
        raise OSError(f"{path} could not be written completely; is the disk full? {error}") from None


def read(path: Path) -> Checkpoint:
    """Reads a ckpt.pt of this project or of nanoGPT. Its tensors stay in the file, mapped into memory.

    Weights are renamed to the names in GPT.state_dict(). Only tensors and plain values are read, so a file
    cannot run code. Raises OSError, and ValueError for a file that is damaged or not a checkpoint.
    """
    values = _load(path)
    try:
        checkpoint = _checkpoint_from(values)
    except ValueError as error:
        raise ValueError(f"{path} is not a GPT checkpoint: {error}") from None
    if checkpoint.tokenizer is not None:
        tokenizer.check(checkpoint.tokenizer, path)
    return checkpoint


def missing(path: Path) -> FileNotFoundError:
    return FileNotFoundError(f"there is no checkpoint {path}; {runs_here()}")


def runs_here() -> str:
    """A hint for a run that does not exist: the runs that do."""
    runs = sorted(str(checkpoint.parent) for checkpoint in Path().glob("*/ckpt.pt"))
    return f"the runs here are {', '.join(runs)}" if runs else "make quickstart makes a first run"


def _checkpoint_from(values: Any) -> Checkpoint:
    """The content of a file, checked and completed."""
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__}, not a dict")
    if lacking := [name for name in ("model", "model_args") if name not in values]:
        raise ValueError(f"it lacks {', '.join(lacking)}")

    # nanoGPT saves the best loss as a tensor with one value.
    if isinstance(best := values.get("best_val_loss"), Tensor) and best.numel() == 1:
        values["best_val_loss"] = best.item()
    # nanoGPT evaluates again after a resume, and so do we with its files. Our older files have a position but
    # no `evaluated`: they were saved only after an evaluation.
    values.setdefault("evaluated", "position" in values)
    kinds = get_type_hints(Checkpoint)
    for name in values.keys() & kinds.keys():
        _check_type(values[name], kinds[name], name)
    checkpoint = Checkpoint(**{name: values[name] for name in kinds if name in values})

    checkpoint.model = {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): weight
        for name, weight in checkpoint.model.items()
        if not name.endswith(MASKS)
    }
    # Embedding and head share one tensor. Some programs save it under one name only.
    for name, other in (TIED, TIED[::-1]):
        if other in checkpoint.model:
            checkpoint.model.setdefault(name, checkpoint.model[other])

    if not checkpoint.gpt_config:
        # From nanoGPT, or an old file of ours, which had one more option: activation. The first versions of
        # nanoGPT saved neither dropout nor bias.
        args = {name: checkpoint.model_args[name] for name in MODEL_ARGS if name in checkpoint.model_args}
        if lacking := [name for name in MODEL_ARGS if name not in (*args, "dropout", "bias")]:
            raise ValueError(f"its model_args lack {', '.join(lacking)}")
        checkpoint.gpt_config = {"activation": values.get("activation", "gelu")} | args
    options = get_type_hints(GPTConfig)
    if unknown := sorted(checkpoint.gpt_config.keys() - options.keys()):
        raise ValueError(
            f"it uses the model option {unknown[0]}, which this version does not know; update tritongpt"
        )
    for name, value in checkpoint.gpt_config.items():
        _check_type(value, options[name], name)
    _check_sizes(GPTConfig(**checkpoint.gpt_config), checkpoint.model)
    return checkpoint


def _check_sizes(config: GPTConfig, weights: dict[str, Tensor]) -> None:
    """Compares the sizes in `config` with the weights, before a model of that size is allocated."""
    for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
        if getattr(config, name) in (0, None):
            raise ValueError(f"{name} must be at least 1")
    if config.n_layer > len(weights):
        raise ValueError(f"it has only {len(weights)} weights, too few for n_layer={config.n_layer}")
    rows = {"transformer.wte.weight": config.vocab_size, "transformer.wpe.weight": config.block_size}
    for name, n in rows.items():
        shape = tuple(weights[name].shape) if name in weights else "missing"
        if shape != (n, config.n_embd):
            raise ValueError(f"{name} is {shape}, but the config says {(n, config.n_embd)}")


NAMES_OF_TYPES = {
    int: "a whole number of at least 0", float: "a number", str: "text", bool: "True or False",
    dict: "a dict", list: "a list", Tensor: "a tensor",
}  # fmt: skip


def _check_type(value: Any, kind: Any, name: str) -> None:
    """Raises ValueError if the value of `name`, or a part of it, does not have the type `kind`."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return
    if origin is types.UnionType:
        # All of them are X | None.
        if value is not None:
            _check_type(value, args[0], name)
    elif is_typeddict(kind) and isinstance(value, dict):
        for key, part in get_type_hints(kind).items():
            _check_type(value.get(key), part, f"{name}[{key!r}]")
    elif origin is dict and isinstance(value, dict):
        for key, part in value.items():
            _check_type(key, args[0], f"a key of {name}")
            _check_type(part, args[1], f"{name}[{key!r}]")
    elif origin is list and isinstance(value, list):
        for i, part in enumerate(value):
            _check_type(part, args[0], f"{name}[{i}]")
    else:
        expected = dict if is_typeddict(kind) else origin or kind
        accepted = (int, float) if expected is float else expected
        # Python's bool is an int.
        fits = isinstance(value, accepted) and (expected is bool or not isinstance(value, bool))
        if not fits or (expected is int and not 0 <= value < 2**62):
            is_short = isinstance(value, int | float | str | None)
            actual = repr(value)[:60] if is_short else f"a {type(value).__name__}"
            raise ValueError(f"{name} is {actual}, but must be {NAMES_OF_TYPES[expected]}")


def _load(path: Path) -> Any:
    if not path.exists():
        raise missing(path)
    size = regular(path).stat().st_size
    try:
        # With mmap=True, torch.load checks nothing itself.
        sizes_in_file = _checked_sizes(path)
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        # Tensors that share memory are one member of the archive. A memory map keeps the order of the file,
        # so the sizes in the order of their addresses must be those of the members.
        storages = [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}
        if [sizes[address] for address in sorted(sizes)] != sizes_in_file:
            raise ValueError("the sizes of its tensors differ from those of the archive's members")
        return values
    except PermissionError:
        raise
    except Exception as error:  # its type depends on what is damaged
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            reason = f"it is damaged, or it holds objects, which could run code ({reason})"
        raise ValueError(f"{path} ({size:,} bytes) is truncated or not a checkpoint: {reason}") from None


def _checked_sizes(path: Path) -> list[int]:
    """Checks the zip archive of a checkpoint. Returns the sizes of its tensors in bytes, in file order."""
    with zipfile.ZipFile(path) as archive:
        members = sorted(archive.infolist(), key=lambda member: member.header_offset)
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("its members are compressed, which torch.save does not do")
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"{damaged} differs from its checksum")
        for member in members:
            if member.filename.endswith("/byteorder") and archive.read(member) != sys.byteorder.encode():
                raise ValueError(f"its numbers are not in this machine's byte order, {sys.byteorder}")
    return [member.file_size for member in members if "/data/" in member.filename and member.file_size]
