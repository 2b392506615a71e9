"""What a ckpt.pt holds: every key and who reads it; the one function that writes it, the one that reads it.

The format is nanoGPT's with more beside it: a dict of tensors and plain values, in the zip archive of
torch.save. nanoGPT's train.py and sample.py open what is written here. What its own files lack, and older
ones of this project, `read` fills in.
"""

import math
import pickle
import sys
import types
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

import torch
from torch import Tensor

from gpt import tokenizer
from gpt.hugging_face import MASKS
from gpt.model import RUN_OPTIONS, GPTConfig
from gpt.reading import regular

# nanoGPT calls GPTConfig(**model_args): it knows these seven and refuses an eighth.
MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
TIED = ("transformer.wte.weight", "lm_head.weight")
WRAPPERS = ("module", "_orig_mod")  # DDP and torch.compile put these into the names of the weights


class Moments(TypedDict):
    """state_dict of an optimizer: {number of a tensor: {moment: its values}}, and the groups of numbers."""

    state: dict[int, dict[str, Any]]
    param_groups: list[dict[str, Any]]


@dataclass
class Checkpoint:
    """The keys of a ckpt.pt; a default is what stands for a key that is not there.

    Training writes them all, `gpt.convert` those that a model without a history has.
    """

    # nanoGPT's keys, which its train.py and sample.py read

    # weights by their name in GPT.state_dict()
    model: dict[str, Tensor]
    # seven of GPTConfig's fields; read here where gpt_config is missing
    model_args: dict[str, Any]
    # train.checkpoint.restore takes moments and step counts from it, rates and decay from the flags
    optimizer: Moments | None = None
    # steps made
    iter_num: int = 0
    best_val_loss: float = math.inf
    # every flag of the run: which data it saw, which optimizer, what changed when it is resumed
    config: dict[str, Any] = field(default_factory=dict)

    # ours

    # every field of GPTConfig; those in gpt.model.RUN_OPTIONS are the run's, which the next may choose anew
    gpt_config: dict[str, Any] = field(default_factory=dict)
    # Tokenizer.to_dict(): what sampling, evaluation and conversion need
    tokenizer: dict[str, Any] | None = None
    # train.data.preflight compares it with the data of a resumed run
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    # loss scale of float16; empty without
    scaler: dict[str, Any] = field(default_factory=dict)
    # by rank: {"cpu": state of its generator, and by type that of its device}
    rng: list[dict[str, Tensor]] = field(default_factory=list)
    # the other fields of train.checkpoint.Progress, which explains them
    position: int | None = None
    skipped: int = 0
    evaluated: bool = False
    began: str | None = None


def model_args(config: GPTConfig) -> dict[str, Any]:
    """nanoGPT's seven, and the options that it lacks: so it refuses a model that it would compute wrongly."""
    return {name: getattr(config, name) for name in MODEL_ARGS} | beyond_gpt2(config)


