"""NF4 and FP4 in blocks with one statistic each, as bitsandbytes stores them."""

from __future__ import annotations

import torch
from torch import Tensor

from gemcut.quantization.tables import code_table, dynamic_map
from gemcut.quantization.weights import NESTED_BLOCK_SIZE, FourBitType, FourBitWeight, Nested


def quantize_4bit(
    weight: Tensor, quant_type: FourBitType = "nf4", *, block_size: int = 64, double_quant: bool = True
) -> FourBitWeight:
    """Cut ``weight`` [out, in] (fp32, fp16 or bf16): each value becomes the nearest code of its block.

    ``absmax`` of a block is its largest magnitude.
    """
    n, k = weight.shape
    flat = weight.reshape(-1).float()
    count = flat.numel()
    padded = torch.nn.functional.pad(flat, (0, -count % block_size)).view(-1, block_size)
    absmax = padded.abs().amax(dim=1)
    scaled = padded * (1.0 / absmax)[:, None].nan_to_num(posinf=0.0)
    table = code_table(quant_type)
    ordered = table.sort()
    middles = (ordered.values[:-1] + ordered.values[1:]) / 2
    codes = ordered.indices[torch.bucketize(scaled, middles)].flatten()[:count].to(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, count % 2))
    packed = codes[0::2] << 4 | codes[1::2]
    nested = None
    if double_quant:
        absmax, nested = nest(absmax)
    return FourBitWeight(packed, absmax, quant_type, block_size, (n, k), weight.dtype, nested)


def nest(absmax: Tensor) -> tuple[Tensor, Nested]:
    """Quantize block statistics fp32 [blocks] to 8 bits: (codes uint8 [blocks], how to decode them)."""
    offset = absmax.mean().item()
    blocks = absmax.numel()
    padded = torch.nn.functional.pad(absmax - offset, (0, -blocks % NESTED_BLOCK_SIZE)).view(-1, NESTED_BLOCK_SIZE)
    scale = padded.abs().amax(dim=1)
    byte_map = dynamic_map()
    places = torch.bucketize(padded * (1.0 / scale)[:, None].nan_to_num(posinf=0.0), (byte_map[:-1] + byte_map[1:]) / 2)
    return places.flatten()[:blocks].to(torch.uint8), Nested(scale, offset)


def block_absmax(weight: FourBitWeight) -> Tensor:
    """The block statistics of ``weight``, decoded: fp32 [blocks]."""
    if weight.nested is None:
        return weight.absmax
    blocks = weight.absmax.numel()
    scale = weight.nested.scale.repeat_interleave(NESTED_BLOCK_SIZE)[:blocks]
    return dynamic_map(weight.absmax.device)[weight.absmax.int()] * scale + weight.nested.offset


def dequantize_4bit(weight: FourBitWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The matrix [out, in]: the product of code and statistic in fp32, rounded once to ``dtype`` (None: its own)."""
    n, k = weight.shape
    count = n * k
    table = code_table(weight.quant_type, weight.codes.device)
    codes = torch.stack((weight.codes >> 4, weight.codes & 15), dim=-1).flatten()[:count]
    values = table[codes.int()]
    padded = torch.nn.functional.pad(values, (0, -count % weight.block_size)).view(-1, weight.block_size)
    out = (padded * block_absmax(weight)[:, None]).flatten()[:count].view(n, k)
    return out.to(dtype or weight.dtype)
