"""What the machine has: device, dtype and free memory, with clear answers where something is missing."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from gemcut.errors import ParameterError
from gemcut.quantization.spec import COMPUTE_DTYPES, DTYPE_NAMES

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, DTYPE_NAMES.get(name, name)) for name in (*COMPUTE_DTYPES, *DTYPE_NAMES)
}


def parse_dtype(dtype: str | torch.dtype | None, default: torch.dtype) -> torch.dtype:
    """A compute dtype from what a person wrote; "auto" and None give ``default``."""
    if dtype is None or dtype == "auto":
        return default
    found = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found not in (torch.bfloat16, torch.float16, torch.float32):
        raise ParameterError(f"dtype is {dtype!r}; expected bfloat16, float16, float32 or auto")
    return found


def parse_device(device: str | int | torch.device | None) -> torch.device:
    """A device from what a person wrote; "auto" and None give the first GPU if there is one, else the CPU."""
    if device is None or device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        if isinstance(device, bool) or (isinstance(device, int) and device < 0):
            raise TypeError
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError):
        raise ParameterError(f"device is {device!r}; expected auto, cpu, cuda or cuda:N") from None
    if found.type not in ("cpu", "cuda"):
        raise ParameterError(f"device {device!r} is not supported; expected auto, cpu, cuda or cuda:N")
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise ParameterError(f"device {device!r} was asked for but torch sees no GPU; use device='cpu' or 'auto'")
        if (found.index or 0) >= count:
            raise ParameterError(f"device {device!r} was asked for but there are {count} GPUs, numbered from 0")
        found = torch.device("cuda", found.index or 0)
    return found


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on ``device`` now; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError):
        pass
    try:  # a container's own limit
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii").strip()
        if limit.isdigit():
            limits.append(int(limit) - int(used))
    except (OSError, ValueError):
        pass
    if not limits and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits) if limits else None
