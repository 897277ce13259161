"""Rotary position embedding, half-split (NeoX) pairs, in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_FIRST_ROWS = 2048

#: cos and sin, each fp32 [T, 1, head_dim / 2].
Rotation = tuple[Tensor, Tensor]


class RotaryTable:
    """cos and sin of every position for one base, computed once per device, on a CPU as far as positions go.

    Angles are ``position / factor · base^(-2i/head_dim)`` (Su et al. 2021), computed in float64 and kept in fp32;
    rounding them to bf16 costs half as much again in error.
    """

    def __init__(self, head_dim: int, base: float, max_positions: int, factor: float = 1.0) -> None:
        self.head_dim, self.base, self.max_positions, self.factor = head_dim, base, max_positions, factor
        self._tables: dict[torch.device, Tensor] = {}

    def at(self, positions: Tensor) -> Rotation:
        """(cos, sin), each fp32 [T, 1, head_dim / 2], for ``positions`` int64 [T]."""
        device, rows = positions.device, None
        if device.type == "cpu" and positions.numel():  # where looking at a position waits for nothing
            rows = int(positions.max()) + 1
        cos, sin = self.table(device, rows)[positions].unsqueeze(1).chunk(2, dim=-1)
        return cos, sin

    def table(self, device: torch.device, rows: int | None = None) -> Tensor:
        """fp32 [max_positions, head_dim]: the cosines of each position, then its sines; at least ``rows`` of them.

        The whole table of 131,072 positions takes a second, which a short text need not wait for.
        """
        table = self._tables.get(device)
        have = 0 if table is None else table.shape[0]
        wanted = self.max_positions if rows is None else rows
        if table is None or have < wanted:
            last = min(self.max_positions, max(wanted, 2 * have, _FIRST_ROWS))
            more = self._build(have, last).to(device)
            table = self._tables[device] = more if table is None else torch.cat((table, more))
        return table

    def _build(self, first: int, last: int) -> Tensor:
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        positions = torch.arange(first, last, dtype=torch.float64) / self.factor
        angles = torch.outer(positions, self.base**-exponents)
        return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


class BatchRotations:
    """Each layer's rotation of one batch's positions, looked up when a layer first asks: some kernels read the tables.

    Args:
        tables: each layer's.
        positions: int64 [T].
    """

    def __init__(self, tables: Sequence[RotaryTable], positions: Tensor) -> None:
        self._tables, self._positions = tables, positions
        self._found: dict[int, Rotation] = {}

    def __getitem__(self, layer: int) -> Rotation:
        table = self._tables[layer]
        if id(table) not in self._found:
            self._found[id(table)] = table.at(self._positions)
        return self._found[id(table)]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs ``(x[i], x[i + head_dim/2])`` of ``x`` [T, heads, head_dim]; fp32 inside, dtype of ``x`` out."""
    first, second = x.chunk(2, dim=-1)
    half = first.shape[-1]
    out = torch.empty_like(x)
    out[..., :half] = (first * cos).addcmul_(second, sin, value=-1)
    out[..., half:] = (second * cos).addcmul_(first, sin)
    return out
