"""Cut a stream of whole tensors, one after another: what a loader and a converter put between file and goal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, overload

import torch
from torch import Tensor

from gemcut.errors import CheckpointError
from gemcut.quantization.four_bit import nest, quantize_4bit
from gemcut.quantization.int8 import quantize_int8, quantize_int8_rows
from gemcut.quantization.spec import (
    FourBitType,
    Quantization,
    skip_matcher,
)
from gemcut.quantization.weights import (
    CheckpointWeight,
    FourBitWeight,
    Incoming,
    Int8Weight,
    StoredWeight,
)

#: The embedding, which is also the output head, under our name.
EMBEDDING = "embed.weight"
# A tensor is cut in pieces of so many values, so that what is computed on the way fits a cache. It holds a whole
# number of blocks, and of groups of 256 blocks, of every block size.
PIECE = 1 << 21


@overload
def quantize_tensors(
    stream: Iterable[tuple[str, CheckpointWeight]],
    spec: Quantization,
    *,
    module_name: Callable[[str], str],
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, CheckpointWeight]]: ...
@overload
def quantize_tensors(
    stream: Iterable[tuple[str, Incoming]],
    spec: Quantization,
    *,
    module_name: Callable[[str], str],
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Incoming]]: ...
def quantize_tensors(
    stream: Iterable[tuple[str, Any]],
    spec: Quantization,
    *,
    module_name: Callable[[str], str],
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Any]]:
    """Cut the weights of ``stream`` as ``spec`` says, each when it is asked for; at most one is held.

    Args:
        stream: (our unfused name, weight on the CPU, or one that is still in its file). A weight already in ``spec``'s
            format passes as it is; so does a StoredWeight that stays whole, which is not looked at.
        spec: what to cut to. The embedding is cut only by ``spec.head``, whatever ``spec.skip`` says.
        module_name: the Hugging Face module name of one of our weights, which ``spec.skip`` is matched against.
        dtype: round whole weights to this first, as a loader would; None takes them as stored.

    Raises:
        CheckpointError: a weight holds NaN or infinity, is cut to another format already, or is too large for the
            format; the message names the tensor.
        ParameterError: ``spec.skip`` holds something that is no pattern.
    """
    stays = skip_matcher(spec.skip)
    for name, weight in stream:
        if not isinstance(weight, (Tensor, StoredWeight)):
            yield name, _same_format(name, weight, spec)
            continue
        if isinstance(weight, Tensor):
            check_finite(name, weight)
        if name == EMBEDDING:
            yield name, weight if spec.head is None else _cut_rows(name, weight, dtype, quantize_int8_rows)
        elif len(weight.shape) != 2 or stays(module_name(name)):
            yield name, weight
        else:
            yield name, quantize_tensor(name, weight, spec, dtype)
        del weight  # before the reader moves on, so that its memory can go


def quantize_table(
    stream: Iterable[tuple[str, Incoming]], *, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Incoming]]:
    """Cut the embedding of ``stream`` to 8 bits and pass all else, for a checkpoint whose layers are cut already."""
    for name, weight in stream:
        if name == EMBEDDING and isinstance(weight, Tensor):
            check_finite(name, weight)
            yield name, _cut_rows(name, weight, dtype, quantize_int8_rows)
        else:
            yield name, weight
        del weight


def quantize_tensor(
    name: str, weight: Tensor | StoredWeight, spec: Quantization, dtype: torch.dtype | None = None
) -> FourBitWeight | Int8Weight:
    """``weight`` [out, in], rounded to ``dtype`` if one is given, in ``spec``'s format.

    A tensor is finite; of a StoredWeight that is checked. Raises CheckpointError where it holds NaN or infinity, or
    int8 cannot hold it.
    """
    if spec.format != "int8":
        return _cut_blocks(name, weight, spec.format, spec, dtype or weight.dtype)

    def quantize(piece: Tensor) -> Int8Weight:
        limit = torch.finfo(torch.float16).max
        if piece.dtype != torch.float16 and max(map(abs, _range(piece))) > limit:
            raise CheckpointError(
                f"tensor {name} holds magnitudes above {limit:.0f}; the int8 format passes through fp16, which ends "
                "there: quantize to nf4, or leave that module whole"
            )
        return quantize_int8(piece)

    return _cut_rows(name, weight, dtype, quantize)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise CheckpointError if ``tensor`` holds a NaN or an infinity."""
    # The sum runs at memory speed and is finite for every sound tensor of ordinary size; the range decides the rest.
    if not math.isfinite(tensor.sum().item()) and not all(map(math.isfinite, _range(tensor))):
        raise CheckpointError(
            f"tensor {name} holds NaN or infinity: the checkpoint is damaged or its training diverged; get the file "
            "again, or start from an earlier checkpoint"
        )


