"""Sampling on the command line: prompts, samples and their error messages."""

from pathlib import Path

import pytest
import torch

from gpt import sample
from tests.runs import run
from tests.test_command_line import command, complaint
from train.prepare import documents
from train.prepare.encode import encode


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        encode(Path("data/tiny"), documents.text(text, "x"), "char", 1)
        run("--max_iters=40", "--lr_decay_iters=40")
    return folder


@pytest.fixture
def trained(trained_once, monkeypatch):
    monkeypatch.chdir(trained_once)


@pytest.fixture
def drawn(trained, monkeypatch, capsys):
    """A function that runs gpt.sample with flags. Returns the samples and stderr."""

    def draw(*flags):
        flags = ["--device=cpu", "--max_new_tokens=30", *flags]
        code, out, err = command(sample.main, monkeypatch, capsys, *flags)
        assert code == 0, err
        *samples, rest = out.split("---------------\n")
        assert rest == ""
        return samples, err

    return draw


def test_samples_are_those_of_generate_with_the_same_seed(drawn):
    """GPT.generate is nanoGPT's loop. It gets the prompt once for each sample of a batch."""
    flags = ["--start=king", "--num_samples=5", "--batch_size=3", "--top_k=4"]
    samples, _ = drawn(*flags)
    torch.manual_seed(1337)  # before the model is made, as in nanoGPT's sample.py
    model, tokens = sample.load(sample.SampleConfig(), "cpu")
    start, expected = torch.tensor([tokens.encode("king")]), []
    for count in (3, 2):
        rows = model.generate(start.repeat(count, 1), 30, temperature=0.8, top_k=4)
        expected += [tokens.decode(row.tolist()) + "\n" for row in rows]
    assert samples == expected and len(set(samples)) == 5
    assert drawn(*flags, "--seed=2")[0] != samples
    greedy = [drawn("--start=king", "--temperature=0", f"--seed={s}")[0] for s in (1, 2)]
    assert greedy[0] == greedy[1] == drawn("--start=king", "--top_p=1e-6")[0]


def test_prompts_in_a_file_get_the_samples_of_each_prompt_alone(drawn, tmp_path):
    (tmp_path / "prompts.txt").write_text("king\nthe queen of hearts\na\n")
    for stop in ("", "e"):
        flags, alone = ["--num_samples=2", "--temperature=0", f"--stop={stop}"], []
        for prompt in ("king", "the queen of hearts", "a"):
            alone += drawn(f"--start={prompt}", *flags)[0]
        for size in ("32", "5", "1"):
            assert drawn(f"--prompts={tmp_path}/prompts.txt", f"--batch_size={size}", *flags)[0] == alone


def test_a_sample_ends_before_the_stop_text(drawn):
    whole, _ = drawn("--start=king", "--num_samples=4")
    stop = whole[1][12:14]  # from the second sample
    cut, _ = drawn("--start=king", "--num_samples=4", f"--stop={stop}")
    assert cut == ["king" + s.rstrip("\n")[4:].split(stop)[0] + "\n" for s in whole] != whole


def test_interactive_sampling_goes_on_after_an_error(trained, monkeypatch, capsys):
    lines = iter(["the king", "Ümlaut", "", "the queen"])

    def ask(prompt):
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", ask)
    flags = ["--device=cpu", "--interactive=True", "--max_new_tokens=20"]
    code, out, err = command(sample.main, monkeypatch, capsys, *flags)
    first, second, end = out.split("---------------\n")
    assert code == 0 and end == "\n"
    assert first.startswith("the king") and len(first) == len("the king") + 20 + 1
    assert second.startswith("the queen") and len(second) == len("the queen") + 20 + 1
    assert "'Ü'" in err and "the prompt is empty" in err


def test_a_prompt_longer_than_the_context_is_continued_with_a_warning(drawn):
    prompt = "the king and queen of hearts"
    samples, err = drawn(f"--start={prompt}", "--num_samples=1")
    assert samples[0].startswith(prompt) and "28 tokens" in err and "last 16" in err


def test_an_error_of_sampling_is_one_line(trained, monkeypatch, capsys, tmp_path):
    (tmp_path / "empty.txt").touch()
    for flag, *words in (
        ("--start=the qüeen", "'ü' (at character 5)", "21"),
        ("--start=", "the prompt is empty"),
        ("--start=FILE:nowhere.txt", "nowhere.txt"),
        ("--out_dir=nowhere", "nowhere/ckpt.pt"),
        ("--top_p=1.5", "top_p=1.5", "above 0 and at most 1"),
        ("--num_samples=0", "num_samples=0", "at least 1"),
        (f"--prompts={tmp_path}/empty.txt", "empty.txt holds no prompts"),
    ):
        err = complaint(sample.main, monkeypatch, capsys, "--device=cpu", flag)
        assert all(word in err for word in words), (flag, err)


def test_sampling_from_nanogpts_checkpoint_needs_its_meta_file(workplace, monkeypatch, capsys):
    state = run("--max_iters=1")
    torch.save({k: state[k] for k in ("model", "model_args", "config")}, "out/ckpt.pt")
    flags = ["--device=cpu", "--num_samples=1", "--max_new_tokens=3", "--start=king"]
    assert command(sample.main, monkeypatch, capsys, *flags)[1].startswith("king")
    Path("data/tiny/meta.pkl").unlink()
    err = complaint(sample.main, monkeypatch, capsys, *flags)
    assert "vocab_size=21" in err and "data/tiny has no tokenizer.json or meta.pkl" in err
