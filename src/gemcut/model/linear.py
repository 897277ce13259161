"""Linear layers without bias, and the embedding that is also the output head, with whole weights.

``gemcut.model.quantized`` has those with cut weights; the network gets either through ``LinearFactory`` and
``EmbeddingFactory``. A layer computes with the kernel that ``gemcut.model.bind`` gave it, or with the plain product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemcut.kernels.linear.dispatch import LinearCase, LinearKernel
from gemcut.kernels.linear.plain import dense_product


class LinearLayer(nn.Module):
    """A linear layer of the network. It knows its place there, which is what others attach to it by.

    Attributes:
        name: "layers.3.attention.o_proj".
        kernel: what computes it; None: plain PyTorch.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.kernel: LinearKernel | None = None

    @property
    def role(self) -> str:
        """Its name within a layer, the same in all layers: "attention.o_proj"."""
        return self.name.split(".", 2)[-1]

    @property
    def case(self) -> LinearCase:
        """What a kernel must compute here."""
        raise NotImplementedError


class Linear(LinearLayer):
    """``y = x Wᵀ`` with ``W`` [out, in] in the compute dtype."""

    def __init__(self, name: str, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__(name)
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)

    @property
    def case(self) -> LinearCase:
        """What a kernel must compute here."""
        return LinearCase((self.weight,), self.weight.dtype, self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [T, in] -> [T, out]."""
        return dense_product(x, self.weight) if self.kernel is None else self.kernel(x)


class TokenTable(nn.Module):
    """The table of token vectors; it is also the output head's matrix (tied)."""

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden`` [n, hidden] in the compute dtype -> fp32 [n, vocab], before the final soft-cap."""
        raise NotImplementedError


class Embedding(TokenTable):
    """A table of whole vectors in the compute dtype."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, dtype=dtype), requires_grad=False)
        self.kernel: LinearKernel | None = None

    @property
    def case(self) -> LinearCase:
        """What a kernel must compute for the head."""
        return LinearCase((self.weight,), self.weight.dtype, torch.float32)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` int64 [T] -> [T, hidden]."""
        return F.embedding(ids, self.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden`` [n, hidden] in the compute dtype -> fp32 [n, vocab], before the final soft-cap."""
        return dense_product(hidden, self.weight, torch.float32) if self.kernel is None else self.kernel(hidden)


#: Makes the linear layer of a name for ``in_features`` and the rows of each matrix that is fused in it, top to bottom;
#: the network never asks what kind it got.
LinearFactory = Callable[[str, int, tuple[int, ...]], LinearLayer]
#: Makes the embedding for ``(vocab_size, hidden_size)``.
EmbeddingFactory = Callable[[int, int], TokenTable]


def dense_linear(dtype: torch.dtype) -> LinearFactory:
    """Linear layers with whole weights in ``dtype``."""
    return lambda name, in_features, rows: Linear(name, in_features, sum(rows), dtype)


def dense_embedding(dtype: torch.dtype) -> EmbeddingFactory:
    """An embedding with a whole table in ``dtype``."""
    return lambda vocab_size, hidden_size: Embedding(vocab_size, hidden_size, dtype)
