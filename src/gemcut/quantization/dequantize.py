"""Any weight as the matrix it stands for."""

from __future__ import annotations

import torch
from torch import Tensor

from gemcut.quantization.four_bit import dequantize_4bit
from gemcut.quantization.int8 import dequantize_int8
from gemcut.quantization.weights import CheckpointWeight, FourBitWeight, Int8Weight


def dequantize_weight(weight: CheckpointWeight, dtype: torch.dtype) -> Tensor:
    """The matrix [out, in] in ``dtype``."""
    if isinstance(weight, FourBitWeight):
        return dequantize_4bit(weight, dtype)
    if isinstance(weight, Int8Weight):
        return dequantize_int8(weight, dtype)
    return weight.to(dtype)
