"""Evaluation against scores written here from transformers' logits in fp64."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt.model import GPT, GPTConfig
from gpt.pretrained import save_checkpoint, save_hugging_face
from gpt.tokenizer import CharTokenizer, write_meta
from tests.runs import surroundings
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
    described = CharTokenizer(SYMBOLS).to_dict()
    save_checkpoint(ours, described, Path("out/ckpt.pt"))
    save_hugging_face(ours, described, Path("folder"))
    return GPT2LMHeadModel.from_pretrained("folder").double().eval()


@torch.no_grad()
def nats(hf, context, token):
    """The loss of one token after a context, by a forward of its own."""
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


@pytest.mark.parametrize("stride", [0, 1, 5, T])
@pytest.mark.parametrize("n", [2, T, T + 1, T + 2, 4 * T + 1, 61])
def test_every_token_is_scored_once_with_its_context(model, monkeypatch, capsys, n, stride):
    ids = write_tokens(n)
    step = stride or T
    total = 0.0
    for i in range(1, n):
        window = max(0, math.ceil((i - T) / step))  # the first that reaches this token
        total += nats(model, ids[window * step : i], ids[i])
    found = run(monkeypatch, capsys, "--data=data/val.bin", f"--stride={stride}", "--batch_size=3")["tokens"]
    text = "".join(SYMBOLS[i] for i in ids[1:])
    assert (found["tokens"], found["stride"], found["block_size"]) == (n - 1, step, T)
    assert found["loss"] == pytest.approx(total / (n - 1), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / (n - 1)), rel=1e-4)
    assert found["bytes"] == len(text.encode())
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-5)


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
    """(by the sum, by the mean) of the losses of an ending's tokens, a token a forward."""
    encode = CharTokenizer(SYMBOLS).encode
    found = []
    for context, endings in EXAMPLES:
        sums, means = [], []
        for ending in endings:
            after = encode(" " + ending)
            ids = encode(context) + after
            losses = [
                nats(hf, ids[max(0, len(ids) - T - 1) : i], ids[i]) for i in range(len(ids))[-len(after) :]
            ]
            sums.append(sum(losses))
            means.append(sum(losses) / len(losses))
        found.append((sums.index(min(sums)), means.index(min(means))))
    return found


def test_hellaswag_chooses_as_the_losses_say(model, monkeypatch, capsys):
    expected = choices(model)
    assert any(a != b for a, b in expected) and len({b for _, b in expected}) > 1
    for key, labels in zip(("acc", "acc_norm"), zip(*expected)):
        for shift in (0, 1):  # with the model's own choices as labels all are right, with others none
            lines = [
                json.dumps({"ctx": c, "endings": e, "label": (label + shift) % 4, "ind": 1})
                for (c, e), label in zip(EXAMPLES, labels)
            ]
            Path("h.jsonl").write_text("\n".join(lines) + "\n")
            found = run(monkeypatch, capsys, "--hellaswag=h.jsonl", "--batch_size=2")["hellaswag"]
            assert found["examples"] == len(EXAMPLES) and found[key] == 1 - shift, key


