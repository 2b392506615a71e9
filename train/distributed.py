"""The ranks of a run under torchrun, and what they tell each other. A plain process is a world of one."""

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

from gpt.device import resolve_device
from gpt.model import GPT


@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    device: str  # of this rank, such as "cuda:3"
    backend: str | None  # of torch.distributed; None in a plain process

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device_type(self) -> str:
        return self.device.partition(":")[0]

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks of a tensor on their device, in place."""
        if self.backend:
            dist.all_reduce(value)
        return value

    def differ(self, value: int) -> bool:
        """Whether the ranks hold different values."""
        if not self.backend:
            return False
        extremes = torch.tensor([value, -value], device=self.device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        return bool(extremes[0] != -extremes[1])

    def gather(self, value: Any) -> list[Any]:
        """Plain values of all ranks, by rank, on rank 0; an empty list elsewhere."""
        if not self.backend:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.gather_object(value, values if self.is_main else None)
        return values if self.is_main else []


def start(backend: str, device: str) -> Ranks:
    """Joins the process group that torchrun's environment describes, if it does. Raises ValueError."""
    under_torchrun = "RANK" in os.environ
    if under_torchrun and ":" in device:
        raise ValueError(
            f"device={device!r} would put every rank on one GPU; under torchrun give --device=cuda"
        )
    device = resolve_device(device, local_rank=int(os.environ.get("LOCAL_RANK", 0)))
    on_gpu = device.startswith("cuda")
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
    dist.init_process_group(backend, device_id=torch.device(device) if on_gpu else None)
    return Ranks(dist.get_rank(), dist.get_world_size(), device, backend)


def parallel(model: GPT, batch_size: int, ranks: Ranks, precision: AbstractContextManager) -> DDP:
    """The model in DDP, with its buckets in their final order.

    DDP sorts its buckets after the first backward. From three ranks on, the order of a bucket decides the
    order of a sum, so that backward is made here, on zeros: a resumed run then adds as the one it continues.
    """
    ddp = DDP(model, gradient_as_bucket_view=True)
    zeros = torch.zeros(batch_size, model.config.block_size, dtype=torch.int64, device=ranks.device)
    with precision:
        _, loss = ddp(zeros, zeros)
    loss.backward()
    ddp.zero_grad(set_to_none=True)
    return ddp


def stop(ranks: Ranks) -> None:
    """Waits for all ranks at the end of a run that went well."""
    if ranks.backend:
        dist.barrier()
        if ranks.backend == "nccl":  # destroying gloo's group after DDP aborts now and then at exit
            dist.destroy_process_group()
