"""Weights in and out: bit for bit there and back, and in transformers' hands the same logits."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpt import checkpoint, convert, sample, tokenizer
from gpt.model import GPT, GPTConfig
from gpt.pretrained import load, save_checkpoint, save_hugging_face
from tests.runs import run
from tests.test_command_line import command
from tests.test_generate import stir
from train import __main__ as training
from train.checkpoint import find_start, initial_model
from train.config import parse
from train.distributed import Ranks
from train.prepare.encode import describe_tokenizer

CHARS = {"kind": "char", "symbols": ["\n", " ", "é", "<", "b", "\u2028"]}
GPT2 = {"kind": "gpt2"}


def build(described=CHARS, **changes):
    torch.manual_seed(0)
    vocab_size = len(described.get("symbols", ())) or 50304
    config = dict(block_size=24, vocab_size=vocab_size, n_layer=2, n_head=2, n_embd=32, dropout=0.25)
    model = GPT(GPTConfig(**config | changes)).eval()
    stir(model)
    return model


def logits(model, idx):
    with torch.no_grad():
        return model(idx, idx, return_logits=True)[0]


@pytest.fixture
def gpt2_files(monkeypatch, tmp_path):
    """GPT-2's two files in miniature: its bytes, and two merges."""
    alphabet = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]
    tokens = [*alphabet, "Ġt", "he"]
    encoder = {token: i for i, token in enumerate(tokens)} | {"<|endoftext|>": 50256}
    files = {"encoder.json": json.dumps(encoder).encode(), "vocab.bpe": "#version: 0.2\nĠ t\nh e\n".encode()}
    monkeypatch.setattr(tokenizer, "gpt2_files", lambda: files)
    return encoder


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_goes_to_hugging_face_and_back_bit_for_bit(tmp_path, bias, activation):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = build(bias=bias, activation=activation)
    save_checkpoint(model, CHARS, tmp_path / "a" / "ckpt.pt")
    convert.convert(str(tmp_path / "a" / "ckpt.pt"), tmp_path / "hf")
    convert.convert(str(tmp_path / "hf"), tmp_path / "b.pt")
    first, second = checkpoint.read(tmp_path / "a" / "ckpt.pt"), checkpoint.read(tmp_path / "b.pt")
    assert first.model_args == second.model_args and first.model_args["dropout"] == 0.25
    assert (second.gpt_config["activation"], second.tokenizer) == (activation, CHARS)
    assert list(first.model) == list(second.model)
    for name, weight in first.model.items():
        assert torch.equal(weight, model.state_dict()[name]) and torch.equal(weight, second.model[name])

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    idx = torch.randint(6, (2, 24))
    torch.testing.assert_close(theirs(idx).logits, logits(model, idx), rtol=1e-5, atol=1e-5)
    chars = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "bé <\n b\u2028"
    assert chars(text).input_ids == tokenizer.CharTokenizer(CHARS["symbols"]).encode(text)
    assert chars.decode(chars(text).input_ids) == text


