"""The ranks of a run under torchrun, and their communication. A plain process is a world of one rank."""

import os
import sys
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
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
    # A gloo group for messages between the processes: they do not wait for a GPU. None: the default group.
    hosts: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device_type(self) -> str:
        return torch.device(self.device).type

    def sum(self, value: Tensor) -> Tensor:
        """Sums a tensor on the device over all ranks, in place."""
        if self.backend:
            dist.all_reduce(value)
        return value

    def any(self, value: bool) -> bool:
        """Whether `value` is true on any rank. The processes wait for each other, but not for their GPUs."""
        if not self.backend:
            return value
        number = torch.tensor(int(value))
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self.hosts)
        return bool(number)

    def broadcast(self, value: Any) -> Any:
        """Returns rank 0's value to all ranks. It can be any Python object."""
        values = [value]
        if self.backend:
            dist.broadcast_object_list(values, group=self.hosts)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all ranks on rank 0, by rank, and an empty list on the others."""
        if not self.backend:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.gather_object(value, values if self.is_main else None, group=self.hosts)
        return values if self.is_main else []


def start(backend: str, device: str, timeout: int = 600) -> Ranks:
    """Joins the process group that torchrun's environment variables describe, if any.

    Raises ValueError if the variables are incomplete, or do not fit `backend` and `device`. Later, a rank
    that waits for another for more than `timeout` seconds raises RuntimeError; see `lost_rank`.
    """
    under_torchrun = "RANK" in os.environ
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
        raise ValueError("an Apple GPU supports only one process: run without torchrun, or with --device=cpu")
    if backend == "auto":
        backend = "nccl" if on_gpu else "gloo"
    if backend == "nccl" and not on_gpu:
        raise ValueError(f"backend='nccl' needs GPUs, and this rank is on {device}; try --backend=gloo")
    patience = timedelta(seconds=timeout)
    try:
        agents, rank, world_size = next(dist.rendezvous("env://", timeout=patience))
    except ValueError as error:
        raise ValueError(f"{error}; start the run with torchrun, or unset RANK") from None
    dist.init_process_group(
        backend, store=_own_store(agents, rank, patience), rank=rank, world_size=world_size,
        # When NCCL times out, it ends the process without a message. So gloo has to time out first.
        timeout=2 * patience if backend == "nccl" else patience,
        device_id=torch.device(device) if on_gpu else None,
    )  # fmt: skip
    hosts = dist.new_group(backend="gloo", timeout=patience) if backend == "nccl" else None
    return Ranks(rank, world_size, device, backend, hosts)


def _own_store(agents: dist.Store, rank: int, patience: timedelta) -> dist.Store:
    """Opens a store for these ranks only. They find its port in the store of torchrun's agents.

    The agents' store survives a restart of the ranks, but still has the addresses of the ranks that died.
    """
    host, deadline = os.environ["MASTER_ADDR"], time.monotonic() + patience.total_seconds()
    if rank == 0:
        own = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience)
        agents.set("port of the ranks' store", str(own.port))
        return own
    while True:
        port = int(agents.get("port of the ranks' store"))
        try:
            own = dist.TCPStore(host, port, wait_for_workers=False, timeout=timedelta(seconds=2))
            own.set_timeout(patience)
            return own
        except dist.DistNetworkError:
            # The port may be that of ranks that died, until the new rank 0 replaces it.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def parallel(model: GPT, strategy: str, compiled: bool | str, dtype: str, ranks: Ranks) -> nn.Module:
    """Compiles `model`, and wraps it by the strategy if there are ranks. Returns the module to train.

    The weights keep their names. fsdp shards the model in place, so create the optimizer afterwards.
    """
    if strategy == "fsdp":
        return _sharded(model, compiled, dtype, ranks)
    if compiled:
        model.compile()
    return DDP(model, gradient_as_bucket_view=True) if ranks.backend else model


def _sharded(model: GPT, compiled: bool | str, dtype: str, ranks: Ranks) -> GPT:
    """Shards `model` by FSDP2, with one group of parameters per block, and one for embeddings and norms."""
    # Each rank has initialised its own weights. Rank 0's are used, as in DDP.
    for parameter in model.parameters():
        dist.broadcast(parameter.detach(), src=0)
    mesh = init_device_mesh(ranks.device_type, (ranks.world_size,))
    # As under autocast, matrices are multiplied in `dtype`, and embeddings and norms compute in float32. So
    # only the matrices of the blocks are gathered in `dtype`. Gradients are added in float32.
    half = None if dtype == "float32" else DTYPES[dtype]
    precision = MixedPrecisionPolicy(half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in cast(Iterable[Block], model.transformer.h):
        group: list[nn.Module] = [block.attn, block.mlp]
        # Only the forward is compiled: FSDP's hooks before and after it would break the graph.
        for module in group if compiled else ():
            module.forward = torch.compile(module.forward)  # type: ignore[method-assign]
        fully_shard(group, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh)
    return model


def first_pass(
    model: nn.Module, batch_size: int, block_size: int, ranks: Ranks, precision: AbstractContextManager
) -> float:
    """Makes a forward and a backward pass on zeros, which changes nothing. Returns the seconds it needed.

    These include compiling. DDP reorders its buckets after the first backward pass. From three ranks on, that
    changes the order in which gradients are added. Here it happens before step 0, so a resumed run adds in
    the same order as a run that never stopped.
    """
    start_time = time.perf_counter()
    # Two tensors: the graph for one tensor in both places would be compiled again for two.
    idx, targets = (
        torch.zeros(batch_size, block_size, dtype=torch.int64, device=ranks.device) for _ in range(2)
    )
    with same_random_numbers(ranks):
        with precision:
            _, loss = model(idx, targets)
        loss.backward()
    model.zero_grad(set_to_none=True)
    if ranks.device_type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start_time


def same_random_numbers(ranks: Ranks) -> AbstractContextManager[None]:
    """Random numbers that are drawn inside do not change those that are drawn afterwards."""
    kind = ranks.device_type
    devices = [] if kind == "cpu" else [torch.device(ranks.device)]
    return torch.random.fork_rng(devices, device_type="cuda" if kind == "cpu" else kind)


def exchange(model: nn.Module, enabled: bool) -> AbstractContextManager[None]:
    """If `enabled`, a backward pass inside averages the gradients of all ranks. Else each keeps its own."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    return model.no_sync() if isinstance(model, DDP) and not enabled else nullcontext()


def lost_rank(error: Exception) -> bool:
    """Whether the error means that another rank died or does not answer."""
    signs = ("timed out", "connection closed", "connection reset", "connection refused", "broken pipe")
    is_network_error = isinstance(error, dist.DistError) or any(sign in str(error).lower() for sign in signs)
    return is_network_error and "RANK" in os.environ


def stop(ranks: Ranks) -> None:
    """Waits for all ranks at the end of a successful run. Under gloo, this ends the process."""
    if not ranks.backend:
        return
    dist.barrier()
    if ranks.backend == "nccl":
        dist.destroy_process_group()
        return
    # The threads of gloo and DDP sometimes abort the process when the interpreter shuts down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
