"""A converted model has the same weights, bit for bit, and the same logits in transformers."""

import json
import shutil
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch

from gpt import checkpoint, convert, sample, tokenizer
from gpt.model import GPT, GPTConfig
from gpt.pretrained import load, save_checkpoint, save_hugging_face
from tests.runs import run
from tests.test_command_line import command, complaint
from tests.test_generate import stir
from train import __main__ as training
from train.checkpoint import find_start, initial_model
from train.config import parse
from train.distributed import Ranks
from train.prepare.encode import describe_tokenizer

CHARS = {"kind": "char", "symbols": ["\n", " ", "é", "<", "b", "\u2028"]}
GPT2 = {"kind": "gpt2"}
DRAW = ["--device=cpu", "--num_samples=2", "--max_new_tokens=20"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def build(description=CHARS, **changes):
    torch.manual_seed(0)
    vocab_size = len(description.get("symbols", ())) or 50304
    config = dict(block_size=24, vocab_size=vocab_size, n_layer=2, n_head=2, n_embd=32, dropout=0.25)
    model = GPT(GPTConfig(**config | changes)).eval()
    stir(model)
    return model


def logits(model, idx):
    with torch.no_grad():
        return model(idx, idx, return_logits=True)[0]


def assert_same_logits(ours, theirs, symbols):
    idx = torch.randint(symbols, (2, 24))
    torch.testing.assert_close(logits(ours.eval(), idx), theirs(idx).logits, rtol=1e-5, atol=1e-5)


def assert_same_weights(weights, expected):
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


# ---- checkpoints and folders


@pytest.mark.parametrize(("bias", "activation"), [(True, "gelu"), (False, "gelu_tanh")])
def test_a_checkpoint_goes_to_hugging_face_and_back_bit_for_bit(bias, activation):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = build(bias=bias, activation=activation)
    save_checkpoint(model, CHARS, Path("a/ckpt.pt"))
    convert.convert("a/ckpt.pt", Path("hf"))
    convert.convert("hf", Path("b.pt"))
    first, second = checkpoint.read(Path("a/ckpt.pt")), checkpoint.read(Path("b.pt"))
    assert first.model_args == second.model_args and first.model_args["dropout"] == 0.25
    assert (second.gpt_config["activation"], second.tokenizer) == (activation, CHARS)
    assert list(first.model) == list(second.model)
    assert_same_weights(first.model, model.state_dict())
    assert_same_weights(second.model, model.state_dict())
    # Its sample.py: GPTConfig(**model_args), load_state_dict, and config, where it looks for a data set.
    seven = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    assert first.model_args.keys() == seven and "dataset" not in first.config

    assert_same_logits(model, AutoModelForCausalLM.from_pretrained("hf").eval(), 6)
    chars, text = AutoTokenizer.from_pretrained("hf"), "bé <\n b\u2028"
    assert chars(text).input_ids == tokenizer.CharTokenizer(CHARS["symbols"]).encode(text)
    assert chars.decode(chars(text).input_ids) == text


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_hugging_face_to_a_checkpoint_and_back_bit_for_bit(kind):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_positions=24, n_layer=2, n_head=2, n_embd=32, resid_pdrop=0.3)
    theirs = GPT2LMHeadModel(config).eval()
    stir(theirs)
    theirs.save_pretrained("a")
    if kind == "bin":
        Path("a/model.safetensors").unlink()
        torch.save(theirs.state_dict(), "a/pytorch_model.bin")
    convert.convert("a", Path("ckpt.pt"))
    convert.convert("ckpt.pt", Path("b"))
    assert_same_weights(GPT2LMHeadModel.from_pretrained("b").state_dict(), theirs.state_dict())
    model, description = load("ckpt.pt")
    assert (model.config.activation, model.config.dropout) == ("gelu_tanh", 0.0)
    assert description["kind"] == "unknown"
    assert_same_logits(model, theirs, 300)
    assert GPT.from_pretrained("a", {"dropout": 0.1}).config.dropout == 0.1


def test_biases_that_transformers_trained_are_kept():
    """In a Hugging Face folder a model without biases has zeros. Fine-tuning there can change them."""
    from transformers import GPT2LMHeadModel

    save_hugging_face(build(bias=False), CHARS, Path("hf"))
    assert not GPT.from_pretrained("hf", {}).config.bias
    theirs = GPT2LMHeadModel.from_pretrained("hf").eval()
    theirs.transformer.h[1].mlp.c_fc.bias.data[3] = 0.5
    theirs.save_pretrained("tuned")
    assert_same_logits(GPT.from_pretrained("tuned", {}), theirs, 6)


