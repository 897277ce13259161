"""Second moments of a layer's inputs, whole or in diagonal blocks where the whole would not fit in memory."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """``Σ share · x xᵀ`` over rows x of what ``add`` was given.

    Attributes:
        blocks: fp32 [b, b] each: the diagonal blocks of the matrix, in order; one block is the whole matrix.
    """

    def __init__(self, size: int, block: int | None = None, device: torch.device | str = "cpu") -> None:
        """Moments of ``size`` inputs, in blocks of ``block`` (None: one) of them."""
        width = min(size, block or size)
        self.sizes = [min(width, size - start) for start in range(0, size, width)]
        self.blocks = [torch.zeros(n, n, dtype=torch.float32, device=device) for n in self.sizes]
        self.count = 0

    @property
    def whole(self) -> bool:
        """Whether all correlations are known."""
        return len(self.blocks) == 1

    def add(self, x: Tensor, share: Tensor | None = None) -> None:
        """Take in rows ``x`` [T, size] of any float dtype, each with a weight in ``share`` fp32 [T]; None: all 1."""
        for block, part in zip(self.blocks, torch.split(x, self.sizes, dim=1), strict=True):
            rows = part.float()
            block.addmm_(rows.t(), rows if share is None else rows * share[:, None])
        self.count += x.shape[0]


def block_width(size: int, memory: int, multiple: int) -> int:
    """The widest blocks, a multiple of ``multiple``, whose moments of ``size`` inputs take at most ``memory`` bytes.

    Halves the width until it fits; never less than ``multiple``. The work of cutting, and its peak memory of about
    four blocks, are bounded with it.
    """
    width = size
    while width > multiple and (size * width + 3 * width * width) * 4 > memory:
        width = max(multiple, -(-width // 2) // multiple * multiple)
    return width
