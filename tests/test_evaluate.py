"""Evaluation, compared with scores computed here from transformers' logits in fp64."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt.model import GPT, GPTConfig
from gpt.pretrained import save_checkpoint, save_hugging_face
from gpt.tokenizer import CharTokenizer, write_meta
from tests.runs import run_ranks
from tests.test_command_line import command
from tests.test_generate import stir
from train import evaluate

SYMBOLS = ["\n", " ", "é", "€", *"abcdefghijklm"]
T = 12  # block_size


@pytest.fixture
def model(tmp_path, monkeypatch):
    """Writes out/ckpt.pt in an empty folder; returns the same weights in fp64, opened by transformers."""
    from transformers import GPT2LMHeadModel

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    ours = GPT(GPTConfig(block_size=T, vocab_size=len(SYMBOLS), n_layer=2, n_head=2, n_embd=32))
    stir(ours)
    described = {"kind": "char", "symbols": SYMBOLS}
    save_checkpoint(ours, described, Path("out/ckpt.pt"))
    save_hugging_face(ours, described, Path("folder"))
    return GPT2LMHeadModel.from_pretrained("folder").double().eval()


@torch.no_grad()
def nats(hf, context, token):
    """The loss of one token after a context, by its own forward pass."""
    return -torch.log_softmax(hf(torch.tensor([context])).logits[0, -1], 0)[token].item()


def write_tokens(n):
    ids = np.random.default_rng(n).integers(0, len(SYMBOLS), n).astype(np.uint16)
    Path("data").mkdir(exist_ok=True)
    ids.tofile("data/val.bin")
    write_meta(Path("data/meta.pkl"), SYMBOLS)
    return ids.tolist()


def run(monkeypatch, capsys, *flags):
    code, out, err = command(evaluate.main, monkeypatch, capsys, "--device=cpu", *flags)
    assert code == 0, err
    return json.loads(out)


def test_every_token_is_scored_once_with_its_context(model, monkeypatch, capsys):
    for n, stride in ((2, 0), (T + 1, 0), (T + 2, 5), (3 * T + 1, 0), (61, 1), (61, 5)):
        ids = write_tokens(n)
        step = stride or T
        total = 0.0
        for i in range(1, n):
            window = max(0, math.ceil((i - T) / step))  # the first that reaches this token
            total += nats(model, ids[window * step : i], ids[i])
        result = run(monkeypatch, capsys, "--data=data/val.bin", f"--stride={stride}", "--batch_size=3")
        tokens, text = result["tokens"], "".join(SYMBOLS[i] for i in ids[1:])
        assert (tokens["tokens"], tokens["stride"], tokens["block_size"]) == (n - 1, step, T)
        assert tokens["loss"] == pytest.approx(total / (n - 1), rel=1e-5)
        assert tokens["perplexity"] == pytest.approx(math.exp(total / (n - 1)), rel=1e-4)
        assert tokens["bytes"] == len(text.encode())
        assert tokens["bits_per_byte"] == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-5)


def test_shards_and_ids_that_only_pad_the_vocabulary_are_evaluated(model, monkeypatch, capsys):
    ours = GPT(GPTConfig(block_size=T, vocab_size=50304, n_layer=1, n_head=1, n_embd=8))
    save_checkpoint(ours, {"kind": "gpt2"}, Path("out/ckpt.pt"))
    Path("data").mkdir()
    for i, ids in enumerate(([464, 5822], [50300, 198])):  # "The", " King", padding, a new line
        np.array(ids, np.uint16).tofile(f"data/web_val_{i}.bin")
    tokens = run(monkeypatch, capsys, "--data=data/val.bin")["tokens"]
    assert (tokens["tokens"], tokens["bytes"]) == (3, len(" King\n"))


EXAMPLES = [
    ("abc", ["d", "ef gh", "ijk", "lmabc d"]),
    ("a€b", ["c", "d", "e", "f"]),
    ("hell", ["ma", "ma ma ma", "b", "é é"]),
    ("a context that is cut".translate(str.maketrans("nostux", "abcdef")), ["be", "c", "ha", "jj j"]),
    ("ij", ["kl", "klm klm klm", "a", "b c"]),
    ("mmm", ["a", "ab", "abc", "abcd"]),
    ("g", ["hhhhhh", "h", "i i", "\n"]),
]  # fmt: skip


def choices(hf):
    """For each example the endings with the lowest sum and the lowest mean of the losses of their tokens."""
    encode = CharTokenizer(SYMBOLS).encode
    for context, endings in EXAMPLES:
        sums, means = [], []
        for ending in endings:
            after = encode(" " + ending)
            ids = encode(context) + after
            positions = range(len(ids))[-len(after) :]
            losses = [nats(hf, ids[max(0, len(ids) - T - 1) : i], ids[i]) for i in positions]
            sums.append(sum(losses))
            means.append(sum(losses) / len(losses))
        yield sums.index(min(sums)), means.index(min(means))


def write_examples(labels):
    lines = [json.dumps({"ctx": c, "endings": e, "label": n}) for (c, e), n in zip(EXAMPLES, labels)]
    Path("h.jsonl").write_text("\n".join(lines) + "\n")


def test_hellaswag_chooses_the_ending_with_the_lowest_loss(model, monkeypatch, capsys):
    expected = list(choices(model))
    assert any(a != b for a, b in expected) and len({b for _, b in expected}) > 1
    for key, labels in zip(("acc", "acc_norm"), zip(*expected)):
        for shift in (0, 1):  # with the model's own choices as labels all are right, with others none
            write_examples([(label + shift) % 4 for label in labels])
            result = run(monkeypatch, capsys, "--hellaswag=h.jsonl", "--batch_size=2")["hellaswag"]
            assert result["examples"] == len(EXAMPLES) and result[key] == 1 - shift, key


def test_two_ranks_give_the_results_of_one(model, monkeypatch, capsys):
    write_tokens(70)
    write_examples([by_mean for _, by_mean in choices(model)])
    flags = ["--data=data/val.bin", "--stride=5", "--hellaswag=h.jsonl", "--batch_size=2"]
    one = run(monkeypatch, capsys, *flags)
    two = json.loads(run_ranks(*flags, "--device=cpu", module="train.evaluate"))
    assert two["hellaswag"] == one["hellaswag"]
    assert two["tokens"].pop("file") == one["tokens"].pop("file")
    assert two["tokens"] == pytest.approx(one["tokens"], rel=1e-6)


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--stride=0", "nothing to evaluate on"),
        ("--data=nowhere.bin", "there is no nowhere.bin"),
        ("--data=nowhere.bin", "-m train.prepare lists the commands that prepare data"),
        ("--stride=13 --data=data/val.bin", "stride=13 must be from 1 to block_size=12"),
        ("--data=other/val.bin", "other/val.bin was prepared with another tokenizer or alphabet"),
        ("--data=large/val.bin", "large/val.bin holds the token id 99, but vocab_size=17"),
        ("--hellaswag=nowhere.jsonl", "there is no file nowhere.jsonl"),
        (
            "--hellaswag=h.jsonl",
            "h.jsonl, line 2, is not an example with ctx, endings and label (KeyError: 'endings')",
        ),
        ("--hellaswag=label.jsonl", "endings and label (ValueError: label=2 must be from 0 to 1)"),
        ("--hellaswag=text.jsonl", "endings and label (ValueError: ctx and endings must be text)"),
        ("--hellaswag=empty.jsonl", "empty.jsonl holds no examples"),
        ("--hellaswag=z.jsonl", "the symbol 'z' (at character 1) is not among the 17"),
        ("--hellaswag=hub", "--hellaswag=hub needs the package datasets"),
    ],
)
def test_a_mistake_is_one_sentence(model, monkeypatch, capsys, flag, sentence):
    write_tokens(20)
    for folder, ids in (("other", [1]), ("large", [1, 99, 3])):
        Path(folder).mkdir()
        np.array(ids, np.uint16).tofile(f"{folder}/val.bin")
    write_meta(Path("other/meta.pkl"), SYMBOLS[:-1])
    good = json.dumps({"ctx": "a", "endings": ["b", "c"], "label": 0})
    Path("h.jsonl").write_text(f'{good}\n{{"ctx": "a"}}\n')
    Path("z.jsonl").write_text(good.replace('"b"', '"z"'))
    Path("label.jsonl").write_text(good.replace("0", "2"))
    Path("text.jsonl").write_text(good.replace('"c"', "3"))
    Path("empty.jsonl").touch()
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, _, err = command(evaluate.main, monkeypatch, capsys, "--device=cpu", *flag.split())
    assert code == 1 and err.startswith("error: ") and sentence in err and err.count("\n") == 1, err


@pytest.mark.parametrize("factor", [1e4, math.nan])
def test_a_perplexity_that_no_float_holds_is_null_and_a_loss_that_is_not_finite_an_error(
    model, monkeypatch, capsys, factor
):
    """The embedding, which is the head, times 10,000 gives such a perplexity."""
    write_tokens(30)
    write_examples([0] * len(EXAMPLES))
    state = torch.load("out/ckpt.pt", weights_only=True)
    for name in ("lm_head.weight", "transformer.wte.weight"):
        state["model"][name] = state["model"][name] * factor
    torch.save(state, "out/ckpt.pt")
    if factor == 1e4:
        result = run(monkeypatch, capsys, "--data=data/val.bin", "--hellaswag=h.jsonl")
        tokens = result["tokens"]
        assert tokens["perplexity"] is None and tokens["loss"] > 710 and tokens["bits_per_byte"] > 100
        return
    for flag in ("--data=data/val.bin", "--hellaswag=h.jsonl"):
        code, out, err = command(evaluate.main, monkeypatch, capsys, "--device=cpu", flag)
        assert (code, out) == (1, "") and "the model's losses are not finite" in err
