"""GemmaConfig: everything about a network's shape that its checkpoint's config.json says, read strictly."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from gemcut.errors import ConfigError
from gemcut.files import UnreadableError, read_json, shown

LayerKind = Literal["sliding_attention", "full_attention"]
SLIDING: LayerKind = "sliding_attention"
FULL: LayerKind = "full_attention"

#: Most of what can be: far beyond every published model, and small enough that a lie costs no memory and no time.
_LARGEST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1000,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 14,
    "max_position_embeddings": 1 << 24,
    "sliding_window": 1 << 31,  # some write a huge number for "no window"
}
#: What a missing key means, from transformers' Gemma2Config and Gemma3TextConfig.
_DEFAULTS = {
    "vocab_size": (256_000, 262_208),
    "hidden_size": (2304, 2304),
    "intermediate_size": (9216, 9216),
    "num_hidden_layers": (26, 26),
    "num_attention_heads": (8, 8),
    "num_key_value_heads": (4, 4),
    "head_dim": (256, 256),
    "max_position_embeddings": (8192, 131_072),
    "sliding_window": (4096, 4096),
}
_POSITIVE = (
    *_LARGEST,
    "query_pre_attn_scalar",
    "rms_norm_eps",
    "rope_theta",
    "rope_local_theta",
    "rope_scaling_factor",
)


@dataclass(frozen=True, kw_only=True)
class GemmaConfig:
    """The shape of a Gemma 2 or Gemma 3 (text) network.

    ``head_dim`` is independent of ``hidden_size / num_attention_heads``: at 27B the heads span 4096 of 4608.
    A soft cap of ``None`` means no cap. ``sliding_window`` counts the query itself: a query at position q sees
    keys k with ``0 <= q - k < sliding_window``.
    """

    model_type: Literal["gemma2", "gemma3_text"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    query_pre_attn_scalar: float
    rms_norm_eps: float
    max_position_embeddings: int
    sliding_window: int
    layer_types: tuple[LayerKind, ...]
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    rope_theta: float  # base of full-attention layers (of every layer in Gemma 2)
    rope_local_theta: float  # base of sliding layers
    rope_scaling_factor: float = 1.0  # linear position scaling of full-attention layers (Gemma 3)
    qk_norm: bool = False
    bos_token_id: int = 2
    eos_token_ids: tuple[int, ...] = (1,)
    pad_token_id: int = 0
    torch_dtype: str | None = None  # dtype the checkpoint says its weights have

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if not (value > 0 and value < math.inf):
                raise ConfigError(f"config: {name} is {shown(value)}; it must be a positive number")
            if value > _LARGEST.get(name, math.inf):
                raise ConfigError(f"config: {name} is {shown(value)}; gemcut takes at most {_LARGEST[name]:,}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"config: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"config: head_dim {self.head_dim} is odd; rotary embedding needs pairs")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ConfigError(
                f"config: layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers"
            )
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            cap = getattr(self, name)
            if cap is not None and not (cap > 0 and math.isfinite(cap)):
                raise ConfigError(f"config: {name} is {cap}; expected a positive number, or null for no cap")

    @property
    def attention_scale(self) -> float:
        """What attention scores are multiplied by: ``query_pre_attn_scalar ** -0.5`` (27B: 1/12, not 128^-0.5)."""
        return 1.0 / math.sqrt(self.query_pre_attn_scalar)

    @property
    def query_size(self) -> int:
        """Width of all query heads together; differs from ``hidden_size`` in every Gemma 2."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_key_value_heads * self.head_dim

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Indices of layers that attend to the whole context."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == FULL)

    @property
    def sliding_layers(self) -> tuple[int, ...]:
        """Indices of layers that attend to the last ``sliding_window`` positions."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == SLIDING)

    def num_parameters(self) -> int:
        """Number of distinct parameters (the output head shares the embedding)."""
        per_layer = (
            self.hidden_size * (self.query_size + 2 * self.key_value_size)
            + self.query_size * self.hidden_size
            + 3 * self.hidden_size * self.intermediate_size
            + 4 * self.hidden_size
            + (2 * self.head_dim if self.qk_norm else 0)
        )
        return self.vocab_size * self.hidden_size + self.num_hidden_layers * per_layer + self.hidden_size

    def replace(self, **changes: Any) -> GemmaConfig:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_file(cls, path: str | Path) -> GemmaConfig:
        """Read a ``config.json``. Raises ConfigError naming the file when it is missing or unusable."""
        path = Path(path)
        try:
            data = read_json(path)
        except FileNotFoundError:
            raise ConfigError(f"{path.parent} has no config.json: not a checkpoint folder") from None
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
        except UnreadableError as error:
            raise ConfigError(f"cannot read {path}: it {error}") from None
        if not isinstance(data, dict):
            raise ConfigError(f"{path} holds {type(data).__name__}; expected a JSON object")
        try:
            return cls.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GemmaConfig:
        """Build from the keys of a Hugging Face config.json.

        Keys that change what the network computes are understood or refused; other unknown keys are ignored.
        """
        data = _text_part(data)
        model_type = data.get("model_type")
        if model_type not in ("gemma2", "gemma3_text"):
            raise ConfigError(
                f"model_type is {shown(model_type)}; gemcut reads 'gemma2', 'gemma3_text' and the text part of 'gemma3'"
            )
        _refuse_heads(data)
        _refuse_unknown_behaviour(data)
        gemma3 = model_type == "gemma3_text"
        sizes = {name: _size(data, name, both[gemma3]) for name, both in _DEFAULTS.items() if name != "sliding_window"}
        theta, local_theta, factor = _rope(data, gemma3)
        return cls(
            model_type=cast(Literal["gemma2", "gemma3_text"], model_type),
            **sizes,
            query_pre_attn_scalar=_number(data, "query_pre_attn_scalar", 256),
            rms_norm_eps=_number(data, "rms_norm_eps", 1e-6),
            sliding_window=_sliding_window(data, _DEFAULTS["sliding_window"][gemma3]),
            layer_types=_layer_types(data, sizes["num_hidden_layers"], gemma3),
            attn_logit_softcapping=_cap(data, "attn_logit_softcapping", None if gemma3 else 50.0),
            final_logit_softcapping=_cap(data, "final_logit_softcapping", None if gemma3 else 30.0),
            rope_theta=theta,
            rope_local_theta=local_theta,
            rope_scaling_factor=factor,
            qk_norm=gemma3,
            bos_token_id=_integer(data, "bos_token_id", 2),
            eos_token_ids=_stored_ids(data),
            pad_token_id=max(0, _integer(data, "pad_token_id", 0)),  # -1 says "none"
            torch_dtype=_dtype(data),
        )

    def to_dict(self) -> dict[str, Any]:
        """The Hugging Face config.json of this network; ``from_dict`` of it gives the same config back."""
        gemma3 = self.model_type == "gemma3_text"
        scalar = float(self.query_pre_attn_scalar)
        data: dict[str, Any] = {
            "architectures": ["Gemma3ForCausalLM" if gemma3 else "Gemma2ForCausalLM"],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            # transformers insists on a whole number here; every published model has one
            "query_pre_attn_scalar": int(scalar) if scalar.is_integer() else scalar,
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "sliding_window": self.sliding_window,
            "layer_types": list(self.layer_types),
            "attn_logit_softcapping": self.attn_logit_softcapping,
            "final_logit_softcapping": self.final_logit_softcapping,
            "rope_theta": self.rope_theta,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_act": "gelu_pytorch_tanh",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": True,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids) if len(self.eos_token_ids) > 1 else self.eos_token_ids[0],
            "pad_token_id": self.pad_token_id,
            "use_cache": True,
        }
        if gemma3:
            data["rope_local_base_freq"] = self.rope_local_theta
            if self.rope_scaling_factor != 1.0:
                data["rope_scaling"] = {"rope_type": "linear", "factor": self.rope_scaling_factor}
        if self.torch_dtype is not None:
            data["torch_dtype"] = self.torch_dtype
        return data


def _text_part(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text network's keys of a Gemma 3 that sees pictures too; any other config as it is."""
    if data.get("model_type") != "gemma3":
        return data
    text = data.get("text_config")
    if not isinstance(text, Mapping):
        raise ConfigError("model_type is 'gemma3' without a text_config; gemcut reads its text part alone")
    outer = {name: data[name] for name in _OUTSIDE if data.get(name) is not None}
    return {**text, **outer, "model_type": "gemma3_text"}


