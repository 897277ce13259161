"""The code tables of bitsandbytes' 4-bit formats and of its nested statistics. All values are fp32."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from gemcut.quantization.weights import FourBitType

NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_MAGNITUDES = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
FP4_VALUES = (*_FP4_MAGNITUDES, *(-value for value in _FP4_MAGNITUDES))


@functools.cache
def code_table(quant_type: FourBitType, device: torch.device | None = None) -> Tensor:
    """The 16 values of a 4-bit format, by code, fp32 [16]."""
    return torch.tensor(NF4_VALUES if quant_type == "nf4" else FP4_VALUES, dtype=torch.float32, device=device or "cpu")


@functools.cache
def dynamic_map(device: torch.device | None = None) -> Tensor:
    """The signed dynamic 8-bit map (Dettmers 2015, arXiv 1511.04561): 256 sorted values, 0 at 127; fp32 [256]."""
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles]
    return torch.cat(values).sort().values.to(device or "cpu")
