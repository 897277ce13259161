"""Where a model goes: what transformers' device_map and max_memory mean for one device, or why they cannot be kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gemcut.errors import ParameterError, UnsupportedError
from gemcut.hf.common import find_device
from gemcut.parallel.shape import check_split
from gemcut.placement.devices import free_memory
from gemcut.placement.plan import MemoryPlan
from gemcut.placement.sizes import parse_size
from gemcut.placement.split_plan import place

_ONE = "whole layers are all on one device in this version"
_WORKS = 'use "auto", "balanced", "cpu", "cuda", "cuda:N", a number or {"": device}'
#: Values of device_map that spread a model by themselves.
_SPREAD = ("balanced_low_0", "disk")
#: Those that may take several GPUs, every layer split over them.
SEVERAL = ("auto", "balanced", "sequential")


def byte_size(name: str, size: object) -> int:
    """Bytes from a number, or a text such as "5GB", "0.5 GiB". Raises ParameterError, which calls it ``name``."""
    number = parse_size(size) if isinstance(size, str) else size
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ParameterError(f"{name} is {size!r}; expected a number of bytes, or a text such as '5GB'")
    return number


def placement(device_map: Any, max_memory: Any = None) -> tuple[torch.device, int | None]:
    """(the one device that a ``device_map`` means, bytes that ``max_memory`` allows on it; None where it names none).

    As in transformers, "auto" does not take a GPU that ``max_memory`` leaves out or gives nothing.

    Raises:
        UnsupportedError: the map spreads the model over several devices.
        ParameterError: it names no device, or ``max_memory`` is no mapping of devices to sizes.
    """
    limits = _limits(max_memory)
    if device_map is None:
        device = torch.device("cpu")
    else:
        if isinstance(device_map, Mapping):
            device_map = _only(device_map)
        if isinstance(device_map, str) and device_map in _SPREAD:
            raise UnsupportedError(f"device_map={device_map!r} is not supported: {_ONE}; {_WORKS}")
        try:
            device = find_device("auto" if isinstance(device_map, str) and device_map in SEVERAL else device_map)
        except ParameterError as error:
            raise ParameterError(f"device_map: {error}") from None
        if isinstance(device_map, str) and device_map in SEVERAL and limits and not limits.get(device):
            device = next((one for one, size in limits.items() if size and _there(one)), device)
    return device, limits.get(device)


def gpu_rooms(max_memory: Any = None) -> list[int]:
    """Bytes that each GPU of this machine has room for: what is free, and what ``max_memory`` allows.

    As in transformers, a GPU that ``max_memory`` does not name gets nothing, if it names any.
    """
    limits = _limits(max_memory)
    rooms = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", index)
        free = free_memory(device) or 0
        rooms.append(min(free, limits.get(device, 0)) if limits else free)
    return rooms


def gpus_for(device_map: str, plan: MemoryPlan, rooms: Sequence[int], dtype: torch.dtype) -> tuple[int, int]:
    """(the first GPU, how many) that one of ``SEVERAL`` means for a network.

    Args:
        device_map: "auto": the first GPU with room, else the fewest that have it together; "balanced": as many as
            divide the network; "sequential": the first one.
        plan: of the whole network.
        rooms: bytes that each GPU has room for.
        dtype: compute dtype.

    Raises UnsupportedError where "sequential" would put layers on a second GPU.
    """
    if len(rooms) < 2:
        return 0, 1
    if device_map == "sequential":
        if plan.total > rooms[0]:
            raise UnsupportedError(
                f"device_map='sequential' is not supported for a model of {plan.total / 1e9:.1f} GB with "
                f"{rooms[0] / 1e9:.1f} GB on the first GPU: whole layers on one GPU after the other are not in this "
                "version; 'auto' splits every layer over several"
            )
        return 0, 1

    def splits(count: int) -> bool:
        try:
            check_split(plan.config, count, plan.quantization, dtype)
        except ParameterError:
            return False
        return True

    if device_map == "balanced":
        used = next((index for index, room in enumerate(rooms) if not room), len(rooms))
        return 0, next((count for count in range(used, 1, -1) if splits(count)), 1)
    found = place(plan, rooms, 0)
    if found is not None and found.kind == "one":
        return int(next(iter(found.layers)).removeprefix("cuda:")), 1
    if found is not None and found.kind == "tensor" and splits(len(found.layers)):
        return 0, len(found.layers)
    return 0, 1


def _only(device_map: Mapping[Any, Any]) -> Any:
    """The device that stands at every place of a map."""
    if not device_map:
        raise ParameterError(f"device_map is empty; {_WORKS}")
    devices = list(device_map.values())
    if len(names := {_spelled(one) for one in devices}) > 1:
        raise UnsupportedError(
            f"device_map with keys {', '.join(map(str, list(device_map)[:4]))} names {', '.join(sorted(names))}: "
            f"{_ONE}; {_WORKS}"
        )
    return devices[0]


def _spelled(device: Any) -> str:
    """One spelling for each device, there or not: 0, "cuda" and "cuda:0" are the same."""
    try:
        found = torch.device("cuda", device) if type(device) is int else torch.device(device)
    except (RuntimeError, TypeError):
        return str(device)
    return "cpu" if found.type == "cpu" else f"{found.type}:{found.index or 0}"


def _limits(max_memory: Any) -> dict[torch.device, int]:
    """Bytes by device, in the order given."""
    if max_memory is None:
        return {}
    if not isinstance(max_memory, Mapping):
        raise ParameterError(
            f"max_memory is of type {type(max_memory).__name__}; expected a mapping such as "
            '{0: "20GB", "cpu": "30GB"}'
        )
    found = {}
    for key, size in max_memory.items():
        name = f"max_memory[{key!r}]"
        number = byte_size(name, size)
        if key == "disk":  # nothing goes there
            continue
        try:
            where = torch.device("cuda", key) if type(key) is int else torch.device(key)
        except (RuntimeError, TypeError):
            raise ParameterError(f"{name}: expected 'cpu' or the number of a GPU as a key") from None
        if where.type not in ("cpu", "cuda") or (where.index or 0) < 0:
            raise ParameterError(f"{name}: expected 'cpu' or the number of a GPU as a key")
        found[torch.device("cpu") if where.type == "cpu" else torch.device("cuda", where.index or 0)] = number
    return found


def _there(device: torch.device) -> bool:
    return device.type == "cpu" or (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count())
