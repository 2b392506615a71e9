"""The kernels that wait for a GPU to choose among them are as right as the shipped ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import contest, timing
from bench.candidates import attention as candidates
from kernels import OPS
from kernels.attention import Tile
from tests.kernel_cases import judge, make, upstream

OP = next(op for op in OPS if op.name == "causal_attention")
SMALL, WIDE = Tile(32, 32, 4, 1), Tile(32, 64, 4, 1)
TILES: dict[str, tuple[Any, ...]] = {
    "two_kernels": (candidates.Pair(Tile(64, 32, 4, 1), WIDE),),
    "head_owned": (WIDE, SMALL),
    "atomic": (WIDE, SMALL),
}


def results(
    call: dict[str, Tensor],
    gradient: Tensor,
    name: str,
    tile: Any,
    descriptors: bool,
    scale: float | None = None,
) -> dict[str, Tensor]:
    """The output of the candidates' forward, and the gradient by one of their backwards."""
    qkv = call["qkv"]
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    out, lse = candidates.forward(qkv, None, 0.0, scale, Tile(64, 32, 4, 1), descriptors)
    backward = getattr(candidates, name)
    dqkv = backward(gradient, qkv, out, lse, None, 0.0, scale, tile, descriptors)
    return {"output 0": out, "dqkv": dqkv}


CASES = [
    (2, 1, 2, 64, torch.float16),
    (1, 2, 5, 64, torch.bfloat16),  # more heads than programs: the interpreter has 3 multiprocessors
    (1, 97, 1, 64, torch.bfloat16),
    (1, 130, 1, 128, torch.float16),
    (2, 33, 1, 80, torch.float32),
]


@pytest.mark.parametrize(("B", "T", "H", "D", "dtype"), CASES, ids=str)
def test_candidates_against_fp64(
    B: int, T: int, H: int, D: int, dtype: torch.dtype, device: str, poisoned: None
) -> None:
    """Lengths that fill no tile; each by pointers or by descriptors, and small ones by both."""
    call = make(OP, dtype, device, {"B": B, "T": T, "H": H, "D": D})
    (gradient,) = gradients = upstream(OP, call)
    for position, name in enumerate(TILES):
        tile = TILES[name][T % len(TILES[name])]
        for descriptors in (False, True) if T < 97 else ((position + T) % 2 == 0,):
            judge(OP, results(call, gradient.to(dtype), name, tile, descriptors), call, gradients)


def test_candidates_take_strides(device: str, poisoned: None) -> None:
    """A qkv in the middle of wider rows, and a gradient that is one number expanded."""
    call = make(OP, torch.float32, device, {"B": 2, "T": 37, "H": 1, "D": 16})
    wide = torch.full((2, 37, 4, 1, 16), torch.nan, device=device)
    wide[:, :, :3] = call["qkv"]
    gradient = torch.full((), 1.5, device=device).expand(2, 37, 1, 16)
    for name in TILES:
        found = results({"qkv": wide[:, :, :3]}, gradient, name, TILES[name][-1], False)
        judge(OP, found, call, (gradient.double(),))


@pytest.mark.parametrize("name", ["two_kernels", "head_owned"])
def test_candidates_that_give_the_same_bits(name: str, device: str) -> None:
    call = make(OP, torch.float16, device, {"B": 1, "T": 70, "H": 1, "D": 16})
    gradient = torch.randn(1, 70, 1, 16, device=device).half()
    first, second = (results(call, gradient, name, TILES[name][0], False)["dqkv"] for _ in range(2))
    assert torch.equal(first, second)


# ---- the contest, as a GPU would hold it


def _half(*tensors: Any, tile: Any, descriptors: bool) -> Tensor:
    """A candidate that forgets a block of keys of one head."""
    dqkv = candidates.atomic(*tensors, tile=tile)
    dqkv[-1, 8:16, 1, -1] = 0
    return dqkv


