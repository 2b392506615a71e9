"""Compile every kernel with every tile in use for every architecture, on a machine without a GPU.

    python -m bench.aot                                 print registers, spills, shared memory, ...
    python -m bench.aot --check                         exit with 1 if a rule below is broken
    python -m bench.aot --check --quick                 one build of a kernel; on sm_90 one of each path
    python -m bench.aot --only="sm_90 _attention_dq_kernel"

The operations say what to build: `run_all` gets meta tensors, and `kernels.op.record` notes what it would
launch. The rules:

- The kernel compiles, and its body is more than a trap.
- On sm_80 and sm_90 at most one in 200 instructions inside loops is a spill.
- Shared and tensor memory stay within the architecture's limits.
- Every half-precision product uses the architecture's best tensor-core instruction throughout, and does not
  wait after each of them.
- There are loads of 16 bytes.

The counts are of the SASS from ptxas. LDL and STL are spills; HMMA, HGMMA (wgmma) and UTCHMMA (tcgen05) are
tensor-core instructions.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt import cli
from kernels import OPS
from kernels.op import INTERPRETED, Launch, record, triton

SPILL_FREE_LOOPS = (80, 90)
MEASURED = 90
TENSOR_MEMORY = 512  # columns, sm_100
TRITON_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Gpu:
    """The limits of one multiprocessor. Source: CUDA C++ programming guide, compute capabilities."""

    shared_block: int  # bytes a block can use
    shared: int  # bytes
    warps: int
    blocks: int
    registers: int = 65536


GPUS = {
    80: Gpu(163 << 10, 164 << 10, 64, 32),
    89: Gpu(99 << 10, 100 << 10, 48, 24),
    90: Gpu(227 << 10, 228 << 10, 64, 32),
    100: Gpu(227 << 10, 228 << 10, 64, 32),
}


@dataclass(frozen=True)
class Build:
    architecture: int
    launch: Launch

    @property
    def source(self) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
        """(signature, constants, attributes), specialised as Triton's launch would."""
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int], list[list[Any]]] = {}
        parameters = {p.name: p for p in self.launch.kernel.params}
        for position, name in enumerate(self.launch.kernel.arg_names):
            value = self.launch.arguments[name]
            parameter = parameters[name]
            is_number = isinstance(value, int) and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (is_number and value == 1):
                signature[name], constants[name] = "constexpr", value
                continue
            if isinstance(value, Tensor):
                signature[name] = TRITON_TYPES[value.dtype]
            elif hasattr(value, "block_shape"):  # a tensor descriptor
                signature[name] = f"tensordesc<{TRITON_TYPES[value.base.dtype][1:]}{list(value.block_shape)}>"
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if isinstance(value, Tensor) or (is_number and value % 16 == 0):
                attributes[(position,)] = [["tt.divisibility", 16]]
        return signature, constants, attributes

    @property
    def key(self) -> str:
        launch = self.launch
        parts = launch.kernel.__name__, self.architecture, self.source, launch.num_warps, launch.num_stages
        return repr(parts)

    def __str__(self) -> str:
        signature, constants, _ = self.source
        sizes = [f"{k}={v}" for k, v in constants.items() if isinstance(v, int) and k.isupper()]
        dtype = next(t for t in signature.values() if t.startswith("*"))[1:]
        warps = f"{self.launch.num_warps} warps"
        return f"sm_{self.architecture} {self.launch.kernel.__name__} {dtype} {' '.join(sizes)} {warps}"


@dataclass(frozen=True)
class Figures:
    registers: int
    stack: int  # bytes a thread
    spills: int  # LDL and STL, anywhere
    loop_spills: int  # those inside a loop
    shared: int  # bytes a block
    tensor_memory: int  # columns
    instructions: int
    loop_instructions: int  # those inside a loop
    tensor_core: dict[str, int]  # instruction -> count
    expected: int  # tensor-core instructions that the products need at least
    # ptxas waits after every wgmma instruction and not after a whole product (its warning C7515)
    one_by_one: bool
    wide_loads: int  # 16 bytes a thread, or by the tensor memory accelerator
    blocks: int  # resident on a multiprocessor
    occupancy: float  # share of its warps that are resident


