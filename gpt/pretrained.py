"""Trained models in and out: checkpoints, see gpt/checkpoint.py, and Hugging Face's GPT-2."""

import difflib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gpt import checkpoint, cli, tokenizer
from gpt.checkpoint import MASKS, Checkpoint
from gpt.model import GPT, RUN_OPTIONS, GPTConfig

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
ACTIVATION = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}  # theirs -> ours
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
OWN_KEY = "tritongpt"  # in config.json: what a GPT2Config has no name for


def load_weights(model: GPT, weights: dict[str, torch.Tensor], source: str | Path) -> None:
    """Copies `weights` into the model. Raises ValueError naming the first tensor that does not fit."""
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        have, want = (tuple(d[name].shape) if name in d else "missing" for d in (weights, own))
        if have != want:
            raise ValueError(f"{source} does not fit the model: {name} is {have} there and {want} here")
    model.load_state_dict(weights)


def from_checkpoint(
    path: Path, device: str = "cpu", dtype: str = "bfloat16", **overrides: Any
) -> tuple[GPT, Checkpoint]:
    """(model on `device`, checkpoint); `overrides` are values for some of RUN_OPTIONS."""
    saved = checkpoint.read(path)
    own = {name: value for name, value in saved.gpt_config.items() if name not in RUN_OPTIONS}
    dropout = {"dropout": saved.gpt_config.get("dropout", 0.0)}
    model = GPT(GPTConfig(**own | dropout | overrides), device, dtype)
    load_weights(model, saved.model, path)
    return model.to(device), saved


def best_or_latest(out_dir: Path) -> Path:
    """best.pt of a run with always_save_checkpoint=False, ckpt.pt of any other."""
    latest, best = out_dir / "ckpt.pt", out_dir / "best.pt"
    others = sorted(out_dir.glob("*.pt"), key=lambda path: path.stat().st_mtime)
    if others and not latest.exists():
        raise FileNotFoundError(
            f"there is no checkpoint {latest}, but there is {others[-1]}: name that file, not its folder"
        )
    wants_best = not checkpoint.read(latest).config.get("always_save_checkpoint", True)
    return best if wants_best and best.exists() else latest


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


def from_hugging_face(
    name: str, override_args: dict[str, Any], device: str = "cpu", dtype: str = "bfloat16"
) -> GPT:
    """A GPT2LMHeadModel by name or folder, in float32, with the GELU it was trained with: the same logits.

    Raises ValueError for what is no GPT-2, is not whole, or computes something else than a GPT does here.
    """
    if not override_args.keys() <= set(RUN_OPTIONS):
        raise ValueError(f"only {', '.join(RUN_OPTIONS)} may be overridden, not {sorted(override_args)}")
    try:
        from transformers import AutoConfig, GPT2LMHeadModel
    except ImportError:
        raise ValueError(f"loading {name!r} needs the package transformers: pip install -e '.[hf]'") from None
    try:
        c = AutoConfig.from_pretrained(name)
        if c.model_type != "gpt2":
            raise ValueError(f"it is a {c.model_type}, and only GPT-2 is known here")
        loaded: Any = GPT2LMHeadModel.from_pretrained(
            name, config=c, dtype=torch.float32, output_loading_info=True
        )
        hf, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"it lacks {len(missing)} weights, {missing[0]} the first")
    except Exception as error:  # transformers, safetensors and the hub each raise their own
        hint = "" if Path(name).is_dir() else "; the path of a local folder works too"
        raise ValueError(f"{name!r} could not be loaded: {_first_line(error)}{hint}") from None
    known = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "layer_norm_epsilon": 1e-5}
    for key, value in known.items():
        if getattr(c, key) != value:
            raise ValueError(f"{name!r} has {key}={getattr(c, key)}; only {value} is known here")
    if c.activation_function not in ACTIVATION:
        raise ValueError(
            f"{name!r} has the activation {c.activation_function!r}; known: {', '.join(ACTIVATION)}"
        )
    weights = {
        key: value.t() if key.endswith(CONV1D) else value  # GPT-2's Conv1D holds (in, out), Linear (out, in)
        for key, value in hf.state_dict().items()
        if not key.endswith(MASKS)
    }
    if not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]):
        raise ValueError(f"{name!r} has an lm_head of its own, and here it is tied to the embedding wte")
    ours = getattr(c, OWN_KEY, {"bias": True, "dropout": 0.0})
    biases = [key for key in weights if key.endswith(".bias")]
    has_bias = ours["bias"] or any(weights[key].any() for key in biases)
    config = GPTConfig(
        block_size=c.n_positions, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head,
        n_embd=c.n_embd, bias=has_bias, activation=ACTIVATION[c.activation_function],
        **{"dropout": ours["dropout"], **override_args},
    )  # fmt: skip
    model = GPT(config, device, dtype)
    load_weights(model, {k: v for k, v in weights.items() if has_bias or k not in biases}, name)
    return model.to(device)


