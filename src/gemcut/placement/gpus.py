"""Whether several GPUs can share a network: how many there are, of which kind, and whether they reach each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gemcut.errors import ParameterError, UnsupportedError

#: Share of the largest GPU's memory by which another one may be smaller: two of a kind differ by a little.
_MEMORY_TOLERANCE = 0.02


@dataclass(frozen=True)
class GpuSeen:
    """A GPU as PyTorch sees it: its name, compute capability, bytes of memory in all and free."""

    name: str
    capability: tuple[int, int]
    memory: int
    free: int


def check_gpus(gpus: int | None, asked: object, device: torch.device) -> int:
    """How many devices a network is split over, ``gpus`` of them (None: 1).

    Args:
        gpus: what a person asked for.
        asked: the ``device`` that was asked for beside it.
        device: what that one means.

    Raises:
        ParameterError: it is no count, or there are fewer GPUs.
        UnsupportedError: they differ, or do not reach each other's memory.
    """
    if gpus is None:
        return 1
    if type(gpus) is not int or gpus < 1:
        raise ParameterError(f"gpus is {gpus!r}; expected a whole number from 1 on")
    if gpus == 1:
        return 1
    if device.type == "cpu":
        if asked in (None, "auto"):
            raise ParameterError(f"{gpus} GPUs were asked for, but {_none_seen()}; use device='cpu' or one device")
        return gpus
    seen = [_seen(index) for index in range(torch.cuda.device_count())]
    if (reason := gpus_refusal(gpus, seen, torch.cuda.can_device_access_peer)) is not None:
        raise (ParameterError if gpus > len(seen) else UnsupportedError)(reason)
    return gpus


def gpus_refusal(count: int, seen: Sequence[GpuSeen], reaches: Callable[[int, int], bool]) -> str | None:
    """None where the first ``count`` of the GPUs ``seen`` can share a network, else one line that says why not.

    ``reaches``: whether one GPU can read and write another one's memory.
    """
    if count > len(seen):
        there = "there is 1 GPU" if len(seen) == 1 else f"there are {len(seen)} GPUs"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        return f"{count} GPUs were asked for, but {there}" + (
            f" (CUDA_VISIBLE_DEVICES is {hidden!r})" if hidden is not None else ""
        )
    first, used = seen[0], seen[:count]
    for index, gpu in enumerate(used):
        if (gpu.name, gpu.capability) != (first.name, first.capability):
            return (
                f"GPU 0 is a {first.name} and GPU {index} a {gpu.name}: a network is split over GPUs of one kind; "
                "choose them by CUDA_VISIBLE_DEVICES"
            )
        if abs(gpu.memory - first.memory) > _MEMORY_TOLERANCE * max(gpu.memory, first.memory):
            return (
                f"GPU 0 has {first.memory / 1e9:.1f} GB of memory and GPU {index} {gpu.memory / 1e9:.1f} GB: a network "
                "is split over GPUs of one kind; choose them by CUDA_VISIBLE_DEVICES"
            )
    for one in range(count):
        for other in range(count):
            if one != other and not reaches(one, other):
                return (
                    f"GPU {one} cannot reach the memory of GPU {other} (no peer access): `nvidia-smi topo -m` shows "
                    "which can; choose those by CUDA_VISIBLE_DEVICES, or use one GPU"
                )
    return None


def _none_seen() -> str:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "torch sees none" + ("" if hidden is None else f" (CUDA_VISIBLE_DEVICES is {hidden!r})")


def _seen(index: int) -> GpuSeen:
    properties = torch.cuda.get_device_properties(index)
    free, _ = torch.cuda.mem_get_info(index)
    return GpuSeen(properties.name, (properties.major, properties.minor), properties.total_memory, free)