def builds() -> list[Build]:
    """Every distinct build that the production shapes of all operations need."""
    distinct: dict[str, Build] = {}
    for architecture in GPUS:
        for op in OPS:
            for sample in op.production_shapes:
                with record(assume=architecture) as launches:
                    op.run_all(**op.make(**{"dtype": torch.bfloat16, "device": "meta"} | sample))
                for launch in launches:
                    build = Build(architecture, launch)
                    distinct[build.key] = build
    return list(distinct.values())


def first_of_each(every: list[Build]) -> list[Build]:
    """One build of each kernel, and for the architecture that was measured one of each path through it."""
    first: dict[tuple[Any, ...], Build] = {}
    for build in every:
        signature, constants, _ = build.source
        # Types, absent arguments and flags choose the path; sizes do not.
        path = [*signature.values(), *(v for v in constants.values() if v is None or isinstance(v, bool))]
        measured = build.architecture == MEASURED
        key = build.architecture, build.launch.kernel.__name__, str(path) if measured else ""
        first.setdefault(key, build)
    return list(first.values())


def compile_build(build: Build) -> Figures:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = build.source
    source = ASTSource(fn=build.launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", build.architecture, 32),
        options={"num_warps": build.launch.num_warps, "num_stages": build.launch.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))  # type: ignore
    return _figures(build, compiled, registers, stack, list(instructions(sass)))


