"""What a cut weight matrix is: packed tensors and the few numbers that dequantize them. Formats are bitsandbytes'."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor, device, dtype

from gemcut.quantization.spec import FourBitType


@dataclass(frozen=True, eq=False)
class Nested:
    """Double quantization: a weight's block statistics, themselves quantized to 8 bits.

    ``absmax[b] = dynamic_map[codes[b]] · scale[b // 256] + offset``, in fp32.

    Attributes:
        scale: fp32 [ceil(blocks / 256)].
        offset: the mean of the statistics; an fp32 value.
    """

    scale: Tensor
    offset: float


@dataclass(frozen=True, eq=False)
class FourBitWeight:
    """A matrix [out, in] in NF4 or FP4: ``value = table[code] · absmax[block]`` in fp32, rounded once to ``dtype``.

    The matrix is one row-major run of values in blocks of ``block_size``; the last block may be partial.

    Attributes:
        codes: uint8 [ceil(out · in / 2)], two codes a byte, the even one in the high half.
        absmax: block statistics: fp32 [blocks]; uint8 [blocks] with double quantization.
        quant_type: "nf4" or "fp4".
        block_size: values that share a statistic.
        shape: (out, in).
        dtype: what a dequantized value is rounded to.
        nested: how to dequantize a uint8 ``absmax``; None if it is fp32.
    """

    codes: Tensor
    absmax: Tensor
    quant_type: FourBitType
    block_size: int
    shape: tuple[int, int]
    dtype: dtype
    nested: Nested | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All packed tensors."""
        return (self.codes, self.absmax, *(() if self.nested is None else (self.nested.scale,)))

    @property
    def nbytes(self) -> int:
        """Bytes of all packed tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """A matrix [out, in] in 8 bits a value: ``value = codes[n, k] · absmax[n] / 127``.

    Attributes:
        codes: int8 [out, in].
        absmax: largest magnitude of each row, fp32 [out] (bitsandbytes' SCB).
        dtype: what a dequantized value is rounded to.
    """

    codes: Tensor
    absmax: Tensor
    dtype: dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.codes.shape[0], self.codes.shape[1])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All packed tensors."""
        return (self.codes, self.absmax)

    @property
    def nbytes(self) -> int:
        """Bytes of all packed tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


#: One matrix as a checkpoint has it: unquantized, or in one of the formats.
CheckpointWeight = Tensor | FourBitWeight | Int8Weight


class PackedWeight(ABC):
    """Matrices of the same inputs, one below the other, put in the order that a kernel reads.

    A layer owns it in place of the matrices that it was made of: there is one copy of a weight.
    """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of codes and statistics."""

    @abstractmethod
    def unpack(self) -> tuple[FourBitWeight | Int8Weight, ...]:
        """The matrices as the checkpoint had them, bit for bit, top to bottom. What had another order is made anew."""


#: What a linear layer may own.
Weight = CheckpointWeight | PackedWeight


def unpacked(weights: Iterable[Weight]) -> tuple[CheckpointWeight, ...]:
    """``weights`` as a checkpoint has them, bit for bit."""
    return tuple(
        matrix for weight in weights for matrix in (weight.unpack() if isinstance(weight, PackedWeight) else (weight,))
    )


class StoredWeight(ABC):
    """A whole weight that is still in its file: read into the place where it is to be, it is never in memory twice.

    Attributes:
        shape: of the weight.
        dtype: what its values are rounded to.
    """

    shape: tuple[int, ...]
    dtype: dtype

    @abstractmethod
    def read(self, out: Tensor) -> None:
        """Fill ``out``, contiguous, on the CPU, of this shape; in another dtype its values are rounded once more."""

    @abstractmethod
    def pieces(self, values: int) -> Iterator[Tensor]:
        """The values in order, ``values`` at a time (a whole number of rows, or of 256 values; fewer at the end), each
        a flat tensor in ``dtype`` of which only the last one is valid."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> StoredWeight:
        """Rows ``start`` to ``stop`` of a matrix; no other is read."""


#: A weight on its way from a file to a layer.
Incoming = CheckpointWeight | StoredWeight


def move_weight(weight: CheckpointWeight, where: device) -> CheckpointWeight:
    """``weight`` with its tensors on another device."""
    if isinstance(weight, FourBitWeight):
        nested = weight.nested and replace(weight.nested, scale=weight.nested.scale.to(where))
        return replace(weight, codes=weight.codes.to(where), absmax=weight.absmax.to(where), nested=nested)
    if isinstance(weight, Int8Weight):
        return replace(weight, codes=weight.codes.to(where), absmax=weight.absmax.to(where))
    return weight.to(where)
