"""What the sampler and the scorer share: small arrays on their way to the device, and how many rows at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

# Logits worked on at a time: on a GPU 256 MB; on a CPU, for each of its threads, what stays in a core's cache from one
# operation to the next.
_CPU_PART, _GPU_PART = 1 << 18, 1 << 26


def upload(array: np.ndarray[Any, np.dtype[Any]], device: torch.device) -> Tensor:
    """``array`` on ``device``, without waiting for a GPU."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def indices(rows: list[int], device: torch.device) -> Tensor:
    """``rows`` as int64 on ``device``, without waiting for a GPU."""
    return upload(np.array(rows, dtype=np.int64), device)


def rows_at_once(logits: Tensor) -> int:
    """How many rows of ``logits`` [n, V] to work on at a time, so that what is made of them stays small."""
    part = _GPU_PART if logits.is_cuda else _CPU_PART * torch.get_num_threads()
    return max(1, part // logits.shape[-1])
