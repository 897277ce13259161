"""Which part of each weight a rank of a tensor parallel network holds, as pure functions of names and shapes.

q, k, v, gate and up are split by rows (their outputs: whole heads, columns of the layer), o and down by columns (their
inputs), the table of tokens by rows (the vocabulary). Norms are whole everywhere. A rank's network is an ordinary one
of the rank's own shape (``local_config``); what it lacks is summed over the ranks behind o and down.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from gemcut.checkpoint.names import split_layer
from gemcut.config import GemmaConfig
from gemcut.errors import ParameterError
from gemcut.parallel.stored import StoredColumns
from gemcut.quantization.four_bit import block_absmax
from gemcut.quantization.spec import NESTED_BLOCK_SIZE, Quantization
from gemcut.quantization.weights import FourBitWeight, Incoming, Int8Weight, Nested, StoredWeight

EMBEDDING = "embed.weight"
#: Of each linear layer's role in a layer what a rank holds: rows of it (outputs) or columns (inputs).
SPLIT_BY_ROLE: dict[str, Literal["rows", "columns"]] = {
    "attention.qkv_proj": "rows",
    "attention.o_proj": "columns",
    "mlp.gate_up_proj": "rows",
    "mlp.down_proj": "columns",
}
_ROLE_OF_PART = {
    "attention.q_proj": "attention.qkv_proj",
    "attention.k_proj": "attention.qkv_proj",
    "attention.v_proj": "attention.qkv_proj",
    "mlp.gate_proj": "mlp.gate_up_proj",
    "mlp.up_proj": "mlp.gate_up_proj",
}


@dataclass(frozen=True)
class Share:
    """One rank of ``size``, counted from 0."""

    rank: int
    size: int


@dataclass(frozen=True)
class Slice:
    """Rows or columns ``start`` to ``stop`` of a matrix."""

    axis: Literal["rows", "columns"]
    start: int
    stop: int


def refusal(config: GemmaConfig, size: int, quantization: Quantization | None = None) -> str | None:
    """None where the network can be split over ``size`` devices, else one line that says why not."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width, block = config.intermediate_size, 1
    if heads % size:
        return f"its {heads} attention heads cannot be shared evenly by {size} devices"
    if kv_heads % size and size % kv_heads:
        return f"its {kv_heads} key-value heads cannot be shared evenly by {size} devices"
    if width % size:
        return f"the {width} columns of its MLP cannot be shared evenly by {size} devices"
    if config.vocab_size < size * size:
        return f"its vocabulary of {config.vocab_size} tokens is too small for {size} devices"
    if quantization is not None and quantization.format != "int8":
        block = quantization.block_size
    for what, count in (("attention output", config.query_size), ("MLP", width)):
        if count // size % block:
            return (
                f"a device's {count // size} of the {count} inputs of its {what} projection are no whole number of "
                f"{quantization.format if quantization else ''} blocks of {block}"
            )
    rows = (config.query_size // size, local_kv_heads(config, size) * config.head_dim, width // size)
    if any(count * config.hidden_size % block for count in rows):
        return f"a device's rows of {config.hidden_size} values would begin amid a block of {block}"
    return None


def check_split(
    config: GemmaConfig, size: int, quantization: Quantization | None = None, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Raise ParameterError where the network cannot be split over ``size`` devices; it names counts that it can."""
    if size < 1:
        raise ParameterError(f"gpus is {size}; expected at least 1")
    if size == 1:
        return
    if dtype == torch.float16:
        # Rows that are too large for fp16 are scaled by factors that each rank would find for itself.
        raise ParameterError(f"dtype float16 is not supported over {size} devices; use bfloat16 or float32")
    if quantization is not None and quantization.activation_threshold is not None:
        raise ParameterError(
            f"LLM.int8()'s arithmetic (activation_threshold) looks at whole rows of activations, of which each of "
            f"{size} devices has a part; leave it out (int8 weights alone work)"
        )
    if (reason := refusal(config, size, quantization)) is None:
        return
    good = [str(n) for n in range(1, 17) if n == 1 or refusal(config, n, quantization) is None]
    raise ParameterError(f"this model cannot be split over {size} devices: {reason}; expected {' or '.join(good)}")


def local_kv_heads(config: GemmaConfig, size: int) -> int:
    """Key-value heads a rank holds; where there are fewer than ranks several ranks hold the same one."""
    return max(1, config.num_key_value_heads // size)


def local_config(config: GemmaConfig, size: int) -> GemmaConfig:
    """The shape of one rank's network: its heads and its part of the MLP; the vocabulary is the whole one."""
    return config.replace(
        num_attention_heads=config.num_attention_heads // size,
        num_key_value_heads=local_kv_heads(config, size),
        intermediate_size=config.intermediate_size // size,
    )


def vocabulary_range(vocabulary: int, share: Share) -> tuple[int, int]:
    """The token ids whose rows of the table a rank holds: the first one and the one behind the last."""
    step = -(-vocabulary // share.size)
    return min(vocabulary, share.rank * step), min(vocabulary, (share.rank + 1) * step)


def slice_of(name: str, config: GemmaConfig, share: Share) -> Slice | None:
    """What a rank holds of a tensor under our unfused name; None: all of it (norms). ``config`` is the whole one's."""
    if share.size == 1:
        return None
    if name == EMBEDDING:
        return Slice("rows", *vocabulary_range(config.vocab_size, share))
    part = split_layer(name)[1].removesuffix(".weight")
    axis = SPLIT_BY_ROLE.get(_ROLE_OF_PART.get(part, part))
    if axis is None:
        return None
    if part in ("attention.k_proj", "attention.v_proj"):
        count = local_kv_heads(config, share.size) * config.head_dim
        # Where ranks outnumber the heads, so many ranks that follow one another hold the same one.
        place = share.rank // max(1, share.size // config.num_key_value_heads)
    else:
        count = (config.query_size if part.startswith("attention") else config.intermediate_size) // share.size
        place = share.rank
    return Slice(axis, place * count, (place + 1) * count)


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
    rows = SPLIT_BY_ROLE.get(_ROLE_OF_PART.get(part, part)) != "columns"
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
