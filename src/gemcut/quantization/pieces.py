"""Work on large tensors piece by piece: what is computed on the way fits a cache, and cores share the pieces."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

#: Values worked on at a time: a whole number of blocks of every size, and small enough for a core's own cache.
PIECE = 1 << 17


def in_pieces(work: Callable[[int, int], None], count: int, step: int, device: torch.device) -> None:
    """Call ``work(start, stop)`` for every ``step`` of ``count`` items, on a CPU on as many threads as torch uses.

    Each thread computes alone: a piece is too small for several to share, who would mostly wait for one another.
    """
    work = torch.inference_mode()(work)
    starts = range(0, count, step)
    workers = min(torch.get_num_threads(), len(starts)) if device.type == "cpu" else 1
    if workers <= 1:
        for start in starts:
            work(start, min(count, start + step))
        return
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in pool.map(lambda start: work(start, min(count, start + step)), starts):
            pass
