"""What is in a data set: counts, vocabulary, largest id, the first tokens as text."""

import hashlib
from pathlib import Path

import numpy as np

from gpt import tokenizer
from train import shards

SHOWN = 64  # tokens


def inspect(folder: Path) -> None:
    """Reads all of it and prints. Raises FileNotFoundError, and ValueError for what is no token file."""
    files = {split: shards.find(folder / f"{split}.bin") for split in ("train", "val")}
    described = tokenizer.describe_dataset(folder)
    vocab_size, meta = tokenizer.vocab_size(described), shards.read_meta(folder)
    print(f"{folder}: tokenizer {tokenizer.name(described)}")
    if meta:
        print(f"from {meta.get('source')}, {meta.get('date')}")
    for split, paths in files.items():
        opened = [shards.open_tokens(path) for path in paths]
        count, kinds = sum(map(len, opened)), {ids.dtype.name for ids in opened}
        # A piece at a time, so that the memory it takes does not grow with the file.
        largest = max(
            (int(ids[i : i + 2**22].max()) for ids in opened for i in range(0, len(ids), 2**22)), default=-1
        )
        of = "" if len(paths) == 1 else f" in {len(paths)} shards"
        print(f"{split}: {count:,} tokens{of}, {', '.join(sorted(kinds))}, largest id {largest}")
        if largest >= vocab_size:
            print(f"{split}: the vocabulary of {vocab_size:,} has no id {largest}: it is another tokenizer's")
        if meta and meta[split]["tokens"] != count:
            print(f"{split}: meta.json says {meta[split]['tokens']:,} tokens: cut short, or replaced")
        elif meta and len(paths) == 1 and meta[split].get("sha256") not in (None, _sha256(paths[0])):
            print(f"{split}: the sha256 is not the one in meta.json: it was changed")
    first = np.concatenate([shards.open_tokens(path)[:SHOWN] for path in files["train"][:1]]).tolist()
    if described["kind"] == "unknown":
        print(f"the first {len(first)} ids: {first}; {described['why']}")
    else:
        print(f"the first {len(first)} tokens: {tokenizer.from_dict(described).decode(first)!r}")


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
