"""The processes of one run: alone, or as torchrun started them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from captum_lnstat.explanation.subject.device import find_device

# Until all processes are there, which were started together.
_GATHERING = timedelta(minutes=30)
# A process may wait for another that has more, or larger, images to do. One that has ended is noticed at once, one
# whose host is gone not before; the run can be gone on with.
_PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Team:
    """This process among those of the run.

    Attributes:
        rank: Which it is.
        size: How many there are.
        device: Where it computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether it is the one that writes what there is once."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(1, device="cpu"))  # on the CPU: a barrier of nccl would time out

    def agree(self, value: Any, what: str) -> None:
        """Raise on all processes if their values are not the same."""
        if self.size > 1:
            values: list[Any] = [None] * self.size
            dist.all_gather_object(values, value)
            other = [rank for rank, found in enumerate(values) if found != values[0]]
            if other:
                raise RuntimeError(
                    f"{what} of process {other[0]} differs from that of process 0; expected the same data, model and "
                    "versions on all hosts"
                )

    def lead(self, value: Any) -> Any:
        """What the first process has, on all."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def total(self, count: int) -> int:
        """The sum over all processes."""
        if self.size == 1:
            return count
        try:
            from torchmetrics import SumMetric
        except ImportError:
            raise RuntimeError(
                'several processes need torchmetrics; install it with pip install "captum-lnstat[evaluate]"'
            ) from None
        metric = SumMetric()
        metric.update(count)
        return int(metric.compute())


@contextmanager
def team(device: str = "auto") -> Iterator[Team]:
    """The team of this process; torchrun's variables say who is in it.

    Args:
        device: ``"auto"`` for a GPU if there is one, else the CPU; or any name that torch knows. Under torchrun each
            process of a host takes a GPU of its own.

    Raises:
        ValueError: There is no such device.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    chosen = find_device(device, local)
    if size == 1:
        yield Team(0, 1, chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    # Control, sums and barriers go over gloo; nccl is there for tensors that are on a GPU.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    store, rank, size = next(iter(rendezvous("env://", rank, size, timeout=_GATHERING)))
    # After a restart the store may still hold the addresses of the processes before it.
    store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    try:
        yield Team(rank, size, chosen)
    finally:
        dist.destroy_process_group()
