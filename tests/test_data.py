"""The promises of the data order, and what is said of files that cannot be read."""

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
from gpt.tokenizer import describe_dataset, from_dict, read_meta
from tests.runs import run
from tests.test_command_line import command
from train import data, metrics, shards
from train.data import TokenFile, describe
from train.distributed import Ranks
from train.loop import read_ahead


def token_file(folder, n, block_size=8, vocab_size=65536, seed=0):
    path = folder / "train.bin"
    np.arange(n, dtype=np.uint16).tofile(path)  # a token says where it stands
    return TokenFile(path, GPTConfig(block_size=block_size, vocab_size=vocab_size), seed)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(9, 3000), block_size=st.integers(1, 8), seed=st.integers(-5, 2**40))
def test_an_epoch_visits_every_window_once_and_none_overlap(tmp_path_factory, n, block_size, seed):
    file = token_file(tmp_path_factory.mktemp("data"), n, block_size, seed=seed)
    for epoch in range(3):
        starts = np.sort(file.starts(epoch * file.windows, file.windows))
        assert len(set(np.diff(starts))) <= 1 and (len(starts) < 2 or np.diff(starts)[0] == block_size)
        assert starts[0] >= 0 and starts[-1] + block_size + 1 <= n
        # what an epoch leaves out is less than two blocks, at the ends
        assert n - len(starts) * block_size <= 2 * block_size


@settings(max_examples=20, deadline=None)
@given(position=st.integers(0, 5000), count=st.integers(1, 100))
def test_any_stretch_can_be_read_directly(tmp_path_factory, position, count):
    file = token_file(tmp_path_factory.mktemp("data"), 700)
    one_by_one = [file.starts(p, 1)[0] for p in range(position, position + count)]
    assert file.starts(position, count).tolist() == one_by_one


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


