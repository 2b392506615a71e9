# mypy: allow-untyped-defs, allow-incomplete-defs
# (a Triton kernel's arguments have no Python types)
"""Shared by all operations: how to describe, launch, register and check one.

`Op` describes an operation to its tests and benchmarks. Every kernel starts through `launch`, so `record`
sees all launches: tests count them, and `bench.aot` compiles them for GPUs that this machine does not have.
`round_to` and `dot` make bfloat16 correct in Triton's interpreter.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
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
except ImportError:  # without Triton, PyTorch's operations still work
    triton, tl, TensorDescriptor, INTERPRETED = None, SimpleNamespace(constexpr=float), None, False

    def jit(fn=None, **_):
        return fn or jit


# Tables of tiles have a row for each architecture: 80 is sm_80. Two more keys stand for the interpreter,
# whose tiles are so small that small tests need several, and for every architecture that has not been tuned.
INTERPRETER = 0
UNTUNED = -1
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# GPUs have an instruction for 2^x, and e^x = 2^(x LOG2E). So softmaxes work in base 2, where the factor LOG2E
# joins a scale that is applied anyway.
LOG2E = tl.constexpr(1.4426950408889634)


class Cost(NamedTuple):
    """The least memory traffic and arithmetic of one forward and one backward call."""

    forward_bytes: int
    backward_bytes: int
    forward_flops: int
    backward_flops: int


@dataclass(frozen=True)
class Slot:
    """A tile to tune: its place in a table, `table[key]` or `table[key][index]`, and the tiles to try."""

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
    """Everything that tests and benchmarks need to know about an operation.

    A *call* is a dict of keyword arguments for every implementation. A *sample* is a dict of sizes and
    options: `make(dtype, device, **sample)` returns a call with random inputs.
    """

    name: str
    # The group of operations in a load spec, such as "attention".
    family: str
    # "triton", "torch" and, if there are others, theirs.
    implementations: Mapping[str, Callable[..., Any]]
    make: Callable[..., dict[str, Any]]
    cost: Callable[..., Cost]  # cost(**call)
    # Small, awkward sizes for the tests. Tests that do not depend on the shape use only the first.
    samples: tuple[dict[str, Any], ...]
    # The kernels that samples[0] launches: (forward, backward).
    launches: tuple[Sequence[Any], Sequence[Any]]
    # For tests on a GPU: enough programs to expose a race.
    large_sample: dict[str, Any]
    # For bench.kernels. The first is the shape of the 124M model.
    benchmark_shapes: tuple[dict[str, Any], ...]
    # For bench.aot and bench.sweep: together they launch every kernel with every tile. The first is the shape
    # of the 124M model.
    production_shapes: tuple[dict[str, Any], ...]
    differentiable: bool = True
    # slots(**call) yields the tiles that bench.sweep may tune for this call.
    slots: Callable[..., Iterable[Slot]] = lambda **_: ()

    @property
    def reference(self) -> Callable[..., Any]:
        """PyTorch's implementation. In fp64 it says what is right."""
        return self.implementations["torch"]

    def run_all(self, **call: Any) -> None:
        """Runs the Triton implementation once, forward and backward. A dry run has meta tensors in `call`."""
        floats = {k: v.detach() for k, v in call.items() if isinstance(v, Tensor) and v.is_floating_point()}
        inputs = [tensor.requires_grad_(self.differentiable) for tensor in floats.values()]
        # Arguments of two dtypes occur only under autocast: fp32, and the autocast dtype.
        dtypes = {tensor.dtype for tensor in inputs}
        half = min(dtypes, key=lambda dtype: dtype.itemsize)
        with torch.autocast(_autocast_device(inputs[0]), half, enabled=len(dtypes) > 1):
            results = self.implementations["triton"](**call | floats)
        results = results if isinstance(results, tuple) else (results,)
        results = [result for result in results if result.requires_grad]
        if results:
            # The results can be their own gradients: of the right shape and not 0. The loss kernel skips rows
            # whose gradient is 0. Nobody reads the values of a carrier, which is one number expanded.
            gradients = [r.detach() if r.is_contiguous() else r.new_empty(r.shape) for r in results]
            torch.autograd.grad(results, inputs, gradients, allow_unused=True)


@dataclass(frozen=True)
class Launch:
    kernel: Any
    arguments: dict[str, Any]  # by name, compile-time constants included
    num_warps: int
    num_stages: int


_records: list[list[Launch]] = []
_assumed: list[int] = []  # the architectures of the dry runs in progress, innermost last


