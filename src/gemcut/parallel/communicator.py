"""What the ranks of a tensor parallel network exchange, over gloo (CPU) or NCCL (GPUs).

All ranks call the same operations in the same order. A sum adds the ranks' parts in fp32 in the order of the ranks, so
that every rank has the same bits, and two runs have. Collectives that add for themselves (NCCL's ring and tree) do not
promise an order; what is used of the libraries here only moves bytes. Our own kernel would be one more Communicator.
"""

from __future__ import annotations

import contextlib
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from gemcut.errors import UnsupportedError

#: Bytes up to which each rank gets all parts and adds them itself; above, each adds a part and hands it out.
ONE_SHOT_BYTES = {"cpu": 1 << 20, "cuda": 256 << 10}
_TIMEOUT = timedelta(days=7)  # a rank that died is noticed by its process's end; one that waits for requests may wait


class Communicator(Protocol):
    """One rank's way to the others."""

    rank: int
    size: int

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' ``x`` (of one shape and dtype), added in fp32 in rank order, in ``x``'s dtype."""

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' ``x`` (of one shape and dtype): [size, *shape], in rank order."""

    def broadcast(self, x: Tensor) -> None:
        """Fill every rank's contiguous ``x`` with that of rank 0."""

    def abort(self) -> None:
        """End what waits for another rank, from any thread: it raises there. Nothing can be exchanged afterwards."""


class GroupCommunicator:
    """A Communicator over one of PyTorch's process groups: ProcessGroupGloo or ProcessGroupNCCL.

    The group is this object's own: PyTorch's default group, which the program may use itself, is not touched.
    """

    def __init__(self, group: Any, rank: int, size: int) -> None:
        self._group, self.rank, self.size = group, rank, size

    def sum(self, x: Tensor) -> Tensor:
        """See Communicator."""
        if x.nbytes <= ONE_SHOT_BYTES[x.device.type]:
            return in_rank_order(self.gather(x)).to(x.dtype)
        # Two shots: rank r adds the r-th part of all, then everybody gets all sums.
        flat, step = x.reshape(-1), -(-x.numel() // self.size)
        padded = flat if flat.numel() == step * self.size else torch.nn.functional.pad(
            flat, (0, step * self.size - flat.numel())
        )  # fmt: skip
        parts = torch.empty_like(padded)
        self._group.alltoall_base(_bytes(parts), _bytes(padded.contiguous()), [], []).wait()
        own = in_rank_order(parts.view(self.size, step)).to(x.dtype)
        return self.gather(own).view(-1)[: x.numel()].view(x.shape)

    def gather(self, x: Tensor) -> Tensor:
        """See Communicator."""
        own = x.contiguous()
        out = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        self._group.allgather([[_bytes(part) for part in out]], [_bytes(own)]).wait()
        return out

    def broadcast(self, x: Tensor) -> None:
        """See Communicator."""
        self._group.broadcast([_bytes(x)], dist.BroadcastOptions()).wait()

    def abort(self) -> None:
        """See Communicator."""
        with contextlib.suppress(Exception):
            self._group.abort()


def in_rank_order(parts: Tensor) -> Tensor:
    """fp32 sum of ``parts`` over their first dimension, one after another."""
    total = parts[0].float()
    if total.data_ptr() == parts.data_ptr():
        total = total.clone()
    for part in parts[1:]:
        total += part
    return total


def connect(backend: str, folder: Path, rank: int, size: int, device: torch.device) -> GroupCommunicator:
    """This rank's communicator. Waits until all ``size`` ranks are there.

    Args:
        backend: "gloo" or "nccl".
        folder: private to the ranks; they meet by a file in it. gloo talks over the loopback device alone, on ports
            that the system chooses.
        rank: this one, from 0.
        size: how many there are.
        device: of this rank; for NCCL.

    Raises UnsupportedError where PyTorch was built without the backend.
    """
    store = dist.FileStore(str(folder / "meeting"), size)
    if backend == "gloo":
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout, options._threads = _TIMEOUT, 1
        return GroupCommunicator(dist.ProcessGroupGloo(store, rank, size, options), rank, size)
    if backend != "nccl" or not dist.is_nccl_available():
        raise UnsupportedError(f"this PyTorch has no {backend}, which several GPUs exchange their results with")
    torch.cuda.set_device(device)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _TIMEOUT
    return GroupCommunicator(dist.ProcessGroupNCCL(store, rank, size, options), rank, size)


def _bytes(x: Tensor) -> Tensor:
    """A contiguous tensor as bytes: gloo knows few dtypes."""
    return x.view(-1).view(torch.uint8)