def test_the_padding_of_the_vocabulary_can_be_left_out(monkeypatch, capsys):
    model = build(GPT2)
    save_checkpoint(model, GPT2, Path("padded.pt"))
    _, out, _ = command(convert.main, monkeypatch, capsys, "padded.pt", "exact.pt", "--vocab_size=50257")
    assert "vocabulary: 50304 -> 50257 rows, for 50257 symbols" in out
    exact = load("exact.pt")[0].eval()
    idx = torch.randint(50257, (2, 24))
    assert torch.allclose(logits(exact, idx), logits(model, idx)[..., :50257], rtol=1e-5, atol=1e-5)
    for size in ("50256", "50258"):
        err = complaint(convert.main, monkeypatch, capsys, "exact.pt", "x.pt", f"--vocab_size={size}")
        assert f"vocab_size={size} must be from 50257" in err and "to 50257" in err


def test_masks_and_wrapper_names_are_dropped_and_the_tied_weight_may_be_saved_once():
    """As older versions of nanoGPT save them. DDP and torch.compile can wrap the model in either order."""
    model = build()
    save_checkpoint(model, CHARS, Path("ckpt.pt"))
    state = torch.load("ckpt.pt", weights_only=True)
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(2)}
    masks["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    for wrapped, left_out in (
        ("_orig_mod.{}", "lm_head.weight"),
        ("module._orig_mod.{}", "transformer.wte.weight"),
        ("_orig_mod.module.{}", ""),
    ):
        weights = {name: weight for name, weight in (state["model"] | masks).items() if name != left_out}
        # a block that was compiled alone has the wrapper's name inside
        renamed = {wrapped.format(name).replace(".h.1.", ".h.1._orig_mod."): w for name, w in weights.items()}
        torch.save(state | {"model": renamed}, "wrapped.pt")
        loaded = load("wrapped.pt")[0]
        assert_same_weights(loaded.state_dict(), model.state_dict())
        assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_a_folder_can_be_that_of_a_run_or_of_a_hugging_face_model(workplace, monkeypatch, capsys):
    """In sampling, conversion and training. After always_save_checkpoint=False a run means its best.pt."""
    run("--max_iters=4", "--always_save_checkpoint=False")
    best = torch.load("out/best.pt", weights_only=True)
    best["model"]["transformer.wpe.weight"] += 1  # now it differs from ckpt.pt
    Path("out/best.pt").unlink()
    torch.save(best, "out/best.pt")
    convert.convert("out", Path("converted.pt"))
    assert_same_weights(checkpoint.read(Path("converted.pt")).model, best["model"])
    convert.convert("out", Path("hf"))
    verified, testzip = [], zipfile.ZipFile.testzip
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda file: verified.append(file) or testzip(file))
    _, expected, _ = command(sample.main, monkeypatch, capsys, *DRAW, "--start=king")
    assert expected.startswith("king") and len(verified) == 1, "reading all of a checkpoint takes long"
    for source in ("out", "hf"):
        drawn = command(sample.main, monkeypatch, capsys, *DRAW, "--start=king", f"--init_from={source}")
        assert drawn[1] == expected
        tuned = run(
            f"--init_from={source}", "--max_iters=1", "--learning_rate=0", "--min_lr=0",
            out_dir=f"tuned-{source}",
        )  # fmt: skip
        assert tuned["iter_num"] == 1, "a new run, not the old one resumed"
        assert_same_weights(tuned["model"], best["model"])


# ---- tokenizers


