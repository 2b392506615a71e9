"""Damaged and odd files: each reader gives the right result, or ValueError or OSError, and nothing else.

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
from gpt.sampling import Sampling
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
    """What `read` returns, or None where it raises a sentence; anything else it raises fails the test."""
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


def test_a_checkpoint_of_odd_values_is_refused_or_goes_on(workplace, dice):
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


def test_a_damaged_checkpoint_is_used_by_no_program(workplace):
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
def test_a_config_file_that_ends_python_or_does_not_end_is_one_sentence(tmp_path, statement, message):
    # A shell starts a background job with SIGINT ignored. Python then has no handler for it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    (tmp_path / "c.py").write_text(f"n_layer = 3\n{statement}\n")
    with pytest.raises(ValueError, match=rf"c.py, {message}$"):
        parse([str(tmp_path / "c.py")])


def test_damaged_token_files_beside_their_meta_json(workplace, dice):
    folder = Path("data/tiny")
    path, meta = folder / "val.bin", folder / "meta.json"
    whole, right_meta = path.read_bytes(), meta.read_text()
    headed = shards.header(np.uint32, len(whole) // 2) + np.fromfile(path, "<u2").astype("<u4").tobytes()

    def ids() -> list[int]:
        split = Split(path, 21)
        preflight({"val": split}, {})
        return split.read(np.array([0]), len(split))[0].tolist()

    expected = np.frombuffer(whole, "<u2").tolist()
    for original, begin, width in ((whole, 0, "<u2"), (headed, 1024, "<u4")):
        for content in damaged(original, dice):
            path.unlink()
            path.write_bytes(content)
            result = attempt(ids)
            # What a bit flip has made of an id cannot be seen, but where it cannot be an id.
            if result is not None:
                assert result == np.frombuffer(content[begin:], width).tolist()
                assert len(result) == len(expected) and max(result) < 21
    path.write_bytes(whole)
    for content in with_other_types(json.loads(right_meta), dice):
        meta.write_text(json.dumps(content))
        assert attempt(ids) in (None, expected)
    for content in damaged(right_meta.encode(), dice):
        meta.write_bytes(content)
        assert attempt(ids) in (None, expected)


def test_an_id_past_the_vocabulary_is_refused_where_the_model_has_rows_for_it(workplace):
    with open("data/tiny/val.bin", "r+b") as file:
        file.write(struct.pack("<H", 30))
    with pytest.raises(ValueError, match=r"val.bin holds the token id 30, and meta.json .* vocabulary of 21"):
        preflight({"val": Split(Path("data/tiny/val.bin"), 64)}, {})


def test_damaged_tokenizers(workplace, dice):
    bpe = pytest.importorskip("tokenizers").ByteLevelBPETokenizer()
    bpe.train_from_iterator(["the king and queen of hearts " * 50], 280, special_tokens=["<|endoftext|>"])
    right = json.loads(bpe.to_str())
    path, meta = Path("data/tiny/tokenizer.json"), Path("data/tiny/meta.pkl")

    def use() -> None:
        described = tokenizer.describe_dataset(path.parent)
        tokenizer.check(described, path)
        tokenizer.mark_of_end(described)
        tokenizer.fits(described, {"kind": "gpt2"}), tokenizer.fits(described, dict(described))
        if described["kind"] == "json":
            tokenizer.describe_folder(path.parent, 300)
        if described["kind"] != "unknown":
            known = tokenizer.from_dict(described)
            known.decode(known.encode_ordinary("the king").tolist())

    whole = meta.read_bytes()
    for content in damaged(whole, dice):
        meta.write_bytes(content)
        attempt(use)
    meta.unlink()
    for content in with_other_types(right, dice):
        path.write_text(json.dumps(content))
        attempt(use)
    for content in [*damaged(bpe.to_str().encode(), dice), b"[" * 100_000, b'{"a":' * 100_000]:
        path.write_bytes(content)
        attempt(use)


def test_damaged_metrics(workplace, dice):
    run(*SMALL, "--max_iters=3", "--eval_interval=1")
    path = Path("out/metrics.jsonl")
    whole = path.read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]
    right = metrics.read(path)

    def use() -> list[dict[str, Any]]:
        records = metrics.read(path)
        for loaded in plot.load_runs([Path("out")]):
            for x in ("step", "tokens", "time"):
                iters = plot.column(loaded.steps + loaded.evaluations, "iter")
                assert np.isfinite(loaded.progress(x, iters)).all()
            plot.lowest(loaded), plot.settled_losses(loaded)
        return records

    for content in damaged(whole, dice):
        path.write_bytes(content)
        attempt(use)
    for changed in with_other_types(lines, dice):
        path.write_text("".join(json.dumps(line) + "\n" for line in changed))
        attempt(use)
    for line in (b"null", b"5", b"[]", b'{"loss": 1}', b'{"event": "start"}', b"[" * 100_000, b"\xff"):
        path.write_bytes(whole + line + b"\n")
        with pytest.raises(ValueError, match=rf"^out/metrics.jsonl, line {len(lines) + 1}, is not a step"):
            use()
    path.write_bytes(whole + whole[:30])
    assert use() == right


def test_damaged_folders_of_hugging_face(tmp_path, dice):
    folder = tmp_path / "hf"
    folder.mkdir()
    files: dict[str, Any] = {
        "config.json": {"vocab_size": 300, "model_type": "gpt2"},
        "vocab.json": {symbol: i for i, symbol in enumerate("abcdefgh")} | {"ab": 8, "<|endoftext|>": 9},
        "tokenizer_config.json": {
            "eos_token": {"content": "<|endoftext|>"},
            "added_tokens_decoder": {"9": {"content": "<|endoftext|>"}},
        },
        "special_tokens_map.json": {"eos_token": "<|endoftext|>"},
        "added_tokens.json": {"<|endoftext|>": 9},
    }
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    assert pretrained.hugging_face_tokenizer(str(folder))["kind"] == "json"
    for name, right in files.items():
        for content in with_other_types(right, dice):
            (folder / name).write_text(json.dumps(content))
            attempt(lambda: tokenizer.check(pretrained.hugging_face_tokenizer(str(folder)), folder), name)
        for raw in damaged(json.dumps(right).encode(), dice):
            (folder / name).write_bytes(raw)
            attempt(lambda: tokenizer.check(pretrained.hugging_face_tokenizer(str(folder)), folder), name)
        (folder / name).write_text(json.dumps(right))


def test_a_damaged_merges_txt_is_refused_or_read_right(tmp_path, dice):
    bpe = pytest.importorskip("tokenizers").ByteLevelBPETokenizer()
    bpe.train_from_iterator(["the king and queen of hearts " * 50], 280, special_tokens=["<|endoftext|>"])
    bpe.save_model(str(tmp_path))
    right = tokenizer.describe_folder(tmp_path)
    path = tmp_path / "merges.txt"
    refused = 0
    for content in damaged(path.read_bytes(), dice):
        path.write_bytes(content)
        described = attempt(lambda: tokenizer.describe_folder(tmp_path))
        assert described in (None, right), content
        refused += described is None
    assert refused > ROUNDS


def test_damaged_hellaswag(tmp_path, dice):
    path = tmp_path / "hellaswag.jsonl"
    right = {"ctx": "A man", "endings": [" sits", " stands", " runs", " eats"], "label": 1}
    contents = [json.dumps(changed).encode() for changed in with_other_types(right, dice)]
    for content in [*contents, *damaged(json.dumps(right).encode(), dice)]:
        path.write_bytes(content)
        for context, endings, label in attempt(lambda: list(evaluate._hellaswag(str(path)))) or []:
            assert isinstance(context, str) and all(isinstance(ending, str) for ending in endings)
            assert 0 <= label < len(endings)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_what_is_not_a_file_is_refused_and_not_waited_for(workplace, kind):
    def put(path: Path) -> Path:
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        if kind == "folder":
            path.mkdir()
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            os.mkfifo(path)
        return path

    data = Path("data/tiny")
    for read in (
        lambda: regular(put(Path("any"))),
        lambda: checkpoint.read(put(Path("ckpt.pt"))),
        lambda: newest_intact(put(Path("out/ckpt.pt"))),
        lambda: metrics.read(put(Path("out/metrics.jsonl"))),
        lambda: tokenizer.describe_json(put(Path("tokenizer.json"))),
        lambda: tokenizer.describe_meta(put(data / "meta.pkl")),
        lambda: shards.read_meta(put(data / "meta.json").parent),
        lambda: shards.open_tokens(put(data / "train.bin")),
        lambda: Split(put(data / "val.bin"), 21),
        lambda: list(evaluate._hellaswag(str(put(Path("hellaswag.jsonl"))))),
    ):
        with pytest.raises((ValueError, OSError), match=r"a folder|a pipe|a device"):
            read()


def test_a_shard_whose_header_counts_otherwise_is_refused(tmp_path):
    path = tmp_path / "train.bin"
    for count in (-1, 3, 2**62):
        words = np.zeros(256, "<i4")
        words[:2] = 20240520, 1
        words[2:4].view("<i8")[:] = count
        path.write_bytes(words.tobytes() + struct.pack("<4H", 1, 2, 3, 4))
        with pytest.raises(ValueError, match="it is incomplete"):
            shards.open_tokens(path)


@pytest.mark.parametrize("target", ["x.pt", "folder"])
def test_a_full_disk_leaves_nothing_of_a_conversion_that_blocks_the_next(workplace, target):
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
    setattr(corpus, split, documents.Split(lambda: iter(()), 0, 0))
    with pytest.raises(ValueError, match=f"short.txt: the split {split} would have no token"):
        encode(tmp_path / "short", corpus, "char", 1)
    assert not (tmp_path / "short").exists()


@pytest.mark.parametrize(
    ("flag", "bound"),
    [
        ("lr_decay_iters=-1", "at least 0"), ("weight_decay=-0.1", "at least 0"),
        ("learning_rate=inf", "at most"), ("learning_rate=nan", "at least 0"), ("min_lr=inf", "at most"),
        ("beta1=1.0", "at most"), ("beta2=nan", "at least 0"), ("grad_clip=nan", "at least 0"),
        ("n_embd=9000000000000000000", "at most 536870912"), ("block_size=1e18", "at most 536870912"),
    ],
)  # fmt: skip
def test_a_number_that_makes_no_run_is_refused_with_its_bound(flag, bound):
    with pytest.raises(ValueError, match=rf"^{flag.partition('=')[0]}=.* must be {bound}"):
        parse([f"--{flag}"])


def test_an_infinite_temperature_is_refused():
    for temperature in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"temperature=(inf|nan) must be"):
            Sampling(temperature)


def test_evaluation_refuses_data_cut_short_beside_their_meta_json(workplace):
    run(*SMALL)
    os.truncate("data/tiny/val.bin", 100)
    config = evaluate.EvaluateConfig(init_from="out/ckpt.pt", data="data/tiny/val.bin")
    with pytest.raises(ValueError, match=r"val.bin has 50 tokens, and meta.json beside it says"):
        evaluate.evaluate(config, distributed.start("auto", "cpu"))
