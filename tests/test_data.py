"""The order of the data, the formats of token files, and the errors for files that cannot be read."""

import gzip
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt import sample
from gpt.model import GPTConfig
from gpt.tokenizer import describe_dataset, describe_meta, from_dict
from tests.runs import run
from tests.test_command_line import command
from train import data, shards
from train.data import Split, TokenFile, describe
from train.distributed import Ranks
from train.loop import read_ahead

# ---- the order


def token_file(folder, n, block_size=8, seed=0):
    path = folder / "train.bin"
    np.arange(n, dtype=np.uint16).tofile(path)  # each id is its position
    return TokenFile(path, GPTConfig(block_size=block_size, vocab_size=65536), seed)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(9, 3000), block_size=st.integers(1, 8), seed=st.integers(-5, 2**40))
def test_an_epoch_visits_every_window_once_and_none_overlap(tmp_path_factory, n, block_size, seed):
    file = token_file(tmp_path_factory.mktemp("data"), n, block_size, seed=seed)
    for epoch in range(3):
        starts = np.sort(file.starts(epoch * file.windows, file.windows))
        assert len(set(np.diff(starts))) <= 1 and (len(starts) < 2 or np.diff(starts)[0] == block_size)
        assert starts[0] >= 0 and starts[-1] + block_size + 1 <= n
        # an epoch leaves out less than two blocks at the ends
        assert n - len(starts) * block_size <= 2 * block_size


def test_epochs_and_seeds_differ_in_order_and_offset(tmp_path):
    file, other = token_file(tmp_path, 60_000), token_file(tmp_path, 60_000, seed=1)
    n = file.windows
    epochs = [file.starts(e * n, n) for e in range(8)] + [other.starts(0, n)]
    assert len({int(e[0]) % 8 for e in epochs}) > 3
    orders = [e // 8 for e in epochs]
    for i, a in enumerate(orders):
        assert abs(np.corrcoef(a, np.arange(n))[0, 1]) < 0.05
        for b in orders[:i]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.05


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(40, 900),
    world_size=st.integers(1, 5),
    size=st.integers(1, 4),
    micro_steps=st.integers(0, 9),
)
def test_ranks_share_the_windows_of_the_run_from_any_position_on(
    tmp_path_factory, n, world_size, size, micro_steps
):
    file = token_file(tmp_path_factory.mktemp("data"), n)
    position = micro_steps * world_size * size
    steps = -(-file.windows // (world_size * size))
    readers = [read_ahead(file, position, size, Ranks(r, world_size, "cpu", None)) for r in range(world_size)]
    windows = [token for _ in range(steps) for r in readers for token in next(r)[0][:, 0].tolist()]
    assert windows == [file.starts(position + i, 1)[0] for i in range(len(windows))]


# ---- the formats


def llm_c_shard(path, ids, magic=20240520, version=1, dtype=np.uint16, count=None):
    """As llm.c's and modded-nanogpt's scripts write them."""
    header = np.zeros(256, dtype=np.int32)
    header[:2] = magic, version
    header[2:4].view(np.int64)[0] = len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(ids, dtype).tobytes())


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=9),
    block_size=st.integers(1, 70),
    seed=st.integers(0, 99),
    kinds=st.integers(0, 2**9),
)
def test_a_file_and_its_shards_give_the_same_windows_and_targets(
    tmp_path_factory, lengths, block_size, seed, kinds
):
    """Shards have any size and format. A window may span several of them."""
    if sum(lengths) <= block_size:
        lengths.append(block_size + 1)
    whole, cut = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cut")
    ids = np.random.default_rng(seed).integers(0, 65536, sum(lengths)).astype(np.uint16)
    ids.tofile(whole / "train.bin")
    for i, part in enumerate(np.split(ids, np.cumsum(lengths)[:-1])):
        path = cut / f"web_train_{i:06}.bin"
        if kinds >> i & 1:
            llm_c_shard(path, part)
        else:
            part.tofile(path)
    for folder in (whole, cut):
        file = TokenFile(folder / "train.bin", GPTConfig(block_size=block_size, vocab_size=65536), seed)
        assert len(file) == len(ids)
        starts = file.starts(3, 2 * file.windows)
        windows = torch.from_numpy(np.stack([ids[s : s + block_size + 1] for s in starts]).astype(np.int64))
        idx, targets = file.batch(3, 2 * file.windows)
        assert torch.equal(idx, windows[:, :-1]) and torch.equal(targets, windows[:, 1:])


