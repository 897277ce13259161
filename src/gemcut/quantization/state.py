"""How bitsandbytes stores a cut weight: the tensors of a checkpoint file that stand for one matrix."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from gemcut.quantization.tables import code_table, dynamic_map
from gemcut.quantization.weights import NESTED_BLOCK_SIZE, FourBitWeight, Int8Weight, Weight


def to_stored(name: str, weight: Weight) -> dict[str, Tensor]:
    """The tensors of a file that hold ``weight``, whose own tensor is called ``name`` ("….up_proj.weight").

    A 4-bit weight's codes are a column of bytes beside its statistics and tables; what decodes it is JSON in a tensor
    of bytes. An 8-bit weight's row magnitudes stand beside it, as ``….up_proj.SCB``.
    """
    if isinstance(weight, FourBitWeight):
        return _four_bit(name, weight)
    if isinstance(weight, Int8Weight):
        module = name.rpartition(".")[0]
        row_major = torch.tensor(0, dtype=torch.uint8)
        return {name: weight.codes, f"{module}.SCB": weight.absmax, f"{module}.weight_format": row_major}
    return {name: weight}


def _four_bit(name: str, weight: FourBitWeight) -> dict[str, Tensor]:
    state: dict[str, object] = {
        "quant_type": weight.quant_type,
        "blocksize": weight.block_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    stored = {
        name: weight.codes.view(-1, 1),
        f"{name}.absmax": weight.absmax,
        f"{name}.quant_map": code_table(weight.quant_type),
    }
    if weight.nested is not None:
        stored |= {f"{name}.nested_absmax": weight.nested.scale, f"{name}.nested_quant_map": dynamic_map()}
        state |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": weight.nested.offset,
        }
    packed = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {**stored, f"{name}.quant_state.bitsandbytes__{weight.quant_type}": packed}
