# mypy: allow-untyped-defs, allow-incomplete-defs
# (a Triton kernel's arguments have no Python types)
"""What the operations of this folder share: how one is described, launched and counted.

`Op` describes an operation to its tests and benchmarks. `launch` is the only way a kernel starts, so `record`
sees every launch: tests count them, and `bench.aot` learns from them what to compile for a GPU that is not
there. The two Triton functions `round_to` and `dot` are what makes bfloat16 right under Triton's
interpreter.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
    jit = triton.jit
except ImportError:  # PyTorch's own operations, and the checks of ours, work without Triton
    triton, tl, TensorDescriptor, INTERPRETED = None, SimpleNamespace(constexpr=float), None, False

    def jit(fn=None, **_):
        return fn or jit


INTERPRETER = 0  # an "architecture" with small tiles, so that small tests cross their borders
UNTUNED = -1  # the row of a table of tiles for the architectures that nobody has tuned
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Cost(NamedTuple):
    """What an operation must move and compute at the least, for one call forward and one backward."""

    forward_bytes: int
    backward_bytes: int
    forward_flops: int
    backward_flops: int


@dataclass(frozen=True)
class Slot:
    """An entry of a table of tiles, `table[key]` or `table[key][index]`, and what may stand there."""

    name: str
    table: dict[Any, Any]
    key: Any
    candidates: tuple[Any, ...]
    index: int | None = None

    def get(self) -> Any:
        return self.table[self.key] if self.index is None else self.table[self.key][self.index]

    def set(self, tile: Any) -> None:
        entries, i = self.table[self.key], self.index
        self.table[self.key] = tile if i is None else (*entries[:i], tile, *entries[i + 1 :])


@dataclass(frozen=True)
class Op:
    """An operation, as its tests and benchmarks need to know it.

    A *call* is a dict of keyword arguments that every implementation and the reference accept. A *sample*
    is a dict that `make(dtype, device, **sample)` turns into a call with random inputs.
    """

    name: str
    # What a load spec calls it.
    family: str
    implementations: Mapping[str, Callable[..., Any]]
    reference: Callable[..., Any]
    make: Callable[..., dict[str, Any]]
    cost: Callable[..., Cost]  # cost(**call)
    run_all: Callable[..., Any]  # run_all(**call) launches every kernel once, on meta tensors too
    # What the tests run: small and awkward. The first stands for all where the shape is not the question.
    samples: tuple[dict[str, Any], ...]
    # The kernels that samples[0] launches forward, and those that it launches backward.
    launches: tuple[Sequence[Any], Sequence[Any]]
    # What a GPU's tests run: many programs, so that a race would show.
    large_sample: dict[str, Any]
    # What bench.kernels times. The first shape decides how fast the 124M trains.
    benchmark_shapes: tuple[dict[str, Any], ...]
    # What bench.aot compiles and bench.sweep tunes: together they launch every kernel with every tile. The
    # first is what the 124M launches.
    production_shapes: tuple[dict[str, Any], ...]
    differentiable: bool = True
    # slots(**call): the tiles of such a call that bench.sweep may change.
    slots: Callable[..., Iterable[Slot]] = lambda **_: ()
    # Kernel -> the most instructions an element in half precision on sm_90. bench.aot checks it; the kernel's
    # argument BLOCK is the number of elements of a program.
    instructions: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Launch:
    kernel: Any
    arguments: dict[str, Any]  # by name, compile-time constants included
    num_warps: int
    num_stages: int


_records: list[list[Launch]] = []
_assumed: list[int] = []  # the architectures of the dry runs in progress


@contextmanager
def record(assume: int | None = None) -> Iterator[list[Launch]]:
    """Every launch made inside the `with`, in order, on any thread.

    With `assume`, an architecture such as 90, nothing runs: tiles are chosen as that GPU would have them, and
    the tensors may be on the meta device.
    """
    launches: list[Launch] = []
    _records.append(launches)
    if assume is not None:
        _assumed.append(assume)
    try:
        yield launches
    finally:
        _records.pop()
        if assume is not None:
            _assumed.pop()


def launch(kernel, grid: tuple[int, ...], *args, num_warps: int, num_stages: int = 1, **constants) -> None:
    """Runs `kernel` on the device of its first tensor, which need not be the current one."""
    for launches in _records:
        arguments = dict(zip(kernel.arg_names, args)) | constants
        launches.append(Launch(kernel, arguments, num_warps, num_stages))
    if _assumed:
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)


def unavailable(device: torch.device) -> str | None:
    """Why the Triton operations cannot run on `device`, or None when they can."""
    if triton is None:
        return "Triton is not installed (pip install triton; it exists for Linux)"
    if INTERPRETED:
        return _interpreter_fault()
    if device.type != "cuda":
        return (
            f"Triton needs a GPU and the device is {device}; set TRITON_INTERPRET=1 before "
            "Python starts to run the kernels, very slowly, in Triton's interpreter"
        )
    if torch.version.hip or not torch.cuda.is_available():
        return "Triton kernels here are for NVIDIA GPUs, and torch sees none"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the GPU {device} is sm_{major}{minor} and the Triton kernels need sm_80 (A100) or newer"
    return None


def _interpreter_fault() -> str | None:
    """Why Triton's interpreter does not run here, or None: that of 3.6 makes a range of an array."""
    import numpy

    version, other = triton.__version__, numpy.__version__
    if version.startswith("3.6.") and numpy.lib.NumpyVersion(other) >= "2.4.0":
        return f"the interpreter of Triton {version} fails with numpy {other}; install numpy<2.4"
    return None


