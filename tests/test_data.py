"""The promises of the data order, and what is said of files that cannot be read."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.model import GPTConfig
from train.__main__ import read_ahead
from train.data import TokenFile, describe
from train.distributed import Ranks


def token_file(folder, n, block_size=8, vocab_size=65536, seed=0):
    path = folder / "train.bin"
    np.arange(n, dtype=np.uint16).tofile(path)  # a token says where it stands
    return TokenFile(path, GPTConfig(block_size=block_size, vocab_size=vocab_size), seed)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(9, 3000), block_size=st.integers(1, 8), seed=st.integers(-5, 2**40))
def test_an_epoch_visits_every_window_once_and_none_overlap(tmp_path_factory, n, block_size, seed):
    file = token_file(tmp_path_factory.mktemp("data"), n, block_size, seed=seed)
    for epoch in range(3):
        starts = np.sort(file.starts(epoch * file.windows, file.windows))
        assert len(set(np.diff(starts))) <= 1 and (len(starts) < 2 or np.diff(starts)[0] == block_size)
        assert starts[0] >= 0 and starts[-1] + block_size + 1 <= n
        # what an epoch leaves out is less than two blocks, at the ends
        assert n - len(starts) * block_size <= 2 * block_size


@settings(max_examples=30, deadline=None)
@given(position=st.integers(0, 5000), count=st.integers(1, 400))
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


def test_files_that_cannot_be_read_are_told(tmp_path):
    config = GPTConfig(block_size=8, vocab_size=10)
    path = tmp_path / "train.bin"
    with pytest.raises(FileNotFoundError, match=r"there is no .*train.bin, and no shard \*train\*.bin"):
        describe(tmp_path)
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