def hugging_face_tokenizer(name: str) -> dict[str, Any]:
    """The tokenizer of one of OpenAI's GPT-2s or of a folder, by `to_dict`: unknown where it has none."""
    if not Path(name).is_dir():
        return {"kind": "gpt2"}
    rows = json.loads(cli.read_text(Path(name, "config.json"))).get("vocab_size", 50257)
    return tokenizer.describe_folder(Path(name), rows)


def load(
    source: str, device: str = "cpu", dtype: str = "bfloat16", **overrides: Any
) -> tuple[GPT, dict[str, Any]]:
    """The model that `source` names, on `device`, and the tokenizer it was trained with, by `to_dict`.

    `source` is the path of a ckpt.pt, of a run's folder, of a folder of Hugging Face's, or the name of one of
    OpenAI's GPT-2s; `dtype` is the precision that it will compute in, `overrides` are dropout and kernels.
    Raises ValueError, OSError.
    """
    source = checkpoint_in(source)
    if is_hugging_face(source):
        model = from_hugging_face(source, overrides, device, dtype)
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
    load_weights(resized, {**weights, "lm_head.weight": wte, "transformer.wte.weight": wte}, "the model")
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
    partial = path.with_name(f"{path.name}.tmp")
    checkpoint.write(saved, partial)
    partial.replace(path)


def save_hugging_face(model: GPT, described: dict[str, Any], folder: Path) -> None:
    """Writes a folder that `transformers` opens as a GPT2LMHeadModel with its tokenizer: the same logits.

    GPT-2 has biases everywhere; a model without gets zeros, and is read back without. Raises ValueError.
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ValueError("writing a Hugging Face folder needs safetensors: pip install -e '.[hf]'") from None
    c = model.config
    end = tokenizer.GPT2_END_OF_TEXT if described["kind"] == "gpt2" else None
    if described["kind"] == "json" and (found := tokenizer.end_of_text(described["json"])):
        end = found[1]
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "dtype": "float32",
        "vocab_size": c.vocab_size, "n_positions": c.block_size, "n_layer": c.n_layer, "n_head": c.n_head,
        "n_embd": c.n_embd, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
        "activation_function": {ours: theirs for theirs, ours in reversed(ACTIVATION.items())}[c.activation],
        "attn_pdrop": c.dropout, "embd_pdrop": c.dropout, "resid_pdrop": c.dropout,
        "bos_token_id": end, "eos_token_id": end,
        OWN_KEY: {"bias": c.bias, "dropout": c.dropout},
    }  # fmt: skip
    weights = {
        key: (value.t() if key.endswith(CONV1D) else value).cpu().contiguous()
        for key, value in model.state_dict().items()
        if key != "lm_head.weight"  # tied, which safetensors refuses to hold twice
    }
    if not c.bias:
        norms_and_linears = [key for key in weights if not key.endswith(("wte.weight", "wpe.weight"))]
        for key in norms_and_linears:  # the last dimension is the output's: Conv1D's is (in, out)
            weights[key.removesuffix("weight") + "bias"] = torch.zeros(weights[key].shape[-1])
    # An unknown tokenizer has no files.
    files = (
        _tokenizer_files(described) if described["kind"] != "unknown" else {}
    )  # before anything is written: it may have to be fetched
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _tokenizer_files(described: dict[str, Any]) -> dict[str, bytes]:
    """What `transformers.AutoTokenizer` opens."""
    settings: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    if described["kind"] == "gpt2":
        settings |= {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
        vocabulary = tokenizer.gpt2_files()
        files = {"vocab.json": vocabulary["encoder.json"], "merges.txt": vocabulary["vocab.bpe"]}
    elif described["kind"] == "json":
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        if end := tokenizer.end_of_text(described["json"]):
            settings["eos_token"] = end[0]
        files = {"tokenizer.json": described["json"].encode()}
    else:
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        vocab = {symbol: i for i, symbol in enumerate(described["symbols"]) if symbol}
        content = {
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": {
                "type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": False,
            },
            "decoder": {"type": "Fuse"},
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": ""},
        }  # fmt: skip
        files = {"tokenizer.json": json.dumps(content, ensure_ascii=False).encode()}
    return files | {"tokenizer_config.json": json.dumps(settings).encode()}


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]
