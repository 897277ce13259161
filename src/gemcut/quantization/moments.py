"""Second moments of a layer's inputs, whole or in diagonal blocks where the whole would not fit in memory."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """``Σ x xᵀ`` over rows x of a layer's inputs, and ``Σ r xᵀ`` with the inputs r it would have in the whole network.

    Attributes:
        blocks: fp32 [b, b] each: the diagonal blocks of ``Σ x xᵀ``, in order; one block is the whole matrix.
        drift: the same of ``Σ (r - x) xᵀ``; empty if no reference was given.
    """

    def __init__(self, size: int, block: int | None = None, device: torch.device | str = "cpu") -> None:
        """Moments of ``size`` inputs, in blocks of ``block`` (None: one) of them."""
        width = min(size, block or size)
        self.sizes = [min(width, size - start) for start in range(0, size, width)]
        self.blocks = [torch.zeros(n, n, dtype=torch.float32, device=device) for n in self.sizes]
        self.drift: list[Tensor] = []
        self.count = 0

    @property
    def whole(self) -> bool:
        """Whether all correlations are known."""
        return len(self.blocks) == 1

    def add(self, x: Tensor, reference: Tensor | None = None) -> None:
        """Take in rows ``x`` [T, size] of any float dtype; ``reference`` of the same shape, always or never."""
        if reference is not None and not self.drift:
            self.drift = [torch.zeros_like(block) for block in self.blocks]
        parts = torch.split(x, self.sizes, dim=1)
        for block, part in zip(self.blocks, parts, strict=True):
            rows = part.float()
            block.addmm_(rows.t(), rows)
        if reference is not None:
            others = torch.split(reference, self.sizes, dim=1)
            for block, part, other in zip(self.drift, parts, others, strict=True):
                block.addmm_((other.float() - part.float()).t(), part.float())
        self.count += x.shape[0]


def block_width(size: int, memory: int, multiple: int) -> int:
    """The widest blocks, a multiple of ``multiple``, whose moments of ``size`` inputs take at most ``memory`` bytes.

    Halves the width until it fits; never less than ``multiple``. The work of cutting, and its peak memory of about
    four blocks, are bounded with it.
    """
    width = size
    while width > multiple and (2 * size * width + 3 * width * width) * 4 > memory:
        width = max(multiple, -(-width // 2) // multiple * multiple)
    return width
