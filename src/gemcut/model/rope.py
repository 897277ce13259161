"""Rotary position embedding, half-split (NeoX) pairs, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


class RotaryTable:
    """cos and sin of every position for one base, computed once per device.

    Angles are ``position / factor · base^(-2i/head_dim)`` (Su et al. 2021), computed in float64 and kept in fp32;
    rounding them to bf16 costs half as much again in error.
    """

    def __init__(self, head_dim: int, base: float, max_positions: int, factor: float = 1.0) -> None:
        self.head_dim, self.base, self.max_positions, self.factor = head_dim, base, max_positions, factor
        self._tables: dict[torch.device, Tensor] = {}

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), each fp32 [T, 1, head_dim / 2], for ``positions`` int64 [T]."""
        cos, sin = self.table(positions.device)[positions].unsqueeze(1).chunk(2, dim=-1)
        return cos, sin

    def table(self, device: torch.device) -> Tensor:
        """fp32 [max_positions, head_dim]: the cosines of each position, then its sines."""
        table = self._tables.get(device)
        if table is None:
            table = self._tables[device] = self._build().to(device)
        return table

    def _build(self) -> Tensor:
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        positions = torch.arange(self.max_positions, dtype=torch.float64) / self.factor
        angles = torch.outer(positions, self.base**-exponents)
        return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs ``(x[i], x[i + head_dim/2])`` of ``x`` [T, heads, head_dim]; fp32 inside, dtype of ``x`` out."""
    first, second = x.chunk(2, dim=-1)
    half = first.shape[-1]
    out = torch.empty_like(x)
    out[..., :half] = (first * cos).addcmul_(second, sin, value=-1)
    out[..., half:] = (second * cos).addcmul_(first, sin)
    return out
