"""python -m bench.sweep [NAME ...]: tries tile sizes on this GPU and prints what each costs, the best first.

For every entry of a table of tiles that the production shapes of an operation reach (`Op.slots`), a pool of
processes compiles each candidate, runs it once and holds the operation to fp64, so that one which crashes
takes nothing with it and one that is wrong is not timed; the others take turns in this process while the
other entries stay as they are. Nothing is written: the winner is put into the table by hand, with the GPU it
was found on, and the tests decide whether it is right.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch

from bench import timing
from bench.kernels import TIMED, fewer, make_call, make_inputs, wrong
from gpt import cli
from gpt.cli import UserPath
from kernels.op import INTERPRETED, Op, Slot, unavailable

DEVICE = "cuda"


def arguments(op: Op, sample: dict[str, Any], make: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    sizes = {k: v for k, v in sample.items() if k != "dtype"}
    return make(op, sample.get("dtype", torch.bfloat16), DEVICE, sizes)


def attempt(name: str, sample: dict[str, Any], position: int, tile: Any) -> str | None:
    """Runs an operation once with `tile` in its slot of that position: None, or why it cannot be.

    In a process of the pool, on fewer rows: what it compiles is in Triton's cache on disk afterwards.
    """
    op, sample = TIMED[name], fewer(TIMED[name], sample)
    try:
        call = arguments(op, sample, make_inputs)
        slot = list(op.slots(**call))[position]
        before = slot.get()
        try:
            slot.set(tile)
            op.run_all(**call)
            torch.cuda.synchronize()
            judged = wrong(op, arguments(op, sample, make_call), {"triton": op.implementations["triton"]})
            return judged.get("triton")
        finally:
            slot.set(before)
    except Exception as error:  # a tile that does not compile, or needs more than there is
        if "CUDA error" in str(error):  # this process has lost its GPU
            os._exit(1)
        return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"


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
        self, op: Op, sample: dict[str, Any], position: int, tiles: list[Any]
    ) -> dict[Any, str | None]:
        """{tile: None, or why it cannot be}."""
        together, suspects = self._try(op, sample, position, tiles)
        for tile in suspects:  # one at a time: the next to break the pool is guilty
            alone, lost = self._try(op, sample, position, [tile])
            together |= alone | dict.fromkeys(lost, "its process died or did not answer")
        return together

    def _try(
        self, op: Op, sample: dict[str, Any], position: int, tiles: list[Any]
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
    op: Op, call: dict[str, Any], slot: Slot, tried: dict[Any, str | None], seconds: float
) -> dict[str, timing.Timing | str]:
    """{candidate: the time of all kernels, or why there is none}; the entry is as before afterwards."""
    before = slot.get()

    def run(tile: Any) -> None:
        slot.set(tile)
        op.run_all(**call)

    works = {str(tuple(tile)): partial(run, tile) for tile, reason in tried.items() if reason is None}
    failed = {str(tuple(tile)): reason for tile, reason in tried.items() if reason is not None}
    try:
        return failed | timing.interleaved(works, "cuda", seconds)
    finally:
        slot.set(before)


@dataclass
class SweepConfig:
    """Try tile sizes on this GPU: python -m bench.sweep [NAME ...] [--flag=value ...]"""

    seconds: float = 0.05  # for each candidate
    out: UserPath = ""  # a JSON file for the results


def main() -> None:
    options, names = cli.parse_with_paths(SweepConfig, sys.argv[1:], prog="python -m bench.sweep")
    ops = [cli.choose(TIMED, name, "operation") for name in names] or list(TIMED.values())
    reason = unavailable(torch.device("cuda"))
    if reason is not None or INTERPRETED:
        raise ValueError(f"bench.sweep needs a GPU: {reason or 'TRITON_INTERPRET is set'}")
    results = timing.of_same_commit(options.out, "sweeps")
    done = [(r["operation"], r["sample"], r["slot"]) for r in results]
    # each process has a GPU context of its own, about half a GB
    processes = max(1, min(14, (os.cpu_count() or 2) - 2))
    pool = Pool(partial(ProcessPoolExecutor, processes, multiprocessing.get_context("spawn")))
    seen = set()
    for op, sample in samples_to_sweep(ops):
        call = arguments(op, sample, make_inputs)
        for position, slot in enumerate(op.slots(**call)):
            entry = id(slot.table), slot.key, slot.index
            if entry in seen:  # the first sample to reach it decides
                continue
            seen.add(entry)
            where = {"operation": op.name, "sample": str(sample), "slot": slot.name}
            if tuple(where.values()) in done:
                continue
            tiles = list(dict.fromkeys((slot.get(), *slot.candidates)))
            # The pool has answered before anything is timed, so that the GPU is idle but for what is timed.
            tried = pool.attempts(op, sample, position, tiles)
            found = sweep(op, call, slot, tried, options.seconds)
            timed = {n: t.median for n, t in found.items() if isinstance(t, timing.Timing)}
            now = str(tuple(slot.get()))
            print(f"{op.name} {sample} {slot.name}: now {now} {timed.get(now, float('nan')):.4f} ms")
            best = sorted(timed, key=lambda n: timed[n])[:5]
            print(*(f"    {n:24} {timed[n]:.4f} ms" for n in best), sep="\n", flush=True)
            failed = {n: t for n, t in found.items() if isinstance(t, str)}
            results.append(where | {"now": now, "ms": timed, "failed": failed})
            if options.out:
                timing.write(options.out, "sweep", "cuda", sweeps=results)
        del call
    pool.close()


def samples_to_sweep(ops: list[Op]) -> Iterator[tuple[Op, dict[str, Any]]]:
    """What the 124M launches first, then the other production shapes, of `ops`."""
    # These two share their entries with add_layer_norm and loss_and_gradient, which a training runs.
    last = "layer_norm", "cross_entropy"
    in_order = sorted(ops, key=lambda op: op.name in last)
    for turn in zip_longest(*([(op, shape) for shape in op.production_shapes] for op in in_order)):
        yield from (case for case in turn if case is not None)


if __name__ == "__main__":
    cli.run(main)
