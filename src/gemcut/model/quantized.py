"""Linear layers and the embedding with cut weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemcut.kernels.linear.dispatch import LinearCase, LinearKernel
from gemcut.kernels.linear.plain import plain_linear
from gemcut.model.linear import (
    EmbeddingFactory,
    LinearFactory,
    LinearLayer,
    TokenTable,
    WeightOwner,
    dense_embedding,
)
from gemcut.quantization.int8 import dequantize_int8
from gemcut.quantization.spec import Quantization
from gemcut.quantization.weights import CheckpointWeight, Int8Weight, Weight


class QuantizedOwner(WeightOwner):
    """What owns matrices that are packed, each in its own way. Built empty; the loader fills it once.

    Attributes:
        part_shapes: of each matrix, top to bottom: (out, in).
        dtype: the network's compute dtype.
        compute_dtype: of the product, and of matrices that stay unquantized.
    """

    def __init__(
        self, name: str, part_shapes: tuple[tuple[int, int], ...], dtype: torch.dtype, compute_dtype: torch.dtype
    ) -> None:
        super().__init__(name)
        self.part_shapes, self.dtype, self.compute_dtype = part_shapes, dtype, compute_dtype
        self._weights: tuple[Weight, ...] = ()

    def fill(self, weights: Sequence[CheckpointWeight]) -> None:
        """Take the matrices, top to bottom; an unquantized one is in the compute dtype."""
        self._weights = tuple(weights)

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The matrices as they were filled in, or as the kernel packed them."""
        return self._weights

    def bind(self, kernel: LinearKernel | None) -> None:
        """Compute with ``kernel`` from now on, and own what it reads; with None in plain PyTorch."""
        super().bind(kernel)
        if kernel is not None:
            self._weights = kernel.weights


class QuantizedLinear(QuantizedOwner, LinearLayer):
    """``y = x Wᵀ`` where ``W`` is one or several matrices of the same inputs, each packed in its own way.

    The product is computed in ``compute_dtype`` and given in ``dtype``.
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
        super().__init__(name, tuple((n, in_features) for n in rows), dtype, compute_dtype)
        self.activation_threshold = activation_threshold

    @property
    def case(self) -> LinearCase:
        """What a kernel must compute here."""
        return LinearCase(self.unpacked(), self.compute_dtype, self.dtype, self.activation_threshold)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [T, in] -> [T, out]."""
        if self.compute_dtype != torch.float16:  # fp16 ends at 65,504: the product itself sees to what is beyond
            x = x.to(self.compute_dtype)
        return self.finish(plain_linear(self.case, x) if self.kernel is None else self.kernel(x))


class Int8Embedding(QuantizedOwner, TokenTable):
    """A table in 8 bits a value."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__(name, ((vocab_size, hidden_size),), dtype, dtype)

    @property
    def case(self) -> LinearCase:
        """What a kernel must compute for the head."""
        return LinearCase(self.unpacked(), self.dtype, torch.float32)

    @property
    def table(self) -> Int8Weight:
        """The table as the checkpoint had it."""
        (table,) = self.unpacked()
        assert isinstance(table, Int8Weight)
        return table

    def vectors(self, ids: Tensor) -> Tensor:
        """[T, hidden] of ``ids`` int64 [T]."""
        table = self.table
        return dequantize_int8(Int8Weight(table.codes[ids], table.absmax[ids], self.dtype))

    def product(self, hidden: Tensor) -> Tensor:
        """fp32 [n, tokens] of ``hidden`` [n, hidden] in the compute dtype."""
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
    return lambda name, vocab_size, hidden_size: Int8Embedding(name, vocab_size, hidden_size, dtype)
