"""Damaged and odd files: a reader returns the right result, or raises ValueError or OSError.

Bits are flipped, files cut short, and values replaced by others of another type, at random from a seed.
`make soak` makes many more rounds than the tests do.
"""

import copy
import json
import os
import random
import resource
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt import checkpoint, pretrained, tokenizer
from gpt.convert import convert
from gpt.model import GPT
from gpt.reading import regular
from tests.runs import run
from train import distributed, evaluate, metrics, plot, shards
from train.checkpoint import Progress, newest_intact, restore
from train.config import TrainConfig, parse
from train.data import Split, preflight
from train.optim import optimizer_for
from train.prepare import documents
from train.prepare.encode import encode

ROUNDS = int(os.environ.get("ROUNDS", "25"))
ODD = [None, True, -1, 0, 2.5, 10**30, float("nan"), "x", "", [], {}, [None], {"a": 1}, [[1, 2], "b"]]
SMALL = "--max_iters=1 --n_layer=1 --n_head=1 --n_embd=8 --block_size=8 --batch_size=2 --keep_last=0".split()


@pytest.fixture
def dice(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(f"{request.node.name} {ROUNDS}")


def damaged(content: bytes, dice: random.Random) -> Iterator[bytes]:
    """`content` with one bit flipped, and cut short."""
    for _ in range(ROUNDS):
        flipped = bytearray(content)
        flipped[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        yield bytes(flipped)
        yield content[: dice.randrange(len(content))]


def with_other_types(value: Any, dice: random.Random, odd: list[Any] = ODD) -> Iterator[Any]:
    """`value` with one part, however deep, replaced or left out."""
    for _ in range(ROUNDS):
        changed = copy.deepcopy(value)
        part: Any = changed
        while True:
            keys = list(part) if isinstance(part, dict) else range(len(part))
            key = dice.choice(keys)
            inner = part[key]
            if not isinstance(inner, dict | list) or not inner or dice.random() < 0.3:
                break
            part = inner
        if dice.random() < 0.2:
            del part[key]
        else:
            part[key] = dice.choice(odd)
        yield changed


def attempt(read: Callable[[], Any], *context: Any) -> Any:
    """What `read` returns, or None if it raises ValueError or OSError. Other errors fail the test."""
    try:
        return read()
    except (ValueError, OSError) as error:
        assert str(error).strip(), context
        return None


def test_damaged_checkpoints_are_refused_or_read_right(workplace, dice):
    run(*SMALL)
    path = Path("out/ckpt.pt")
    Path("out/best.pt").unlink()
    whole, right = path.read_bytes(), checkpoint.read(path)
    right = copy.deepcopy(right)  # the file is mapped, and about to change
    refused = 0
    for content in damaged(whole, dice):
        path.write_bytes(content)
        saved = attempt(lambda: checkpoint.read(path))
        refused += saved is None
        if saved is None:
            with pytest.raises((ValueError, OSError)):
                newest_intact(path)
            continue
        assert saved.config == right.config and saved.iter_num == 1
        for name, weight in right.model.items():
            assert torch.equal(weight, saved.model[name]), name
    assert refused > ROUNDS


def test_a_checkpoint_of_odd_values_is_refused_or_can_be_resumed(workplace, dice):
    state = run(*SMALL)
    path = Path("odd.pt")
    odd = [*ODD, torch.zeros(3), torch.zeros((), dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.int64)]
    config, ranks = TrainConfig(), distributed.start("auto", "cpu")
    for values in with_other_types(state, dice, odd):
        torch.save(values, path)

        def go_on() -> None:
            model, saved = pretrained.from_checkpoint(path)
            optimizer = optimizer_for(model, config, "cpu")
            restore(saved, config, optimizer, torch.amp.GradScaler("cpu", enabled=False), ranks)
            Progress.after(saved, config)
            tokenizer.fits(saved.tokenizer or {"kind": "gpt2"}, {"kind": "char", "symbols": ["a"]})
            assert isinstance(model, GPT)

        attempt(go_on)


@pytest.mark.parametrize("fault", ["compressed", "another size", "another byte order"])
def test_an_archive_that_torch_would_read_as_noise_is_refused(workplace, fault):
    run(*SMALL)
    with zipfile.ZipFile("out/ckpt.pt") as whole, zipfile.ZipFile("odd.pt", "w") as odd:
        for member in whole.infolist():
            content = whole.read(member)
            if fault == "another size" and member.filename.endswith("/data/0"):
                content = content[:-8]
            if fault == "another byte order" and member.filename.endswith("/byteorder"):
                content = b"big"
            kind = zipfile.ZIP_DEFLATED if fault == "compressed" else zipfile.ZIP_STORED
            odd.writestr(member.filename, content, kind)
    with pytest.raises(ValueError, match=r"odd.pt .* is truncated or not a checkpoint"):
        checkpoint.read(Path("odd.pt"))


def test_no_program_uses_a_damaged_checkpoint(workplace):
    run(*SMALL)
    content = bytearray(Path("out/ckpt.pt").read_bytes())
    weight = checkpoint.read(Path("out/ckpt.pt")).model["transformer.h.0.mlp.c_fc.weight"]
    content[content.index(weight.numpy().tobytes()) + 3] ^= 0x40
    Path("out/best.pt").unlink()
    Path("out/ckpt.pt").unlink()
    Path("out/ckpt.pt").write_bytes(content)
    for use in (
        lambda: run(*SMALL, "--init_from=resume"),
        lambda: run(*SMALL, "--init_from=auto"),
        lambda: run(*SMALL, "--init_from=out/ckpt.pt", out_dir="tuned"),
        lambda: pretrained.load("out"),
        lambda: convert("out/ckpt.pt", Path("converted.pt")),
    ):
        with pytest.raises(ValueError, match="differs from its checksum"):
            use()
    assert Path("out/ckpt.pt").read_bytes() == content and not Path("converted.pt").exists()


def test_a_resumed_run_checks_its_checkpoint_once(workplace, monkeypatch):
    run(*SMALL)
    check, checked = checkpoint._checked_sizes, []
    monkeypatch.setattr(checkpoint, "_checked_sizes", lambda path: checked.append(str(path)) or check(path))
    assert run(*SMALL, "--init_from=resume", "--max_iters=2")["iter_num"] == 2
    assert checked == ["out/ckpt.pt"]


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("raise GeneratorExit('odd')", "line 2: GeneratorExit: odd"),
        ("raise SystemExit", "line 2: SystemExit"),
        ("while True: import signal; signal.raise_signal(signal.SIGINT)", "line 2: KeyboardInterrupt"),
    ],
)
def test_a_config_file_that_exits_or_hangs_gives_one_sentence(tmp_path, statement, message):
    # A shell starts a background job with SIGINT ignored. Python then has no handler for it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    (tmp_path / "c.py").write_text(f"n_layer = 3\n{statement}\n")
    with pytest.raises(ValueError, match=rf"c.py, {message}$"):
        parse([str(tmp_path / "c.py")])


