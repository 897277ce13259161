"""From a GGUF file's metadata to GemmaConfig: every key of the model's own section is read, or refused by name.

Two converters write these files: llama.cpp's, and Ollama's, which spells some keys in its own way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemcut.checkpoint.gguf_header import GgufArray
from gemcut.config import FULL, SLIDING, GemmaConfig
from gemcut.errors import ConfigError

# The 27B of each generation divides queries by sqrt(hidden / heads), all others by sqrt(head_dim). The file does not
# say so; the number of layers tells them apart.
LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
_ABSENT = object()
# Keys that change nothing in these networks: how a model came to its context, and what only YaRN reads.
_WITHOUT_EFFECT = ("rope.scaling.original_context_length", "rope.scaling.finetuned", "mm.tokens_per_image")
_OF_YARN = (
    *("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast"),
    *("rope.scaling.yarn_beta_slow", "rope.scaling.yarn_log_multiplier", "rope.scaling.extrapolation_factor"),
    *("rope.scaling.beta_fast", "rope.scaling.beta_slow"),
)
# Keys of other networks, with the only value that says "not here".
_NEUTRAL: dict[str, float] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.shared_kv_layers": 0,
    "embedding_length_per_layer_input": 0,
    "expert_count": 0,
    "expert_used_count": 0,
    "leading_dense_block_count": 0,
    "logit_scale": 1,
    "nextn_predict_layers": 0,
    "pooling_type": 0,
    "residual_scale": 1,
    "rope.freq_scale": 1,
    "rope.scaling.attn_factor": 1,
    "use_parallel_residual": False,
}


def read_config(
    path: Path, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], ids: Mapping[str, Any]
) -> GemmaConfig:
    """The network a file describes.

    Args:
        path: the file, for messages.
        metadata: its metadata; ``general.architecture`` is gemma2 or gemma3.
        shapes: its tensors by our names, ``embed.weight`` among them.
        ids: eos_token_id, bos_token_id and pad_token_id.

    Raises:
        ConfigError: a key is missing, of the wrong kind, contradicts another, or is one gemcut does not know.
    """
    section = _Section(path, metadata)
    gemma3 = section.architecture == "gemma3"
    layers, hidden = section.integer("block_count"), section.integer("embedding_length")
    heads, kv_heads = section.integer("attention.head_count"), section.integer("attention.head_count_kv")
    head_dim = section.integer("attention.key_length", _head_dim(shapes, heads))
    rows = shapes["embed.weight"][0]
    context = section.integer("context_length")
    large = layers == LAYERS_OF_27B[section.architecture] and heads
    scale = section.number("attention.scale", None)
    final_cap = section.cap("final_logit_softcapping", None if gemma3 else 30.0)
    if section.has("rope.global.freq_base") and gemma3 and final_cap == 30.0:
        final_cap = None  # Ollama's first converter, which alone spelled it so, wrote 30 where config.json says null
    window, kinds = _window(section, layers, gemma3)
    data: dict[str, Any] = {
        "model_type": "gemma3_text" if gemma3 else "gemma2",
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": section.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "query_pre_attn_scalar": hidden / heads if large else head_dim,
        "rms_norm_eps": section.number("attention.layer_norm_rms_epsilon", 1e-6),
        "max_position_embeddings": context,
        "sliding_window": context if window is None else window,
        "layer_types": kinds,
        "attn_logit_softcapping": section.cap("attn_logit_softcapping", None if gemma3 else 50.0),
        "final_logit_softcapping": final_cap,
        "rope_parameters": _rope(section, gemma3),
        **ids,
    }
    if scale is not None:
        if not 1e-6 < scale < 1e6:
            raise section.wrong("attention.scale", "1 / sqrt(the width of a head), or near it")
        data["query_pre_attn_scalar"] = scale**-2
    tokens = metadata.get("tokenizer.ggml.tokens")
    section.only("vocab_size", (rows, *([len(tokens)] if isinstance(tokens, GgufArray) else [])))
    for key in ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa"):
        section.only(key, (head_dim,))
    for key in ("rope.dimension_count", "rope.dimension_count_swa"):
        section.only(key, (head_dim,))
    section.only("embedding_length_out", (hidden,))
    section.only("embedding_scale", (math.sqrt(hidden) if hidden > 0 else 0.0,))
    section.finish()
    try:
        return GemmaConfig.from_dict(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _head_dim(shapes: Mapping[str, tuple[int, ...]], heads: int) -> int:
    """The width of a head where the file does not say it: its query rows tell."""
    rows = shapes.get("layers.0.attention.q_proj.weight", (0,))[0]
    return rows // heads if heads > 0 else 0


def _window(section: _Section, layers: int, gemma3: bool) -> tuple[int | None, list[str]]:
    """(width, the kind of each layer). Gemma 3 without a window has full layers alone, as in llama.cpp; then None.

    Gemma 2's files of June 2024 do not have the key: its window is 4096.
    """
    window = section.integer("attention.sliding_window", 0 if gemma3 else 4096)
    given = section.take("attention.sliding_window_pattern")
    if isinstance(given, GgufArray):
        slides = given.values() if given.kind not in ("string", "float32", "float64") else []
        if len(slides) != layers or any(value not in (0, 1) for value in slides):
            raise section.wrong("attention.sliding_window_pattern", f"one true or false for each of {layers} layers")
    else:
        period = section.checked("attention.sliding_window_pattern", given, int, 6 if gemma3 else 2)
        if period < 0:
            raise section.wrong("attention.sliding_window_pattern", "0 or more")
        # llama.cpp's meaning: 0 is "every layer slides", 1 "none does".
        slides = [period == 0 or (i + 1) % period != 0 for i in range(max(0, min(layers, 1 << 16)))]
    if gemma3 and window == 0:
        if isinstance(given, GgufArray) and any(slides):
            raise section.wrong("attention.sliding_window", "the width of the layers that slide")
        return None, [FULL] * len(slides)
    return window, [SLIDING if slide else FULL for slide in slides]


def _rope(section: _Section, gemma3: bool) -> dict[str, Any]:
    """config.json's ``rope_parameters``."""
    base = section.one_of("rope.freq_base", "rope.global.freq_base", default=1_000_000.0 if gemma3 else 10_000.0)
    local = section.one_of("rope.freq_base_swa", "rope.local.freq_base", default=10_000.0 if gemma3 else base)
    if not gemma3 and local != base:
        raise section.wrong("rope.freq_base_swa", f"{base:g}, since Gemma 2 has one base for all layers")
    kind = section.text("rope.scaling.type", "linear")  # llama.cpp's reading of a factor without a type
    factor = section.one_of("rope.scaling.factor", "rope.scale_linear", default=1.0) or 1.0
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    if kind not in ("none", "linear") or (kind == "linear" and factor != 1.0):
        full |= {"rope_type": kind, "factor": factor}
    else:
        section.skip(*_OF_YARN)
    return {FULL: full, SLIDING: {"rope_type": "default", "rope_theta": local}}