@functools.cache
def _gpu(device: torch.device) -> tuple[int, int, int | None]:
    """(architecture whose tiles fit, number of multiprocessors, bytes of memory), or ValueError."""
    reason = unavailable(device)
    if reason is not None:
        raise ValueError(reason)
    if INTERPRETED:
        return INTERPRETER, 3, None
    major, minor = torch.cuda.get_device_capability(device)
    # By shared memory a block: sm_86, sm_89 and sm_120 have 99 KiB, sm_80 163, sm_90 and sm_100 227.
    architecture = {(8, 0): 80, (8, 7): 80}.get((major, minor), {9: 90, 10: 100, 11: 100}.get(major, 89))
    properties = torch.cuda.get_device_properties(device)
    return architecture, properties.multi_processor_count, properties.total_memory


def architecture(tensor: Tensor) -> int:
    """80, 89, 90 or 100: the key of the tile tables; INTERPRETER without a GPU."""
    return architecture_of(tensor.device)


def architecture_of(device: torch.device) -> int:
    """The same of a device that can run Triton's kernels. Raises ValueError for another."""
    return _assumed[-1] if _assumed else _gpu(device)[0]


def tiles_for(tensor: Tensor, table: dict[int, dict[Any, Any]]) -> dict[Any, Any]:
    """The row of `table` for the tensor's architecture."""
    return table.get(architecture(tensor), table[UNTUNED])


def multiprocessors(tensor: Tensor) -> int:
    return 132 if _assumed else _gpu(tensor.device)[1]


def operator(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """`function` as the operator `tritongpt::name`, which torch.compile treats as opaque.

    `fake` takes the same arguments and returns empty tensors like the results.
    """
    # The arguments arrive with the strides that they have without torch.compile.
    tags = (torch.Tag.needs_exact_strides,)
    made = torch.library.custom_op(f"tritongpt::{name}", function, mutates_args=(), tags=tags)

    @made.register_fake
    def _(*args):
        # A compiler asks for the fake result before anything else.
        _lower_explicitly(getattr(torch.ops.tritongpt, name).default)
        return fake(*args)

    return made


def _lower_explicitly(overload: Any) -> None:
    """Tells Inductor, when it is in use, to call the operator as it is.

    Inductor decides so by itself when it first meets the operator in a graph. But up to PyTorch 2.12 it then
    formats a log message that nobody reads, with the whole history of the arguments as text. Every operator
    that reads two results of the one before doubles that text, and add_layer_norm is one: 2 layers compile in
    seconds, 12 never finish. PyTorch 2.13 formats the message only when somebody logs it.
    """
    inductor = sys.modules.get("torch._inductor.lowering")
    if inductor is not None and overload not in inductor.lowerings:
        inductor.make_fallback(overload)


def device_memory(tensor: Tensor) -> int | None:
    """Bytes of the memory of the tensor's GPU; None without one."""
    return None if _assumed else _gpu(tensor.device)[2]


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that autocast wants on the tensor's device; outside of autocast, the tensor's own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def check_tensors(name: str, **tensors: Tensor | None) -> None:
    """All on one device and of a dtype the kernels compute in, else ValueError."""
    given = {k: t for k, t in tensors.items() if t is not None}
    for argument, tensor in given.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: {argument} is {tensor.dtype}; float32, float16, bfloat16 are allowed")
    if len({t.device for t in given.values()}) > 1:
        places = ", ".join(f"{k} on {t.device}" for k, t in given.items())
        raise ValueError(f"{name}: all tensors must be on one device, not {places}")


@jit
def round_to(x, dtype: tl.constexpr):
    """x in `dtype`, to nearest even: the interpreter would truncate fp32 to bf16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        # The low half is cleared: the interpreter makes 1e-38 of a denormal number, and 0 + 0x7FFF is one.
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).to(tl.float32, bitcast=True)
    return x.to(dtype)


@jit
def dot(a, b, acc=None):
    """acc + a @ b in fp32, without tf32; the interpreter would multiply the bit patterns of bf16."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
