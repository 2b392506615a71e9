"""python -m bench.sweep [NAME ...]: tries tile sizes on this GPU and prints what each costs, the best first.

For every entry of the tables in `kernels/` that the shipped samples reach, a pool of processes compiles
each candidate, runs it once and holds the operation to fp64, so that one which crashes takes nothing with
it and one that is wrong is not timed; the others take turns in this process while the other entries stay as
they are. Nothing is written: the winner is put into the table by hand, with the GPU it was found on, and
the tests decide whether it is right.
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
from bench.kernels import IN_PLACE, loss_and_gradient, make_call, make_inputs, wrong
from kernels import OPS
from kernels.attention import DESCRIPTOR_TILES, descriptor
from kernels.attention import TILES as ATTENTION_TILES
from kernels.attention import Tile as AttentionTile
from kernels.cross_entropy import A_ROW_EACH
from kernels.cross_entropy import TILES as LOSS_TILES
from kernels.cross_entropy import _width as loss_width
from kernels.decode import TILES as DECODE_TILES
from kernels.decode import Tile as DecodeTile
from kernels.gelu import TILES as GELU_TILES
from kernels.gelu import Tile as GeluTile
from kernels.layer_norm import TILES as NORM_TILES
from kernels.layer_norm import _width as norm_width
from kernels.linear_cross_entropy import _sum as loss_in_chunks
from kernels.op import INTERPRETED, Op, architecture, tiles_for, unavailable

DEVICE = "cuda"
CHUNK = {"rows": ((16384,),)}  # as `chunk_rows` has it for GPT-2's vocabulary
# What a step of the 124M launches, or a step of its generation: these decide an entry before the shapes that
# an Op ships.
DECIDING: dict[str, dict[str, Any]] = {
    "causal_attention": {"B": 64, "T": 1024, "H": 12, "D": 64},
    "add_layer_norm": {"shape": (65536, 768), "mixed": True, "bias": False},
    "cross_entropy": {"N": 8192, "V": 50304},
    "linear_cross_entropy": {"N": 65536, "C": 768, "V": 50304},
    "gelu": {"shape": (65536, 3072)},
    "decode_attention": {"B": 32, "H": 12, "T": 1024, "D": 64, "ragged": False},
}


@dataclass(frozen=True)
class Slot:
    """One entry of a table of tiles: `table[key]` or `table[key][index]`, and what may stand there."""

    name: str
    table: dict[Any, Any]
    key: Any
    index: int | None  # None: the entry is the tile
    candidates: tuple[Any, ...]
    launch: Callable[..., Any]  # (**call): what is timed

    def get(self) -> Any:
        return self.table[self.key] if self.index is None else self.table[self.key][self.index]

    def set(self, tile: Any) -> None:
        entries, i = self.table[self.key], self.index
        self.table[self.key] = tile if i is None else (*entries[:i], tile, *entries[i + 1 :])


def slots(op: Op, call: dict[str, Any]) -> Iterator[Slot]:
    """The entries that decide how `op` is launched with these arguments."""
    first = next(v for v in call.values() if isinstance(v, torch.Tensor))
    arch = architecture(first)
    table: dict[Any, tuple[Any, ...]]
    candidates: tuple[Any, ...]
    if op.family == "layer_norm":
        C, table = first.shape[-1], tiles_for(first, NORM_TILES)
        key = norm_width(C)
        forward = tuple(_norm_tiles(C, 64))
        yield Slot("forward (rows, warps, columns)", table, key, 0, forward, op.launchers)
        # backward holds six values for each of a lane's columns, so that it has half as many, and one row
        lean = (tile for tile in _norm_tiles(C, 32) if tile[0] * tile[2] == 256 * tile[1])
        resident = ((t, p) for t, p in product(lean, (1, 2, 3, 4, 6, 8, 12, 16)) if 4 <= t[1] * p <= 24)
        backward = tuple((*tile, programs) for tile, programs in resident)
        name = "backward (rows, warps, columns, programs)"
        yield Slot(name, table, key, 1, backward, op.launchers)
    elif op.name == "cross_entropy" and first.shape[1] > 2048:
        sizes = product((4096, 8192, 16384, 32768), (4, 8, 16, 32), (1, 2, 3, 4, A_ROW_EACH))
        candidates = tuple(
            (block, warps, programs)
            for block, warps, programs in sizes
            if 8 <= block // (32 * warps) <= 32 and (programs == A_ROW_EACH or 16 <= warps * programs <= 64)
        )
        table, key = tiles_for(first, LOSS_TILES), loss_width(first.shape[1])
        # what training runs, on a chunk of its own logits, decides
        for name, launch in (("in place", loss_and_gradient), ("forward, backward", op.launchers)):
            yield Slot(f"{name} (BLOCK, warps, programs)", table, key, None, candidates, launch)
    elif op.name == "linear_cross_entropy":
        chunks = tuple((rows,) for rows in (4096, 8192, 16384, 32768))
        yield Slot("rows of a chunk", CHUNK, "rows", 0, chunks, _in_chunks)
    elif op.name == "decode_attention":
        width = 64 if first.shape[-1] <= 64 else 128
        # 16 or 32 values of a tile in a lane: more spill or fill the registers, fewer load too little ahead.
        settings = product((16, 32), (2, 4, 8), (3, 4), (2, 3, 4))
        candidates = tuple(
            DecodeTile(values * 32 * warps // width, warps, stages, programs)
            for values, warps, stages, programs in settings
        )
        table = tiles_for(first, DECODE_TILES)
        yield Slot("(n, warps, stages, programs)", table, width, 0, candidates, op.launchers)
    elif op.name == "gelu":
        candidates = tuple(GeluTile(32 * w * elements, w) for w in (2, 4, 8) for elements in (8, 16, 32))
        table = tiles_for(first, GELU_TILES)
        for direction in ("forward", "backward"):
            yield Slot(f"{direction} (block, warps)", table, direction, None, candidates, op.launchers)
    elif op.name == "causal_attention" and first.dtype != torch.float32 and not call.get("dropout_p"):
        width = 64 if first.shape[-1] <= 64 else 128
        by_descriptor = descriptor(first, None) is not None
        if by_descriptor:  # its two blocks are one
            candidates = tuple(AttentionTile(m, m, *t) for m, *t in product((32, 64, 128), (4, 8), (2, 3, 4)))
            name = "forward by descriptor (m, n, warps, stages)"
            yield Slot(name, DESCRIPTOR_TILES, arch, None, candidates, op.launchers)
        for index, name in enumerate(("forward", "dq", "dk and dv")):
            if by_descriptor and name == "forward":
                continue
            tiles = product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
            # The block that a program owns is a multiple of the other: queries, and keys for dk and dv.
            square = (t for t in tiles if (t[1] % t[0] if index == 2 else t[0] % t[1]) == 0)
            candidates = tuple(AttentionTile(*t) for t in square)
            where = f"{name} (m, n, warps, stages)"
            yield Slot(where, ATTENTION_TILES[arch], width, index, candidates, op.launchers)


def _norm_tiles(C: int, most: int) -> Iterator[tuple[int, int, int]]:
    """(rows, warps, columns) with up to `most` values of a row or two in a lane, a quarter of them idle."""
    for rows, warps, columns in product((1, 2, 4, 8), (1, 2, 4, 8, 16), (256, 512, 1024, 2048)):
        tiles = -(-C // columns)
        values = rows * columns * tiles // (32 * warps)
        if warps <= rows * columns // 256 and values <= most and tiles * columns <= max(256, 1.34 * C):
            yield rows, warps, columns


def _in_chunks(input: torch.Tensor, linear_weight: torch.Tensor, target: torch.Tensor, **_: Any) -> None:
    (rows,) = CHUNK["rows"][0]
    loss_in_chunks(input, linear_weight, target, -100, 0.0, rows, input.dtype, True, True)


def arguments(op: Op, sample: dict[str, Any]) -> dict[str, Any]:
    sizes = {k: v for k, v in sample.items() if k != "dtype"}
    return make_inputs(op, sample.get("dtype", torch.bfloat16), DEVICE, sizes)


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
            if reason := _wrong(op, fewer(op, sample)):
                return reason
        finally:
            slot.set(before)
    except Exception as error:  # a tile that does not compile, or needs more than there is
        if "CUDA error" in str(error):  # this process has lost its GPU
            os._exit(1)
        return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    return None


def _wrong(op: Op, sample: dict[str, Any]) -> str | None:
    """Why the operation, and for cross_entropy the one in place, is not right with the tiles that are set."""
    sizes = {k: v for k, v in sample.items() if k != "dtype"}
    for judged in (op, IN_PLACE) if op.name == "cross_entropy" else (op,):
        if judged is IN_PLACE:
            sizes.pop("label_smoothing", None)  # it has none
        call = make_call(judged, sample.get("dtype", torch.bfloat16), DEVICE, sizes)
        if reason := wrong(judged, call, {"triton": judged.implementations["triton"]}):
            return reason["triton"]
    return None


def fewer(op: Op, sample: dict[str, Any]) -> dict[str, Any]:
    """Less memory, and the same compilation: the sizes that go stay multiples of 16."""
    if op.name == "decode_attention":  # how it is split depends on the batch
        return sample
    most = {"N": 512, "B": 2}
    found = {k: min(v, most[k]) if k in most else v for k, v in sample.items()}
    if "shape" in sample:
        found["shape"] = (min(4096, sample["shape"][0]), *sample["shape"][1:])
    return found


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
    parser.add_argument("names", nargs="*", metavar="NAME", help="operations; all by default")
    parser.add_argument("--seconds", type=float, default=0.05, help="for each candidate")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    if unknown := set(options.names) - {op.name for op in OPS}:
        sys.exit(f"error: no operation is called {', '.join(sorted(unknown))}")
    reason = unavailable(torch.device("cuda"))
    if reason is not None or INTERPRETED:
        sys.exit(f"error: tiles are tried on a GPU: {reason or 'TRITON_INTERPRET is set'}")
    results = timing.kept(options.out, "sweeps")
    done = [(r["operation"], r["sample"], r["slot"]) for r in results]
    # each process has a GPU context of its own, about half a GB
    processes = max(1, min(14, (os.cpu_count() or 2) - 2))
    pool = Pool(partial(ProcessPoolExecutor, processes, multiprocessing.get_context("spawn")))
    seen = set()
    for op, sample in samples_to_sweep(options.names):
        call = arguments(op, sample)
        for position, slot in enumerate(slots(op, call)):
            entry = id(slot.table), slot.key, slot.index, slot.name
            if entry in seen:  # the first sample to reach it decides
                continue
            seen.add(entry)
            where = {"operation": op.name, "sample": str(sample), "slot": slot.name}
            if tuple(where.values()) in done:
                continue
            tiles = list(dict.fromkeys((slot.get(), *slot.candidates)))
            # The pool has answered before anything is timed, so that the GPU is idle but for what is timed.
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
        del call
    pool.close()


def samples_to_sweep(names: list[str]) -> Iterator[tuple[Op, dict[str, Any]]]:
    """What decides first, then what the operations ship; of `names`, or of all."""
    ops = {op.name: op for op in OPS if not names or op.name in names}
    yield from ((ops[name], sample) for name, sample in DECIDING.items() if name in ops)
    # layer_norm shares its entries with add_layer_norm, which runs more often.
    for op in sorted(ops.values(), key=lambda op: op.name == "layer_norm"):
        yield from ((op, sample) for sample in op.shipped)


if __name__ == "__main__":
    main()
