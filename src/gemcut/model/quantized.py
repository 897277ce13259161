"""Linear layers and the embedding with cut weights."""

from __future__ import annotations

import torch
from torch import Tensor

from gemcut.kernels.linear.dispatch import LinearCase, LinearKernel
from gemcut.kernels.linear.plain import plain_linear
from gemcut.model.linear import EmbeddingFactory, LinearFactory, LinearLayer, TokenTable, dense_embedding
from gemcut.quantization.int8 import dequantize_int8
from gemcut.quantization.spec import Quantization
from gemcut.quantization.weights import Int8Weight, Weight


class QuantizedLinear(LinearLayer):
    """``y = x Wᵀ`` where ``W`` is one or several matrices of the same inputs, each packed in its own way.

    Built empty; the loader fills each part once. The product is computed in ``compute_dtype`` and given in ``dtype``.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        rows: tuple[int, ...],
        dtype: torch.dtype,
        compute_dtype: torch.dtype,
        activation_threshold: float | None = None,
    ) -> None:
        super().__init__(name)
        self.part_shapes = tuple((n, in_features) for n in rows)
        self.dtype, self.compute_dtype = dtype, compute_dtype
        self.activation_threshold = activation_threshold
        self.weights: list[Weight] = []

    def fill(self, weights: list[Weight]) -> None:
        """Take the packed matrices, top to bottom; a whole one is in the compute dtype."""
        self.weights = list(weights)

    @property
    def case(self) -> LinearCase:
        """What a kernel must compute here."""
        return LinearCase(tuple(self.weights), self.compute_dtype, self.dtype, self.activation_threshold)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [T, in] -> [T, out]."""
        if self.compute_dtype != torch.float16:  # fp16 ends at 65,504: the product itself sees to what is beyond
            x = x.to(self.compute_dtype)
        return plain_linear(self.case, x) if self.kernel is None else self.kernel(x)


class Int8Embedding(TokenTable):
    """A table in 8 bits a value."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.part_shapes = ((vocab_size, hidden_size),)
        self.dtype = self.compute_dtype = dtype
        self.weights: list[Weight] = []
        self.kernel: LinearKernel | None = None

    def fill(self, weights: list[Weight]) -> None:
        """Take the table."""
        self.weights = list(weights)

    @property
    def case(self) -> LinearCase:
        """What a kernel must compute for the head."""
        return LinearCase(tuple(self.weights), self.dtype, torch.float32)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` int64 [T] -> [T, hidden]."""
        (table,) = self.weights
        assert isinstance(table, Int8Weight)
        return dequantize_int8(Int8Weight(table.codes[ids], table.absmax[ids], self.dtype))

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden`` [n, hidden] in the compute dtype -> fp32 [n, vocab], before the final soft-cap."""
        return plain_linear(self.case, hidden) if self.kernel is None else self.kernel(hidden)


def quantized_linear(spec: Quantization, dtype: torch.dtype) -> LinearFactory:
    """Linear layers for weights cut as ``spec`` says; ``dtype`` is the network's compute dtype."""
    compute = spec.dtype(dtype)
    threshold = spec.activation_threshold
    return lambda name, in_features, rows: QuantizedLinear(name, in_features, rows, dtype, compute, threshold)


def quantized_embedding(spec: Quantization, dtype: torch.dtype) -> EmbeddingFactory:
    """The embedding for weights cut as ``spec`` says."""
    if spec.head is None:
        return dense_embedding(dtype)
    return lambda vocab_size, hidden_size: Int8Embedding(vocab_size, hidden_size, dtype)