@contextmanager
def record(assume: int | None = None) -> Iterator[list[Launch]]:
    """Records every launch inside the `with`, in order and on any thread.

    With `assume`, an architecture such as 90, this is a dry run: the launches use the tiles of that GPU but
    nothing executes, and the tensors may be on the meta device.
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
    """Launches `kernel` on the device of its first tensor."""
    for launches in _records:
        arguments = dict(zip(kernel.arg_names, args)) | constants
        launches.append(Launch(kernel, arguments, num_warps, num_stages))
    if _assumed:
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    # Triton launches on the current device, which may be another one.
    switch = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if switch else nullcontext():
        kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)


def unavailable(device: torch.device) -> str | None:
    """The reason why Triton kernels cannot run on `device`, or None if they can."""
    if triton is None:
        return "Triton is not installed (on Linux: pip install triton)"
    if _assumed:  # a dry run needs no GPU
        return None
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return (
            f"Triton needs a GPU and the device is {device}; to use Triton's interpreter instead, "
            "which is very slow, set TRITON_INTERPRET=1 before Python starts"
        )
    if torch.version.hip or not torch.cuda.is_available():
        return "the Triton kernels need an NVIDIA GPU, and torch finds none"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the GPU {device} is sm_{major}{minor} and the Triton kernels need sm_80 (A100) or newer"
    return None


@functools.cache
def _gpu(device: torch.device) -> tuple[int, int, int | None]:
    """(architecture, number of multiprocessors, bytes of memory). Raises ValueError if kernels cannot run."""
    reason = unavailable(device)
    if reason is not None:
        raise ValueError(reason)
    if INTERPRETED:
        return INTERPRETER, 3, None
    major, minor = torch.cuda.get_device_capability(device)
    # Shared memory decides which tiles fit. A block may use 99 KiB on sm_86, sm_89 and sm_120, 163 KiB on
    # sm_80 and sm_87, and 227 KiB on sm_90, sm_100 and sm_110.
    architecture = {(8, 0): 80, (8, 7): 80}.get((major, minor), {9: 90, 10: 100, 11: 100}.get(major, 89))
    properties = torch.cuda.get_device_properties(device)
    return architecture, properties.multi_processor_count, properties.total_memory


def architecture(tensor: Tensor) -> int:
    """The key of the tile tables: 80, 89, 90 or 100, or INTERPRETER."""
    return architecture_of(tensor.device)


def architecture_of(device: torch.device) -> int:
    """`architecture` for a device. Raises ValueError if Triton kernels cannot run on it."""
    return _assumed[-1] if _assumed else _gpu(device)[0]


def tiles_for(tensor: Tensor, table: dict[int, dict[Any, Any]]) -> dict[Any, Any]:
    """The row of `table` for the architecture of the tensor's device."""
    return table.get(architecture(tensor), table[UNTUNED])


def key_for(tiles: dict[int, Any], size: int) -> int:
    """The key of `size` in a row of a table whose keys are the largest sizes, in order."""
    return next(largest for largest in tiles if largest >= size)


def multiprocessors(tensor: Tensor) -> int:
    return 132 if _assumed else _gpu(tensor.device)[1]


def operator(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Registers `function` as the operator `tritongpt::name`, which torch.compile does not trace into.

    `fake` takes the same arguments and returns empty tensors of the same shapes, dtypes and strides.
    """
    # torch.compile may pass tensors with other strides than eager mode. This tag forbids it.
    tags = (torch.Tag.needs_exact_strides,)
    op = torch.library.custom_op(f"tritongpt::{name}", function, mutates_args=(), tags=tags)

    @op.register_fake
    def _(*args):
        if _assumed:  # a dry run with meta tensors, which records the launches
            return function(*args)
        # torch.compile calls the fake before it lowers the operator.
        _lower_explicitly(getattr(torch.ops.tritongpt, name).default)
        return fake(*args)

    return op


def _lower_explicitly(overload: Any) -> None:
    """Tells Inductor, if it is loaded, to call the operator as it is.

    Inductor would do so anyway when it first meets the operator. But up to PyTorch 2.12 it then formats a
    debug message that contains the expressions of all arguments. An operator that reads two results of the
    one before it, such as add_layer_norm, doubles the message: 2 layers compile in seconds, 12 never finish.
    PyTorch 2.13 formats the message only if it is logged.
    """
    inductor = sys.modules.get("torch._inductor.lowering")
    if inductor is not None and overload not in inductor.lowerings:
        inductor.make_fallback(overload)


def device_memory(tensor: Tensor) -> int | None:
    """Bytes of memory of the tensor's GPU, or None without a GPU."""
    return None if _assumed else _gpu(tensor.device)[2]


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The autocast dtype of the tensor's device, or the tensor's dtype if autocast is off."""
    return torch.get_autocast_dtype(_autocast_device(tensor)) if autocast_enabled(tensor) else tensor.dtype


def autocast_enabled(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device."""
    return torch.is_autocast_enabled(_autocast_device(tensor))


def _autocast_device(tensor: Tensor) -> str:
    """The device whose autocast applies. The meta tensors of a dry run have none, and use the CPU's."""
    return "cpu" if tensor.is_meta else tensor.device.type


def check_tensors(name: str, **tensors: Tensor | None) -> None:
    """Raises ValueError unless all tensors are on one device and have a dtype of `DTYPES`."""
    present = {k: t for k, t in tensors.items() if t is not None}
    for argument, tensor in present.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: {argument} is {tensor.dtype}; float32, float16, bfloat16 are allowed")
    if len({t.device for t in present.values()}) > 1:
        places = ", ".join(f"{k} on {t.device}" for k, t in present.items())
        raise ValueError(f"{name}: all tensors must be on one device, not {places}")


@jit
def round_to(x, dtype: tl.constexpr):
    """Rounds x to `dtype`, to the nearest even. The interpreter would truncate fp32 to bf16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        # bf16 is the upper half of fp32. Add half of the last place, then clear the lower half: 0 + 0x7FFF
        # would be a denormal number, which the interpreter turns into 1e-38.
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).to(tl.float32, bitcast=True)
    return x.to(dtype)


@jit
def dot(a, b, acc=None):
    """acc + a @ b in fp32, without tf32."""
    if INTERPRETED:  # the interpreter would multiply the bit patterns of bf16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
