"""GPT-2 in the format of Hugging Face's transformers, in and out: a folder, or a name of OpenAI's models."""

import json
from pathlib import Path
from typing import Any

import torch

from gpt import tokenizer
from gpt.atomic import replacing
from gpt.cli import install

ACTIVATION = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}  # theirs -> ours
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
OWN_KEY = "tritongpt"  # in config.json: what a GPT2Config has no name for
# Causal masks that older versions of transformers and nanoGPT have among the weights.
MASKS = (".attn.bias", ".attn.masked_bias")


def read(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A GPT2LMHeadModel by name or folder: (fields of GPTConfig, weights by GPT's names, float32).

    Raises ValueError for a model that is not a GPT-2, is not whole, or computes something else than GPT.
    """
    try:
        from transformers import AutoConfig, GPT2LMHeadModel
    except ImportError:
        raise ValueError(f"loading {name!r} needs the package transformers: {install('hf')}") from None
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
    config = dict(
        block_size=c.n_positions, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head,
        n_embd=c.n_embd, bias=has_bias, activation=ACTIVATION[c.activation_function], dropout=ours["dropout"],
    )  # fmt: skip
    return config, {key: weight for key, weight in weights.items() if has_bias or key not in biases}


def write(
    config: dict[str, Any], weights: dict[str, torch.Tensor], described: dict[str, Any], folder: Path
) -> None:
    """Writes a GPT's `config` and `weights` as a folder, with the tokenizer that `described` is.

    GPT-2 has biases everywhere; a model without gets zeros, and is read back without. Raises ValueError,
    OSError.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise ValueError(f"writing a Hugging Face folder needs safetensors: {install('hf')}") from None
    end = tokenizer.GPT2_END_OF_TEXT if described["kind"] == "gpt2" else None
    if described["kind"] == "json" and (own := tokenizer.end_of_text(described["json"])):
        end = own[1]
    activation = next(theirs for theirs, ours in ACTIVATION.items() if ours == config["activation"])
    theirs = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "dtype": "float32",
        "vocab_size": config["vocab_size"], "n_positions": config["block_size"],
        "n_layer": config["n_layer"], "n_head": config["n_head"], "n_embd": config["n_embd"],
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
        "activation_function": activation,
        "attn_pdrop": config["dropout"], "embd_pdrop": config["dropout"], "resid_pdrop": config["dropout"],
        "bos_token_id": end, "eos_token_id": end,
        OWN_KEY: {"bias": config["bias"], "dropout": config["dropout"]},
    }  # fmt: skip
    weights = {
        key: (value.t() if key.endswith(CONV1D) else value).cpu().contiguous()
        for key, value in weights.items()
        if key != "lm_head.weight"  # tied, which safetensors refuses to hold twice
    }
    if not config["bias"]:
        norms_and_linears = [key for key in weights if not key.endswith(("wte.weight", "wpe.weight"))]
        for key in norms_and_linears:  # the last dimension is the output's: Conv1D's is (in, out)
            weights[key.removesuffix("weight") + "bias"] = torch.zeros(weights[key].shape[-1])
    # Before anything is written: the tokenizer may have to be fetched. An unknown one has no files.
    files = _tokenizer_files(described) if described["kind"] != "unknown" else {}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as temporary:
        temporary.mkdir()
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        (temporary / "config.json").write_text(json.dumps(theirs, indent=2) + "\n")
        try:
            save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"not all of {folder} could be written; is the disk full? {error}") from None


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