def beyond_gpt2(config: GPTConfig) -> dict[str, Any]:
    """The options that this model uses and that neither nanoGPT nor GPT-2's format has."""
    known = (*MODEL_ARGS, *RUN_OPTIONS, "activation")
    others = [option for option in fields(GPTConfig) if option.name not in known]
    values = {option.name: getattr(config, option.name) for option in others}
    return {option.name: values[option.name] for option in others if values[option.name] != option.default}


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Raises OSError."""
    try:
        torch.save({key: value for key, value in vars(checkpoint).items() if value is not None}, path)
    except RuntimeError as error:  # of torch's writer, which does not say that the disk is full
        raise OSError(f"not all of {path} could be written; is the disk full? {error}") from None


def read(path: Path) -> Checkpoint:
    """A ckpt.pt of this project or of nanoGPT, on the CPU, mapped into memory.

    Weights have the names of GPT's: what DDP and torch.compile add is taken off, causal masks are left out.
    Only plain values and tensors are read: a file that would run code is refused, and so is one that is not
    whole by its checksums. Raises OSError, and ValueError that names the key where one is missing or of
    another type.
    """
    values = _load(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a GPT checkpoint: it holds a {type(values).__name__}, not a dict")
    if missing := [name for name in ("model", "model_args") if name not in values]:
        raise ValueError(f"{path} is not a GPT checkpoint: it lacks {', '.join(missing)}")

    # nanoGPT's best loss is a tensor of one value.
    if isinstance(best := values.get("best_val_loss"), Tensor) and best.numel() == 1:
        values["best_val_loss"] = best.item()
    # Checkpoints were saved after evaluations only, before a signal could ask for one: not so nanoGPT's.
    values.setdefault("evaluated", "position" in values)
    kinds = get_type_hints(Checkpoint)
    for name in values.keys() & kinds.keys():
        if (problem := _problem(values[name], kinds[name], name)) is not None:
            raise ValueError(f"{path} is not a GPT checkpoint of this version or nanoGPT's: {problem}")
    checkpoint = Checkpoint(**{name: values[name] for name in kinds if name in values})
    if checkpoint.tokenizer is not None:
        tokenizer.check(checkpoint.tokenizer, path)

    checkpoint.model = {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): weight
        for name, weight in checkpoint.model.items()
        if not name.endswith(MASKS)
    }
    # They are one tensor, which some programs save once.
    for name, other in (TIED, TIED[::-1]):
        if other in checkpoint.model:
            checkpoint.model.setdefault(name, checkpoint.model[other])
    if not checkpoint.gpt_config:
        # Before there was gpt_config, the only option beside nanoGPT's was the activation. nanoGPT saved no
        # dropout and bias at first.
        args = {name: checkpoint.model_args[name] for name in MODEL_ARGS if name in checkpoint.model_args}
        if missing := [name for name in MODEL_ARGS if name not in (*args, "dropout", "bias")]:
            raise ValueError(f"{path} is not a GPT checkpoint: its model_args lack {', '.join(missing)}")
        checkpoint.gpt_config = {"activation": values.get("activation", "gelu")} | args
    options = get_type_hints(GPTConfig)
    if unknown := sorted(checkpoint.gpt_config.keys() - options.keys()):
        raise ValueError(f"{path} has a model option that is unknown here: {unknown[0]}; update this project")
    for name, value in checkpoint.gpt_config.items():
        if (problem := _problem(value, options[name], name)) is not None:
            raise ValueError(f"{path} does not describe a GPT: {problem}")
    _check_sizes(GPTConfig(**checkpoint.gpt_config), checkpoint.model, path)
    return checkpoint


def _check_sizes(config: GPTConfig, weights: dict[str, Tensor], path: Path) -> None:
    """Raises ValueError for a model that its weights do not fill: to make a large one takes the memory."""
    for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
        if getattr(config, name) in (0, None):
            raise ValueError(f"{path} does not describe a GPT: {name} must be at least 1")
    if config.n_layer > len(weights):
        raise ValueError(f"{path} has only {len(weights)} weights, too few for n_layer={config.n_layer}")
    rows = {"transformer.wte.weight": config.vocab_size, "transformer.wpe.weight": config.block_size}
    for name, n in rows.items():
        shape = tuple(weights[name].shape) if name in weights else "missing"
        if shape != (n, config.n_embd):
            raise ValueError(
                f"{path} does not fit the model: {name} is {shape} there and {(n, config.n_embd)} here"
            )


def missing(path: Path) -> FileNotFoundError:
    return FileNotFoundError(f"there is no checkpoint {path}; {runs_here()}")


def runs_here() -> str:
    """A hint for somebody who names a run that is not there."""
    runs = sorted(str(checkpoint.parent) for checkpoint in Path().glob("*/ckpt.pt"))
    return f"the runs here are {', '.join(runs)}" if runs else "make quickstart makes a first run"


def _load(path: Path) -> Any:
    if not path.exists():
        raise missing(path)
    size = regular(path).stat().st_size
    try:
        # torch.load maps the file and looks at none of this.
        members = _whole_members(path)
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        # The tensors lie in the map in the order of the archive.
        sizes = {storage.data_ptr(): storage.nbytes() for storage in _storages(values)}
        if [sizes[address] for address in sorted(sizes)] != members:
            raise ValueError("its tensors have other sizes than the archive's members")
        return values
    except PermissionError:
        raise
    except Exception as error:  # damage can be in any part of the archive, and each part raises its own
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            raise ValueError(
                f"{path} cannot be read as plain values and tensors: it is damaged, or holds objects, which "
                f"could run code ({reason})"
            ) from None
        raise ValueError(f"{path} ({size:,} bytes) is truncated or no checkpoint: {reason}") from None


def _whole_members(path: Path) -> list[int]:
    """The sizes of an archive's tensors in bytes, in the order of the file. Raises ValueError and others."""
    with zipfile.ZipFile(path) as archive:
        members = sorted(archive.infolist(), key=lambda member: member.header_offset)
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("its members are compressed, which torch.save does not do")
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"{damaged} differs from its checksum")
        for member in members:
            if member.filename.endswith("/byteorder") and archive.read(member) != sys.byteorder.encode():
                raise ValueError(f"its numbers are not in the byte order of this machine, {sys.byteorder}")
    return [member.file_size for member in members if "/data/" in member.filename and member.file_size]


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    """The memory of each tensor in `value` that has any."""
    if isinstance(value, Tensor):
        if (storage := value.untyped_storage()).nbytes():
            yield storage
    elif isinstance(value, dict | list | tuple):
        for part in (*value.keys(), *value.values()) if isinstance(value, dict) else value:
            yield from _storages(part)


def _problem(value: Any, kind: Any, name: str) -> str | None:
    """What is wrong with a value that should be of the type `kind`, or None."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return None
    if origin is types.UnionType:
        problems = [_problem(value, option, name) for option in args]
        return None if None in problems else problems[0]
    if is_typeddict(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        parts = [_problem(value.get(key), hints[key], f"{name}[{key!r}]") for key in hints]
    elif origin is dict and isinstance(value, dict):
        parts = [_problem(key, args[0], f"a key of {name}") for key in value]
        parts += [_problem(part, args[1], f"{name}[{key!r}]") for key, part in value.items()]
    elif origin is list and isinstance(value, list):
        parts = [_problem(part, args[0], f"{name}[{i}]") for i, part in enumerate(value)]
    else:
        expected = dict if is_typeddict(kind) else origin or kind
        accepted = (int, float) if expected is float else expected
        fits = isinstance(value, accepted) and (expected is bool or not isinstance(value, bool))
        if fits and not (expected is int and not 0 <= value < 2**62):
            return None
        shown = repr(value) if isinstance(value, int | float | str | None) else f"a {type(value).__name__}"
        words = {int: "a whole number of at least 0", float: "a number", str: "text", bool: "True or False"}
        words |= {dict: "a dict", list: "a list", Tensor: "a tensor", types.NoneType: "None"}
        return f"{name} is {shown[:60]}, and must be {words[expected]}"
    return next((problem for problem in parts if problem is not None), None)