@pytest.fixture
def files(workplace: Path) -> None:
    """Writes an undamaged file of each kind. The token files in data/tiny and data/wide have the same ids."""
    run(*SMALL, "--max_iters=3", "--eval_interval=1")
    ids = np.fromfile("data/tiny/val.bin", np.uint16).astype(np.uint32)
    example = {"ctx": "A man", "endings": [" sits", " stands", " runs", " eats"], "label": 1}
    bpe = pytest.importorskip("tokenizers").ByteLevelBPETokenizer()
    bpe.train_from_iterator(["the king and queen of hearts " * 50], 280, special_tokens=["<|endoftext|>"])
    for folder in ("data/wide", "own", "hf"):
        Path(folder).mkdir()
    Path("data/wide/val.bin").write_bytes(shards.header(np.uint32, len(ids)) + ids.tobytes())
    Path("data/wide/meta.json").write_bytes(Path("data/tiny/meta.json").read_bytes())
    Path("own/tokenizer.json").write_text(bpe.to_str())
    bpe.save_model("hf")  # vocab.json and merges.txt
    end = {"content": "<|endoftext|>"}
    settings = {"eos_token": end, "added_tokens_decoder": {"0": end}}
    Path("hf/config.json").write_text(json.dumps({"vocab_size": 300, "model_type": "gpt2"}))
    Path("hf/tokenizer_config.json").write_text(json.dumps(settings))
    Path("hf/added_tokens.json").write_text('{"<|endoftext|>": 0}')
    Path("h.jsonl").write_text(json.dumps(example))


def read_ids(path: Path) -> list[int]:
    split = Split(path.parent / "val.bin", 21)
    preflight({"val": split}, {})
    ids = split.read(np.array([0]), len(split))[0].tolist()
    # A flipped bit may turn an id into another one of the vocabulary. No id may be lost.
    begin, dtype = (1024, "<u4") if path.parent.name == "wide" else (0, "<u2")
    assert ids == np.frombuffer((path.parent / "val.bin").read_bytes()[begin:], dtype).tolist()
    assert len(ids) == 5534 and max(ids) < 21
    return ids


def read_tokenizer(path: Path) -> dict[str, Any]:
    description = tokenizer.describe_dataset(path.parent)
    tokenizer.check(description, path)
    tokenizer.end_mark(description)
    tokenizer.fits(description, {"kind": "gpt2"}), tokenizer.fits(description, dict(description))
    if description["kind"] == "json":
        tokenizer.describe_folder(path.parent, 300)
    if description["kind"] != "unknown":
        known = tokenizer.from_dict(description)
        known.decode(known.encode_ordinary("the king").tolist())
    return description


def read_folder(path: Path) -> dict[str, Any]:
    description = tokenizer.describe_hugging_face(str(path.parent))
    tokenizer.check(description, path)
    return description