def test_targets_are_the_tokens_that_follow(tmp_path):
    file = token_file(tmp_path, 1000)
    idx, targets = file.batch(5, 12)
    assert idx.dtype == targets.dtype == torch.int64 and idx.shape == (12, 8)
    assert torch.equal(idx[:, 0], torch.from_numpy(file.starts(5, 12)))
    assert torch.equal(idx + 1, targets)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_step_has_the_same_windows_whatever_the_number_of_ranks(tmp_path, world_size):
    file = token_file(tmp_path, 5000)
    expected = file.starts(24, 3 * 16).reshape(3, 16)  # three steps of 4 micro-batches of 4 windows
    readers = [read_ahead(file, 24, 4, Ranks(r, world_size, "cpu", None)) for r in range(world_size)]
    for step in range(3):
        seen = [next(r)[0][:, 0].tolist() for _ in range(4 // world_size) for r in readers]
        assert np.concatenate(seen).tolist() == expected[step].tolist()


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(40, 900),
    world_size=st.integers(1, 5),
    size=st.integers(1, 4),
    micro_steps=st.integers(0, 9),
)
def test_ranks_read_disjoint_windows(tmp_path_factory, n, world_size, size, micro_steps):
    """Together the next ones of the run from any position on; over an epoch every window once."""
    file = token_file(tmp_path_factory.mktemp("data"), n)
    position = micro_steps * world_size * size
    steps = -(-file.windows // (world_size * size))
    readers = [read_ahead(file, position, size, Ranks(r, world_size, "cpu", None)) for r in range(world_size)]
    seen = [token for _ in range(steps) for r in readers for token in next(r)[0][:, 0].tolist()]
    assert seen == file.starts(position, len(seen)).tolist()
    whole = file.starts(-(-position // file.windows) * file.windows, file.windows)
    assert len(set(whole.tolist())) == file.windows
    if position % file.windows == 0:
        assert sorted(seen[: file.windows]) == sorted(whole.tolist())


def test_files_that_cannot_be_read_are_told(tmp_path):
    config = GPTConfig(block_size=8, vocab_size=10)
    path = tmp_path / "train.bin"
    with pytest.raises(
        FileNotFoundError, match=r"there is no .*train.bin, and no shard with the word train in its name"
    ):
        describe(tmp_path)
    with path.open("wb") as f:
        np.save(f, np.arange(100, dtype=np.uint16) % 10)
    for content, kind in ((path.read_bytes(), "a NumPy array"), (gzip.compress(b"ids"), "compressed .gzip.")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"train.bin is {kind}.*, not a file of ids: write"):
            TokenFile(path, config, 0)
    path.write_bytes(b"\0" * 31)
    with pytest.raises(ValueError, match="odd number of bytes, 31"):
        TokenFile(path, config, 0)
    path.write_bytes(b"\0" * 16)
    with pytest.raises(ValueError, match=r"has 8 tokens, too few .* lower block_size to 7"):
        TokenFile(path, config, 0)
    np.full(100, 10, np.uint16).tofile(path)
    file = TokenFile(path, config, 0)
    with pytest.raises(ValueError, match=r"token id 10, but vocab_size=10 allows 0 to 9"):
        file.batch(0, 4)


def llm_c_shard(path, ids, magic=20240520, version=1, dtype=np.uint16, count=None):
    """As llm.c's and modded-nanogpt's scripts write them."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(ids, dtype).tobytes())


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=9),
    block_size=st.integers(1, 70),
    seed=st.integers(0, 99),
    kinds=st.integers(0, 2**9),
)
def test_shards_give_the_batches_of_the_file_they_would_make(
    tmp_path_factory, lengths, block_size, seed, kinds
):
    """Of whatever sizes and formats: windows may begin in one and end in another, past some in between."""
    if sum(lengths) <= block_size:
        lengths.append(block_size + 1)
    whole, cut = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cut")
    ids = np.random.default_rng(seed).integers(0, 65536, sum(lengths)).astype(np.uint16)
    ids.tofile(whole / "train.bin")
    for i, part in enumerate(np.split(ids, np.cumsum(lengths)[:-1])):
        path = cut / f"web_train_{i:06}.bin"
        _ = llm_c_shard(path, part) if kinds >> i & 1 else part.tofile(path)
    config = GPTConfig(block_size=block_size, vocab_size=65536)
    one, many = (TokenFile(folder / "train.bin", config, seed) for folder in (whole, cut))
    assert len(one) == len(many) == len(ids)
    for a, b in zip(one.batch(0, 2 * one.windows), many.batch(0, 2 * one.windows)):
        assert torch.equal(a, b)
    starts = one.starts(0, one.windows)
    expected = np.stack([ids[s : s + block_size + 1] for s in starts]).astype(np.int64)
    assert np.array_equal(many.read(starts, block_size + 1), expected)


def test_shards_are_found_by_the_name_of_their_split(tmp_path):
    for name, token in (("fineweb_val_000000", 1), ("fineweb_train_000002", 2), ("fineweb_train_000001", 3)):
        llm_c_shard(tmp_path / f"{name}.bin", [token] * 20)
    config = GPTConfig(block_size=39, vocab_size=10)
    assert TokenFile(tmp_path / "train.bin", config, 0).batch(0, 1)[0].tolist() == [[3] * 20 + [2] * 19]
    with pytest.raises(ValueError, match=r"val.bin has 20 tokens, too few"):
        TokenFile(tmp_path / "val.bin", config, 0)
    np.full(50, 7, np.uint16).tofile(tmp_path / "train.bin")  # a whole file comes before shards
    assert TokenFile(tmp_path / "train.bin", config, 0).batch(0, 1)[0].unique().tolist() == [7]
    describe(tmp_path)
    (tmp_path / "fineweb_val_000000.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*val.bin, and no shard with the word val in its name"):
        describe(tmp_path)


def test_a_shard_belongs_to_the_split_whose_word_is_in_its_name(tmp_path):
    names = ["medieval_train_01", "medieval_val_00", "constraint_02", "interval_03", "Train-2", "validation0"]
    for name in names:
        llm_c_shard(tmp_path / f"{name}.bin", [1] * 20)
    llm_c_shard(tmp_path / "train3.BIN", [1] * 20)
    (tmp_path / "._Train-2.bin").write_bytes(b"a Mac's own")
    assert [p.stem for p in shards.find(tmp_path / "train.bin")] == ["Train-2", "medieval_train_01", "train3"]
    assert [p.stem for p in shards.find(tmp_path / "val.bin")] == ["medieval_val_00", "validation0"]
    llm_c_shard(tmp_path / "train_val_00.bin", [1] * 20)
    with pytest.raises(ValueError, match=r"train_val_00.bin has the words of both splits .*\(train, val\)"):
        shards.find(tmp_path / "val.bin")


@pytest.mark.parametrize("vocab_size", [40, 50257, 128256])
def test_uint32_ids_without_a_header_are_refused_and_what_the_sentence_says_converts_them(
    tmp_path, vocab_size
):
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


def test_a_text_of_one_symbol_a_line_is_not_taken_for_uint32(tmp_path):
    path = tmp_path / "train.bin"
    np.stack([np.arange(900) % 26 + 1, np.zeros(900)], 1).astype(np.uint16).tofile(path)
    assert len(TokenFile(path, GPTConfig(block_size=8, vocab_size=27), 0)) == 1800
    (tmp_path / "meta.json").write_text(
        json.dumps({"dtype": "uint16", "vocab_size": 400, "train": {"tokens": 1800}, "val": {"tokens": 9}})
    )
    np.stack([np.arange(900) % 400, np.zeros(900)], 1).astype(np.uint16).tofile(path)
    assert len(TokenFile(path, GPTConfig(block_size=8, vocab_size=400), 0)) == 1800


def test_ids_past_16_bits_are_written_and_read_as_llm_c_does(tmp_path):
    ids = np.array([0, 65535, 65536, 128255, 7] * 10, np.uint32)
    theirs, ours = tmp_path / "theirs_train.bin", tmp_path / "ours_train.bin"
    llm_c_shard(theirs, ids, 20240801, 7, np.uint32)
    ours.write_bytes(shards.header(shards.dtype_for(128256), len(ids)) + ids.tobytes())
    assert ours.read_bytes() == theirs.read_bytes()
    file = TokenFile(tmp_path / "train.bin", GPTConfig(block_size=4, vocab_size=128256), 0)
    assert file.read(np.array([48]), 5).tolist() == [[128255, 7, 0, 65535, 65536]]
    assert shards.dtype_for(65536) == np.uint16 and shards.header(np.uint16, 10**12) == b""
    # more than the header's 32 bits of count; the file is a hole
    huge = 2**32 + 5
    ours.write_bytes(shards.header(np.uint32, huge))
    os.truncate(ours, 1024 + 4 * huge)
    assert len(shards.open_tokens(ours)) == huge


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (dict(version=2), r"shard of version 2; of magic 20240520 only version 1 is known"),
        (dict(count=101), r"has 1,224 bytes, .* says 101 tokens, makes 1,226: it is not whole"),
        (dict(count=99), r"it is not whole"),
        (dict(count=-1), r"it is not whole"),
        (dict(magic=20240801, version=7), r"says 100 tokens, makes 1,424: it is not whole"),
    ],
)
def test_a_shard_that_is_not_whole_is_told(tmp_path, shard, message):
    llm_c_shard(tmp_path / "x_train.bin", np.zeros(100), **shard)
    with pytest.raises(ValueError, match=message):
        TokenFile(tmp_path / "train.bin", GPTConfig(block_size=8, vocab_size=10), 0)


@pytest.fixture
def looking_at_little(monkeypatch):
    """Of data/tiny too, as of a large file, only pieces are looked at before training."""
    monkeypatch.setattr(data, "LOOKED_AT", (50, 100))


def change(path, at, token):
    ids = np.fromfile(path, np.uint16)
    ids[at] = token
    ids.tofile(path)


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_id_past_the_vocabulary_is_told_before_the_first_step(workplace, capsys, split):
    change(Path(f"data/tiny/{split}.bin"), 2345, 21)
    with pytest.raises(
        ValueError, match=rf"{split}.bin holds the token id 21, but vocab_size=21 allows 0 to 20"
    ):
        run()
    assert "iter 0" not in capsys.readouterr().out and not Path("out/ckpt.pt").exists()


def test_a_large_file_is_looked_at_from_end_to_end(workplace, looking_at_little):
    """The first and the last token, and a stretch longer than the distance between two pieces."""
    path = Path("data/tiny/train.bin")
    whole = np.fromfile(path, np.uint16)
    for at in (0, len(whole) - 1, slice(20_000, 21_000)):
        change(path, at, 30)
        with pytest.raises(ValueError, match="holds the token id 30"):
            run()
        whole.tofile(path)
    run()


def test_data_that_meta_json_does_not_count_is_told(workplace):
    meta = json.loads(Path("data/tiny/meta.json").read_text())
    assert meta["train"]["tokens"] == 49_801 and meta["val"]["tokens"] == 5_534
    path = Path("data/tiny/val.bin")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"val.bin has 5,434 tokens, and meta.json beside it says 5,534"):
        run()
    Path("data/tiny/meta.json").write_text("{}")
    with pytest.raises(ValueError, match=r"meta.json cannot be read .*; remove it, or prepare"):
        run()
    Path("data/tiny/meta.json").unlink()
    run()  # nanoGPT's has none


def test_data_of_a_larger_vocabulary_than_the_models_is_told(workplace):
    """Though no id of it is past the model's: the next batch of the same data could have one."""
    meta = json.loads(Path("data/tiny/meta.json").read_text())
    Path("data/tiny/meta.json").write_text(json.dumps(meta | {"vocab_size": 22}))
    with pytest.raises(ValueError, match=r"prepared with a vocabulary of 22, and the model's has 21"):
        run()
    run("--vocab_size=22")


@pytest.mark.parametrize(("split", "large"), [("train", False), ("val", True)])
def test_data_that_changed_since_the_checkpoint_is_told(workplace, monkeypatch, split, large):
    if large:
        monkeypatch.setattr(data, "LOOKED_AT", (50, 20))
    run("--max_iters=4")
    path = Path(f"data/tiny/{split}.bin")
    before = path.read_bytes()
    change(path, -1, 3)
    message = rf"{split}.bin is not what the checkpoint was trained on: (49,801|5,534) tokens then"
    with pytest.raises(ValueError, match=message):
        run("--init_from=resume")
    run("--init_from=out/ckpt.pt", out_dir="out2")  # other data is what fine-tuning is for
    path.write_bytes(before)
    run("--init_from=resume")
    os.rename("data/tiny", "data/moved")  # asked for by name
    path = Path("data/moved", path.name)
    change(path, -1, 3)
    run("--init_from=resume", "--max_iters=12", "--dataset=moved")


def test_a_checkpoint_of_another_tokenizer_names_both(workplace):
    run("--max_iters=4")
    Path("data/tiny/meta.pkl").unlink()
    with pytest.raises(ValueError, match=r"has: char \(21 symbols\), and the data gpt2 \(50,257 symbols\)"):
        run("--init_from=resume")


@pytest.mark.parametrize(
    ("meta", "lack"),
    [
        ({"vocab_size": 30}, "has vocab_size=30, and it names no symbols (itos, stoi)"),
        (
            {"vocab_size": 21, "itos": dict(enumerate(range(21)))},
            "has vocab_size=21, and its symbols are not text",
        ),
    ],
)
def test_a_meta_file_without_symbols_is_trained_on_and_says_what_sampling_lacks(
    workplace, monkeypatch, capsys, meta, lack
):
    path = Path("data/tiny/meta.pkl")
    chars = path.read_bytes()
    path.write_bytes(pickle.dumps(meta))
    state = run("--eval_sample=5")
    assert state["model_args"]["vocab_size"] == meta["vocab_size"] and state["iter_num"] == 8
    out = capsys.readouterr().out
    assert f"samples are left out: data/tiny/meta.pkl {lack}: the model can be trained, but sampling" in out
    flags = ["--device=cpu", "--num_samples=1", "--max_new_tokens=2", "--start=king"]
    code, _, err = command(sample.main, monkeypatch, capsys, *flags)
    assert code == 1 and lack in err
    path.write_bytes(chars)  # it is found later
    assert command(sample.main, monkeypatch, capsys, *flags)[1].startswith("king")
    path.write_bytes(pickle.dumps(meta))
    assert run("--init_from=resume", "--max_iters=9")["iter_num"] == 9


@pytest.mark.parametrize(
    ("meta", "value"),
    [
        ({"vocab_size": 2, "itos": {"0": "(", "1": ")"}}, "'0'"),
        ({"stoi": {"(": "0", ")": "1"}}, "'0'"),
        ({"vocab_size": "60"}, "'60'"),
        ({"vocab_size": 60.5}, "60.5"),
        ({"itos": {None: "("}}, "None"),
    ],
)
def test_ids_in_a_meta_file_that_are_not_numbers_are_told(tmp_path, meta, value):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(ValueError, match=rf"vocab_size and the ids .* must be whole numbers, not {value}\)"):
        read_meta(tmp_path / "meta.pkl")


def test_symbols_whose_ids_begin_at_1_are_read(workplace):
    """nanoGPT needs the row of id 0 all the same."""
    path = Path("data/tiny/meta.pkl")
    symbols = read_meta(path)
    stoi = {symbol: i for i, symbol in enumerate(symbols, 1)}
    path.write_bytes(pickle.dumps({"vocab_size": 21, "stoi": stoi}))
    Path("data/tiny/meta.json").unlink()
    for split in ("train", "val"):
        ids = np.fromfile(f"data/tiny/{split}.bin", np.uint16)
        (ids + 1).astype(np.uint16).tofile(f"data/tiny/{split}.bin")
    tokens = from_dict(describe_dataset(path.parent))
    assert tokens.encode("king") == [stoi[c] for c in "king"] and tokens.start_id == 1
    assert tokens.decode([0, *tokens.encode("king")]) == "\ufffdking"
    assert run()["model_args"]["vocab_size"] == 22


@pytest.mark.parametrize("vocab_size", [100, 300])
def test_data_without_a_tokenizer_and_a_small_vocabulary_are_trained_on_without_samples(
    workplace, capsys, vocab_size
):
    """A sample would begin from GPT-2's new line, 198, or be GPT-2's words for ids that are not GPT-2's."""
    for name in ("meta.pkl", "meta.json"):
        Path("data/tiny", name).unlink()
    state = run(f"--vocab_size={vocab_size}", "--eval_sample=5")
    assert state["iter_num"] == 8 and state["tokenizer"]["kind"] == "unknown"
    out = capsys.readouterr().out
    sentence = (
        f"samples are left out: vocab_size={vocab_size} is too small for GPT-2's encoding, and data/tiny"
    )
    assert out.count(sentence) == 1
    assert run("--init_from=resume", "--max_iters=9")["iter_num"] == 9


@pytest.mark.parametrize("line", ['{"step": 1, "loss": 2.5}\n', "[1, 2]\n", '{"step": 1}\n{"ste'])
def test_a_metrics_file_of_another_program_is_left_alone(workplace, line):
    path = Path("out/metrics.jsonl")
    path.parent.mkdir()
    path.write_text(line)
    for read in (run, lambda: metrics.read(path)):
        with pytest.raises(ValueError, match=r"metrics.jsonl was not written by a training run .*--out_dir"):
            read()
    assert path.read_text() == line and not Path("out/ckpt.pt").exists()