def _tool(name: str, *arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def instructions(sass: str) -> Iterator[tuple[str, bool]]:
    """Yields (instruction, whether it is inside a loop). A loop ends in a branch back to a label."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    depth: list[int] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?);?\s*(?:/\*|$)", line):
            lines.append(instruction[1])
            depth.append(0)
            target = re.match(r"BRA.*`\((\.L_x_\d+)\)", instruction[1])
            # ptxas ends every kernel with a branch to itself. That is not a loop.
            if target and labels.get(target[1], len(lines)) < len(lines) - 1:
                for inside in range(labels[target[1]], len(lines)):
                    depth[inside] += 1
    return ((line, d > 0) for line, d in zip(lines, depth))


def _figures(
    build: Build, compiled: Any, registers: int, stack: int, instructions: list[tuple[str, bool]]
) -> Figures:
    names = [(line.split()[0], inside) for line, inside in instructions if line]
    spills = [inside for name, inside in names if name.startswith(("LDL", "STL"))]
    tensor_core: dict[str, int] = {}
    for name, _ in names:
        kind = name.split(".")[0]
        if kind in ("HMMA", "HGMMA", "UTCHMMA"):
            tensor_core[kind] = tensor_core.get(kind, 0) + 1
    wide = sum(n.startswith(("LDG", "LDGSTS", "UTMALDG")) and (".128" in n or "UTMA" in n) for n, _ in names)
    gpu, warps, shared = GPUS[build.architecture], build.launch.num_warps, compiled.metadata.shared
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    registers_warp = -(-registers * 32 // 256) * 256
    blocks = min(
        gpu.registers // (registers_warp * warps),
        gpu.shared // (shared + 1024),  # the driver takes 1 KiB of each block
        TENSOR_MEMORY // max(columns, 1),
        gpu.warps // warps,
        gpu.blocks,
    )
    return Figures(
        registers=registers,
        stack=stack,
        spills=len(spills),
        loop_spills=sum(spills),
        shared=shared,
        tensor_memory=columns,
        instructions=sum(name != "NOP" for name, _ in names),
        loop_instructions=sum(inside and name != "NOP" for name, inside in names),
        tensor_core=tensor_core,
        expected=_expected(build, compiled.asm["ttir"]),
        one_by_one=waits_after_every_product([name for name, _ in names]),
        wide_loads=wide,
        blocks=blocks,
        occupancy=blocks * warps / gpu.warps,
    )


def waits_after_every_product(names: list[str]) -> bool:
    """Whether there is a wait between any two wgmma instructions."""
    order = [n for n in names if n.startswith(("HGMMA", "WARPGROUP.DEPBAR"))]
    products = [n.startswith("HGMMA") for n in order]
    return any(products) and not any(a and b for a, b in pairwise(products))


def _expected(build: Build, ttir: str) -> int:
    """Tensor-core instructions of one warp that one pass over all half-precision products needs."""
    total, warps = 0, build.launch.num_warps
    for m, k, dtype, n in re.findall(r"tt\.dot .*: tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x", ttir):
        M, K, N = int(m), int(k), int(n)
        if dtype in ("bf16", "f16"):
            if build.architecture in (80, 89):  # m16n8k16, a warp
                total += M * N * K // (16 * 8 * 16 * warps)
            elif build.architecture == 90:  # m64, n to 256, k16, four warps
                total += max(1, M // (16 * warps)) * K // 16
            else:  # m128, n to 256, k16, one thread for the block
                total += max(1, M // 128) * K // 16
    return total


def faults(build: Build, figures: Figures) -> list[str]:
    """The rules that a kernel breaks."""
    gpu, architecture = GPUS[build.architecture], build.architecture
    best = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[architecture]
    rules = {
        # One reload in a loop of hundreds of instructions costs too little to measure.
        f"{figures.loop_spills} spills in loops of {figures.loop_instructions} instructions": (
            architecture in SPILL_FREE_LOOPS and 200 * figures.loop_spills > figures.loop_instructions
        ),
        f"{figures.shared} bytes of shared memory": figures.shared > gpu.shared_block,
        f"{figures.tensor_memory} columns of tensor memory": figures.tensor_memory > TENSOR_MEMORY,
        f"a body of {figures.instructions} instructions": figures.instructions < 32,
        f"{figures.tensor_core} where {figures.expected} {best} are expected": (
            figures.tensor_core.get(best, 0) < figures.expected
        ),
        "wgmma instructions one by one": figures.one_by_one,
        "no load of 16 bytes": figures.wide_loads == 0,
        "not one block fits": figures.blocks == 0,
    }
    return [rule for rule, broken in rules.items() if broken]


def _attempt(position: int) -> Figures | str:
    try:
        return compile_build(_BUILDS[position])
    except Exception as error:  # a compiler's failure is a result here
        return f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"


_BUILDS: list[Build] = []  # for the forked workers: a Triton kernel cannot be pickled


@dataclass
class AotConfig:
    """Compile every kernel for every architecture: registers, spills, shared memory, tensor cores."""

    check: bool = False  # exit with 1 where a rule is broken
    quick: bool = False  # one build of each kernel, and on sm_90 one of each path through it
    only: str = ""  # only builds whose line has all of these words, such as "sm_90 _loss_kernel"
    jobs: int = os.cpu_count() or 1  # processes


def main() -> None:
    options = cli.parse(AotConfig, sys.argv[1:], prog="python -m bench.aot")
    if triton is None or INTERPRETED:
        raise ValueError("bench.aot needs Triton, and TRITON_INTERPRET unset")
    start = time.perf_counter()
    every = first_of_each(builds()) if options.quick else builds()
    _BUILDS[:] = [b for b in every if all(part in str(b) for part in options.only.split())]
    broken = 0
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("fork")) as pool:
        for build, figures in zip(_BUILDS, pool.map(_attempt, range(len(_BUILDS)))):
            if isinstance(figures, str):
                broken_rules, line = [figures], ""
            else:
                broken_rules = faults(build, figures)
                cores = " ".join(f"{n} {kind}" for kind, n in figures.tensor_core.items()) or "-"
                line = (
                    f"    {figures.registers} registers, "
                    f"{figures.spills} spills ({figures.loop_spills} in loops), {figures.stack} B stack, "
                    f"{figures.shared / 1024:.1f} KiB shared, {cores}, {figures.wide_loads} wide loads, "
                    f"{figures.tensor_memory} columns of tensor memory, "
                    f"{figures.blocks} blocks = {figures.occupancy:.0%}"
                )
            broken += bool(broken_rules)
            print(build, line, *(f"    FAULT: {fault}" for fault in broken_rules), sep="\n", flush=True)
    print(f"{len(_BUILDS)} kernels, {broken} with faults, {time.perf_counter() - start:.0f} s")
    sys.exit(1 if options.check and broken else 0)


if __name__ == "__main__":
    cli.run(main)
