"""The code tables of bitsandbytes' 4-bit formats and of its nested statistics. All values are fp32."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gemcut.quantization.spec import FourBitType

NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_MAGNITUDES = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
# The sign bit adds no second sign of zero: bitsandbytes stores and dequantizes code 8 as 0.
FP4_VALUES = (*_FP4_MAGNITUDES, 0.0, *(-value for value in _FP4_MAGNITUDES[1:]))


@functools.cache
def code_table(quant_type: FourBitType, device: torch.device | None = None) -> Tensor:
    """The 16 values of a 4-bit format, by code, fp32 [16]."""
    return torch.tensor(NF4_VALUES if quant_type == "nf4" else FP4_VALUES, dtype=torch.float32, device=device or "cpu")


@dataclass(frozen=True, eq=False)
class RisingCodes:
    """A 4-bit format's codes in the order of their values.

    Attributes:
        middles: midpoints between neighbours, fp32 [15]. A value's place is the number of midpoints below it.
        pairs: uint8 [256], from a byte of two places to the byte of their codes; None where places are codes.
    """

    middles: npt.NDArray[np.float32]
    pairs: Tensor | None


@functools.cache
def rising_codes(quant_type: FourBitType) -> RisingCodes:
    """How a ratio between -1 and 1 finds its nearest code."""
    # FP4 has two zeros, codes 0 and 8: in a stable order small positive values take code 8, as in bitsandbytes.
    values, codes = code_table(quant_type).sort(stable=True)
    middles = ((values[:-1] + values[1:]) / 2).numpy()
    if torch.equal(codes, torch.arange(16)):
        return RisingCodes(middles, None)
    code = codes.to(torch.uint8)
    return RisingCodes(middles, (code[:, None] << 4 | code).flatten())


@functools.cache
def dynamic_map(device: torch.device | None = None) -> Tensor:
    """The signed dynamic 8-bit map (Dettmers 2015, arXiv 1511.04561): 256 sorted values, 0 at 127; fp32 [256]."""
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles]
    return torch.cat(values).sort().values.to(device or "cpu")


def nearest_dynamic(ratios: Tensor) -> Tensor:
    """Codes uint8 of the dynamic map for ``ratios`` fp32 between -1 and 1, as bitsandbytes chooses them.

    It rounds a ratio to one of 65,536 even steps and takes the entry nearest to that. Only near 0, where entries lie
    closer than steps, and next to a midpoint is this not the entry nearest to the ratio.
    """
    steps = ((ratios + 1.0) * 0.5 * 65535.0 + 0.5).to(torch.int32)
    return _dynamic_steps(ratios.device).index_select(0, steps)


@functools.cache
def _dynamic_steps(device: torch.device) -> Tensor:
    """The code nearest to each of 65,536 even steps from -1 to 1: uint8 [65536]."""
    steps = torch.arange(65536, dtype=torch.float32) / 65535 * 2 - 1
    entries = dynamic_map()
    return torch.bucketize(steps, (entries[:-1] + entries[1:]) / 2).to(torch.uint8).to(device)