class _Section:
    """The keys under the architecture's name; each is taken once, and ``finish`` refuses what nobody took."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self.architecture = str(metadata["general.architecture"])
        prefix = f"{self.architecture}."
        self._values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        self._taken: set[str] = set()

    def has(self, key: str) -> bool:
        return key in self._values

    def take(self, key: str) -> Any:
        """The value as it is; None where there is none."""
        self._taken.add(key)
        return self._values.get(key)

    def wrong(self, key: str, expected: str) -> ConfigError:
        shown = str(self._values.get(key))[:40]
        return ConfigError(f"{self.path}: metadata {self.architecture}.{key} is {shown!r}; expected {expected}")

    def checked(self, key: str, value: Any, kind: type, default: Any) -> Any:
        """``value`` if it is a number of this kind; ``default`` where it is None. One for each layer, all equal, is
        one number."""
        if isinstance(value, GgufArray) and value.kind != "string" and 0 < len(value) <= 1 << 16:
            values = value.values()
            value = values[0] if len(set(values)) == 1 else value
        if value is None and default is not _ABSENT:
            return default
        if type(value) is not int and (kind is int or type(value) is not float or not math.isfinite(value)):
            raise self.wrong(key, "a whole number" if kind is int else "a number")
        return value

    def number(self, key: str, default: Any = _ABSENT) -> Any:
        return self.checked(key, self.take(key), float, default)

    def integer(self, key: str, default: Any = _ABSENT) -> Any:
        return self.checked(key, self.take(key), int, default)

    def text(self, key: str, default: str) -> str:
        value = self.take(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, "a text")
        return default if value is None else value

    def cap(self, key: str, default: float | None) -> float | None:
        """A soft cap. 0 is "none" in these files."""
        value = self.number(key, default)
        return None if value == 0 else value

    def one_of(self, key: str, other: str, default: float) -> float:
        """A number with two spellings."""
        first, second = self.number(key, None), self.number(other, None)
        if first is not None and second is not None and first != second:
            raise self.wrong(key, f"the {second:g} that {other} says")
        found = second if first is None else first
        return default if found is None else float(found)

    def only(self, key: str, allowed: tuple[float, ...]) -> None:
        """A number that may be absent, or say what is so anyway."""
        value = self.number(key, None)
        if value is not None and not any(math.isclose(value, each, rel_tol=1e-6) for each in allowed):
            raise self.wrong(key, " or ".join(f"{each:g}" for each in dict.fromkeys(allowed)))

    def skip(self, *keys: str) -> None:
        self._taken.update(keys)

    def finish(self) -> None:
        """Raise ConfigError for a key that may change what the network computes and that nobody took."""
        self.skip(*_WITHOUT_EFFECT)
        for key, value in self._values.items():
            if key in self._taken or (key in _NEUTRAL and not isinstance(value, str) and value == _NEUTRAL[key]):
                continue
            if key.startswith("vision."):
                raise ConfigError(
                    f"{self.path} holds an image encoder ({self.architecture}.{key}); gemcut reads text models: take a "
                    "text-only file of this model"
                )
            if key in _NEUTRAL:
                raise self.wrong(key, str(_NEUTRAL[key]))
            raise ConfigError(
                f"{self.path}: metadata {self.architecture}.{key} is {str(value)[:40]!r}; gemcut does not know this "
                "key, which may change what the model computes: take a file made by a current llama.cpp"
            )
