"""NF4 and FP4 in blocks with one statistic each: bytes and dequantized values are those of bitsandbytes on a CPU."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from gemcut.quantization.pieces import PIECE, in_pieces
from gemcut.quantization.spec import NESTED_BLOCK_SIZE, FourBitType
from gemcut.quantization.tables import code_table, dynamic_map, nearest_dynamic, rising_codes
from gemcut.quantization.weights import FourBitWeight, Nested

# A statistic below this is taken as this when values are divided by it: its reciprocal would overflow.
_LEAST = 1e-38


def quantize_4bit(
    weight: Tensor, quant_type: FourBitType = "nf4", *, block_size: int = 64, double_quant: bool = True
) -> FourBitWeight:
    """Cut ``weight`` [out, in] (fp32, fp16 or bf16; finite): each value becomes the nearest code of its block.

    ``absmax`` of a block is its largest magnitude. A value midway between two codes takes the lower one.
    """
    n, k = weight.shape
    flat = weight.detach().reshape(-1)
    count, device = flat.numel(), flat.device
    codes = torch.empty(math.ceil(count / 2), dtype=torch.uint8, device=device)
    absmax = torch.empty(math.ceil(count / block_size), dtype=torch.float32, device=device)

    def quantize_piece(start: int, stop: int) -> None:
        statistics = absmax[start // block_size : math.ceil(stop / block_size)]
        ratios = _ratios(flat[start:stop].float(), block_size, statistics)
        codes[start // 2 : math.ceil(stop / 2)] = _nearest_pairs(ratios, quant_type)

    in_pieces(quantize_piece, count, PIECE, device)
    nested = None
    if double_quant:
        absmax, nested = nest(absmax)
    return FourBitWeight(codes, absmax, quant_type, block_size, (n, k), weight.dtype, nested)


def _ratios(values: Tensor, block_size: int, absmax: Tensor) -> Tensor:
    """``values`` fp32, each divided by its block's largest magnitude, which is written to ``absmax`` fp32 [blocks].

    A zero is added to an odd number of values. Whole blocks are multiplied by a reciprocal and a partial last block is
    divided, as in bitsandbytes: the last bit of a ratio may decide a code.
    """
    count = values.numel()
    blocks = count // block_size
    whole = blocks * block_size
    ratios = torch.empty(count + count % 2, dtype=torch.float32, device=values.device)
    shape = (blocks, block_size)
    inside = ratios[:whole].view(shape)
    torch.amax(torch.abs(values[:whole].view(shape), out=inside), dim=1, out=absmax[:blocks])
    torch.mul(values[:whole].view(shape), absmax[:blocks].clamp(min=_LEAST).reciprocal_()[:, None], out=inside)
    if whole < count:
        rest = values[whole:]
        absmax[blocks] = rest.abs().max().clamp(min=_LEAST)
        ratios[whole:count] = rest / absmax[blocks]
    ratios[count:] = 0.0
    return ratios


def _nearest_pairs(ratios: Tensor, quant_type: FourBitType) -> Tensor:
    """The codes nearest to ``ratios`` fp32 [2 · pairs], two a byte: uint8 [pairs]."""
    rising = rising_codes(quant_type)
    if ratios.device.type == "cpu":
        # How many midpoints lie below a ratio is its place among the rising codes. Counting them with NumPy's vector
        # comparisons takes about a tenth of the time of torch.bucketize.
        array = ratios.numpy()
        above = np.empty(array.shape, dtype=np.bool_)
        counts = np.zeros(array.shape, dtype=np.uint8)
        for middle in rising.middles:
            np.greater(array, middle, out=above)
            np.add(counts, above.view(np.uint8), out=counts)
        places = torch.from_numpy(counts)
    else:
        middles = torch.from_numpy(rising.middles).to(ratios.device)
        places = torch.bucketize(ratios, middles, out_int32=True).to(torch.uint8)
    pairs = places.view(torch.int16)  # the even place in the low byte
    packed = ((pairs << 4) | (pairs >> 8)).to(torch.uint8)
    if rising.pairs is None:
        return packed
    return rising.pairs.to(packed.device).index_select(0, packed.int())


def nest(absmax: Tensor) -> tuple[Tensor, Nested]:
    """Quantize block statistics fp32 [blocks] to 8 bits: (codes uint8 [blocks], how to dequantize them)."""
    offset = absmax.mean().item()
    if not math.isfinite(offset):  # the sum of huge statistics overflows fp32; their mean does not
        offset = absmax.mean(dtype=torch.float64).float().item()
    blocks = absmax.numel()
    padded = torch.nn.functional.pad(absmax - offset, (0, -blocks % NESTED_BLOCK_SIZE)).view(-1, NESTED_BLOCK_SIZE)
    scale = padded.abs().amax(dim=1)
    # 0 · ∞ where a scale is 0, or so small that its reciprocal overflows
    ratios = (padded * scale.reciprocal()[:, None]).nan_to_num_(nan=-1.0).clamp_(-1.0, 1.0)
    return nearest_dynamic(ratios.flatten()[:blocks]), Nested(scale, offset)


def block_absmax(weight: FourBitWeight) -> Tensor:
    """The block statistics of ``weight``, dequantized: fp32 [blocks]."""
    if weight.nested is None:
        return weight.absmax
    blocks = weight.absmax.numel()
    out = dynamic_map(weight.absmax.device).index_select(0, weight.absmax.int())
    whole = blocks // NESTED_BLOCK_SIZE
    out[: whole * NESTED_BLOCK_SIZE].view(whole, NESTED_BLOCK_SIZE).mul_(weight.nested.scale[:whole, None])
    out[whole * NESTED_BLOCK_SIZE :].mul_(weight.nested.scale[whole:])
    return out.add_(weight.nested.offset)


def dequantize_4bit(weight: FourBitWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The matrix [out, in]: the product of code and statistic in fp32, rounded once to ``dtype`` (None: its own)."""
    n, k = weight.shape
    count, size = n * k, weight.block_size
    absmax = block_absmax(weight)
    # The two values a byte stands for, as one 8-byte item: half as many look-ups.
    table = code_table(weight.quant_type, weight.codes.device)
    both = torch.stack((table.repeat_interleave(16), table.repeat(16)), dim=1).view(torch.int64).flatten()
    out = torch.empty(count, dtype=dtype or weight.dtype, device=weight.codes.device)

    def dequantize_piece(start: int, stop: int) -> None:
        picked = both.index_select(0, weight.codes[start // 2 : math.ceil(stop / 2)].int())
        values = picked.view(torch.float32)[: stop - start]
        first, blocks = start // size, (stop - start) // size
        values[: blocks * size].view(blocks, size).mul_(absmax[first : first + blocks, None])
        values[blocks * size :].mul_(absmax[first + blocks : first + blocks + 1])
        out[start:stop] = values

    in_pieces(dequantize_piece, count, PIECE, out.device)
    return out.view(n, k)