def _cut_blocks(
    name: str, weight: Tensor | StoredWeight, quant_type: FourBitType, spec: Quantization, dtype: torch.dtype
) -> FourBitWeight:
    """``weight`` in 4 bits, piece by piece; the block statistics are nested when all are known."""
    n, k = weight.shape
    codes = torch.empty(-(-n * k // 2), dtype=torch.uint8)
    absmax = torch.empty(-(-n * k // spec.block_size), dtype=torch.float32)
    start = 0
    for values in _pieces(name, weight, PIECE):
        row = values.to(dtype).view(1, -1)
        piece = quantize_4bit(row, quant_type, block_size=spec.block_size, double_quant=False)
        codes[start // 2 : start // 2 + piece.codes.numel()] = piece.codes
        first = start // spec.block_size
        absmax[first : first + piece.absmax.numel()] = piece.absmax
        start += values.numel()
    statistics, nested = nest(absmax) if spec.double_quant else (absmax, None)
    return FourBitWeight(codes, statistics, quant_type, spec.block_size, (n, k), dtype, nested)


def _cut_rows(
    name: str, table: Tensor | StoredWeight, dtype: torch.dtype | None, quantize: Callable[[Tensor], Int8Weight]
) -> Int8Weight:
    """``table`` in 8 bits a value, a few rows at a time."""
    rows, columns = table.shape
    codes = torch.empty((rows, columns), dtype=torch.int8)
    absmax = torch.empty(rows, dtype=torch.float32)
    step = max(1, PIECE // columns)
    kept = dtype or table.dtype
    for start, values in zip(range(0, rows, step), _pieces(name, table, step * columns), strict=True):
        piece = quantize(values.view(-1, columns).to(kept))
        codes[start : start + step] = piece.codes
        absmax[start : start + step] = piece.absmax
    return Int8Weight(codes, absmax, kept)


def _pieces(name: str, weight: Tensor | StoredWeight, values: int) -> Iterator[Tensor]:
    """The values of ``weight`` in order, ``values`` at a time. Those from a file are checked to be finite."""
    if isinstance(weight, Tensor):
        flat = weight.reshape(-1)
        for start in range(0, flat.numel(), values):
            yield flat[start : start + values]
        return
    for piece in weight.pieces(values):
        check_finite(name, piece)
        yield piece


def _same_format(name: str, weight: FourBitWeight | Int8Weight, spec: Quantization) -> CheckpointWeight:
    """``weight`` if it is in ``spec``'s format; an 8-bit embedding always is."""
    if isinstance(weight, FourBitWeight):
        have = (weight.quant_type, weight.block_size, weight.nested is not None)
        same = have == (spec.format, spec.block_size, spec.double_quant)
        found = f"{weight.quant_type} with blocks of {weight.block_size}"
    else:
        same, found = spec.format == "int8" or name == EMBEDDING, "int8"
    if not same:
        raise CheckpointError(
            f"tensor {name} is quantized already ({found}) and cannot be cut to {spec.format}: load the checkpoint "
            "without choosing a quantization, or start from the whole weights"
        )
    return weight


def _range(tensor: Tensor) -> tuple[float, float]:
    low, high = torch.aminmax(tensor)
    return low.item(), high.item()
