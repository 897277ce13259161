"""What a network asks of the kernels between its GEMMs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowwiseCase:
    """Values of a row of the residual stream, of an MLP's inside, and of a head."""

    hidden: int
    width: int
    head_dim: int
