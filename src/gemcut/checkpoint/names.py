"""Tensor names: Hugging Face's and GGUF's on one side, ours on the other. Nothing else in gemcut knows theirs.

Ours hold ``scale = 1 + w`` of every norm in fp32. A Hugging Face file stores ``w``; a GGUF file stores ``1 + w``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from gemcut.config import GemmaConfig
from gemcut.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from gemcut.quantization.weights import CheckpointWeight

#: (ours, Hugging Face's, GGUF's) for tensors outside the layers.
_OUTER = [
    ("embed.weight", "model.embed_tokens.weight", "token_embd.weight"),
    ("norm.scale", "model.norm.weight", "output_norm.weight"),
]
#: The same for tensors of a layer, after "layers.{i}.", "model.layers.{i}." and "blk.{i}.".
_INNER = [
    ("input_norm.scale", "input_layernorm.weight", "attn_norm.weight"),
    ("attention.q_proj.weight", "self_attn.q_proj.weight", "attn_q.weight"),
    ("attention.k_proj.weight", "self_attn.k_proj.weight", "attn_k.weight"),
    ("attention.v_proj.weight", "self_attn.v_proj.weight", "attn_v.weight"),
    ("attention.o_proj.weight", "self_attn.o_proj.weight", "attn_output.weight"),
    ("attention.q_norm.scale", "self_attn.q_norm.weight", "attn_q_norm.weight"),
    ("attention.k_norm.scale", "self_attn.k_norm.weight", "attn_k_norm.weight"),
    ("post_attention_norm.scale", "post_attention_layernorm.weight", "post_attention_norm.weight"),
    ("pre_feedforward_norm.scale", "pre_feedforward_layernorm.weight", "ffn_norm.weight"),
    ("mlp.gate_proj.weight", "mlp.gate_proj.weight", "ffn_gate.weight"),
    ("mlp.up_proj.weight", "mlp.up_proj.weight", "ffn_up.weight"),
    ("mlp.down_proj.weight", "mlp.down_proj.weight", "ffn_down.weight"),
    ("post_feedforward_norm.scale", "post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
]
_FROM_HF = {theirs: ours for ours, theirs, _ in _OUTER + _INNER}
_FROM_GGUF = {theirs: ours for ours, _, theirs in _OUTER + _INNER}
_TO_HF = {ours: theirs for ours, theirs, _ in _OUTER + _INNER}
_TO_GGUF = {ours: theirs for ours, _, theirs in _OUTER + _INNER}

#: The output head, where a file repeats the embedding it is tied to.
LM_HEAD = "lm_head.weight"
# Constants that exporters saved, at whatever place; they are computed from the config.
_COMPUTED = re.compile(r"(?:[\w.]*\.)?rotary_emb\w*\.\w*(?:inv_freq|cos_cached|sin_cached)")
# Parts that a text network does not have: what sees pictures, and the value head that reinforcement learning adds.
_BESIDE = re.compile(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\..+|v_head\.[\w.]+")
# How a Gemma 3 that sees pictures begins the names of its text network, in either era of transformers.
_TEXT_PART = re.compile(r"(?:model\.)?language_model\.(?:model\.)?")
# Names that tell what a file is instead of a language model's weights.
_TELLING = (
    (re.compile(r"(?:.*\.)?score\.weight|(?:.*\.)?classifier\..+"), "a classifier's: it judges texts and writes none"),
    (re.compile(r".*\.lora_[AB]\b.*|.*\.lora_embedding.*|.*\.lora_magnitude.*"), "an adapter's (LoRA): merge it first"),
    (re.compile(r".*\.(?:qweight|qzeros|g_idx)"), "packed by GPTQ or AWQ, which gemcut does not read"),
    (re.compile(r".*\.(?:q_weight|q_scale|q_perm|q_groups)"), "packed by EXL2, which gemcut does not read"),
    (re.compile(r".*\.(?:scales|biases)"), "packed by MLX, which gemcut does not read"),
    (re.compile(r".*\.(?:weight_packed|weight_scale|weight_scale_inv|input_scale)"), "packed by compressed-tensors"),
)
_INSTEAD = "; take the whole weights in safetensors (gemcut cuts them while loading), or a GGUF file"

#: Fused parameters of the network and the tensors their rows come from, top to bottom.
FUSED = {
    "attention.qkv_proj.weight": ("attention.q_proj.weight", "attention.k_proj.weight", "attention.v_proj.weight"),
    "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}


def from_hf(name: str) -> str | None:
    """Our name of a Hugging Face tensor; ``LM_HEAD`` for a head of its own; None for one to be skipped.

    Raises CheckpointError for a tensor that no Gemma 2 or Gemma 3 text network has.
    """
    return _translate(name, "model.", "layers", _FROM_HF, LM_HEAD)


def from_gguf(name: str) -> str | None:
    """Our name of a GGUF tensor; as ``from_hf`` otherwise."""
    if name == LM_HEAD:  # Ollama's converter for Gemma 2 leaves this name
        return LM_HEAD
    return _translate(name, "", "blk", _FROM_GGUF, "output.weight")


def to_hf(name: str) -> str:
    """The Hugging Face name of one of our (unfused) tensors."""
    prefix, inner = split_layer(name)
    return f"model.{prefix}{_TO_HF[inner]}" if prefix else _TO_HF[inner]


def hf_module(name: str) -> str:
    """The Hugging Face name of the module that holds one of our (unfused) tensors: "model.layers.0.mlp.up_proj"."""
    return to_hf(name).rpartition(".")[0]


def to_gguf(name: str) -> str:
    """The GGUF name of one of our (unfused) tensors."""
    prefix, inner = split_layer(name)
    return prefix.replace("layers.", "blk.") + _TO_GGUF[inner]


def split_layer(name: str) -> tuple[str, str]:
    """("layers.3.", "mlp.up_proj.weight") of "layers.3.mlp.up_proj.weight"; ("", name) outside the layers."""
    match = re.match(r"layers\.\d+\.", name)
    return (match.group(), name[match.end() :]) if match else ("", name)


def expected_shapes(config: GemmaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor (our unfused names) a checkpoint of this config must hold, with its shape."""
    d, ffn, head = config.hidden_size, config.intermediate_size, config.head_dim
    query, kv = config.query_size, config.key_value_size
    inner: dict[str, tuple[int, ...]] = {
        "input_norm.scale": (d,),
        "attention.q_proj.weight": (query, d),
        "attention.k_proj.weight": (kv, d),
        "attention.v_proj.weight": (kv, d),
        "attention.o_proj.weight": (d, query),
        "post_attention_norm.scale": (d,),
        "pre_feedforward_norm.scale": (d,),
        "mlp.gate_proj.weight": (ffn, d),
        "mlp.up_proj.weight": (ffn, d),
        "mlp.down_proj.weight": (d, ffn),
        "post_feedforward_norm.scale": (d,),
    }
    if config.qk_norm:
        inner |= {"attention.q_norm.scale": (head,), "attention.k_norm.scale": (head,)}
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (config.vocab_size, d)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in inner.items()}
    shapes["norm.scale"] = (d,)
    return shapes


