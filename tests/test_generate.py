"""Generation with a cache draws the tokens of the model without one; sampling follows its formulas."""

import gc
import weakref

import pytest
import torch

from gpt import sample
from gpt.generate import Cache, stream
from gpt.model import GPT, GPTConfig
from gpt.sampling import Sampling, check_drawn, draw_ids
from gpt.tokenizer import CharTokenizer, from_dict
from kernels.op import record

SMALL = dict(block_size=16, vocab_size=41, n_layer=2, n_head=2, n_embd=32, kernels="torch")
GREEDY = Sampling(temperature=0)
RANDOM = Sampling(temperature=0.8, top_k=9)


def build(seed=0, device="cpu", **changes):
    """A model whose weights are large enough for every token to influence the next."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SMALL | changes), device).to(device).eval()
    stir(model)
    return model


def stir(model):
    for p in model.parameters():
        p.data += (0.3 if p.dim() == 2 else 0.05) * torch.randn_like(p)


def prompts(*lengths, seed=1, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(41, (n,), generator=generator).to(device) for n in lengths]


@torch.no_grad()
def cacheless(model, sequences, n, sampling, seed=0):
    """nanoGPT's loop, row by row: the last block_size tokens through the whole model for every new one."""
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    rows = [s.clone() for s in sequences]
    for _ in range(n):
        logits = torch.cat([model(r[None, -model.config.block_size :])[0][:, -1] for r in rows])
        if sampling.temperature == 0:
            new = logits.argmax(-1)
        else:
            new = torch.multinomial(probabilities(logits, sampling), 1, generator=generator)[:, 0]
        rows = [torch.cat((r, token[None])) for r, token in zip(rows, new)]
    return [r[len(s) :] for r, s in zip(rows, sequences)]


def probabilities(logits, sampling):
    """Temperature, top_k and top_p one symbol at a time."""
    result = torch.zeros_like(logits)
    for row, out in zip(logits / sampling.temperature, result):
        symbols = sorted(range(len(row)), key=lambda i: -row[i])[: sampling.top_k]
        weight = torch.softmax(row[symbols], 0)
        before = 0.0
        for symbol, p in zip(symbols, weight):
            if sampling.top_p is None or before < sampling.top_p:
                out[symbol] = p
            before += p.item()
    return result / result.sum(-1, keepdim=True)


def generated(model, sequences, n, sampling, samples=1, seed=0):
    generator = torch.Generator(sequences[0].device).manual_seed(seed)
    return torch.stack(list(stream(model, sequences, n, sampling, samples, generator)), 1)


def assert_same(rows, expected):
    for row, other in zip(rows, expected, strict=True):
        assert torch.equal(row, other), f"{row.tolist()} is not {other.tolist()}"


@pytest.mark.parametrize("length", [1, 9, 15, 16, 40])
def test_a_cache_changes_no_token_at_any_length(length):
    """The prompts are shorter and longer than block_size, and generation goes past it."""
    model, start, sampling = build(qk_norm=True), prompts(length, length), RANDOM
    n = 24 - min(length, 15)
    expected = cacheless(model, start, n, sampling)
    assert len(set(torch.cat(expected).tolist())) > 4, "a model that repeats itself tests nothing"
    assert_same(generated(model, start, n, sampling), expected)
    # GPT.generate is the specification.
    draws = torch.Generator().manual_seed(0)
    out = model.generate(
        torch.stack(start), n, sampling.temperature, sampling.top_k, top_p=sampling.top_p, generator=draws
    )
    assert torch.equal(out[:, :length], torch.stack(start))
    assert_same(out[:, length:], expected)


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM, Sampling(0.9, None, 0.6)], ids=str)
def test_prompts_of_different_lengths_each_sampled_several_times(sampling):
    """Without a cache each sample is a row. The longest prompt passes block_size first, then all do."""
    model, start = build(), prompts(3, 11, 1, 14)
    repeated = [p for p in start for _ in range(3)]
    expected = cacheless(model, repeated, 18, sampling)
    assert_same(generated(model, start, 18, sampling, samples=3), expected)
    if sampling is not GREEDY:
        assert any(not torch.equal(expected[0], e) for e in expected[1:3])


