"""python -m bench.sweep [NAME ...]: tries tile sizes on this GPU and prints what each costs, the best first.

For every entry of the tables in `kernels/` that the shipped samples reach, all candidates take turns in one
process while the other entries stay as they are. Nothing is written: the winner is put into the table by
hand, with the GPU it was found on, and the tests decide whether it is right.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
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
        forward = tuple(product((1, 2, 4, 8), (1, 2, 4, 8, 16)))
        backward = tuple(product((1, 2, 4), (1, 2, 4, 8, 16), (1, 2, 4, 8, 16)))
        yield Slot("forward (rows, warps)", _layer_norm.TILES[arch], block, 0, forward)
        yield Slot("backward (rows, warps, programs)", _layer_norm.TILES[arch], block, 1, backward)
    elif op.name == "cross_entropy":
        candidates = tuple(product((1024, 2048, 4096, 8192, 16384, 32768), (4, 8, 16, 32)))
        index = int(first.shape[1] > 2048)
        yield Slot("(BLOCK, warps)", _cross_entropy.TILES, arch, index, candidates)
    elif op.name == "decode_attention":
        candidates = tuple(_decode.Tile(*t) for t in product((16, 32, 64), (2, 4, 8), (2, 3, 4), (2, 4, 8)))
        width = 64 if first.shape[-1] <= 64 else 128
        yield Slot("(n, warps, stages, programs)", _decode.TILES[arch], width, 0, candidates)
    elif op.name == "causal_attention" and first.dtype != torch.float32 and not call.get("dropout_p"):
        width = 64 if first.shape[-1] <= 64 else 128
        for index, name in enumerate(("forward", "dq", "dk and dv")):
            tiles = product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
            # The block that a program owns is a multiple of the other: queries, and keys for dk and dv.
            fits = (t for t in tiles if (t[1] % t[0] if index == 2 else t[0] % t[1]) == 0)
            candidates = tuple(_attention.Tile(*t) for t in fits)
            yield Slot(f"{name} (m, n, warps, stages)", _attention.TILES[arch], width, index, candidates)


def sweep(op: Op, call: dict[str, Any], slot: Slot, seconds: float) -> dict[str, timing.Timing | str]:
    """{candidate: time of all kernels of `op`, or why there is none}; the entry is as before afterwards."""
    before = slot.get()
    found: dict[str, timing.Timing | str] = {}
    works: dict[str, Any] = {}

    def run(tile: Any) -> None:
        slot.set(tile)
        op.launchers(**call)

    try:
        for tile in dict.fromkeys((before, *slot.candidates)):
            name = str(tuple(tile))
            try:
                run(tile)
                torch.cuda.synchronize()
                works[name] = lambda tile=tile: run(tile)
            except Exception as error:  # a tile that does not compile, or needs more than there is
                found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        return found | timing.interleaved(works, "cuda", seconds)
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
    results = []
    for op in OPS:
        for sample in op.shipped if not options.names or op.name in options.names else ():
            call = op.make(**{"dtype": torch.bfloat16, "device": "cuda"} | sample)
            for slot in slots(op, call):
                found = sweep(op, call, slot, options.seconds)
                timed = {n: t.median for n, t in found.items() if isinstance(t, timing.Timing)}
                now = str(tuple(slot.get()))
                print(f"{op.name} {sample} {slot.name}: now {now} {timed[now]:.4f} ms")
                best = sorted(timed, key=lambda n: timed[n])[:5]
                print(*(f"    {n:24} {timed[n]:.4f} ms" for n in best), sep="\n", flush=True)
                failed = {n: t for n, t in found.items() if isinstance(t, str)}
                where = {"operation": op.name, "sample": str(sample), "slot": slot.name}
                results.append(where | {"now": now, "ms": timed, "failed": failed})
    if options.out:
        environment = timing.environment("cuda", ["python", "-m", "bench.sweep", *sys.argv[1:]])
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"environment": environment, "sweeps": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
