"""Generation with a cache against the model without one and against formulas; text as it comes."""

import gc
import itertools
import weakref

import pytest
import torch

from gpt.generate import Cache, stream
from gpt.model import GPT, GPTConfig
from gpt.sample import Continuation
from gpt.sampling import Sampling, check_drawn, choose
from gpt.tokenizer import CharTokenizer
from kernels.op import record

SMALL = dict(block_size=16, vocab_size=41, n_layer=2, n_head=2, n_embd=32, kernels="torch")
GREEDY = Sampling(temperature=0)
RANDOM = Sampling(temperature=0.8, top_k=9)


def build(seed=0, device="cpu", **changes):
    """Weights away from their start, so that every token has a say in the next."""
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
def test_tokens_are_those_without_a_cache_at_every_length(length):
    """From prompts shorter and longer than block_size, into and past it."""
    model, start, sampling = build(qk_norm=True), prompts(length, length), RANDOM
    n = 24 - min(length, 15)
    expected = cacheless(model, start, n, sampling)
    assert len(set(torch.cat(expected).tolist())) > 4, "a model that says one thing tests nothing"
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
    """As many rows without a cache, drawn from together; past block_size for the longest and for all."""
    model, start = build(), prompts(3, 11, 1, 14)
    repeated = [p for p in start for _ in range(3)]
    expected = cacheless(model, repeated, 18, sampling)
    assert_same(generated(model, start, 18, sampling, samples=3), expected)
    if sampling is not GREEDY:
        assert any(not torch.equal(expected[0], e) for e in expected[1:3])


@pytest.mark.parametrize("samples", [1, 3])
def test_a_token_is_computed_once(samples):
    """The prompt once whatever the samples, then a token a row; past block_size the window."""
    model = build()
    seen = []
    model.transformer.drop.register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape[:2])))
    generated(model, prompts(5, 3), 14, RANDOM, samples)
    # 5 + 11 tokens fill the block; two more move the window; the last one drawn is not looked at
    assert seen == [(2, 5)] + 11 * [(2 * samples, 1)] + 2 * [(2 * samples, 16)]


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(None, None), (1, None), (100, 0.9), (5, 0.3), (None, 0.3), (None, 1e-9)]
)
def test_draws_follow_the_probabilities(top_k, top_p):
    sampling = Sampling(0.7, top_k, top_p)
    logits = 2 * torch.randn(1, 41, generator=torch.Generator().manual_seed(3))
    expected = probabilities(logits, sampling)[0]
    drawn = choose(logits.expand(20000, -1), sampling, torch.Generator().manual_seed(4))
    shares = torch.bincount(drawn, minlength=41) / 20000
    assert not shares[expected == 0].any()
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.02)


def test_equal_logits_at_the_border_of_top_k_all_stay():
    """As in nanoGPT."""
    logits = torch.tensor([[1.0, 3.0, 1.0, 1.0, 0.0]]).expand(500, -1)
    drawn = choose(logits, Sampling(top_k=2), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {0, 1, 2, 3}


def test_tokens_of_our_kernels(device):
    """The decode kernel attends, once a block and token, until the window moves."""
    ours, theirs = (build(kernels=spec, device=device, block_size=10) for spec in ("triton", "torch"))
    start = prompts(4, 7, device=device)
    with record() as launches:
        tokens = generated(ours, start, 6, RANDOM, samples=2)
    steps = sum(launch.kernel.__name__ == "_split_kernel" for launch in launches)
    assert steps == 2 * 3 if device == "cpu" else steps > 0  # on a GPU a graph replays them
    assert_same(tokens, cacheless(theirs, [p for p in start for _ in range(2)], 6, RANDOM))


def test_tokens_in_half_precision(device):
    model, start = build(device=device), prompts(6, 9, device=device)
    with torch.autocast(device, torch.bfloat16), torch.no_grad():
        assert_same(generated(model, start, 4, GREEDY), cacheless(model, start, 4, GREEDY))


def test_the_cache_is_let_go_when_it_is_of_no_use(monkeypatch):
    """By reference counting, not whenever the garbage collector comes by: it may be gigabytes."""
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


def test_compiled_in_as_many_graphs_as_there_are_kinds_of_step():
    """The prompts, the first step and those of any other length, the window: not one for every token."""
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
        (lambda: Sampling(top_k=0), "top_k=0 must be >= 1"),
        (lambda: Sampling(top_p=1.01), "top_p=1.01 must be above 0 and at most 1"),
        (lambda: generated(build(), prompts(3, 0), 2, GREEDY), "a prompt is empty"),
        (lambda: generated(build(dropout=0.1).train(), prompts(3), 2, GREEDY), r"call model.eval\(\) first"),
    ],
)
def test_a_mistake_is_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


