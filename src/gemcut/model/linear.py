"""Linear layers without bias, and the embedding that is also the output head, with whole weights.

``gemcut.model.quantized`` has those with cut weights; the network gets either through ``LinearFactory`` and
``EmbeddingFactory``. A layer computes with the kernel that ``gemcut.model.bind`` gave it, or with the plain product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemcut.kernels.linear.dispatch import LinearCase, LinearKernel
from gemcut.kernels.linear.plain import dense_matmul
from gemcut.quantization.weights import CheckpointWeight, Weight, unpacked

if TYPE_CHECKING:
    from gemcut.parallel.communicator import Communicator
    from gemcut.parallel.split import VocabularyPart


class WeightOwner(nn.Module):
    """What owns a weight matrix, or several of the same inputs, and multiplies by it.

    Attributes:
        name: its place in the network, which is what others attach to it by: "layers.3.attention.o_proj".
        kernel: what computes the product; None: plain PyTorch.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.kernel: LinearKernel | None = None

    @property
    def weights(self) -> tuple[Weight, ...]:
        """What it owns, the only copy: the matrices as loaded, top to bottom, or as the kernel packed them."""
        raise NotImplementedError

    def unpacked(self) -> tuple[CheckpointWeight, ...]:
        """``weights`` as the checkpoint had them, bit for bit."""
        return unpacked(self.weights)

    @property
    def case(self) -> LinearCase:
        """What a kernel must compute here."""
        raise NotImplementedError

    def bind(self, kernel: LinearKernel | None) -> None:
        """Compute with ``kernel`` from now on, and own what it reads; with None in plain PyTorch."""
        self.kernel = kernel


class LinearLayer(WeightOwner):
    """A linear layer of the network: called with ``x`` [T, in] it gives [T, out].

    Attributes:
        communicator: sums the results of all ranks where each holds a part of the inputs; None: the result is whole.
    """

    communicator: Communicator | None = None

    @property
    def role(self) -> str:
        """Its name within a layer, the same in all layers: "attention.o_proj"."""
        return self.name.split(".", 2)[-1]

    def finish(self, y: Tensor) -> Tensor:
        """The layer's result from this rank's product ``y`` [T, out]."""
        return y if self.communicator is None else self.communicator.sum(y)


class Linear(LinearLayer):
    """``y = x Wᵀ`` with ``W`` [out, in] in the compute dtype."""

    def __init__(self, name: str, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__(name)
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)

    @property
    def weights(self) -> tuple[Tensor]:
        """The one matrix."""
        return (self.weight,)

    @property
    def case(self) -> LinearCase:
        """What a kernel must compute here."""
        return LinearCase(self.weights, self.weight.dtype, self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [T, in] -> [T, out]."""
        return self.finish(dense_matmul(x, self.weight) if self.kernel is None else self.kernel(x))


class TokenTable(WeightOwner):
    """The table of token vectors; it is also the output head's matrix (tied).

    Attributes:
        part: which tokens it holds where each of several ranks holds some; None: all.
    """

    part: VocabularyPart | None = None

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` int64 [T] -> [T, hidden]."""
        return self.vectors(ids) if self.part is None else self.part.look_up(ids, self.vectors)

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden`` [n, hidden] in the compute dtype -> fp32 [n, vocab], before the final soft-cap."""
        return self.product(hidden) if self.part is None else self.part.logits(hidden, self.product)

    def vectors(self, ids: Tensor) -> Tensor:
        """[T, hidden] of ``ids`` int64 [T], counted from the first token that it holds."""
        raise NotImplementedError

    def product(self, hidden: Tensor) -> Tensor:
        """fp32 [n, tokens that it holds] of ``hidden`` [n, hidden] in the compute dtype."""
        raise NotImplementedError


class Embedding(TokenTable):
    """A table of unquantized vectors in the compute dtype."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__(name)
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, dtype=dtype), requires_grad=False)

    @property
    def weights(self) -> tuple[Tensor]:
        """The table."""
        return (self.weight,)

    @property
    def case(self) -> LinearCase:
        """What a kernel must compute for the head."""
        return LinearCase(self.weights, self.weight.dtype, torch.float32)

    def vectors(self, ids: Tensor) -> Tensor:
        """[T, hidden] of ``ids`` int64 [T]."""
        return F.embedding(ids, self.weight)

    def product(self, hidden: Tensor) -> Tensor:
        """fp32 [n, tokens] of ``hidden`` [n, hidden] in the compute dtype."""
        return dense_matmul(hidden, self.weight, torch.float32) if self.kernel is None else self.kernel(hidden)


#: Makes the linear layer of a name for ``in_features`` and the rows of each matrix that is fused in it, top to bottom;
#: the network never asks what kind it got.
LinearFactory = Callable[[str, int, tuple[int, ...]], LinearLayer]
#: Makes the embedding of a name for ``(vocab_size, hidden_size)``.
EmbeddingFactory = Callable[[str, int, int], TokenTable]


def dense_linear(dtype: torch.dtype) -> LinearFactory:
    """Linear layers with whole weights in ``dtype``."""
    return lambda name, in_features, rows: Linear(name, in_features, sum(rows), dtype)


def dense_embedding(dtype: torch.dtype) -> EmbeddingFactory:
    """An embedding with a whole table in ``dtype``."""
    return lambda name, vocab_size, hidden_size: Embedding(name, vocab_size, hidden_size, dtype)
