"""Linear layers without bias, and the output head. A quantized linear replaces ``Linear`` through ``LinearFactory``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` [T, in] times ``weight`` [out, in] transposed -> [T, out].

    One row in bf16 on a CPU goes through the matrix-vector product, which reads a quarter to a half faster there; both
    accumulate in fp32.
    """
    if x.shape[0] == 1 and x.dtype == torch.bfloat16 and not x.is_cuda:
        return torch.mv(weight, x[0])[None]
    return F.linear(x, weight)


class Linear(nn.Module):
    """``y = x Wᵀ`` with ``W`` [out, in] in the compute dtype."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [T, in] -> [T, out]."""
        return product(x, self.weight)


#: Makes the linear layer for ``(in_features, out_features)``; the network never asks what kind it got.
LinearFactory = Callable[[int, int], nn.Module]


class Embedding(nn.Module):
    """The table of token vectors; it is also the output head's matrix (tied)."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, dtype=dtype), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` int64 [T] -> [T, hidden]."""
        return F.embedding(ids, self.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden`` [n, hidden] in the compute dtype -> fp32 [n, vocab], before the final soft-cap."""
        if hidden.is_cuda and hidden.dtype != torch.float32:
            # A bf16 result would put logits near 25 on a grid of 0.125, so the product is kept as fp32.
            return torch.mm(hidden, self.weight.t(), out_dtype=torch.float32)
        return product(hidden, self.weight).float()