@pytest.mark.parametrize("samples", [1, 3])
def test_a_token_is_computed_once(samples):
    """First each prompt once, whatever `samples`; then one token per row; past block_size the window."""
    model = build()
    seen = []
    model.transformer.drop.register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape[:2])))
    generated(model, prompts(5, 3), 14, RANDOM, samples)
    # 5 + 11 tokens fill the block, two more move the window, and the last token is never an input
    assert seen == [(2, 5)] + 11 * [(2 * samples, 1)] + 2 * [(2 * samples, 16)]


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(None, None), (1, None), (100, 0.9), (5, 0.3), (None, 0.3), (None, 1e-9)]
)
def test_draws_follow_the_probabilities(top_k, top_p):
    sampling = Sampling(0.7, top_k, top_p)
    logits = 2 * torch.randn(1, 41, generator=torch.Generator().manual_seed(3))
    expected = probabilities(logits, sampling)[0]
    drawn = draw_ids(logits.expand(20000, -1), sampling, torch.Generator().manual_seed(4))
    shares = torch.bincount(drawn, minlength=41) / 20000
    assert not shares[expected == 0].any()
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.02)


def test_equal_logits_at_the_edge_of_top_k_are_all_kept():
    """As in nanoGPT."""
    logits = torch.tensor([[1.0, 3.0, 1.0, 1.0, 0.0]]).expand(500, -1)
    drawn = draw_ids(logits, Sampling(top_k=2), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {0, 1, 2, 3}


def test_our_kernels_give_the_same_tokens(device):
    """The decode kernel runs once per block and token, until the window moves."""
    ours, theirs = (build(kernels=spec, device=device, block_size=10) for spec in ("triton", "torch"))
    start = prompts(4, 7, device=device)
    with record() as launches:
        tokens = generated(ours, start, 6, RANDOM, samples=2)
    steps = sum(launch.kernel.__name__ == "_split_kernel" for launch in launches)
    assert steps == 2 * 3 if device == "cpu" else steps > 0  # on a GPU a graph replays them
    assert_same(tokens, cacheless(theirs, [p for p in start for _ in range(2)], 6, RANDOM))


def test_a_cache_changes_no_token_in_half_precision(device):
    model, start = build(device=device), prompts(6, 9, device=device)
    with torch.autocast(device, torch.bfloat16), torch.no_grad():
        assert_same(generated(model, start, 4, GREEDY), cacheless(model, start, 4, GREEDY))


def test_the_cache_is_freed_at_block_size_and_at_the_end(monkeypatch):
    """By reference counting, not when the garbage collector happens to run: it may hold gigabytes."""
    alive = weakref.WeakSet()

    class WatchedCache(Cache):
        def __init__(self, *args):
            super().__init__(*args)
            alive.add(self)

    monkeypatch.setattr("gpt.generate.Cache", WatchedCache)
    gc.disable()
    try:
        counts = [len(alive) for _ in stream(build(), prompts(3), 17, GREEDY)]
        next(stream(build(), prompts(3), 9, GREEDY))
    finally:
        gc.enable()
    assert counts == 14 * [1] + 3 * [0] and not alive


def test_compilation_makes_one_graph_for_each_kind_of_step():
    """The prompts, the first step, the other steps, and the window: not one graph for every token."""
    torch._dynamo.reset()
    model, start = build(n_layer=1), prompts(4, 6)
    expected = generated(model, start, 14, RANDOM)
    torch._dynamo.utils.counters.clear()
    model.transformer.compile(dynamic=True, backend="eager")
    assert_same(generated(model, start, 14, RANDOM), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Sampling(temperature=-0.1), "temperature=-0.1 must be >= 0"),
        (lambda: Sampling(temperature=float("nan")), "temperature=nan must be >= 0"),
        (lambda: Sampling(temperature=float("inf")), "temperature=inf must be finite"),
        (lambda: Sampling(top_k=0), "top_k=0 must be >= 1"),
        (lambda: Sampling(top_p=1.01), "top_p=1.01 must be above 0 and at most 1"),
        (lambda: generated(build(), prompts(3, 0), 2, GREEDY), "a prompt is empty"),
        (lambda: generated(build(dropout=0.1).train(), prompts(3), 2, GREEDY), r"call model.eval\(\) first"),
    ],
)
def test_wrong_arguments_are_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


# ---- the text of a sample


