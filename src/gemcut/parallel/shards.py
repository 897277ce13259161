"""A rank's part of each weight: the values are bit for bit those of the whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import Tensor

from gemcut.checkpoint.names import split_layer
from gemcut.config import GemmaConfig
from gemcut.errors import ParameterError
from gemcut.parallel.shape import EMBEDDING, ROLE_OF_PART, SPLIT_BY_ROLE, Share, Slice, slice_of
from gemcut.parallel.stored import StoredColumns
from gemcut.quantization.four_bit import block_absmax
from gemcut.quantization.spec import NESTED_BLOCK_SIZE, Quantization
from gemcut.quantization.weights import FourBitWeight, Incoming, Int8Weight, Nested, StoredWeight


def cut_weight(weight: Incoming, part: Slice | None) -> Incoming:
    """``part`` of a weight; a packed one's dequantized values are bit for bit those of the whole.

    Unquantized rows and packed rows are views: of a file only they are read. Statistics that were quantized themselves
    stay 8 bits wide where the slice begins with a group of 256 of them; where groups straddle slices (o and down)
    they are dequantized to the fp32 values that they stand for.
    """
    if part is None:
        return weight
    start, stop = part.start, part.stop
    if isinstance(weight, StoredWeight):
        return weight.rows(start, stop) if part.axis == "rows" else StoredColumns(weight, start, stop)
    if isinstance(weight, Int8Weight):
        if part.axis == "rows":
            return replace(weight, codes=weight.codes[start:stop], absmax=weight.absmax[start:stop])
        return replace(weight, codes=weight.codes[:, start:stop].contiguous())
    if isinstance(weight, FourBitWeight):
        return _four_bit_rows(weight, start, stop) if part.axis == "rows" else _four_bit_columns(weight, start, stop)
    return weight[start:stop] if part.axis == "rows" else weight[:, start:stop]


def cut_stream(
    stream: Iterable[tuple[str, Incoming]], config: GemmaConfig, share: Share
) -> Iterator[tuple[str, Incoming]]:
    """A rank's part of each weight of ``stream`` (our unfused names); ``config`` is the whole network's."""
    for name, weight in stream:
        yield name, cut_weight(weight, slice_of(name, config, share))
        del weight


def cut_before(
    stream: Iterable[tuple[str, Incoming]], config: GemmaConfig, share: Share, spec: Quantization
) -> Iterator[tuple[str, Incoming]]:
    """``cut_stream`` for those unquantized weights of which a part is quantized to ``spec`` as the whole would be."""
    for name, weight in stream:
        yield name, cut_weight(weight, slice_of(name, config, share)) if _independent(name, spec) else weight
        del weight


def cut_behind(
    stream: Iterable[tuple[str, Incoming]], config: GemmaConfig, share: Share, spec: Quantization
) -> Iterator[tuple[str, Incoming]]:
    """``cut_stream`` for what ``cut_before`` left whole and has been quantized since."""
    for name, weight in stream:
        yield name, weight if _independent(name, spec) else cut_weight(weight, slice_of(name, config, share))
        del weight


def _independent(name: str, spec: Quantization) -> bool:
    """Whether quantizing a rank's part of a weight gives what the whole one has there.

    Rows do not know of each other, unless their statistics are quantized together. A row's columns share one in int8.
    """
    part = split_layer(name)[1].removesuffix(".weight")
    if name == EMBEDDING:
        return True
    rows = SPLIT_BY_ROLE.get(ROLE_OF_PART.get(part, part)) != "columns"
    return rows and (spec.format == "int8" or not spec.double_quant)


def _four_bit_rows(weight: FourBitWeight, start: int, stop: int) -> FourBitWeight:
    k, size = weight.shape[1], weight.block_size
    if start * k % size or (stop * k % size and stop != weight.shape[0]):
        raise ParameterError(f"rows {start} to {stop} of {k} values do not begin and end with blocks of {size}")
    first, last = start * k // size, -(-stop * k // size)
    nested = weight.nested
    if nested is not None and first % NESTED_BLOCK_SIZE == 0:
        group = first // NESTED_BLOCK_SIZE
        scale = nested.scale[group : -(-last // NESTED_BLOCK_SIZE)]
        absmax, nested = weight.absmax[first:last], Nested(scale, nested.offset)
    else:
        absmax, nested = block_absmax(weight)[first:last].clone(), None
    codes = weight.codes[start * k // 2 : -(-stop * k // 2)]
    return replace(weight, codes=codes, absmax=absmax, shape=(stop - start, k), nested=nested)


def _four_bit_columns(weight: FourBitWeight, start: int, stop: int) -> FourBitWeight:
    (n, k), size = weight.shape, weight.block_size
    if k % size or start % size or stop % size:
        raise ParameterError(f"columns {start} to {stop} of {k} do not begin and end with blocks of {size}")
    codes: Tensor = weight.codes.view(n, k // 2)[:, start // 2 : stop // 2].reshape(-1)
    absmax: Tensor = block_absmax(weight).view(n, k // size)[:, start // size : stop // size].reshape(-1)
    return replace(weight, codes=codes.contiguous(), absmax=absmax.clone(), shape=(n, stop - start), nested=None)