def check_shapes(
    where: object, found: Mapping[str, tuple[int, ...]], config: GemmaConfig, theirs: Mapping[str, str], missing: str
) -> None:
    """Raise CheckpointError unless ``found`` (our names) is exactly what ``config`` needs.

    ``theirs`` gives the file's own name of each tensor; ``missing`` is "hf" or "gguf", for tensors not in the file.
    """
    expected = expected_shapes(config)
    for name, shape in found.items():
        if name not in expected:
            raise CheckpointError(f"{where}: unexpected tensor {theirs[name]}: the config has no place for it")
        if shape != expected[name]:
            raise CheckpointError(
                f"{where}: tensor {theirs[name]} has shape {list(shape)}; the config asks for {list(expected[name])}"
            )
    absent = [name for name in expected if name not in found]
    if absent:
        first = to_hf(absent[0]) if missing == "hf" else to_gguf(absent[0])
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise CheckpointError(f"{where}: tensor {first} is missing{more}; the checkpoint is incomplete")


def export_tensors(
    state: Mapping[str, torch.Tensor],
    config: GemmaConfig,
    *,
    dtype: torch.dtype | None = None,
    packed: Mapping[str, Callable[[], CheckpointWeight]] | None = None,
) -> Iterator[tuple[str, CheckpointWeight]]:
    """The network's parameters under Hugging Face names: fused rows apart, norms as ``w = scale - 1``.

    ``dtype`` of every whole tensor; None keeps the weights' own and gives norms the embedding's. Weights that need no
    conversion are views. ``packed`` gives what is not in ``state``, by our unfused names, when it is its turn. A norm
    read from a bf16 (fp16) file comes back exactly where ``|w| >= 2**-16`` (``2**-13``) or ``w == 0``; a smaller one,
    and any fp32 ``w``, to within the rounding of ``1 + w`` in fp32, which is what every implementation computes with.
    """
    packed = packed or {}
    norm_dtype = dtype
    for name in expected_shapes(config):  # the embedding first
        if name in packed:
            weight = packed[name]()
            norm_dtype = norm_dtype or weight.dtype
            yield to_hf(name), weight
            del weight  # before the next one is made
            continue
        tensor = _unfused(state, name, config)
        norm_dtype = norm_dtype or tensor.dtype
        if name.endswith(".scale"):
            yield to_hf(name), (tensor.float() - 1.0).to(norm_dtype)
        else:
            yield to_hf(name), tensor.to(dtype or tensor.dtype)