class Bytes:
    """A tokenizer whose ids are the bytes of UTF-8."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def printed(monkeypatch, capsys, tokenizer, prompt, ids, stop=""):
    """Prints a sample of `ids`. Returns what was printed before each id is drawn, and then the rest."""
    steps = []

    def stream(*_):
        for id in ids:
            steps.append(capsys.readouterr().out)
            yield torch.tensor([id])

    monkeypatch.setattr(sample, "stream", stream)
    sample.show(build(), tokenizer, [list(prompt)], sample.SampleConfig(num_samples=1, stop=stop))
    return [*steps, capsys.readouterr().out.removesuffix(f"\n{sample.SEPARATOR}\n")]


def test_each_character_is_printed_as_soon_as_all_its_bytes_are_drawn(monkeypatch, capsys):
    steps = printed(monkeypatch, capsys, Bytes(), b"a", "bé€\ufffd!".encode() + "é".encode()[:1])
    assert steps == ["a", "b", "", "é", "", "", "€", "", "", "", "\ufffd!", "\ufffd"]
    assert "".join(printed(monkeypatch, capsys, CharTokenizer("ab"), [0], [0, 5, 1])) == "aa\ufffdb"


@pytest.mark.parametrize("stop", ["", "x"])
def test_a_sample_is_decoded_a_few_ids_at_a_time(monkeypatch, capsys, stop):
    lengths = []

    class Counting(Bytes):
        def decode(self, ids):
            lengths.append(len(ids))
            return super().decode(ids)

    printed(monkeypatch, capsys, Counting(), b"a", 1000 * b"b", stop)
    assert sum(lengths) < 20_000


@pytest.mark.parametrize("stop", ["\n\n", "aab", "🦁"])  # of four bytes
def test_the_stop_text_ends_a_sample_and_is_not_printed(monkeypatch, capsys, stop):
    for text in ("Löwe €5\n\nrest", "aaab 🦁! x", "aa", "naïve\nx\n\n"):
        for prompt in ("king", stop, stop[:1]):
            steps = printed(monkeypatch, capsys, Bytes(), prompt.encode(), text.encode(), stop)
            before, stop_text, _ = text.partition(stop)
            assert "".join(steps) == prompt + before
            assert len(steps) == len((before + stop_text).encode()) + 1, "no id is drawn after the stop text"


def test_a_sample_keeps_the_space_that_a_tokenizer_leaves_out_at_the_beginning(monkeypatch, capsys):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"\u2581the": 0, "\u2581kings": 1}, unk_token="\u2581the"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = from_dict({"kind": "json", "json": words.to_str()})
    steps = printed(monkeypatch, capsys, tokenizer, tokenizer.encode("the kings"), [0, 1])
    assert steps == ["the kings", " the", " kings"]
    assert printed(monkeypatch, capsys, tokenizer, [1], [0, 1], stop=" the") == ["", "kings"]
    # an id past the vocabulary has no text
    assert "".join(printed(monkeypatch, capsys, tokenizer, [1], [2, 0, 1])) == "kings the kings"


def test_characters_whose_bytes_are_tokens_are_printed_one_after_the_other(monkeypatch, capsys):
    """As in SentencePiece's byte fallback, which decodes bytes in a row together or not at all."""

    class Fallback:
        def decode(self, ids):
            try:
                return bytes(ids).decode()
            except UnicodeDecodeError:
                return len(ids) * "\ufffd"

    assert printed(monkeypatch, capsys, Fallback(), b"", "é€x".encode()) == ["", "", "é", "", "", "€", "x"]


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "random"])
@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_a_cuda_graph_gives_the_same_tokens(kernels, sampling, device):
    model, start = build(kernels=kernels, device=device), prompts(3, 9, device=device)
    expected = cacheless(model, start, 20, sampling)
    for _ in range(2):
        assert_same(generated(model, start, 20, sampling), expected)


@pytest.mark.parametrize("temperature", [1e-4, 1e-39, 1e-320])
def test_a_low_temperature_takes_the_likeliest_token(temperature):
    logits = torch.tensor([[3.0, 60000.0, 59000.0], [-5.0, -9.0, -1.0]])
    for dtype in (torch.float16, torch.float32):
        for options in ({}, {"top_k": 2}, {"top_p": 0.9}):
            assert draw_ids(logits.to(dtype), Sampling(temperature, **options)).tolist() == [1, 2]


def test_float16_logits_are_drawn_from_in_float32():
    logits = torch.randn(20000, 41, generator=torch.Generator().manual_seed(0)).half()
    half, single = (
        draw_ids(x, Sampling(0.3, top_k=30), torch.Generator().manual_seed(1))
        for x in (logits, logits.float())
    )
    assert torch.equal(half, single)


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_row_whose_logits_are_not_finite_gets_minus_1(temperature):
    for bad in (torch.nan, torch.inf):
        logits = torch.tensor([[0.0, 9.0, 0.0], [0.0, bad, 0.0], [9.0, -torch.inf, 0.0]])
        assert draw_ids(logits, Sampling(temperature, top_k=1)).tolist() == [1, -1, 0]


def test_a_model_with_nan_says_so_instead_of_sampling():
    model = build()
    model.transformer.h[1].mlp.c_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="logits of the model are not finite"):
        model.generate(prompts(4)[0][None], 3)
    (ids,) = stream(model, prompts(4), 1, RANDOM)
    with pytest.raises(ValueError, match="logits of the model are not finite"):
        check_drawn(ids)