#: Keys that a config with a text part keeps outside it.
_OUTSIDE = ("eos_token_id", "bos_token_id", "pad_token_id", "dtype", "torch_dtype", "tie_word_embeddings")


def _refuse_heads(data: Mapping[str, Any]) -> None:
    """Refuse a network that ends in something else than words."""
    names = data.get("architectures")
    for name in names if isinstance(names, (list, tuple)) else ():
        if isinstance(name, str) and any(part in name for part in ("Classification", "Reward", "QuestionAnswering")):
            raise ConfigError(
                f"architectures is {shown(name)}, which judges texts and writes none; gemcut runs language models "
                "(…ForCausalLM): take the model it was made from, such as google/gemma-2-2b-it"
            )


def _stored_ids(data: Mapping[str, Any]) -> tuple[int, ...]:
    """The end ids; a negative one says "none"."""
    value = data.get("eos_token_id")
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value < 0):
        return (1,)
    return token_ids(value, "eos_token_id")


def _dtype(data: Mapping[str, Any]) -> str | None:
    """The dtype under transformers 5's name or 4's."""
    found = data.get("dtype") or data.get("torch_dtype")
    return str(found).removeprefix("torch.")[:40] if isinstance(found, str) or "torch" in str(type(found)) else None


def _size(data: Mapping[str, Any], name: str, default: int) -> int:
    """A whole number, ``default`` where the key is missing (null is no number)."""
    if name in data and data[name] is None and name != "max_position_embeddings":
        raise ConfigError(f"{name} is null; expected a whole number")
    return _integer(data, name, default)


