"""How bitsandbytes stores a cut weight: the tensors of a checkpoint file that stand for one matrix."""

from __future__ import annotations

import json
from typing import Any, cast

import torch
from torch import Tensor

from gemcut.errors import CheckpointError
from gemcut.quantization.spec import (
    BLOCK_SIZES,
    COMPUTE_DTYPES,
    FOUR_BIT,
    NESTED_BLOCK_SIZE,
    FourBitType,
)
from gemcut.quantization.tables import code_table, dynamic_map
from gemcut.quantization.weights import CheckpointWeight, FourBitWeight, Int8Weight, Nested


def to_stored(name: str, weight: CheckpointWeight) -> dict[str, Tensor]:
    """The tensors of a file that hold ``weight``, whose own tensor is called ``name`` ("….up_proj.weight").

    A 4-bit weight's codes are a column of bytes beside its statistics and tables; how to dequantize it is JSON in a
    tensor of bytes. An 8-bit weight's row magnitudes stand beside it, as ``….up_proj.SCB``.
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


#: What stands in a file beside a cut weight's own tensor, after its name; the 4-bit state's name ends in its type.
STATE_PREFIX = "quant_state.bitsandbytes__"
_STATE_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_KEYS = {"nested_blocksize", "nested_dtype", "nested_offset"}
_MAX_STATE_BYTES = 4096
_LARGEST = torch.finfo(torch.float32).max
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in COMPUTE_DTYPES}


def from_stored(name: str, parts: dict[str, Tensor], dtype: torch.dtype) -> FourBitWeight | Int8Weight:
    """The cut weight that a file's tensors stand for.

    Args:
        name: of the weight, for messages.
        parts: its tensors: "weight", and beside it "SCB" and "weight_format", or "absmax", "quant_map",
            "quant_state.bitsandbytes__nf4" and, with double quantization, "nested_absmax" and "nested_quant_map".
        dtype: what an 8-bit weight is dequantized to; a 4-bit one says so itself.

    Only shapes, dtypes and the small tables are looked at, not the statistics (``check_statistics`` does).
    Raises CheckpointError that names the weight and what is wrong with it.
    """
    if "SCB" in parts:
        return _int8_from(name, parts, dtype)
    states = [key for key in parts if key.startswith(STATE_PREFIX)]
    if len(states) != 1:
        what = "has no quant_state tensor" if not states else "has several quant_state tensors"
        raise CheckpointError(f"tensor {name} is quantized but {what}; the checkpoint is incomplete or damaged")
    quant_type = states[0].removeprefix(STATE_PREFIX)
    state = _read_state(name, parts[states[0]], quant_type)
    rows, columns = state["shape"]
    blocks = -(-rows * columns // state["blocksize"])
    codes = parts["weight"].reshape(-1).view(torch.uint8)
    if abs(codes.numel() - -(-rows * columns // 2)) >= parts["weight"].element_size():
        raise CheckpointError(
            f"tensor {name} holds {codes.numel():,} bytes of codes; its shape {state['shape']} needs "
            f"{-(-rows * columns // 2):,}: the file is damaged"
        )
    nested = state.keys() & _NESTED_KEYS
    wanted = {"absmax", "quant_map"} | ({"nested_absmax", "nested_quant_map"} if nested else set())
    have = parts.keys() - {"weight", states[0]}
    if have != wanted:
        odd = sorted(have ^ wanted)[0]
        state_of = "unexpected" if odd in have else "missing"
        raise CheckpointError(f"tensor {name}.{odd} is {state_of}: the file is damaged")
    _expect(name, parts, "absmax", torch.uint8 if nested else torch.float32, blocks)
    _expect_table(name, parts, "quant_map", code_table(cast(FourBitType, quant_type)))
    inner = None
    if nested:
        _expect(name, parts, "nested_absmax", torch.float32, -(-blocks // NESTED_BLOCK_SIZE))
        _expect_table(name, parts, "nested_quant_map", dynamic_map())
        inner = Nested(parts["nested_absmax"].reshape(-1), float(state["nested_offset"]))
    statistics = parts["absmax"].reshape(-1)
    if inner is not None and state["nested_dtype"] != "float32":
        statistics, inner = _rounded_statistics(statistics, inner, _DTYPES[state["nested_dtype"]]), None
    return FourBitWeight(
        codes[: -(-rows * columns // 2)],
        statistics,
        cast(FourBitType, quant_type),
        state["blocksize"],
        (rows, columns),
        _DTYPES[state["dtype"]],
        inner,
    )


def _rounded_statistics(codes: Tensor, nested: Nested, dtype: torch.dtype) -> Tensor:
    """Block statistics fp32 [blocks] whose dequantization is rounded to ``dtype`` at each step.

    bitsandbytes dequantizes so what it has packed for a forward pass on a CPU with AVX512-BF16 and unpacked to save: in
    the dtype of the weights.
    """
    scales = nested.scale.repeat_interleave(NESTED_BLOCK_SIZE)[: codes.numel()]
    products = dynamic_map().index_select(0, codes.int()).mul_(scales).to(dtype)
    return products.add_(torch.tensor(nested.offset, dtype=dtype)).float()


def check_statistics(name: str, weight: FourBitWeight | Int8Weight) -> None:
    """Raise CheckpointError if a statistic of ``weight`` is NaN or infinite."""
    for tensor in weight.tensors:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"tensor {name}: its block statistics hold NaN or infinity; the file is damaged")


def _int8_from(name: str, parts: dict[str, Tensor], dtype: torch.dtype) -> Int8Weight:
    codes = parts["weight"]
    if codes.dtype != torch.int8 or codes.ndim != 2:
        raise CheckpointError(f"tensor {name} is {codes.dtype} {list(codes.shape)}; expected an int8 matrix beside SCB")
    odd = sorted(parts.keys() - {"weight", "SCB", "weight_format"})
    if odd:
        raise CheckpointError(f"tensor {name}.{odd[0]} is unexpected beside an 8-bit weight: the file is damaged")
    _expect(name, parts, "SCB", torch.float32, codes.shape[0])
    if "weight_format" in parts:
        _expect(name, parts, "weight_format", torch.uint8, 1)
        if layout := int(parts["weight_format"].item()):
            raise CheckpointError(
                f"tensor {name} is stored in an old layout for one kind of GPU (weight_format {layout}); save it again "
                "with a current bitsandbytes"
            )
    return Int8Weight(codes, parts["SCB"].reshape(-1), dtype)


def _read_state(name: str, packed: Tensor, quant_type: str) -> dict[str, Any]:
    """The JSON of a quant_state tensor, every value checked."""

    def damaged(why: str) -> CheckpointError:
        return CheckpointError(f"tensor {name}: its quant_state {why}; the file is damaged or of a newer format")

    if packed.dtype != torch.uint8 or packed.numel() > _MAX_STATE_BYTES:
        raise damaged("is no short text")
    try:
        state = json.loads(bytes(packed.reshape(-1).tolist()))
        keys = state.keys()
    except (ValueError, AttributeError, RecursionError):
        raise damaged("is no JSON object") from None
    if keys not in (_STATE_KEYS, _STATE_KEYS | _NESTED_KEYS):
        odd = sorted((keys ^ _STATE_KEYS) - _NESTED_KEYS) or sorted(_NESTED_KEYS - keys)
        raise damaged(f"{'lacks' if odd[0] not in keys else 'has an unknown'} {odd[0]!r}")
    shape = state["shape"]
    whole = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 1 << 31 for n in shape)
    if quant_type not in FOUR_BIT or state["quant_type"] != quant_type:
        raise damaged(f"says {str(state['quant_type'])[:20]!r}; expected nf4 or fp4, as its name does")
    if type(state["blocksize"]) is not int or state["blocksize"] not in BLOCK_SIZES:
        raise damaged(f"says blocksize {str(state['blocksize'])[:20]}; expected one of {BLOCK_SIZES}")
    if not whole or not isinstance(state["dtype"], str) or state["dtype"] not in _DTYPES:
        raise damaged("has a wrong shape or dtype")
    if keys & _NESTED_KEYS:
        offset = state["nested_offset"]
        if type(offset) not in (int, float) or not abs(offset) <= _LARGEST:  # NaN is not
            raise damaged("has a nested_offset that is no finite fp32 number")
        kind = state["nested_dtype"]
        if state["nested_blocksize"] != NESTED_BLOCK_SIZE or not isinstance(kind, str) or kind not in _DTYPES:
            raise damaged(f"has other nested blocks than {NESTED_BLOCK_SIZE} in {', '.join(_DTYPES)}")
    return cast("dict[str, Any]", state)


def _expect(name: str, parts: dict[str, Tensor], leaf: str, dtype: torch.dtype, count: int) -> None:
    tensor = parts[leaf]
    if tensor.dtype != dtype or tensor.numel() != count:
        have, wanted = (str(kind).removeprefix("torch.") for kind in (tensor.dtype, dtype))
        raise CheckpointError(
            f"tensor {name}: {leaf} is {tensor.numel():,} values of {have}; expected {count:,} of {wanted}: "
            "the file is damaged"
        )


def _expect_table(name: str, parts: dict[str, Tensor], leaf: str, table: Tensor) -> None:
    """A stored table is for information: bitsandbytes dequantizes with its own; another would mean other numbers."""
    _expect(name, parts, leaf, torch.float32, table.numel())
    if not torch.allclose(parts[leaf].reshape(-1), table, rtol=0, atol=1e-6):
        raise CheckpointError(f"tensor {name}: {leaf} is not the table of its format, and no other can be decoded")
