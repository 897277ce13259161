"""What ``gemcut info --kernels`` asks kernels about: a network's matrices by their shapes alone, in each format."""

from __future__ import annotations

import torch

from gemcut.config import GemmaConfig
from gemcut.kernels.linear import bf16, four_bit, int8
from gemcut.kernels.linear.dispatch import LinearCase
from gemcut.kernels.linear.gemv import Storage
from gemcut.quantization.spec import FourBitType
from gemcut.quantization.weights import CheckpointWeight, FourBitWeight, Int8Weight, Nested

DTYPE = torch.bfloat16

#: What each format's matrices are packed as; four-bit ones with double quantization.
FORMATS: dict[str, Storage] = {
    "nf4": four_bit.NESTED,
    "fp4": four_bit.NESTED,
    "int8": int8.STORAGE,
    "bf16": bf16.STORAGE,
}


def layer_shapes(config: GemmaConfig) -> dict[str, tuple[tuple[int, ...], int]]:
    """Of each linear layer, by its role: (rows of each matrix that is fused in it, columns)."""
    attention = (config.query_size, config.key_value_size, config.key_value_size)
    return {
        "attention.qkv_proj": (attention, config.hidden_size),
        "attention.o_proj": ((config.hidden_size,), config.query_size),
        "mlp.gate_up_proj": ((config.intermediate_size,) * 2, config.hidden_size),
        "mlp.down_proj": ((config.hidden_size,), config.intermediate_size),
    }


def linear_case(
    format_name: str, shape: tuple[tuple[int, ...], int], device: torch.device, out_dtype: torch.dtype = DTYPE
) -> LinearCase:
    """A product by matrices of one of `FORMATS`; ``shape`` as in ``layer_shapes``.

    On a CPU they are memory that is never touched, elsewhere none at all: support depends on shapes alone.
    """
    (rows, k), where = shape, device if device.type == "cpu" else torch.device("meta")
    if format_name == "bf16":
        weights: tuple[CheckpointWeight, ...] = (torch.empty((sum(rows), k), dtype=DTYPE, device=where),)
    elif format_name == "int8":
        weights = tuple(
            Int8Weight(torch.empty((n, k), dtype=torch.int8, device=where), torch.empty(n, device=where), DTYPE)
            for n in rows
        )
    else:
        weights = tuple(_four_bit("fp4" if format_name == "fp4" else "nf4", n, k, where) for n in rows)
    return LinearCase(weights, DTYPE, out_dtype)


def _four_bit(quant_type: FourBitType, n: int, k: int, where: torch.device) -> FourBitWeight:
    codes = torch.empty(n * k // 2, dtype=torch.uint8, device=where)
    absmax = torch.empty(-(-n * k // 64), dtype=torch.uint8, device=where)
    nested = Nested(torch.empty(-(-len(absmax) // 256), device=where), 0.0)
    return FourBitWeight(codes, absmax, quant_type, 64, (n, k), DTYPE, nested)
