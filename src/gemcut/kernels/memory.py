"""Where weights live."""

from __future__ import annotations

from collections.abc import Callable

import torch


def weight_allocator(device: torch.device) -> Callable[[tuple[int, ...], torch.dtype], torch.Tensor] | None:
    """Makes memory for weights on ``device``; None where torch's own allocation is as good."""
    return None
