"""What attention asks of a kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionCase:
    """One layer's heads.

    Attributes:
        heads, kv_heads: query heads; key heads, of which each serves ``heads / kv_heads`` of them.
        head_dim: values of a head.
        softcap: of scores; None: none.
        dtype: of queries, keys and values.
        block_size: tokens of a block of the paged cache, where the kernel reads one.
    """

    heads: int
    kv_heads: int
    head_dim: int
    softcap: float | None
    dtype: torch.dtype
    block_size: int | None = None

    @property
    def group(self) -> int:
        """Query heads a key head."""
        return self.heads // self.kv_heads
