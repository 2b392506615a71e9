"""python -m bench.sweep [NAME ...]: tries tile sizes on this GPU and prints what each costs, the best first.

`python -m bench.sweep attention` tries other kernels too: bench/contest.py.

For every entry of the tables in `kernels/` that the shipped samples reach, a pool of processes compiles and
runs each candidate once, so that one which crashes takes nothing with it; those that work take turns in this
process while the other entries stay as they are. Nothing is written: the winner is put into the table by
hand, with the GPU it was found on, and the tests decide whether it is right.
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench import timing
from kernels import OPS
from kernels.op import INTERPRETED, Op, architecture, unavailable

_attention = sys.modules["kernels.attention"]  # `kernels.cross_entropy` and the like are the functions
_cross_entropy = sys.modules["kernels.cross_entropy"]
_decode = sys.modules["kernels.decode"]
_layer_norm = sys.modules["kernels.layer_norm"]


@dataclass(frozen=True)
class Slot:
    """One entry of a table of tiles: `table[key][index]`, and what may stand there."""

    name: str
    table: dict[Any, tuple[Any, ...]]
    key: Any
    index: int
    candidates: tuple[Any, ...]
    launch: Callable[..., None]  # (**call): what is timed

    def get(self) -> Any:
        return self.table[self.key][self.index]

    def set(self, tile: Any) -> None:
        entries = self.table[self.key]
        self.table[self.key] = (*entries[: self.index], tile, *entries[self.index + 1 :])


def slots(op: Op, call: dict[str, Any]) -> Iterator[Slot]:
    """The entries that decide how `op` is launched with these arguments."""
    first = next(v for v in call.values() if isinstance(v, torch.Tensor))
    arch = architecture(first)
    if op.family == "layer_norm":
        block = _layer_norm._block(first.shape[-1])
        # up to 128 values a thread: more would spill, after minutes of compiling
        fits = [(r, w) for r, w in product((1, 2, 4, 8), (1, 2, 4, 8, 16)) if r * block <= 128 * 32 * w]
        forward = tuple(fits)
        backward = tuple((r, w, p) for (r, w), p in product(fits, (1, 2, 4, 8, 16)) if r <= 4)
        yield Slot("forward (rows, warps)", _layer_norm.TILES[arch], block, 0, forward, op.launchers)
        yield Slot(
            "backward (rows, warps, programs)", _layer_norm.TILES[arch], block, 1, backward, op.launchers
        )
    elif op.name == "cross_entropy":
        blocks = product((1024, 2048, 4096, 8192, 16384, 32768), (4, 8, 16, 32))
        candidates = tuple((b, w) for b, w in blocks if b <= 128 * 32 * w)
        index = int(first.shape[1] > 2048)
        # the second is what training runs, on a chunk of its own logits
        for name, launch in (("forward, backward", op.launchers), ("in place", _loss_and_gradient)):
            yield Slot(f"{name} (BLOCK, warps)", _cross_entropy.TILES, arch, index, candidates, launch)
    elif op.name == "decode_attention":
        candidates = tuple(_decode.Tile(*t) for t in product((16, 32, 64), (2, 4, 8), (2, 3, 4), (2, 4, 8)))
        width = 64 if first.shape[-1] <= 64 else 128
        yield Slot("(n, warps, stages, programs)", _decode.TILES[arch], width, 0, candidates, op.launchers)
    elif op.name == "causal_attention" and first.dtype != torch.float32 and not call.get("dropout_p"):
        width = 64 if first.shape[-1] <= 64 else 128
        for index, name in enumerate(("forward", "dq", "dk and dv")):
            tiles = product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
            # The block that a program owns is a multiple of the other: queries, and keys for dk and dv.
            square = (t for t in tiles if (t[1] % t[0] if index == 2 else t[0] % t[1]) == 0)
            candidates = tuple(_attention.Tile(*t) for t in square)
            yield Slot(
                f"{name} (m, n, warps, stages)",
                _attention.TILES[arch],
                width,
                index,
                candidates,
                op.launchers,
            )


def _loss_and_gradient(input: torch.Tensor, target: torch.Tensor, ignore_index: int, **_: Any) -> None:
    _cross_entropy.loss_and_gradient_(input, target, ignore_index, 0.0, True)


def arguments(op: Op, sample: dict[str, Any]) -> dict[str, Any]:
    return op.make(**{"dtype": torch.bfloat16, "device": "cuda"} | sample)


def attempt(name: str, sample: dict[str, Any], position: int, tile: Any) -> str | None:
    """Runs an operation once with `tile` in its slot of that position: None, or why it cannot be.

    In a process of the pool, on fewer rows: what it compiles is in Triton's cache on disk afterwards.
    """
    op = next(op for op in OPS if op.name == name)
    try:
        call = arguments(op, fewer(op, sample))
        slot = list(slots(op, call))[position]
        before = slot.get()
        try:
            slot.set(tile)
            slot.launch(**call)
            torch.cuda.synchronize()
        finally:
            slot.set(before)
    except Exception as error:  # a tile that does not compile, or needs more than there is
        if "CUDA error" in str(error):  # this process has lost its GPU
            os._exit(1)
        return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    return None


def fewer(op: Op, sample: dict[str, Any]) -> dict[str, Any]:
    """Less memory, and the same compilation: the sizes that go stay multiples of 16."""
    if op.name == "decode_attention":  # how it is split depends on the batch
        return sample
    most = {"N": 512, "B": 1}
    found = {k: min(v, most[k]) if k in most else v for k, v in sample.items()}
    return found | ({"shape": (4096, *sample["shape"][1:])} if "shape" in sample else {})


class Pool:
    """Processes that try candidates. One that dies or hangs takes its pool along: then there is a new one."""

    def __init__(
        self,
        make: Callable[[], Executor],
        patience: float = 60.0,
        attempt: Callable[..., str | None] = attempt,
    ):
        self.make, self.patience, self.attempt = make, patience, attempt
        self.executor = make()

    def attempts(
        self, op: Op, sample: dict[str, Any], position: Any, tiles: list[Any]
    ) -> dict[Any, str | None]:
        """{tile: None, or why it cannot be}."""
        together, suspects = self._try(op, sample, position, tiles)
        for tile in suspects:  # one at a time: the next to break the pool is guilty
            alone, lost = self._try(op, sample, position, [tile])
            together |= alone | dict.fromkeys(lost, "its process died or did not answer")
        return together

    def _try(
        self, op: Op, sample: dict[str, Any], position: Any, tiles: list[Any]
    ) -> tuple[dict[Any, str | None], list[Any]]:
        """(answers, tiles without one)."""
        tried = {tile: self.executor.submit(self.attempt, op.name, sample, position, tile) for tile in tiles}
        found: dict[Any, str | None] = {}
        lost: list[Any] = []
        for tile, result in tried.items():
            try:
                found[tile] = result.result(self.patience if not lost else 0)
            except (BrokenProcessPool, TimeoutError, CancelledError):
                lost.append(tile)
        if lost:
            self.close()
            self.executor = self.make()
        return found, lost

    def close(self) -> None:
        for process in getattr(self.executor, "_processes", {}).values():  # one that hangs ends no other way
            process.kill()
        self.executor.shutdown(wait=False, cancel_futures=True)


def sweep(
    call: dict[str, Any], slot: Slot, tried: dict[Any, str | None], seconds: float
) -> dict[str, timing.Timing | str]:
    """{candidate: time of the slot's kernels, or why there is none}; the entry is as before afterwards."""
    before = slot.get()

    def run(tile: Any) -> None:
        slot.set(tile)
        slot.launch(**call)

    works = {str(tuple(tile)): partial(run, tile) for tile, reason in tried.items() if reason is None}
    failed = {str(tuple(tile)): reason for tile, reason in tried.items() if reason is not None}
    try:
        return failed | timing.interleaved(works, "cuda", seconds)
    finally:
        slot.set(before)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sweep", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="operations; all by default; or attention: its candidates"
    )
    parser.add_argument("--seconds", type=float, default=0.05, help="for each candidate")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    if unknown := set(options.names) - {op.name for op in OPS} - {"attention"}:
        sys.exit(f"error: no operation is called {', '.join(sorted(unknown))}")
    reason = unavailable(torch.device("cuda"))
    if reason is not None or INTERPRETED:
        sys.exit(f"error: tiles are tried on a GPU: {reason or 'TRITON_INTERPRET is set'}")
    if options.names == ["attention"]:
        from bench import contest  # which takes its pool from here

        return contest.run(options.out, options.seconds)
    results = timing.kept(options.out, "sweeps")
    done = [(r["operation"], r["sample"], r["slot"]) for r in results]
    # each process has a GPU context of its own, about half a GB
    processes = max(1, min(14, (os.cpu_count() or 2) - 2))
    pool = Pool(partial(ProcessPoolExecutor, processes, multiprocessing.get_context("spawn")))
    most_to_gain = ("causal_attention", "cross_entropy")
    for op in sorted(OPS, key=lambda op: op.name not in most_to_gain):
        for sample in op.shipped if not options.names or op.name in options.names else ():
            call = arguments(op, sample)
            for position, slot in enumerate(slots(op, call)):
                where = {"operation": op.name, "sample": str(sample), "slot": slot.name}
                if tuple(where.values()) in done:
                    continue
                tiles = list(dict.fromkeys((slot.get(), *slot.candidates)))
                tried = pool.attempts(op, sample, position, tiles)
                found = sweep(call, slot, tried, options.seconds)
                timed = {n: t.median for n, t in found.items() if isinstance(t, timing.Timing)}
                now = str(tuple(slot.get()))
                print(f"{op.name} {sample} {slot.name}: now {now} {timed.get(now, float('nan')):.4f} ms")
                best = sorted(timed, key=lambda n: timed[n])[:5]
                print(*(f"    {n:24} {timed[n]:.4f} ms" for n in best), sep="\n", flush=True)
                failed = {n: t for n, t in found.items() if isinstance(t, str)}
                results.append(where | {"now": now, "ms": timed, "failed": failed})
                if options.out:
                    timing.write(options.out, "sweep", "cuda", sweeps=results)
    pool.close()


if __name__ == "__main__":
    main()
