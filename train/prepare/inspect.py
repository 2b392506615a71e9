"""Show a data set: counts, vocabulary, largest id, and the first tokens as text."""

from pathlib import Path

from gpt import tokenizer
from train import shards

N_FIRST = 64  # tokens that are shown
CHUNK = 1 << 22  # ids that are read at a time, to bound the memory


def inspect(folder: Path) -> None:
    """Reads and prints the data set in `folder`. Raises FileNotFoundError and ValueError."""
    files = {split: shards.find(folder / f"{split}.bin") for split in ("train", "val")}
    description = tokenizer.describe_dataset(folder)
    vocab_size, meta = tokenizer.vocab_size(description), shards.read_meta(folder)
    print(f"{folder}: tokenizer {tokenizer.name(description)}")
    if meta:
        print(f"from {meta.get('source')}, {meta.get('date')}")
    for split, paths in files.items():
        arrays = [shards.open_tokens(path) for path in paths]
        n_tokens = sum(map(len, arrays))
        chunks = (ids[i : i + CHUNK] for ids in arrays for i in range(0, len(ids), CHUNK))
        largest = max((int(ids.max()) for ids in chunks), default=-1)
        dtypes = ", ".join(sorted({ids.dtype.name for ids in arrays}))
        in_shards = "" if len(paths) == 1 else f" in {len(paths)} shards"
        print(f"{split}: {n_tokens:,} tokens{in_shards}, {dtypes}, largest id {largest}")
        if largest >= vocab_size:
            print(
                f"{split}: the vocabulary of {vocab_size:,} has no id {largest}: wrong tokenizer, or damaged"
            )
        if meta and meta[split]["tokens"] != n_tokens:
            print(f"{split}: meta.json says {meta[split]['tokens']:,} tokens: cut short, or replaced")
    first = shards.open_tokens(files["train"][0])[:N_FIRST].tolist()
    if description["kind"] == "unknown":
        print(f"the first {len(first)} ids: {first}; {description['why']}")
    else:
        print(f"the first {len(first)} tokens: {tokenizer.from_dict(description).decode(first)!r}")