def test_a_tokenizer_of_ones_own_goes_along_and_back(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(
        models.BPE({t: i for i, t in enumerate([*letters, "th", "the"])}, [("t", "h"), ("th", "e")])
    )
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.add_special_tokens(["<|endoftext|>"])
    described = {"kind": "json", "vocab_size": 259, "json": bpe.to_str()}
    model = GPT(GPTConfig(24, 320, 1, 2, 32)).eval()
    save_hugging_face(model, described, tmp_path / "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "the äther <|endoftext|>"
    assert theirs(text).input_ids == tokenizer.JsonTokenizer(bpe.to_str()).encode(text)
    assert (
        theirs.eos_token_id
        == json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"]
        == 258
    )
    again, found = load(str(tmp_path / "hf"))
    assert found == described and torch.equal(again.lm_head.weight, model.lm_head.weight)
    convert.convert(str(tmp_path / "hf"), tmp_path / "small.pt", vocab_size=259)
    assert checkpoint.read(tmp_path / "small.pt").model_args["vocab_size"] == 259


def other_language(folder, rows=50265):
    """A GPT-2 in the shape of Hugging Face's, with a byte-pair encoding of its own of as many symbols."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=rows, n_positions=24, n_layer=1, n_head=2, n_embd=8)
    GPT2LMHeadModel(config).save_pretrained(folder)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["der Hund und die Katze " * 9], 270, special_tokens=["<s>", "<|endoftext|>"])
    return bpe


@pytest.mark.parametrize("layout", ["tokenizer.json", "vocab.json"])
def test_a_byte_order_mark_in_a_file_of_a_folder_is_left_out(tmp_path, monkeypatch, layout):
    monkeypatch.chdir(tmp_path)
    bpe = other_language("hf", 300)
    if layout == "vocab.json":
        bpe.save_model("hf")
    else:
        bpe.save("hf/tokenizer.json")
    model, described = load("hf")
    for path in (p for p in Path("hf").iterdir() if p.name in (layout, "merges.txt")):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    again, marked = load("hf")
    assert marked == described and again.config == model.config
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    if layout == "tokenizer.json":
        assert describe_tokenizer("hf/tokenizer.json", None) == described


@pytest.mark.parametrize("layout", ["tokenizer.json", "vocab.json", "of class GPT2Tokenizer"])
def test_a_tokenizer_in_a_folder_is_kept_whatever_its_layout_and_class(tmp_path, monkeypatch, capsys, layout):
    monkeypatch.chdir(tmp_path)
    bpe = other_language("hf", 300)
    if layout == "vocab.json":
        bpe.save_model("hf")  # vocab.json and merges.txt
    else:
        bpe.save("hf/tokenizer.json")
    if "class" in layout:
        Path("hf/tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    text = "der Hund und die Größe <|endoftext|>"
    expected = bpe.encode(text).ids
    model, described = load("hf")
    assert described["kind"] == "json" and tokenizer.from_dict(described).encode(text) == expected
    assert expected[-1] == 1 and tokenizer.from_dict(described).decode(expected) == text
    _, out, _ = command(convert.main, monkeypatch, capsys, "hf", "a.pt")
    assert "leaves the padding out" not in out and "300 rows for the" in out
    convert.convert("a.pt", Path("again"))
    again, described = load("again")
    assert tokenizer.from_dict(described).encode(text) == expected
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    flags = ["--init_from=hf", "--start=der Hund", "--num_samples=1", "--max_new_tokens=2", "--device=cpu"]
    assert command(sample.main, monkeypatch, capsys, *flags)[1].startswith("der Hund")

    # data by this tokenizer, however it is named, are trained on; data of another are not
    bpe.save("saved elsewhere.json", pretty=True)
    config, given = parse(["--init_from=hf", "--dataset=x", "--dtype=float32"])
    ranks = Ranks(0, 1, "cpu", None)
    start = find_start(config, given, ranks)
    for kind in ("hf", "saved elsewhere.json"):
        initial_model(config, given, describe_tokenizer(kind, None), ranks, start)
    for data in (GPT2, CHARS):
        with pytest.raises(ValueError, match=r"hf was trained with another tokenizer .*tokenizer.json \("):
            initial_model(config, given, data, ranks, start)


def test_gpt2s_encoding_is_known_by_its_ids(tmp_path):
    try:
        files = tokenizer.gpt2_files()
    except OSError as error:
        pytest.skip(str(error))
    (tmp_path / "vocab.json").write_bytes(files["encoder.json"])
    (tmp_path / "merges.txt").write_bytes(files["vocab.bpe"])
    assert tokenizer.describe_folder(tmp_path) == GPT2
    text = tokenizer._json_of_bpe(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    assert tokenizer.describe_folder(tmp_path) == GPT2
    example = "Hello, I'm a language model<|endoftext|>"
    assert tokenizer.JsonTokenizer(text).encode(example) == tokenizer.GPT2Tokenizer().encode(example)
    # tokens added to it are kept where the embedding has rows for them
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 50257}')
    (tmp_path / "tokenizer.json").unlink()
    more = tokenizer.describe_folder(tmp_path, 50258)
    assert tokenizer.from_dict(more).encode("Hello<pad>") == [15496, 50257]
    assert tokenizer.describe_folder(tmp_path, 50257) == GPT2
    assert tokenizer.fits(more, GPT2) and not tokenizer.fits(GPT2, more)
    other = json.loads((tmp_path / "vocab.json").read_text())
    other["Hello"], other["Ġthe"] = other["Ġthe"], other["Hello"]
    (tmp_path / "vocab.json").write_text(json.dumps(other))
    assert tokenizer.describe_folder(tmp_path, 50257)["kind"] == "json"


# GPT-2's own number of rows, and nanoGPT's, say nothing about the tokenizer either.
@pytest.mark.parametrize("rows", [300, 50257, 50304])
def test_a_folder_without_a_tokenizer_goes_there_and_back_and_says_so(tmp_path, monkeypatch, capsys, rows):
    monkeypatch.chdir(tmp_path)
    other_language("hf", rows)
    code, out, err = command(convert.main, monkeypatch, capsys, "hf", "a.pt")
    assert code == 0 and "the tokenizer is unknown: hf has no tokenizer" in out, err
    assert "leaves the padding out" not in out
    code, out, err = command(convert.main, monkeypatch, capsys, "a.pt", "back")
    assert code == 0 and "tokenizer unknown" in out and not list(Path("back").glob("tokenizer*")), err
    assert torch.equal(load("back")[0].lm_head.weight, load("hf")[0].lm_head.weight)
    code, _, err = command(convert.main, monkeypatch, capsys, "hf", "b.pt", f"--vocab_size={rows - 8}")
    assert (
        code == 1
        and f"vocab_size={rows - 8} is too small: the tokenizer of hf is unknown, so all of its {rows} rows"
        in err
    )
    code, out, err = command(convert.main, monkeypatch, capsys, "hf", "b.pt", f"--vocab_size={rows + 8}")
    assert code == 0 and f"vocabulary: {rows} rows in hf, {rows + 8} in b.pt\n" in out, err
    code, _, err = command(sample.main, monkeypatch, capsys, "--init_from=a.pt", "--device=cpu")
    assert code == 1 and "no prompt can be encoded; put the model's tokenizer.json into the folder" in err


def test_truncation_and_padding_in_a_tokenizer_json_change_no_text(tmp_path):
    from tokenizers import Tokenizer

    other_language(tmp_path / "hf", 300).save(str(tmp_path / "plain.json"))
    bpe = Tokenizer.from_file(str(tmp_path / "plain.json"))
    bpe.enable_truncation(16)
    bpe.enable_padding(length=500)
    bpe.save(str(tmp_path / "cut.json"))
    plain, cut = (tokenizer.describe_json(tmp_path / f"{name}.json") for name in ("plain", "cut"))
    text = "der Hund und die Katze, " * 20
    ids = tokenizer.from_dict(cut).encode(text)
    assert ids == tokenizer.from_dict(plain).encode(text) and 16 < len(ids) < 500
    assert tokenizer.from_dict(cut).encode_ordinary(text).tolist() == ids
    assert tokenizer.fits(plain, cut)


def test_gpt2s_tokenizer_goes_along(tmp_path, gpt2_files):
    from transformers import AutoTokenizer

    save_hugging_face(build(GPT2), GPT2, tmp_path / "hf")
    bpe = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert bpe("b the<|endoftext|>").input_ids == [gpt2_files[t] for t in ("b", "Ġt", "he", "<|endoftext|>")]
    assert bpe.eos_token_id == 50256 == json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"]


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_hugging_face_to_a_checkpoint_and_back_bit_for_bit(tmp_path, kind, gpt2_files):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(n_positions=24, n_layer=2, n_head=2, n_embd=32, resid_pdrop=0.3)).eval()
    stir(hf)
    hf.save_pretrained(tmp_path / "a")
    if kind == "bin":
        (tmp_path / "a" / "model.safetensors").unlink()
        torch.save(hf.state_dict(), tmp_path / "a" / "pytorch_model.bin")
    convert.convert(str(tmp_path / "a"), tmp_path / "ckpt.pt")
    convert.convert(str(tmp_path / "ckpt.pt"), tmp_path / "b")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "b").eval()
    for (name, a), b in zip(hf.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    model, described = load(str(tmp_path / "ckpt.pt"))
    assert (model.config.activation, described["kind"], model.config.dropout) == ("gelu_tanh", "unknown", 0.0)
    idx = torch.randint(50257, (2, 24))
    torch.testing.assert_close(logits(model.eval(), idx), hf(idx).logits, rtol=1e-5, atol=1e-5)
    assert GPT.from_pretrained(str(tmp_path / "a"), {"dropout": 0.1}).config.dropout == 0.1


def test_biases_that_were_trained_elsewhere_are_kept(tmp_path):
    """A model without, fine-tuned by transformers, has some."""
    from transformers import GPT2LMHeadModel

    save_hugging_face(build(bias=False), CHARS, tmp_path / "hf")
    assert not GPT.from_pretrained(str(tmp_path / "hf"), {}).config.bias
    hf = GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    hf.transformer.h[1].mlp.c_fc.bias.data[3] = 0.5
    hf.save_pretrained(tmp_path / "tuned")
    model = GPT.from_pretrained(str(tmp_path / "tuned"), {}).eval()
    idx = torch.randint(6, (2, 24))
    torch.testing.assert_close(logits(model, idx), hf(idx).logits, rtol=1e-5, atol=1e-5)


def test_padding_of_the_vocabulary_is_left_out_and_added(tmp_path, monkeypatch, capsys):
    model = build(GPT2)
    save_checkpoint(model, GPT2, tmp_path / "padded.pt")
    paths = [str(tmp_path / name) for name in ("padded.pt", "exact.pt", "again.pt", "small.pt")]
    _, out, _ = command(convert.main, monkeypatch, capsys, *paths[:2], "--vocab_size=50257")
    assert f"50304 rows in {paths[0]}, 50257 in {paths[1]}, for 50257 symbols" in out
    _, out, _ = command(convert.main, monkeypatch, capsys, paths[1], "--vocab_size=50304", paths[2])
    assert "50257 rows" in out and "50304 in" in out
    exact, again = load(paths[1])[0].eval(), load(paths[2])[0].eval()
    assert (exact.config.vocab_size, again.config.vocab_size) == (50257, 50304)
    idx = torch.randint(50257, (2, 24))
    expected = logits(model, idx)[..., :50257]
    assert torch.allclose(logits(exact, idx), expected, rtol=1e-5, atol=1e-5)
    padded = logits(again, idx)
    assert torch.allclose(padded[..., :50257], expected, rtol=1e-5, atol=1e-5)
    mean = expected.mean(-1, keepdim=True).expand(-1, -1, 47)  # a logit of 0 might be the likeliest
    assert torch.allclose(padded[..., 50257:], mean, rtol=1e-4, atol=1e-4)
    code, _, err = command(convert.main, monkeypatch, capsys, paths[1], paths[3], "--vocab_size=50256")
    assert code == 1 and "vocab_size=50256 is too small: the tokenizer has 50257 symbols" in err


def test_a_folder_is_sampled_from_and_trained_on(workplace, monkeypatch, capsys):
    state = run("--max_iters=20")
    convert.convert("out/ckpt.pt", Path("hf"))
    flags = ["--device=cpu", "--num_samples=2", "--max_new_tokens=20", "--start=king"]
    _, expected, _ = command(sample.main, monkeypatch, capsys, *flags)
    _, found, _ = command(sample.main, monkeypatch, capsys, *flags, "--init_from=hf")
    assert found == expected and found.startswith("king")
    config, given = parse(["--init_from=hf", "--dataset=tiny", "--dtype=float32"])
    ranks, described = Ranks(0, 1, "cpu", None), tokenizer.describe_dataset(Path("data/tiny"))
    elsewhere = replace(config, out_dir="tuned")
    model, _ = initial_model(config, given, described, ranks, find_start(elsewhere, given, ranks))
    assert all(torch.equal(w, state["model"][n]) for n, w in model.state_dict().items())


def test_what_nanogpt_reads_is_in_a_converted_checkpoint(tmp_path):
    """Its sample.py: GPTConfig(**model_args), load_state_dict, and config, where it looks for a data set."""
    save_checkpoint(build(), CHARS, tmp_path / "ckpt.pt")
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    seven = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    assert state["model_args"].keys() == seven and "dataset" not in state["config"]
    assert state["model"].keys() == build().state_dict().keys()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_hugging_face(build(), CHARS, Path("hf"))
    return Path("hf")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "gpt_neo"}, "could not be loaded: it is a gpt_neo; only GPT-2 is supported"),
        ({"scale_attn_by_inverse_layer_idx": True}, "has scale_attn_by_inverse_layer_idx=True; only False"),
        ({"layer_norm_epsilon": 1e-6}, "has layer_norm_epsilon=1e-06; only 1e-05 is supported"),
        ({"activation_function": "relu"}, "has the activation 'relu'; supported: gelu, gelu_new"),
        (
            {"n_layer": 3},
            "could not be loaded: it lacks 12 weights, transformer.h.2.attn.c_attn.bias the first",
        ),
        ({"n_positions": 30}, "could not be loaded"),
    ],
)
def test_a_model_that_computes_something_else_is_refused(folder, change, sentence):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained("hf", {})
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_head_of_its_own_is_refused(folder):
    from transformers import GPT2LMHeadModel

    hf = GPT2LMHeadModel.from_pretrained("hf", tie_word_embeddings=False)
    hf.lm_head.weight = torch.nn.Parameter(hf.lm_head.weight + 1)
    hf.save_pretrained("untied")
    with pytest.raises(ValueError, match="'untied' has an untied lm_head"):
        GPT.from_pretrained("untied", {})


def test_mistakes_in_converting_are_one_sentence(folder, monkeypatch, capsys):
    shutil.copytree("hf", "truncated")
    weights = Path("truncated/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    cases = {
        ("hf",): "python -m gpt.convert FROM TO [--vocab_size=N] takes two paths",
        ("hf", "hf"): "hf is there already; remove it, or choose another name",
        ("nowhere.pt", "x"): "there is no checkpoint nowhere.pt",
        ("truncated", "x"): "'truncated' could not be loaded",
        ("gpt2-medum", "x"): "did you mean 'gpt2-medium'",
    }
    for args, sentence in cases.items():
        code, _, err = command(convert.main, monkeypatch, capsys, *args)
        last = err.strip().splitlines()[-1]
        assert code == 1 and last.startswith("error: ") and sentence in last, err
        assert not Path("x").exists()


def test_a_hub_that_cannot_be_reached(monkeypatch):
    """Without its cache and, for the test's sake, without the network."""
    import transformers

    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect to the hub\nCheck your internet connection")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained("gpt2")
    assert str(error.value) == (
        "'gpt2' could not be loaded: We couldn't connect to the hub; the path of a local folder works too"
    )


@pytest.mark.parametrize("wrapped", ["{}", "_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}"])
def test_masks_and_the_names_of_wrappers_are_left_out(tmp_path, wrapped):
    """What older versions of nanoGPT save, under DDP and torch.compile, in the order of the user."""
    model = build()
    save_checkpoint(model, CHARS, tmp_path / "ckpt.pt")
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    for i in range(2):
        state["model"][f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
        state["model"][f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    state["model"] = {wrapped.format(name): weight for name, weight in state["model"].items()}
    torch.save(state, tmp_path / "wrapped.pt")
    loaded = load(str(tmp_path / "wrapped.pt"))[0].state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("name", ["lm_head.weight", "transformer.wte.weight"])
@pytest.mark.parametrize("wrapper", ["", "_orig_mod."])
def test_the_tied_weight_may_be_there_once(tmp_path, name, wrapper):
    model = build()
    save_checkpoint(model, CHARS, tmp_path / "ckpt.pt")
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    del state["model"][name]
    state["model"] = {wrapper + name: weight for name, weight in state["model"].items()}
    torch.save(state, tmp_path / "once.pt")
    loaded = load(str(tmp_path / "once.pt"))[0]
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert all(torch.equal(loaded.state_dict()[key], weight) for key, weight in model.state_dict().items())


def test_a_wrapper_inside_the_model_is_left_out(tmp_path):
    model = build()
    save_checkpoint(model, CHARS, tmp_path / "ckpt.pt")
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    state["model"] = {name.replace(".h.1.", ".h.1._orig_mod."): w for name, w in state["model"].items()}
    torch.save(state, tmp_path / "blocks.pt")
    loaded = load(str(tmp_path / "blocks.pt"))[0].state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())


def test_the_folder_of_a_run_stands_for_its_checkpoint(workplace, monkeypatch, capsys):
    """Of its best checkpoint where the run was told so, as with --out_dir."""
    run("--max_iters=4", "--always_save_checkpoint=False")
    best = torch.load("out/best.pt", weights_only=True)
    best["model"]["transformer.wpe.weight"] += 1  # to be told from ckpt.pt
    Path("out/best.pt").unlink()
    torch.save(best, "out/best.pt")
    convert.convert("out", Path("converted.pt"))
    found = checkpoint.read(Path("converted.pt")).model
    assert all(torch.equal(found[name], weight) for name, weight in best["model"].items())
    flags = ["--device=cpu", "--num_samples=1", "--max_new_tokens=20", "--start=king"]
    _, expected, _ = command(sample.main, monkeypatch, capsys, *flags, "--out_dir=out")
    code, text, _ = command(sample.main, monkeypatch, capsys, *flags, "--init_from=out")
    assert (code, text) == (0, expected) and text.startswith("king")
    tuned = run("--init_from=out", "--max_iters=1", "--learning_rate=0", "--min_lr=0", out_dir="tuned")
    assert tuned["iter_num"] == 1, "a new run, not the old one resumed"
    assert all(torch.equal(tuned["model"][name], weight) for name, weight in best["model"].items())


@pytest.mark.parametrize("name", ["best.pt", "ckpt-5.pt"])
def test_the_checkpoint_of_a_folder_without_the_latest_is_named(workplace, monkeypatch, capsys, name):
    save_checkpoint(build(), CHARS, Path("run", name))
    for main, *args in (
        (training.main, "--init_from=run", "--dataset=tiny", "--device=cpu", "--block_size=16"),
        (sample.main, "--init_from=run"),
        (sample.main, "--out_dir=run"),
        (convert.main, "run", "x"),
    ):
        code, _, err = command(main, monkeypatch, capsys, *args)
        assert code == 1 and f"no checkpoint run/ckpt.pt, but there is run/{name}: name that file" in err, err


def test_a_folder_with_neither_kind_of_model_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(ValueError, match=r"folder empty has neither a run's ckpt\.pt nor the config\.json"):
        load("empty")
