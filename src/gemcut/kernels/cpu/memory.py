"""Memory on huge pages: weights are read from end to end in every step, which pages of 4 KiB slow down by a quarter."""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
from collections.abc import Sequence

import torch

_HUGE_PAGE = 2 << 20
_ALIGNMENT = 64
_ARENA_SIZE = 16 << 20
#: Larger tensors get a mapping of their own, so that they are given back alone.
_LARGE = 4 << 20

_lock = threading.Lock()
_arena: mmap.mmap | None = None
_arena_used = 0


def huge_empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised (in fact zero) contiguous CPU tensor, on transparent huge pages where the system has them.

    The tensor owns its memory: the system gets it back when the last tensor on it is gone (small tensors share
    mappings of 16 MiB). Each has a storage of its own, as torch.empty's.

    Where huge pages are missing (other systems than Linux, ``transparent_hugepage`` set to never, no free stretch of
    2 MiB) the same tensor lies on ordinary pages: everything works, and reading it is slower by up to a third.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size == 0 or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.empty(tuple(shape), dtype=dtype)
    if size >= _LARGE:
        region = _map(size)
        offset = _first_aligned(region)
    else:
        region, offset = _from_arena(size)
    return torch.frombuffer(region, dtype=dtype, count=count, offset=offset).view(tuple(shape))


def huge_zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """``huge_empty`` filled with zeros, which on most systems touches none of the memory before it is used."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(tuple(shape), dtype=dtype)
    return huge_empty(shape, dtype)  # fresh mappings are zero


def _from_arena(size: int) -> tuple[mmap.mmap, int]:
    """(mapping, offset) of ``size`` bytes in the current arena, or in a new one if it is full."""
    global _arena, _arena_used
    with _lock:
        if _arena is None or _arena_used + size > len(_arena):
            _arena = _map(_ARENA_SIZE)
            _arena_used = _first_aligned(_arena)
        offset = _arena_used
        _arena_used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return _arena, offset


def _map(size: int) -> mmap.mmap:
    """A private anonymous mapping with room for ``size`` bytes from the first border between huge pages."""
    whole = -(-size // _HUGE_PAGE) * _HUGE_PAGE
    try:
        region = mmap.mmap(-1, whole + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no room for {size / 1e9:.2f} GB") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages
            region.madvise(mmap.MADV_HUGEPAGE)
    return region


def _first_aligned(region: mmap.mmap) -> int:
    """Offset of the first border between huge pages in ``region``."""
    address = torch.frombuffer(region, dtype=torch.uint8, count=1).data_ptr()
    return -address % _HUGE_PAGE
