"""What the sampler and the scorer share: small arrays on their way to the device, and how many rows at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

# Logits worked on at a time: on a CPU what stays in its caches from one operation to the next, on a GPU 256 MB.
_CPU_PART, _GPU_PART = 1 << 19, 1 << 26


def upload(array: np.ndarray[Any, np.dtype[Any]], device: torch.device) -> Tensor:
    """``array`` on ``device``, without waiting for a GPU."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def indices(rows: list[int], device: torch.device) -> Tensor:
    """``rows`` as int64 on ``device``, without waiting for a GPU."""
    return upload(np.array(rows, dtype=np.int64), device)


def rows_at_once(logits: Tensor) -> int:
    """How many rows of ``logits`` [n, V] to work on at a time, so that what is made of them stays small."""
    return max(1, (_GPU_PART if logits.is_cuda else _CPU_PART) // logits.shape[-1])
