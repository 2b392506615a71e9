"""The ranks of a run under torchrun, and what they tell each other. A plain process is a world of one."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from gpt.device import DTYPES, resolve_device
from gpt.model import GPT, Block


@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    device: str  # of this rank, such as "cuda:3"
    backend: str | None  # of torch.distributed; None in a plain process
    # where the processes agree, over gloo, so that no GPU is waited for
    hosts: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device_type(self) -> str:
        return torch.device(self.device).type

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks of a tensor on their device, in place."""
        if self.backend:
            dist.all_reduce(value)
        return value

    def any(self, value: bool) -> bool:
        """Whether it holds on any rank. The processes wait for each other, their GPUs work on."""
        return self._extremes(value)[1] > 0

    def differ(self, value: int) -> bool:
        """Whether the ranks hold different values."""
        least, most = self._extremes(value)
        return least != most

    def _extremes(self, value: int) -> tuple[int, int]:
        if not self.backend:
            return value, value
        extremes = torch.tensor([-value, value])
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self.hosts)
        return -int(extremes[0]), int(extremes[1])

    def broadcast(self, value: Any) -> Any:
        """Rank 0's plain value."""
        values = [value]
        if self.backend:
            dist.broadcast_object_list(values, group=self.hosts)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Plain values of all ranks, by rank, on rank 0; an empty list elsewhere."""
        if not self.backend:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.gather_object(value, values if self.is_main else None, group=self.hosts)
        return values if self.is_main else []


def start(backend: str, device: str, timeout: int = 600) -> Ranks:
    """Joins the process group that torchrun's environment describes, if it does. Raises ValueError.

    A rank that waits for longer than `timeout` seconds raises RuntimeError; see `lost_rank`.
    """
    under_torchrun = "RANK" in os.environ
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT") if under_torchrun else ():
        if not os.environ.get(name, "0").isdigit():
            raise ValueError(
                f"{name}={os.environ[name]!r} is set and must be a whole number: start it with torchrun, "
                "which sets it, or unset RANK for a run in one process"
            )
    if under_torchrun and ":" in device:
        raise ValueError(
            f"device={device!r} would put every rank on one GPU; under torchrun give --device=cuda"
        )
    device = resolve_device(device, local_rank=int(os.environ.get("LOCAL_RANK", 0)))
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    if not under_torchrun:
        return Ranks(rank=0, world_size=1, device=device, backend=None)
    if device == "mps":
        raise ValueError("an Apple GPU takes one process: run without torchrun, or with --device=cpu")
    if backend == "auto":
        backend = "nccl" if on_gpu else "gloo"
    if backend == "nccl" and not on_gpu:
        raise ValueError(f"backend='nccl' needs GPUs, and this rank is on {device}; try --backend=gloo")
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"RANK={os.environ['RANK']} is set, as for a rank of torchrun, and {', '.join(missing)} not: "
            "start it with torchrun, or unset RANK for a run in one process"
        )
    patience = timedelta(seconds=timeout)
    agents, rank, world_size = next(dist.rendezvous("env://", timeout=patience))
    dist.init_process_group(
        backend, store=_own_store(agents, rank, patience), rank=rank, world_size=world_size,
        # NCCL's clock ends a process without a word: let the hosts' be the first to run out.
        timeout=2 * patience if backend == "nccl" else patience,
        device_id=torch.device(device) if on_gpu else None,
    )  # fmt: skip
    hosts = dist.new_group(backend="gloo", timeout=patience) if backend == "nccl" else None
    return Ranks(rank, world_size, device, backend, hosts)


def _own_store(agents: dist.Store, rank: int, patience: timedelta) -> dist.Store:
    """A store of these ranks alone, found through that of torchrun's agents.

    The agents' outlives ranks that they start again, which would find the addresses of the dead in it.
    """
    host, deadline = os.environ["MASTER_ADDR"], time.monotonic() + patience.total_seconds()
    if rank == 0:
        own = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience)
        agents.set("port of the ranks' store", str(own.port))
        return own
    while True:  # nobody listens at the port of the dead
        port = int(agents.get("port of the ranks' store"))
        try:
            own = dist.TCPStore(host, port, wait_for_workers=False, timeout=timedelta(seconds=2))
        except dist.DistNetworkError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            own.set_timeout(patience)
            return own


def parallel(model: GPT, strategy: str, compiled: bool | str, dtype: str, ranks: Ranks) -> nn.Module:
    """What is trained: the model, compiled, in the strategy where there are ranks.

    The names of the weights stay as they are. Under fsdp the model itself is sharded, so an optimizer is made
    afterwards.
    """
    if strategy == "fsdp":
        return _sharded(model, compiled, dtype, ranks)
    if compiled:
        model.compile()
    return DDP(model, gradient_as_bucket_view=True) if ranks.backend else model


def first_pass(
    model: nn.Module, batch_size: int, block_size: int, ranks: Ranks, precision: AbstractContextManager
) -> float:
    """Seconds of a forward and a backward pass on zeros, with compiling in them; nothing of the run changes.

    DDP sorts its buckets after the first backward. From three ranks on, the order of a bucket decides the
    order of a sum, so that backward is this one: a resumed run then adds as the one it continues.
    """
    began = time.perf_counter()
    # Two tensors: a graph compiled for one in both places would be compiled again.
    idx, targets = (
        torch.zeros(batch_size, block_size, dtype=torch.int64, device=ranks.device) for _ in range(2)
    )
    with random_numbers_kept(ranks):
        with precision:
            _, loss = model(idx, targets)
        loss.backward()
    model.zero_grad(set_to_none=True)
    if ranks.device_type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


@contextmanager
def random_numbers_kept(ranks: Ranks) -> Iterator[None]:
    """What is drawn inside is not missing afterwards."""
    kind = ranks.device_type
    devices = [] if kind == "cpu" else [torch.device(ranks.device)]
    with torch.random.fork_rng(devices, device_type="cuda" if kind == "cpu" else kind):
        yield


def _sharded(model: GPT, compiled: bool | str, dtype: str, ranks: Ranks) -> GPT:
    """FSDP2: one group of parameters a block and one for the rest, sharded in place.

    What a block multiplies by is gathered in `dtype`. Embeddings and norms stay in the rest's group, which is
    gathered in float32: they compute in it, as they do under autocast. Gradients are added in float32.
    """
    for parameter in model.parameters():  # each rank has drawn its own
        dist.broadcast(parameter.detach(), src=0)
    mesh = init_device_mesh(ranks.device_type, (ranks.world_size,))
    half = None if dtype == "float32" else DTYPES[dtype]
    precision = MixedPrecisionPolicy(half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in cast(Iterable[Block], model.transformer.h):
        group: list[nn.Module] = [block.attn, block.mlp]
        # What FSDP does before and after a forward stays outside of the graphs.
        for module in group if compiled else ():
            module.forward = torch.compile(module.forward)  # type: ignore[method-assign]
        fully_shard(group, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh)
    return model


@contextmanager
def exchange(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Whether the backward pass inside ends with the gradients added over all ranks, or keeps its own."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
        yield
        return
    with model.no_sync() if isinstance(model, DDP) and not enabled else nullcontext():
        yield


def lost_rank(error: Exception) -> bool:
    """Whether it says that another rank is dead or does not answer."""
    signs = ("timed out", "connection closed", "connection reset", "connection refused", "broken pipe")
    told = isinstance(error, dist.DistError) or any(sign in str(error).lower() for sign in signs)
    return told and "RANK" in os.environ


def stop(ranks: Ranks) -> None:
    """Waits for all ranks at the end of a run that went well, and under gloo ends the process."""
    if not ranks.backend:
        return
    dist.barrier()
    if ranks.backend == "nccl":
        dist.destroy_process_group()
        return
    # The threads of gloo and DDP abort the process now and then when the interpreter takes it down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