def token_ids(value: object, name: str) -> tuple[int, ...]:
    """A config's token id, which may be one number or a list of them, as a tuple."""
    values = value if isinstance(value, (list, tuple)) else [value]
    if not values or any(isinstance(v, bool) or not isinstance(v, int) or v < 0 for v in values):
        raise ConfigError(f"{name} is {shown(value)}; expected a token id or a list of token ids")
    return tuple(cast(Iterable[int], values))


def _refuse_unknown_behaviour(data: Mapping[str, Any]) -> None:
    activation = data.get("hidden_activation") or "gelu_pytorch_tanh"  # "hidden_act" says "gelu" in old configs
    expected: dict[str, tuple[object, tuple[object, ...]]] = {
        "hidden_activation": (activation, ("gelu_pytorch_tanh",)),
        "hidden_act": (data.get("hidden_act", "gelu"), ("gelu", "gelu_pytorch_tanh", None)),
        "attention_bias": (data.get("attention_bias", False), (False, None)),
        "tie_word_embeddings": (data.get("tie_word_embeddings", True), (True,)),
        "use_bidirectional_attention": (data.get("use_bidirectional_attention"), (False, None)),
    }
    for name, (value, known) in expected.items():
        if value not in known:
            raise ConfigError(f"{name} is {shown(value)}; gemcut knows only {known[0]!r}")


def _number(data: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = data.get(name)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"{name} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name} is {shown(value)}; expected a number")
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"{name} is {shown(value)}; expected a number that a float holds") from None


def _integer(data: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = data.get(name)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"{name} is missing")
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} is {shown(value)}; expected a whole number")
    return value


