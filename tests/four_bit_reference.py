"""A slow, plain quantizer in bitsandbytes' format for kernel tests: NF4, FP4, blocks of 64, nested scales or not."""

from __future__ import annotations

import torch

from gemcut.quantization.weights import FourBitWeight, Nested

NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip
_FP4_HALF = torch.tensor([0, 0.0625 / 12, 8 / 12, 1, 4 / 12, 6 / 12, 2 / 12, 3 / 12])
FP4 = torch.cat((_FP4_HALF, -_FP4_HALF))


def dynamic_map() -> torch.Tensor:
    """The signed dynamic 8-bit map: 256 sorted values, zero at 127."""
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += [middles, -middles]
    return torch.cat(values).sort().values


def quantize(weight: torch.Tensor, table: torch.Tensor, *, nested: bool) -> FourBitWeight:
    """weight fp32 [n, k], k a multiple of 64; nearest code to weight / absmax."""
    shape = (weight.shape[0], weight.shape[1])
    quant_type = "nf4" if table is NF4 else "fp4"
    device = weight.device
    table = table.to(device)
    blocks = weight.reshape(-1, 64)
    absmax = blocks.abs().amax(dim=1)
    order = table.sort()
    middles = (order.values[:-1] + order.values[1:]) / 2
    places = torch.bucketize(blocks / absmax.clamp(min=1e-30)[:, None], middles)
    codes = order.indices[places].flatten().to(torch.uint8)
    codes = codes[0::2] << 4 | codes[1::2]
    if not nested:
        return FourBitWeight(codes, absmax, quant_type, 64, shape, torch.bfloat16)
    byte_map = dynamic_map().to(device)
    offset = absmax.mean().item()
    padded = torch.nn.functional.pad(absmax - offset, (0, -absmax.numel() % 256)).view(-1, 256)
    groups = padded.abs().amax(dim=1).clamp(min=1e-30)
    places = torch.bucketize(padded / groups[:, None], (byte_map[:-1] + byte_map[1:]) / 2)
    absmax8 = places.flatten()[: absmax.numel()].to(torch.uint8)
    return FourBitWeight(codes, absmax8, quant_type, 64, shape, torch.bfloat16, Nested(groups, offset))


def dequantize(weight: FourBitWeight) -> torch.Tensor:
    """fp64 [n, k] of what `quantize` made: code times scale, both in fp64."""
    n, k = weight.shape
    device = weight.codes.device
    data = weight.codes.flatten().long()
    table = (NF4 if weight.quant_type == "nf4" else FP4).to(device).double()
    values = table[torch.stack((data >> 4, data & 15), dim=1).flatten()]
    scales = weight.absmax
    if weight.nested is not None:
        groups = weight.nested.scale.double().repeat_interleave(256)[: scales.numel()]
        scales = dynamic_map().to(device).double()[scales.long()] * groups + weight.nested.offset
    return (values.view(-1, 64) * scales.double()[:, None]).view(n, k)