# ---- text as it comes


class Bytes:
    """A tokenizer whose ids are the bytes of UTF-8."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def screen(text, stop=""):
    """What a terminal would have seen after every byte, and at the end."""
    continuation, steps = Continuation(Bytes(), stop), []
    for byte in text.encode():
        continuation.add(byte)
        steps.append(continuation.text[: continuation.certain])
    continuation.finish()
    return steps, continuation


@pytest.mark.parametrize("stop", ["", "\n\n", "aab", "é!"])
def test_only_whole_characters_and_nothing_of_the_stop_text_is_shown(stop):
    for text in ("Löwe €5\n\nrest", "aaab é! x", "aa", "naïve\nx\n\n", "\ufffd\ufffd."):
        steps, continuation = screen(text, stop)
        whole = text.split(stop)[0] if stop else text
        assert continuation.text == whole
        assert continuation.stopped == (bool(stop) and stop in text)
        for before, after in itertools.pairwise([*steps, continuation.text]):
            assert after.startswith(before)  # nothing on the screen is taken back


def test_text_is_shown_as_soon_as_it_is_certain():
    assert screen("abc")[0] == ["a", "ab", "abc"]
    assert screen("a\nb", stop="\n\n")[0] == ["a", "a", "a\nb"]


def test_half_a_character_and_a_symbol_that_does_not_exist_are_shown_as_such():
    for tokenizer, ids, text in (
        (Bytes(), "é".encode()[:1], ""),
        (CharTokenizer("ab"), (0, 5, 1), "a\ufffdb"),
    ):
        continuation = Continuation(tokenizer, "")
        for token in ids:
            continuation.add(token)
        assert continuation.text == text
        continuation.finish()
        assert continuation.text == (text or "\ufffd")


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "random"])
@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_a_replayed_graph_gives_the_tokens_of_the_model(kernels, sampling, device):
    model, start = build(kernels=kernels, device=device), prompts(3, 9, device=device)
    expected = cacheless(model, start, 20, sampling)
    for _ in range(2):
        assert_same(generated(model, start, 20, sampling), expected)


@pytest.mark.parametrize("temperature", [1e-4, 1e-39, 1e-320])
def test_a_low_temperature_takes_the_likeliest_token(temperature):
    logits = torch.tensor([[3.0, 60000.0, 59000.0], [-5.0, -9.0, -1.0]])
    for dtype in (torch.float16, torch.float32):
        for options in ({}, {"top_k": 2}, {"top_p": 0.9}):
            assert choose(logits.to(dtype), Sampling(temperature, **options)).tolist() == [1, 2]


def test_the_draw_in_float16_is_that_of_the_same_logits_in_float32():
    logits = torch.randn(20000, 41, generator=torch.Generator().manual_seed(0)).half()
    half, single = (
        choose(x, Sampling(0.3, top_k=30), torch.Generator().manual_seed(1)) for x in (logits, logits.float())
    )
    assert torch.equal(half, single)


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_row_whose_logits_are_not_finite_has_no_token(temperature):
    for bad in (torch.nan, torch.inf):
        logits = torch.tensor([[0.0, 9.0, 0.0], [0.0, bad, 0.0], [9.0, -torch.inf, 0.0]])
        assert choose(logits, Sampling(temperature, top_k=1)).tolist() == [1, -1, 0]


def test_a_model_with_nan_says_so_instead_of_sampling():
    model = build()
    model.transformer.h[1].mlp.c_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="logits of the model are not finite"):
        model.generate(prompts(4)[0][None], 3)
    (ids,) = stream(model, prompts(4), 1, RANDOM)
    with pytest.raises(ValueError, match="logits of the model are not finite"):
        check_drawn(ids)