def read_metrics(path: Path) -> list[dict[str, Any]]:
    records = metrics.read(path)
    for loaded in plot.load_runs([path.parent]):
        for x in ("step", "tokens", "time"):
            iters = plot.column(loaded.steps + loaded.evaluations, "iter")
            assert np.isfinite(loaded.progress(x, iters)).all()
        plot.lowest(loaded), plot.settled_losses(loaded)
    return records


def read_hellaswag(path: Path) -> list[tuple[str, list[str], int]]:
    examples = list(evaluate._hellaswag(str(path)))
    for context, endings, label in examples:
        assert isinstance(context, str) and all(isinstance(ending, str) for ending in endings)
        assert 0 <= label < len(endings)
    return examples


READERS: dict[str, Callable[[Path], Any]] = {  # by file
    "data/tiny/val.bin": read_ids,
    "data/tiny/meta.json": read_ids,
    "data/wide/val.bin": read_ids,
    "data/tiny/meta.pkl": read_tokenizer,
    "own/tokenizer.json": read_tokenizer,
    "hf/config.json": read_folder,
    "hf/vocab.json": read_folder,
    "hf/merges.txt": read_folder,
    "hf/tokenizer_config.json": read_folder,
    "hf/added_tokens.json": read_folder,
    "out/metrics.jsonl": read_metrics,
    "h.jsonl": read_hellaswag,
}
# Damage to these files must be noticed: the result is that of the undamaged file, or there is none.
EXACT = ("data/tiny/meta.json", "hf/merges.txt")


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_right_or_refused(files, dice, name):
    path, read = Path(name), READERS[name]
    right, whole = read(path), path.read_bytes()
    contents = [*damaged(whole, dice), b"[" * 100_000, b'{"a":' * 100_000]
    if path.suffix == ".json":
        contents += [json.dumps(value).encode() for value in with_other_types(json.loads(whole), dice)]
    if path.suffix == ".jsonl":
        for lines in with_other_types([json.loads(line) for line in whole.splitlines()], dice):
            contents.append("".join(json.dumps(line) + "\n" for line in lines).encode())
    for content in contents:
        path.unlink()  # the old file may still be mapped into memory
        path.write_bytes(content)
        result = attempt(lambda: read(path), content)
        assert name not in EXACT or result in (None, right), content


def test_an_id_past_the_vocabulary_is_refused_even_if_the_model_has_a_row_for_it(workplace):
    with open("data/tiny/val.bin", "r+b") as file:
        file.write(struct.pack("<H", 30))
    with pytest.raises(ValueError, match=r"val.bin holds the token id 30, and meta.json .* vocabulary of 21"):
        preflight({"val": Split(Path("data/tiny/val.bin"), 64)}, {})


def test_pipes_devices_and_folders_are_refused_without_waiting(workplace):
    os.mkfifo("pipe")
    Path("data/tiny/val.bin").unlink()
    os.mkfifo("data/tiny/val.bin")
    for read in (
        lambda: regular(Path("pipe")),
        lambda: regular(Path("/dev/zero")),
        lambda: regular(Path("data")),
        lambda: checkpoint.read(Path("pipe")),
        lambda: metrics.read(Path("pipe")),
        lambda: tokenizer.describe_meta(Path("pipe")),
        lambda: evaluate._hellaswag("pipe").__next__(),
        lambda: Split(Path("data/tiny/val.bin"), 21),
    ):
        with pytest.raises(OSError, match=r"is a folder, a pipe or a device"):
            read()


@pytest.mark.parametrize("target", ["x.pt", "folder"])
def test_a_conversion_to_a_full_disk_leaves_nothing_and_can_be_repeated(workplace, target):
    pytest.importorskip("safetensors")
    run(*SMALL)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        with pytest.raises(OSError):
            convert("out/ckpt.pt", Path("converted", target))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(Path("converted").iterdir())
    convert("out/ckpt.pt", Path("converted", target))
    assert [p.name for p in Path("converted").iterdir()] == [target]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_corpus_that_leaves_a_split_without_tokens_writes_nothing(tmp_path, split):
    corpus = documents.text("a text of some length " * 10, "short.txt")
    setattr(corpus, split, documents.Part(lambda: iter(()), 0))
    with pytest.raises(ValueError, match=f"short.txt: the split {split} would have no token"):
        encode(tmp_path / "short", corpus, "char", 1)
    assert not list((tmp_path / "short").iterdir())


def test_evaluation_refuses_data_cut_short_beside_their_meta_json(workplace):
    run(*SMALL)
    os.truncate("data/tiny/val.bin", 100)
    config = evaluate.EvaluateConfig(init_from="out/ckpt.pt", data="data/tiny/val.bin")
    with pytest.raises(ValueError, match=r"val.bin has 50 tokens, and meta.json beside it says"):
        evaluate.evaluate(config, distributed.start("auto", "cpu"))
