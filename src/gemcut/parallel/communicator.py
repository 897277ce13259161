"""What the ranks of a tensor parallel network exchange, over gloo (CPU) or NCCL (GPUs).

All ranks call the same operations in the same order. A sum adds the ranks' parts in fp32 in the order of the ranks, so
that every rank has the same bits, and two runs have. Collectives that add for themselves (NCCL's ring and tree) do not
promise an order; what is used of the libraries here only moves bytes. Our own kernel would be one more Communicator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from gemcut.errors import CommunicationError, UnsupportedError

_c10d: Any = dist  # its stubs lack what is used here

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
        #: Asked before each exchange; raises where there must be none.
        self.check: Callable[[], None] | None = None
        #: Makes of an exchange's failure the exception to raise; None: PeerLostError.
        self.explain: Callable[[Exception], Exception] | None = None

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
        self._exchange(lambda: self._group.alltoall_base(_bytes(parts), _bytes(padded.contiguous()), [], []))
        own = in_rank_order(parts.view(self.size, step)).to(x.dtype)
        return self.gather(own).view(-1)[: x.numel()].view(x.shape)

    def gather(self, x: Tensor) -> Tensor:
        """See Communicator."""
        own = x.contiguous()
        out = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        self._exchange(lambda: self._group.allgather([[_bytes(part) for part in out]], [_bytes(own)]))
        return out

    def broadcast(self, x: Tensor) -> None:
        """See Communicator."""
        self._exchange(lambda: self._group.broadcast([_bytes(x)], _c10d.BroadcastOptions()))

    def abort(self) -> None:
        """See Communicator."""
        with contextlib.suppress(Exception):
            self._group.abort()

    def verify(self, device: torch.device) -> None:
        """Exchange patterns and compare what comes. Raises CommunicationError where it is not what was sent."""
        places = torch.arange(1 << 12, dtype=torch.float32, device=device)
        expected = torch.stack([places * 3 + rank for rank in range(self.size)])
        large = torch.ones(ONE_SHOT_BYTES[device.type] // 4 + self.size, device=device) * (self.rank + 1)
        right = torch.equal(self.gather(places * 3 + self.rank), expected)
        right &= torch.equal(self.sum(places + self.rank), in_rank_order(expected - places * 2))
        right &= bool((self.sum(large) == self.size * (self.size + 1) / 2).all())
        if not right:
            raise CommunicationError(
                f"what device {self.rank} of {self.size} gets from the others is not what they send: peer access "
                "between them is broken (an IOMMU or a virtual machine may be the reason); use one GPU"
            )

    def _exchange(self, start: Callable[[], Any]) -> None:
        if self.check is not None:
            self.check()
        try:
            start().wait()
        except RuntimeError as error:
            raise (PeerLostError(str(error)) if self.explain is None else self.explain(error)) from error


class PeerLostError(Exception):
    """An exchange failed since another rank is gone; why that one is, it says itself."""


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
    store = _c10d.FileStore(str(folder / "meeting"), size)
    if backend == "gloo":
        options = _c10d.ProcessGroupGloo._Options()
        options._devices = [_c10d.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout, options._threads = _TIMEOUT, 1
        return GroupCommunicator(_c10d.ProcessGroupGloo(store, rank, size, options), rank, size)
    if backend != "nccl" or not dist.is_nccl_available():
        raise UnsupportedError(f"this PyTorch has no {backend}, which several GPUs exchange their results with")
    torch.cuda.set_device(device)
    options = _c10d.ProcessGroupNCCL.Options()
    options._timeout = _TIMEOUT
    return GroupCommunicator(_c10d.ProcessGroupNCCL(store, rank, size, options), rank, size)


def _bytes(x: Tensor) -> Tensor:
    """A contiguous tensor as bytes: gloo knows few dtypes."""
    return x.view(-1).view(torch.uint8)