def test_two_ranks_give_the_figures_of_one(model, monkeypatch, capsys):
    write_tokens(70)
    lines = [json.dumps({"ctx": c, "endings": e, "label": 1}) for c, e in EXAMPLES]
    Path("h.jsonl").write_text("\n".join(lines))
    flags = ["--data=data/val.bin", "--stride=5", "--hellaswag=h.jsonl", "--batch_size=2"]
    one = run(monkeypatch, capsys, *flags)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*torchrun, "-m", "train.evaluate", *flags, "--device=cpu", "--result=r.json"],
        env=surroundings(),
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    two = json.loads(Path("r.json").read_text())
    assert two == json.loads(result.stdout)
    assert two["hellaswag"] == one["hellaswag"]
    for key, value in one["tokens"].items():
        assert two["tokens"][key] == (pytest.approx(value, rel=1e-6) if key != "file" else value), key


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "nothing to evaluate on"),
        (["--data=nowhere.bin"], "there is no nowhere.bin"),
        (["--data=data/val.bin", "--stride=13"], "stride=13 must be from 1 to block_size=12"),
        (["--data=other/val.bin"], "other/val.bin was prepared with another tokenizer or alphabet"),
        (["--data=large/val.bin"], "large/val.bin holds the token id 99, but vocab_size=17"),
        (["--hellaswag=nowhere.jsonl"], "there is no file nowhere.jsonl"),
        (["--hellaswag=h.jsonl"], "h.jsonl, line 2, is no example of ctx, endings and label (KeyError)"),
        (["--hellaswag=empty.jsonl"], "empty.jsonl holds no examples"),
        (["--hellaswag=z.jsonl"], "the symbol 'z' (at character 1) is not among the 17"),
        (["--data=data/val.bin", "--batch_size=0"], "batch_size=0 must be at least 1"),
        (["--data=data/val.bin", "--init_from=nowhere.pt"], "there is no checkpoint nowhere.pt"),
    ],
)
def test_a_mistake_is_one_sentence(model, monkeypatch, capsys, flags, sentence):
    write_tokens(20)
    for folder, ids in (("other", [1]), ("large", [1, 99, 3])):
        Path(folder).mkdir()
        np.array(ids, np.uint16).tofile(f"{folder}/val.bin")
    write_meta(Path("other/meta.pkl"), SYMBOLS[:-1])
    good = json.dumps({"ctx": "a", "endings": ["b", "c"], "label": 0})
    Path("h.jsonl").write_text(f'{good}\n{{"ctx": "a"}}\n')
    Path("z.jsonl").write_text(good.replace('"b"', '"z"'))
    Path("empty.jsonl").touch()
    code, _, err = command(evaluate.main, monkeypatch, capsys, "--device=cpu", *flags)
    assert code == 1 and err.startswith("error: ") and sentence in err and err.count("\n") == 1, err


def test_no_datasets_package(model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, _, err = command(evaluate.main, monkeypatch, capsys, "--device=cpu", "--hellaswag=hub")
    assert code == 1 and err.startswith("error: --hellaswag=hub needs the package datasets: ")
    assert err.endswith("-m pip install -e '.[data]'\n")


def scaled(factor):
    """The model with its embedding, which is its head, times `factor`."""
    state = torch.load("out/ckpt.pt", weights_only=True)
    for name in ("lm_head.weight", "transformer.wte.weight"):
        state["model"][name] = state["model"][name] * factor
    torch.save(state, "out/ckpt.pt")


def strict(text):
    return json.loads(text, parse_constant=pytest.fail)


def test_a_perplexity_beyond_what_a_float_holds_is_null(model, monkeypatch, capsys):
    write_tokens(30)
    scaled(1e4)
    code, out, err = command(evaluate.main, monkeypatch, capsys, "--device=cpu", "--data=data/val.bin")
    found = strict(out)["tokens"]
    assert code == 0 and found["loss"] > 710 and found["perplexity"] is None, err
    assert found["bits_per_byte"] > 100


def test_losses_that_are_nan_are_null_and_an_error(model, monkeypatch, capsys):
    write_tokens(30)
    scaled(math.nan)
    example = {"ctx": "abc", "endings": ["d", "e", "f", "g"], "label": 0}
    Path("h.jsonl").write_text(json.dumps(example) + "\n")
    for flags in (["--data=data/val.bin"], ["--hellaswag=h.jsonl"]):
        code, out, err = command(
            evaluate.main, monkeypatch, capsys, "--device=cpu", "--result=r.json", *flags
        )
        assert code == 1 and "the losses of out/ckpt.pt are not finite" in err
        assert strict(out) == strict(Path("r.json").read_text())
        figures = strict(out).get("tokens") or strict(out)["hellaswag"]
        names = {"loss", "perplexity", "bits_per_byte", "acc", "acc_norm"} & figures.keys()
        assert len(names) >= 2 and all(figures[name] is None for name in names)
