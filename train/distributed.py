"""The ranks of a run under torchrun, and what they tell each other. A plain process is a world of one."""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpt.device import resolve_device


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

    def gather(self, value: Any) -> list[Any]:
        """Plain values of all ranks, by rank, on rank 0; an empty list elsewhere."""
        if not self.backend:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.gather_object(value, values if self.is_main else None)
        return values if self.is_main else []


def start(backend: str, device: str) -> Ranks:
    """Joins the process group that torchrun's environment describes, if it does. Raises ValueError."""
    device = resolve_device(device, local_rank=int(os.environ.get("LOCAL_RANK", 0)))
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return Ranks(rank=0, world_size=1, device=device, backend=None)
    if backend == "auto":
        backend = "nccl" if on_gpu else "gloo"
    if backend == "nccl" and not on_gpu:
        raise ValueError(f"backend='nccl' needs GPUs, and this rank is on {device}; try --backend=gloo")
    dist.init_process_group(backend, device_id=torch.device(device) if on_gpu else None)
    return Ranks(dist.get_rank(), dist.get_world_size(), device, backend)


def stop(ranks: Ranks) -> None:
    """Waits for all ranks at the end of a run that went well."""
    if ranks.backend:
        dist.barrier()
        if ranks.backend == "nccl":  # destroying gloo's group after DDP aborts now and then at exit
            dist.destroy_process_group()