def test_a_shard_that_is_cut_short_after_it_was_opened_is_refused(tmp_path):
    """Reading the map beyond the end of its file would kill the process."""
    for i in range(3):
        np.zeros(8000, np.uint16).tofile(tmp_path / f"train_{i}.bin")
    file = Split(tmp_path / "train.bin", 1)
    os.truncate(tmp_path / "train_1.bin", 0)
    assert not file.read(np.array([0, 16_000]), 8000).any()
    for start, length in ((7990, 11), (8000, 1), (7990, 8020)):
        with pytest.raises(ValueError, match=r"train_1.bin was cut short while it was in use: 16,000 bytes"):
            file.read(np.array([start]), length)


def test_a_shard_belongs_to_the_split_whose_word_is_in_its_name(tmp_path):
    def stems(split):
        return [path.stem for path in shards.find(tmp_path / f"{split}.bin")]

    names = ["medieval_train_01", "medieval_val_00", "constraint_02", "interval_03", "Train-2", "validation0"]
    for name in names:
        llm_c_shard(tmp_path / f"{name}.bin", [1] * 20)
    llm_c_shard(tmp_path / "train3.BIN", [1] * 20)
    (tmp_path / "._Train-2.bin").write_bytes(b"a Mac's own")
    assert stems("train") == ["Train-2", "medieval_train_01", "train3"]
    assert stems("val") == ["medieval_val_00", "validation0"]
    llm_c_shard(tmp_path / "train_val_00.bin", [1] * 20)
    with pytest.raises(ValueError, match=r"train_val_00.bin has the words of both splits .*\(train, val\)"):
        stems("val")
    np.full(50, 7, np.uint16).tofile(tmp_path / "train.bin")  # a whole file comes before shards
    assert stems("train") == ["train"]


@pytest.mark.parametrize("vocab_size", [40, 50257, 128256])
def test_uint32_ids_without_a_header_are_refused_with_a_command_that_converts_them(tmp_path, vocab_size):
    """Read as uint16, every second one is 0, or at most 1 where the vocabulary is past 16 bits."""
    ids = np.random.default_rng(0).integers(0, vocab_size, 3000).astype(np.uint32)
    path = tmp_path / "train.bin"
    ids.tofile(path)
    config = GPTConfig(block_size=8, vocab_size=vocab_size)
    with pytest.raises(ValueError, match=r"train.bin has uint32 ids without a header") as error:
        TokenFile(path, config, 0)
    convert = str(error.value).partition("Convert it: ")[2]
    if vocab_size > 65536:
        assert convert == "write train.shards.header(np.uint32, 3000) before its bytes"
        path.write_bytes(shards.header(np.uint32, 3000) + path.read_bytes())
    else:
        code = convert.removeprefix('python -c "').removesuffix('"')
        subprocess.run([sys.executable, "-c", code], check=True)
    file = TokenFile(path, config, 0)
    assert len(file) == 3000 and file.read(np.array([0]), 3000)[0].tolist() == ids.tolist()


