"""python -m bench.sweep [NAME ...]: time tile sizes on this GPU and print the fastest.

An operation has tables of tiles, and its production shapes use some of their entries (`Op.slots`). For each
entry a pool of processes compiles every candidate, runs it once and compares the result with fp64. So a
candidate that crashes stops nothing else, and a wrong one is not timed. The others then take turns in this
process, while all other entries stay as they are.

Nothing is written into the tables. Put the winner there by hand, with the name of the GPU, and run the tests.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import CancelledError, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench import timing
from bench.judge import failures
from bench.kernels import TIMED, fewer, in_turns, make_call, make_inputs
from gpt import cli
from gpt.cli import UserPath
from kernels.op import INTERPRETED, Op, Slot, unavailable

DEVICE = "cuda"
PATIENCE = 60.0  # seconds for a candidate to compile and run


def arguments(op: Op, sample: dict[str, Any], make: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    sizes = {k: v for k, v in sample.items() if k != "dtype"}
    return make(op, sample.get("dtype", torch.bfloat16), DEVICE, sizes)


def attempt(name: str, sample: dict[str, Any], position: int, tile: Any) -> str | None:
    """Runs an operation once with `tile` in its slot number `position`. Returns None, or why it failed.

    This runs in a process of the pool, on fewer rows. Triton's cache on disk then has what it compiled.
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
            triton = {"triton": op.implementations["triton"]}
            return failures(op, arguments(op, sample, make_call), triton).get("triton")
        finally:
            slot.set(before)
    except Exception as error:  # a tile that does not compile, or needs more than there is
        if "CUDA error" in str(error):  # this process has lost its GPU
            os._exit(1)
        return timing.reason(error)


class Pool:
    """Processes that try candidates. When one dies or hangs, the pool is replaced by a new one."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        # Each process has a GPU context of its own, about half a GB.
        processes = max(1, min(14, (os.cpu_count() or 2) - 2))
        self.executor = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))

    def attempts(
        self, op: Op, sample: dict[str, Any], position: int, tiles: list[Any]
    ) -> dict[Any, str | None]:
        """{tile: None, or why it failed}."""
        answers, suspects = self._try(op, sample, position, tiles)
        for tile in suspects:  # one at a time, to learn which of them breaks the pool
            answer, lost = self._try(op, sample, position, [tile])
            answers |= answer | dict.fromkeys(lost, "its process died or did not answer")
        return answers

    def _try(
        self, op: Op, sample: dict[str, Any], position: int, tiles: list[Any]
    ) -> tuple[dict[Any, str | None], list[Any]]:
        """(answers, tiles without an answer)."""
        futures = {tile: self.executor.submit(attempt, op.name, sample, position, tile) for tile in tiles}
        answers: dict[Any, str | None] = {}
        lost: list[Any] = []
        for tile, future in futures.items():
            try:
                answers[tile] = future.result(PATIENCE if not lost else 0)
            except (BrokenProcessPool, TimeoutError, CancelledError):
                lost.append(tile)
        if lost:
            self.close()
            self.start()
        return answers, lost

    def close(self) -> None:
        for process in self.executor._processes.values():  # nothing else ends one that hangs
            process.kill()
        self.executor.shutdown(wait=False, cancel_futures=True)


def sweep(
    op: Op, call: dict[str, Any], slot: Slot, answers: dict[Any, str | None], seconds: float
) -> dict[str, timing.Timing | str]:
    """{candidate: the time of all kernels, or why there is none}. The entry stays as it was."""
    before = slot.get()

    def run(tile: Any) -> None:
        slot.set(tile)
        op.run_all(**call)

    works = {str(tuple(tile)): partial(run, tile) for tile, reason in answers.items() if reason is None}
    failed = {str(tuple(tile)): reason for tile, reason in answers.items() if reason is not None}
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
    pool = Pool()
    seen = set()
    # The shapes of the 124M come first. These two share entries with add_layer_norm and loss_and_gradient,
    # which decide, because a training runs those.
    ops.sort(key=lambda op: op.name in ("layer_norm", "cross_entropy"))
    for op, sample in in_turns(ops, lambda op: op.production_shapes):
        call = arguments(op, sample, make_inputs)
        for position, slot in enumerate(op.slots(**call)):
            entry = id(slot.table), slot.key, slot.index
            if entry in seen:  # the first sample that uses an entry decides
                continue
            seen.add(entry)
            where = {"operation": op.name, "sample": str(sample), "slot": slot.name}
            if tuple(where.values()) in done:
                continue
            tiles = list(dict.fromkeys((slot.get(), *slot.candidates)))
            # The pool finishes before anything is timed, so nothing else uses the GPU then.
            answers = pool.attempts(op, sample, position, tiles)
            results_by_tile = sweep(op, call, slot, answers, options.seconds)
            timed = {n: t.median for n, t in results_by_tile.items() if isinstance(t, timing.Timing)}
            now = str(tuple(slot.get()))
            print(f"{op.name} {sample} {slot.name}: now {now} {timed.get(now, float('nan')):.4f} ms")
            best = sorted(timed, key=lambda n: timed[n])[:5]
            print(*(f"    {n:24} {timed[n]:.4f} ms" for n in best), sep="\n", flush=True)
            failed = {n: t for n, t in results_by_tile.items() if isinstance(t, str)}
            results.append(where | {"now": now, "ms": timed, "failed": failed})
            if options.out:
                timing.write(options.out, "sweep", "cuda", sweeps=results)
        del call
    pool.close()


if __name__ == "__main__":
    cli.run(main)