def other_language(folder, rows=300):
    """Saves a GPT2LMHeadModel in `folder`, and returns a byte-pair encoding of its own."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=rows, n_positions=24, n_layer=1, n_head=2, n_embd=8)
    GPT2LMHeadModel(config).save_pretrained(folder)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["der Hund und die Katze " * 9], 270, special_tokens=["<s>", "<|endoftext|>"])
    return bpe


@pytest.mark.parametrize("layout", ["tokenizer.json", "vocab.json", "of class GPT2Tokenizer"])
def test_the_tokenizer_in_a_folder_is_kept_whatever_its_layout_and_class(monkeypatch, capsys, layout):
    from transformers import AutoTokenizer

    bpe = other_language("hf")
    if layout == "vocab.json":
        bpe.save_model("hf")  # vocab.json and merges.txt
    else:
        bpe.save("hf/tokenizer.json")
    if "class" in layout:
        Path("hf/tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    text = "der Hund und die Größe <|endoftext|>"
    expected = bpe.encode(text).ids
    model, description = load("hf")
    assert description["kind"] == "json" and tokenizer.from_dict(description).encode(text) == expected
    assert expected[-1] == 1 and tokenizer.from_dict(description).decode(expected) == text
    # a byte-order mark in its files is left out
    for path in [p for p in Path("hf").iterdir() if p.suffix in (".json", ".txt")]:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    assert tokenizer.describe_folder(Path("hf")) == description
    for path in Path("hf").glob("*config.json"):
        path.write_bytes(path.read_bytes()[3:])
    _, out, _ = command(convert.main, monkeypatch, capsys, "hf", "a.pt")
    assert "vocabulary: 300 rows, for 270 symbols; --vocab_size=270 drops the others" in out
    convert.convert("a.pt", Path("again"))
    theirs = AutoTokenizer.from_pretrained("again")
    assert theirs(text).input_ids == expected
    assert theirs.eos_token_id == json.loads(Path("again/config.json").read_text())["eos_token_id"] == 1
    again, description = load("again")
    assert tokenizer.from_dict(description).encode(text) == expected
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    flags = [*DRAW, "--init_from=hf", "--start=der Hund"]
    assert command(sample.main, monkeypatch, capsys, *flags)[1].startswith("der Hund")

    # training accepts data made with this tokenizer, whatever the name of its file, and no other data
    bpe.save("saved elsewhere.json", pretty=True)
    config, given = parse(["--init_from=hf", "--dataset=x", "--dtype=float32"])
    ranks = Ranks(0, 1, "cpu", None)
    start = find_start(config, given, ranks)
    for kind in ("hf", "saved elsewhere.json"):
        initial_model(config, given, describe_tokenizer(kind, None), ranks, start)
    for data in (GPT2, CHARS):
        with pytest.raises(ValueError, match=r"hf and data/x have different tokenizers"):
            initial_model(config, given, data, ranks, start)


def test_gpt2s_encoding_is_recognized_by_its_ids_and_kept():
    from transformers import AutoTokenizer

    save_hugging_face(build(GPT2), GPT2, Path("hf"))
    theirs, text = AutoTokenizer.from_pretrained("hf"), "Hello, I'm a language model<|endoftext|>"
    assert theirs(text).input_ids == tokenizer.GPT2Tokenizer().encode(text)
    assert theirs.eos_token_id == 50256 == json.loads(Path("hf/config.json").read_text())["eos_token_id"]
    assert tokenizer.describe_folder(Path("hf")) == GPT2
    # added tokens are kept if the embedding has rows for them
    Path("hf/added_tokens.json").write_text('{"<pad>": 50257}')
    more = tokenizer.describe_folder(Path("hf"), 50258)
    assert tokenizer.from_dict(more).encode("Hello<pad>") == [15496, 50257]
    # the folder of a model with 50257 rows: data prepared with its tokenizer fit the model
    model = json.loads(Path("hf/config.json").read_text())
    Path("hf/config.json").write_text(json.dumps(model | {"vocab_size": 50257}))
    assert describe_tokenizer("hf", None) == tokenizer.describe_hugging_face("hf") == GPT2
    assert tokenizer.fits(more, GPT2) and not tokenizer.fits(GPT2, more)
    normalized = more | {"json": json.dumps(json.loads(more["json"]) | {"normalizer": {"type": "NFC"}})}
    assert not tokenizer.fits(more, normalized) and not tokenizer.fits(normalized, GPT2)
    config = Path("hf/tokenizer_config.json")
    settings = config.read_text()
    config.write_text(json.dumps(json.loads(settings) | {"add_prefix_space": True}))
    assert tokenizer.describe_folder(Path("hf"), 50257)["kind"] == "json"
    config.write_text(settings)
    other = json.loads(Path("hf/vocab.json").read_text())
    other["Hello"], other["Ġthe"] = other["Ġthe"], other["Hello"]
    Path("hf/vocab.json").write_text(json.dumps(other))
    assert tokenizer.describe_folder(Path("hf"), 50257)["kind"] == "json"


def test_a_tokenizer_of_words_is_not_our_export_of_characters(tmp_path):
    """Chlorine in a molecule is one token, "Cl", beside "C" for carbon."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    atoms = Tokenizer(models.WordLevel({"C": 0, "Cl": 1}, unk_token="C"))
    atoms.pre_tokenizer = pre_tokenizers.Split(Regex("Cl|C"), "isolated")
    atoms.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer.from_dict(tokenizer.describe_folder(tmp_path)).encode("CCl") == [0, 1]