def _unsteady(*tensors: Any, tile: Any, descriptors: bool) -> Tensor:
    return candidates.atomic(*tensors, tile=tile) * (1 + 1e-2 * torch.rand(()).item())


class _Pool:
    def __init__(self, _: Any, attempt: Any) -> None:
        assert attempt is contest.attempt

    def attempts(self, op: Any, shape: Any, direction: str, new: list[int]) -> dict[int, str | None]:
        assert (op, new[0]) == (OP, 0)
        return {i: contest.wrong(shape, direction, i, "cpu") for i in new}

    def close(self) -> None:
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter; a GPU holds it itself")
def test_contest_times_what_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At tiny size: all is timed but what is wrong, fp16 has the finalists, and what is measured is kept."""
    monkeypatch.setattr(contest, "Pool", _Pool)
    monkeypatch.setattr(candidates, "half", _half, raising=False)
    monkeypatch.setattr(candidates, "unsteady", _unsteady, raising=False)
    table = {
        ("forward", 0, 64): (("forward", False, (Tile(64, 32, 4, 1),)),),
        ("backward", 0, 64): (
            ("head_owned", False, (WIDE,)),
            ("atomic", True, (WIDE,)),
            ("half", False, (WIDE,)),
            ("unsteady", False, (WIDE,)),
        ),
    }
    monkeypatch.setattr(candidates, "CANDIDATES", table)
    shapes = [{"B": 1, "T": 20, "H": 1, "D": 16, "dtype": dtype} for dtype in ("bf16", "fp16")]
    monkeypatch.setattr(contest, "KEPT", 1)
    monkeypatch.setenv("TRITONGPT_COMMIT", "abc")
    calls: list[list[str]] = []

    def once(works: Any, *_: Any) -> dict[str, timing.Timing]:
        calls.append(list(works))
        for work in works.values():
            work()
        return {name: timing.Timing(1 + i, 1, 9, 5) for i, name in enumerate(works)}

    monkeypatch.setattr(timing, "interleaved", once)
    out = tmp_path / "attention.json"
    contest.run(out, 0.01, shapes, "cpu")
    head = "head_owned: 32x64 4w 1s"
    right = [["shipped", "forward"], ["shipped", "head_owned", "atomic, descriptors"], ["sdpa", "shipped"]]
    names = [
        [name.split(":")[0] for name in works if name != "sdpa" or works[0] == "sdpa"] for works in calls
    ]
    assert names[:3] == [right[0], right[1], [*right[2], "shipped"]], "the third is the best pair"
    assert names[3:5] == [["shipped"], ["shipped"]], "fp16 is for the finalists of bf16"
    printed = capsys.readouterr().out
    assert "half: 32x64 4w 1s" in printed and "wrong: off by" in printed
    assert "differs from run to run" in printed
    bf16 = json.loads(out.read_text())["contests"][0]
    (row,) = [r for r in bf16["rows"] if r["name"] == head]
    pairs = 20 * 21 // 2
    assert row["tflops"] == pytest.approx(5 * 2 * 16 * pairs / 2 / 1e9)
    assert row["ratio"] == 4 / 2, "the fourth to be timed is SDPA"
    calls.clear()
    contest.run(out, 0.01, shapes, "cpu")
    assert not calls, "what is kept is measured again"


def test_a_wrong_row_is_seen_at_full_size() -> None:
    """Among many rows a wrong tile is nothing, and the rounding of two kernels is not a fault."""
    expected = torch.randn(2, 512, 3, 4, 64) / torch.arange(1, 513)[:, None, None, None]
    rounded = (expected * (1 + 0.01 * torch.randn_like(expected))).bfloat16()
    broken = rounded.clone()
    broken[1, 448:, 0, 3] = 0
    for found, right in ((rounded, True), (broken, False)):
        candidate = candidates.Candidate("x", lambda *_, found=found, **__: found, None)
        assert (contest.at_full_size(candidate, (), expected) is None) == right