def _mapping(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = data.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{name} is {shown(value)}; expected an object")
    return value or {}


def _cap(data: Mapping[str, Any], name: str, default: float | None) -> float | None:
    if name not in data:
        return default
    return None if data[name] is None else _number(data, name)  # null switches the cap off


def _sliding_window(data: Mapping[str, Any], default: int) -> int:
    names = [name for name in ("sliding_window", "sliding_window_size") if data.get(name) is not None]
    windows = {name: _integer(data, name) for name in names}
    if len(set(windows.values())) > 1:
        raise ConfigError(
            f"sliding_window {windows['sliding_window']} contradicts sliding_window_size "
            f"{windows['sliding_window_size']}"
        )
    if not windows and "sliding_window" in data:  # transformers' sliding mask cannot be made from null either
        raise ConfigError("sliding_window is null; expected a whole number")
    return next(iter(windows.values()), default)


def _layer_types(data: Mapping[str, Any], layers: int, gemma3: bool) -> tuple[LayerKind, ...]:
    given = data.get("layer_types")
    if given is not None:
        if not isinstance(given, (list, tuple)) or any(kind not in (SLIDING, FULL) for kind in given):
            raise ConfigError(f"layer_types holds {shown(given)}; known kinds are {SLIDING!r} and {FULL!r}")
        return tuple(given)
    # Gemma 2: 0-indexed even layers slide. Gemma 3: every sixth layer is full.
    period = _integer(data, "sliding_window_pattern", _integer(data, "_sliding_window_pattern", 6)) if gemma3 else 2
    if period < 1:
        raise ConfigError(f"sliding_window_pattern is {period}; expected 1 or more")
    if layers > _LARGEST["num_hidden_layers"]:
        return ()  # refused by its number, before so many kinds are listed
    return tuple(FULL if (i + 1) % period == 0 else SLIDING for i in range(layers))


def _rope(data: Mapping[str, Any], gemma3: bool) -> tuple[float, float, float]:
    """(theta of full layers, theta of sliding layers, linear factor of full layers) from either era of config keys."""
    theta = _number(data, "rope_theta", 1_000_000.0 if gemma3 else 10_000.0)
    local = _number(data, "rope_local_base_freq", 10_000.0) if gemma3 else theta
    scaling, parameters = _mapping(data, "rope_scaling"), _mapping(data, "rope_parameters")
    full_rope, local_rope = parameters, {} if gemma3 else parameters
    if FULL in parameters or SLIDING in parameters:
        full_rope, local_rope = _mapping(parameters, FULL), _mapping(parameters, SLIDING)
    full_rope = {**full_rope, **scaling}
    theta = _number(full_rope, "rope_theta", theta)
    local = _number(local_rope, "rope_theta", local if gemma3 else theta)
    factor = 1.0
    for rope, scalable in ((full_rope, True), (local_rope, False)):
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "linear" and scalable and gemma3:
            factor = _number(rope, "factor")
        elif kind != "default":
            raise ConfigError(f"rope_type is {shown(kind)}; gemcut knows 'default', and 'linear' for Gemma 3")
    return theta, local, factor


def _published(model_type: str, vocab_size: int, window: int, shape: tuple[int, ...]) -> GemmaConfig:
    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    names += ["head_dim", "query_pre_attn_scalar"]
    data: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": vocab_size,
        "sliding_window": window,
        "torch_dtype": "bfloat16",
        "max_position_embeddings": 8192 if model_type == "gemma2" else 32_768,
    }
    return GemmaConfig.from_dict(data | dict(zip(names, shape, strict=True)))


#: Published shapes by short name. Sources: the checkpoints' config.json; Gemma 2 and Gemma 3 technical reports.
FAMILY: dict[str, GemmaConfig] = {
    "gemma-2-2b": _published("gemma2", 256_000, 4096, (2304, 9216, 26, 8, 4, 256, 256)),
    "gemma-2-9b": _published("gemma2", 256_000, 4096, (3584, 14336, 42, 16, 8, 256, 256)),
    "gemma-2-27b": _published("gemma2", 256_000, 4096, (4608, 36864, 46, 32, 16, 128, 144)),
    "gemma-3-270m": _published("gemma3_text", 262_144, 512, (640, 2048, 18, 4, 1, 256, 256)),
    "gemma-3-1b": _published("gemma3_text", 262_144, 512, (1152, 6912, 26, 4, 1, 256, 256)),
}