# GPT-2's own number of rows says nothing about the tokenizer either.
@pytest.mark.parametrize("rows", [300, 50257])
def test_a_folder_without_a_tokenizer_is_converted_and_back_and_says_so(monkeypatch, capsys, rows):
    other_language("hf", rows)
    code, out, err = command(convert.main, monkeypatch, capsys, "hf", "a.pt")
    assert code == 0 and "the tokenizer is unknown" in out, err
    convert.convert("a.pt", Path("back"))
    assert not list(Path("back").glob("tokenizer*"))
    assert torch.equal(load("back")[0].lm_head.weight, load("hf")[0].lm_head.weight)
    err = complaint(convert.main, monkeypatch, capsys, "a.pt", "b.pt", f"--vocab_size={rows - 8}")
    assert f"vocab_size={rows - 8}" in err and str(rows) in err
    err = complaint(sample.main, monkeypatch, capsys, "--init_from=a.pt", "--device=cpu")
    assert "hf has neither tokenizer.json nor vocab.json" in err


def test_truncation_and_padding_in_a_tokenizer_json_are_ignored():
    bpe = other_language("hf")
    bpe.save("plain.json")
    bpe.enable_truncation(16)
    bpe.enable_padding(length=500)
    bpe.save("cut.json")
    plain, cut = (tokenizer.describe_json(Path(f"{name}.json")) for name in ("plain", "cut"))
    text = "der Hund und die Katze, " * 20
    ids = tokenizer.from_dict(cut).encode(text)
    assert ids == tokenizer.from_dict(plain).encode(text) and 16 < len(ids) < 500
    assert tokenizer.fits(plain, cut)


# ---- errors


@pytest.fixture
def folder():
    save_hugging_face(build(), CHARS, Path("hf"))
    return Path("hf")


def test_a_model_that_gpt_cannot_compute_is_refused(folder):
    from transformers import GPT2LMHeadModel

    file = folder / "config.json"
    known = json.loads(file.read_text())
    for change, words in (
        ({"model_type": "gpt_neo"}, "gpt_neo"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06"),
        ({"activation_function": "relu"}, "'relu'"),
        ({"n_layer": 3}, "transformer.h.2.attn.c_attn.bias"),
        ({"n_positions": 30}, "could not be loaded"),
    ):
        file.write_text(json.dumps(known | change))
        with pytest.raises(ValueError, match="hf") as error:
            GPT.from_pretrained("hf", {})
        assert words in str(error.value) and "\n" not in str(error.value)
    file.write_text(json.dumps(known))
    untied = GPT2LMHeadModel.from_pretrained("hf", tie_word_embeddings=False)
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight + 1)
    untied.save_pretrained("untied")
    with pytest.raises(ValueError, match=r"'untied' has .*lm_head"):
        GPT.from_pretrained("untied", {})


def test_an_error_of_conversion_is_one_line(folder, monkeypatch, capsys):
    shutil.copytree("hf", "truncated")
    weights = Path("truncated/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    Path("empty").mkdir()
    for args, words in (
        (["hf"], "FROM TO"),
        (["hf", "hf"], "hf exists already"),
        (["nowhere.pt", "x"], "there is no checkpoint nowhere.pt"),
        (["gpt2-run/ckpt.pt", "x"], "there is no checkpoint gpt2-run/ckpt.pt"),
        (["truncated", "x"], "'truncated' could not be loaded"),
        (["gpt2-medum", "x"], "did you mean 'gpt2-medium'"),
        (["empty", "x"], "empty has neither a run's ckpt.pt nor the config.json"),
    ):
        code, _, err = command(convert.main, monkeypatch, capsys, *args)
        last = err.strip().splitlines()[-1]
        assert code == 1 and last.startswith("error: ") and words in last, err
        assert not Path("x").exists()


def test_a_folder_without_ckpt_pt_names_its_newest_checkpoint(workplace, monkeypatch, capsys):
    save_checkpoint(build(), CHARS, Path("run/ckpt-5.pt"))
    for main, *args in (
        (training.main, "--init_from=run", "--dataset=tiny", "--device=cpu", "--block_size=16"),
        (sample.main, "--out_dir=run"),
        (convert.main, "run", "x"),
    ):
        assert "run/ckpt-5.pt" in complaint(main, monkeypatch, capsys, *args)


def test_an_error_of_the_hub_becomes_one_line():
    error = OSError("no network\nCheck your internet connection")
    failing = mock.patch("transformers.AutoConfig.from_pretrained", side_effect=error)
    with failing, pytest.raises(ValueError, match=r"^'gpt2' could not be loaded: no network; .*$"):
        GPT.from_pretrained("gpt2")