def _unfused(state: Mapping[str, torch.Tensor], name: str, config: GemmaConfig) -> torch.Tensor:
    if name in state:
        return state[name]
    prefix, inner = split_layer(name)
    shapes = expected_shapes(config.replace(num_hidden_layers=1, layer_types=config.layer_types[:1]))
    for fused, parts in FUSED.items():
        if inner in parts and prefix + fused in state:
            start = sum(shapes[f"layers.0.{part}"][0] for part in parts[: parts.index(inner)])
            return state[prefix + fused][start : start + shapes[f"layers.0.{inner}"][0]]
    raise CheckpointError(f"the network to be saved has no parameter for {name}")


def _translate(name: str, outer: str, layers: str, table: Mapping[str, str], head: str) -> str | None:
    if layers == "layers" and (name.startswith("language_model.") or name.startswith("model.language_model.")):
        name = _TEXT_PART.sub("", name, count=1)
    if name == head:
        return LM_HEAD
    if _COMPUTED.fullmatch(name) or (layers == "layers" and _BESIDE.fullmatch(name)):
        return None
    # A backbone saved without its head has no "model." prefix.
    full = name if name.startswith(outer) else outer + name
    if full in table and split_layer(table[full]) == ("", table[full]) and full in _OUTER_NAMES:
        return table[full]
    match = re.fullmatch(rf"{re.escape(outer)}{layers}\.(0|[1-9]\d{{0,3}})\.(.+)", full)
    if match and match.group(2) in table and match.group(2) not in _OUTER_NAMES:
        return f"layers.{match.group(1)}.{table[match.group(2)]}"
    for pattern, what in _TELLING:
        if layers == "layers" and pattern.fullmatch(name):
            raise CheckpointError(f"unexpected tensor {name}: it is {what}{_INSTEAD}")
    raise CheckpointError(f"unexpected tensor {name}: no Gemma 2 or Gemma 3 text network has one of that name")


_OUTER_NAMES = {name for row in _OUTER for name in row}