def test_a_text_with_one_symbol_per_line_is_not_taken_for_uint32(tmp_path):
    path = tmp_path / "train.bin"
    np.stack([np.arange(900) % 26 + 1, np.zeros(900)], 1).astype(np.uint16).tofile(path)
    assert len(shards.open_tokens(path)) == 1800
    meta = {"dtype": "uint16", "vocab_size": 400, "train": {"tokens": 1800}, "val": {"tokens": 9}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    np.stack([np.arange(900) % 400, np.zeros(900)], 1).astype(np.uint16).tofile(path)
    assert len(shards.open_tokens(path)) == 1800


def test_ids_past_16_bits_are_written_and_read_as_llm_c_does(tmp_path):
    ids = np.array([0, 65535, 65536, 128255, 7] * 10, np.uint32)
    theirs, ours = tmp_path / "theirs_train.bin", tmp_path / "ours_train.bin"
    llm_c_shard(theirs, ids, 20240801, 7, np.uint32)
    ours.write_bytes(shards.header(shards.dtype_for(128256), len(ids)) + ids.tobytes())
    assert ours.read_bytes() == theirs.read_bytes()
    file = TokenFile(tmp_path / "train.bin", GPTConfig(block_size=4, vocab_size=128256), 0)
    assert file.read(np.array([48]), 5).tolist() == [[128255, 7, 0, 65535, 65536]]
    assert shards.dtype_for(65536) == np.uint16 and shards.header(np.uint16, 10**12) == b""
    count = np.frombuffer(shards.header(np.uint32, 2**32 + 5), "<i8")[1]  # the upper half of it is ours
    assert count == 2**32 + 5


# ---- what cannot be trained on


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    config = GPTConfig(block_size=8, vocab_size=10)
    path = tmp_path / "train.bin"
    with pytest.raises(FileNotFoundError, match=r"no .*train.bin, and no shard with the word train in its"):
        describe(tmp_path)
    with path.open("wb") as f:
        np.save(f, np.arange(100, dtype=np.uint16) % 10)
    for content, message in (
        (path.read_bytes(), "train.bin is a NumPy array .*, not a file of ids: write"),
        (gzip.compress(b"ids"), "train.bin is compressed .gzip., not a file of ids: write"),
        (b"\0" * 31, "odd number of bytes, 31"),
        (b"\0" * 16, "has 8 tokens, too few .* lower block_size to 7"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            TokenFile(path, config, 0)
    for header, message in (
        (dict(magic=20240801, version=7), "says 100 tokens, makes 1,424: it is incomplete"),
        (dict(count=-1), "says -1 tokens, makes 1,022: it is incomplete"),
        (dict(count=101), "says 101 tokens, makes 1,226: it is incomplete"),
        (dict(count=2**62), "says 4,611,686,018,427,387,904 tokens, .* it is incomplete"),
    ):
        llm_c_shard(path, np.zeros(100), **header)
        with pytest.raises(ValueError, match=message):
            TokenFile(path, config, 0)
    np.full(100, 10, np.uint16).tofile(path)
    file = TokenFile(path, config, 0)
    with pytest.raises(ValueError, match=r"token id 10, but vocab_size=10 allows 0 to 9"):
        file.batch(0, 4)


def change(path, at, token):
    ids = np.fromfile(path, np.uint16)
    ids[at] = token
    ids.tofile(path)


def test_an_id_past_the_vocabulary_is_refused_before_the_first_step(workplace, monkeypatch, capsys):
    """In a large file: the first and the last id, and a stretch longer than the gap between two samples."""
    path = Path("data/tiny/train.bin")
    whole = path.read_bytes()
    small, large = data.SAMPLE, (50, 100)
    for numbers, at in ((small, 2345), (large, 0), (large, -1), (large, slice(20_000, 21_000))):
        monkeypatch.setattr(data, "SAMPLE", numbers)
        change(path, at, 30)
        with pytest.raises(ValueError, match=r"train.bin holds the token id 30, but vocab_size=21 allows 0"):
            run()
        path.write_bytes(whole)
    assert "iter 0" not in capsys.readouterr().out and not Path("out/ckpt.pt").exists()
    run("--max_iters=1")


def test_a_meta_json_that_contradicts_the_data_or_the_model_is_refused(workplace):
    def refused(message):
        with pytest.raises(ValueError, match=message):
            run()

    path, meta_path = Path("data/tiny/val.bin"), Path("data/tiny/meta.json")
    whole, meta = path.read_bytes(), json.loads(meta_path.read_text())
    path.write_bytes(whole[:-200])
    refused(r"val.bin has 5,434 tokens, and meta.json beside it says 5,534")
    path.write_bytes(whole)
    meta_path.write_text(json.dumps(meta | {"vocab_size": 22}))
    refused(r"prepared with a vocabulary of 22, and the model's has 21")
    run("--vocab_size=22", "--max_iters=1", out_dir="larger")
    meta_path.write_text("{}")
    refused(r"meta.json cannot be read .*; remove it, or prepare")
    meta_path.unlink()
    run("--max_iters=1")  # nanoGPT's data has none


def test_a_resumed_run_refuses_changed_data_unless_dataset_is_given(workplace, monkeypatch):
    monkeypatch.setattr(data, "SAMPLE", (50, 20))  # val.bin is sampled too
    run("--max_iters=4")
    path = Path("data/tiny/val.bin")
    before = path.read_bytes()
    change(path, -1, 3)
    message = r"val.bin is not what the checkpoint was trained on: 5,534 tokens then"
    with pytest.raises(ValueError, match=message):
        run("--init_from=resume")
    run("--init_from=out/ckpt.pt", "--max_iters=1", out_dir="tuned")  # other data is what fine-tuning is for
    path.write_bytes(before)
    run("--init_from=resume")
    os.rename("data/tiny", "data/moved")
    change(Path("data/moved/val.bin"), -1, 3)
    run("--init_from=resume", "--max_iters=9", "--dataset=moved")


def test_a_metrics_file_of_another_program_is_left_alone(workplace):
    path = Path("out/metrics.jsonl")
    path.parent.mkdir()
    for line in ('{"step": 1, "loss": 2.5}\n', '{"step": 1}\n{"ste'):
        path.write_text(line)
        with pytest.raises(ValueError, match=r"metrics.jsonl was not written by a training run"):
            run()
        assert path.read_text() == line and not Path("out/ckpt.pt").exists()


# ---- tokenizers of the data


def test_a_meta_file_without_symbols_is_trained_on_and_says_what_sampling_lacks(
    workplace, monkeypatch, capsys
):
    path = Path("data/tiny/meta.pkl")
    chars = path.read_bytes()
    path.write_bytes(pickle.dumps({"vocab_size": 30}))
    lack = "has vocab_size=30 and no symbols that are text (itos)"
    assert run("--eval_sample=5")["model_args"]["vocab_size"] == 30
    out = capsys.readouterr().out
    assert f"no samples: data/tiny/meta.pkl {lack}: the model can be trained, but sampling" in out
    flags = ["--device=cpu", "--num_samples=1", "--max_new_tokens=2", "--start=king"]
    code, _, err = command(sample.main, monkeypatch, capsys, *flags)
    assert code == 1 and lack in err
    path.write_bytes(chars)  # the symbols are added later
    assert command(sample.main, monkeypatch, capsys, *flags)[1].startswith("king")


def test_a_meta_file_without_a_size_of_the_vocabulary_is_refused(tmp_path):
    path = tmp_path / "meta.pkl"
    for meta in ({"itos": {0: "a"}}, {"vocab_size": 60.5}, {"vocab_size": -1}, {"vocab_size": 2**60}, [65]):
        path.write_bytes(pickle.dumps(meta))
        with pytest.raises(ValueError, match=r"meta.pkl cannot be read as nanoGPT's meta.pkl; prepare"):
            describe_meta(path)


def test_the_symbols_of_a_meta_file_may_be_a_list_or_none(tmp_path):
    path = tmp_path / "meta.pkl"
    for itos, kind in ((["a", "b"], "char"), (None, "unknown"), ([], "unknown")):
        path.write_bytes(pickle.dumps({"vocab_size": 2, "itos": itos}))
        description = describe_meta(path)
        assert description["kind"] == kind and description.get("symbols", itos) == itos


def test_symbols_whose_ids_begin_at_1_are_read(workplace):
    path = Path("data/tiny/meta.pkl")
    itos = dict(enumerate(describe_meta(path)["symbols"], 1))
    path.write_bytes(pickle.dumps({"vocab_size": 22, "itos": itos}))
    tokenizer = from_dict(describe_dataset(path.parent))
    assert [itos[i] for i in tokenizer.encode("king")] == list("king") and tokenizer.start_id == 1
    assert tokenizer.decode([0, *tokenizer.encode("king")]) == "\ufffdking"
    Path("data/tiny/meta.json").unlink()
    assert run("--max_iters=1")["model_args"]["vocab_size"] == 22


def test_data_without_a_tokenizer_and_a_small_vocabulary_are_trained_on_without_samples(workplace, capsys):
    """A sample would be GPT-2's words for ids that are not GPT-2's."""
    for name in ("meta.pkl", "meta.json"):
        Path("data/tiny", name).unlink()
    state = run("--vocab_size=300", "--eval_sample=5")
    assert state["iter_num"] == 8 and state["tokenizer"]["kind"] == "unknown"
    sentence = "no samples: vocab_size=300 is too small for GPT-2's encoding, and data/tiny"
    assert capsys.readouterr().out.count(sentence) == 1
    assert run("--init_from=resume", "--max_iters=9")["iter_num"] == 9
