"""The compiled kernels: whether they are there, which instruction set they use, with how many threads."""

from __future__ import annotations

import ctypes
import functools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gemcut.errors import UnsupportedError
from gemcut.kernels.cpu.build import VARIANTS, architecture, damage, fingerprint, library_path

_BUILD = "python -m gemcut.kernels.cpu.build"


@dataclass(frozen=True, eq=False)
class Library:
    """The loaded library, bound to one instruction set.

    Attributes:
        handle: for functions that are the same for all.
        variant: name of the instruction set.
    """

    handle: ctypes.CDLL
    variant: str

    def function(self, name: str, argtypes: list[Any], restype: Any = None) -> Any:
        """The entry point ``name`` of this instruction set. ctypes releases the GIL while it runs."""
        # CDLL's items are new objects at each access, so argument types set here bind nobody else.
        found = self.handle[f"gemcut_{name}_{self.variant}"]
        found.argtypes, found.restype = argtypes, restype
        return found


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, tuple[str, ...], str | None]:
    """(the library, instruction sets that it has and this processor too, best first, or why there is none)."""
    path = library_path()
    if not path.is_file():
        return None, (), f"the CPU kernels are not built ({_BUILD} builds them)"
    # Loading a file that was cut short ends the process (SIGBUS), and a foreign one runs what it likes.
    if (wrong := damage(path)) is not None:
        return None, (), f"the CPU kernels are damaged: {wrong} ({_BUILD} makes them anew)"
    try:
        handle = ctypes.CDLL(str(path))
        handle.gemcut_fingerprint.restype = ctypes.c_char_p
        marker = handle.gemcut_fingerprint().decode()
    except (OSError, AttributeError) as error:
        return None, (), f"the CPU kernels cannot be loaded: {error} ({_BUILD} makes them anew)"
    if marker != fingerprint():
        return None, (), f"the CPU kernels were built from other sources than these ({_BUILD} makes them anew)"
    names = [variant.name for variant in VARIANTS.get(architecture(), ())]
    there = tuple(n for n in names if hasattr(handle, f"gemcut_variant_{n}") and handle.gemcut_supports(n.encode()))
    if not there:
        return (
            None,
            (),
            f"this processor has none of the instruction sets that the CPU kernels need ({', '.join(names)})",
        )
    return handle, there, None


def unavailable() -> str | None:
    """None if the kernels can run here; else the reason."""
    return _load()[2]


def variants() -> tuple[str, ...]:
    """Instruction sets that can run here, the best first."""
    return _load()[1]


def library(variant: str | None = None) -> Library:
    """The library with the best instruction set, or with one by name. Raises UnsupportedError."""
    handle, there, reason = _load()
    if handle is None:
        raise UnsupportedError(str(reason))
    if variant is not None and variant not in there:
        raise UnsupportedError(f"the CPU kernels have no {variant!r} here; there are: {', '.join(there)}")
    return Library(handle, variant or there[0])


def threads() -> int:
    """Threads for a kernel: PyTorch's number (``torch.set_num_threads``), within what this process may use."""
    return min(torch.get_num_threads(), processors())


@functools.cache
def processors() -> int:
    """Processors this process may run on: its affinity, and on Linux its control group's share of time."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([count, *_control_group_limits()]))


def _control_group_limits() -> list[int]:
    """Whole processors that control groups (version 2, or 1) grant, rounded up; empty without a limit."""
    limits = []
    try:
        group = Path("/proc/self/cgroup").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
    # Inside a container the group is usually mounted as the root.
    inner = next((line[3:].strip("/") for line in group if line.startswith("0::")), "")
    root = Path("/sys/fs/cgroup")
    for folder in {root, *(root / inner).parents, root / inner}:
        if not folder.is_relative_to(root):
            continue
        try:
            quota, period = (folder / "cpu.max").read_text().split()[:2]
        except (OSError, ValueError):
            continue
        if quota != "max":
            limits.append(math.ceil(int(quota) / int(period)))
    try:
        quota = (root / "cpu/cpu.cfs_quota_us").read_text()
        if int(quota) > 0:
            limits.append(math.ceil(int(quota) / int((root / "cpu/cpu.cfs_period_us").read_text())))
    except (OSError, ValueError):
        pass
    return limits
