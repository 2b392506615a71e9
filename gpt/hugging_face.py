"""Reads and writes GPT-2 in the format of Hugging Face's transformers: a folder, or a model of OpenAI's."""

import json
from pathlib import Path
from typing import Any

import torch

from gpt import tokenizer
from gpt.atomic import replacing
from gpt.cli import install

ACTIVATION = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}  # its name -> GPT's
# GPT-2 uses a Conv1D for these, whose weight is (in, out). A Linear has (out, in).
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# The key in config.json for options that GPT2Config lacks.
OWN_KEY = "tritongpt"
# Causal masks: older versions of transformers and nanoGPT save them with the weights.
MASKS = (".attn.bias", ".attn.masked_bias")


def read(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A GPT2LMHeadModel by name or folder -> (fields of GPTConfig, float32 weights with GPT's names).

    Raises ValueError for a model that is not a GPT-2, is incomplete, or computes something that GPT cannot.
    """
    try:
        from transformers import AutoConfig, GPT2LMHeadModel
    except ImportError:
        raise ValueError(f"loading {name!r} needs the package transformers: {install('hf')}") from None
    try:
        c = AutoConfig.from_pretrained(name)
        if c.model_type != "gpt2":
            raise ValueError(f"it is a {c.model_type}; only GPT-2 is supported")
        loaded: Any = GPT2LMHeadModel.from_pretrained(
            name, config=c, dtype=torch.float32, output_loading_info=True
        )
        hf, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"it lacks {len(missing)} weights, {missing[0]} the first")
    except Exception as error:  # transformers, safetensors and the hub have their own exceptions
        hint = "" if Path(name).is_dir() else "; the path of a local folder works too"
        reason = str(error).strip().partition("\n")[0][:200]
        raise ValueError(f"{name!r} could not be loaded: {reason}{hint}") from None
    required = {
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "layer_norm_epsilon": 1e-5,
    }  # fmt: skip
    for key, value in required.items():
        if getattr(c, key) != value:
            raise ValueError(f"{name!r} has {key}={getattr(c, key)}; only {value} is supported")
    if c.activation_function not in ACTIVATION:
        raise ValueError(
            f"{name!r} has the activation {c.activation_function!r}; supported: {', '.join(ACTIVATION)}"
        )
    weights = {
        key: value.t() if key.endswith(CONV1D) else value
        for key, value in hf.state_dict().items()
        if not key.endswith(MASKS)
    }
    if not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]):
        raise ValueError(f"{name!r} has an untied lm_head; GPT ties it to the embedding wte")
    # GPT-2 always has biases. A model of ours without them was saved with zeros.
    own = getattr(c, OWN_KEY, {"bias": True, "dropout": 0.0})
    biases = [key for key in weights if key.endswith(".bias")]
    has_bias = own["bias"] or any(weights[key].any() for key in biases)
    config = dict(
        block_size=c.n_positions, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head,
        n_embd=c.n_embd, bias=has_bias, activation=ACTIVATION[c.activation_function], dropout=own["dropout"],
    )  # fmt: skip
    return config, {key: weight for key, weight in weights.items() if has_bias or key not in biases}


def write(
    config: dict[str, Any], weights: dict[str, torch.Tensor], description: dict[str, Any], folder: Path
) -> None:
    """Writes a GPT's `config` and `weights`, and its tokenizer by `description`, as a folder.

    GPT-2 always has biases, so a model without them gets zeros; `read` leaves them out again. Raises
    ValueError, OSError.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise ValueError(f"writing a Hugging Face folder needs safetensors: {install('hf')}") from None
    # The tokenizer may have to be downloaded: do that before writing anything.
    files, end = _tokenizer_files(description)
    hf_config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "dtype": "float32",
        "vocab_size": config["vocab_size"], "n_positions": config["block_size"],
        "n_layer": config["n_layer"], "n_head": config["n_head"], "n_embd": config["n_embd"],
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
        "activation_function": next(hf for hf, own in ACTIVATION.items() if own == config["activation"]),
        "attn_pdrop": config["dropout"], "embd_pdrop": config["dropout"], "resid_pdrop": config["dropout"],
        "bos_token_id": end, "eos_token_id": end,
        OWN_KEY: {"bias": config["bias"], "dropout": config["dropout"]},
    }  # fmt: skip
    weights = {
        key: (value.t() if key.endswith(CONV1D) else value).cpu().contiguous()
        for key, value in weights.items()
        if key != "lm_head.weight"  # tied to wte, and safetensors refuses to save a tensor twice
    }
    if not config["bias"]:
        norms_and_linears = [key for key in weights if not key.endswith(("wte.weight", "wpe.weight"))]
        for key in norms_and_linears:  # Conv1D's weight is (in, out), so the bias has its last size
            weights[key.removesuffix("weight") + "bias"] = torch.zeros(weights[key].shape[-1])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as temporary:
        temporary.mkdir()
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        (temporary / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
        try:
            save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder} could not be written completely; is the disk full? {error}") from None


def _tokenizer_files(description: dict[str, Any]) -> tuple[dict[str, bytes], int | None]:
    """The files that `transformers.AutoTokenizer` reads, and the id of the end of a text, if there is one."""
    if description["kind"] == "unknown":
        return {}, None
    end: int | None = None
    settings = {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    if description["kind"] == "gpt2":
        settings |= {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
        end = tokenizer.GPT2_END_OF_TEXT
        vocabulary = tokenizer.gpt2_files()
        files = {"vocab.json": vocabulary["encoder.json"], "merges.txt": vocabulary["vocab.bpe"]}
    elif description["kind"] == "json":
        if token_and_id := tokenizer.end_of_text(description["json"]):
            settings["eos_token"], end = token_and_id
        files = {"tokenizer.json": description["json"].encode()}
    else:
        vocab = {symbol: i for i, symbol in enumerate(description["symbols"]) if symbol}
        content = {
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": {
                "type": "Split", "pattern": tokenizer.EACH_CHARACTER, "behavior": "Isolated", "invert": False,
            },
            "decoder": {"type": "Fuse"},
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": ""},
        }  # fmt: skip
        files = {"tokenizer.json": json.dumps(content, ensure_ascii=False).encode()}
    return files | {"tokenizer_config.json": json.dumps(settings).encode()}, end
