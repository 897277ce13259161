"""Which part of each tensor a rank of a tensor parallel network holds, as pure functions of names and shapes.

q, k, v, gate and up are split by rows (their outputs: whole heads, columns of the layer), o and down by columns (their
inputs), the table of tokens by rows (the vocabulary). Norms are whole everywhere. A rank's network is an ordinary one
of the rank's own shape (``local_config``); what it lacks is summed over the ranks behind o and down. Free of torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gemcut.checkpoint.names import split_layer
from gemcut.config import GemmaConfig
from gemcut.errors import ParameterError
from gemcut.quantization.spec import Quantization

EMBEDDING = "embed.weight"
#: Of each linear layer's role in a layer what a rank holds: rows of it (outputs) or columns (inputs).
SPLIT_BY_ROLE: dict[str, Literal["rows", "columns"]] = {
    "attention.qkv_proj": "rows",
    "attention.o_proj": "columns",
    "mlp.gate_up_proj": "rows",
    "mlp.down_proj": "columns",
}
ROLE_OF_PART = {
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
    config: GemmaConfig, size: int, quantization: Quantization | None = None, dtype: object = "bfloat16"
) -> None:
    """Raise ParameterError where the network cannot be split over ``size`` devices; it names counts that it can."""
    if size < 1:
        raise ParameterError(f"gpus is {size}; expected at least 1")
    if size == 1:
        return
    if str(dtype).removeprefix("torch.") in ("float16", "fp16"):
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
    axis = SPLIT_BY_ROLE.get(ROLE_OF_PART.get(part, part))
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
