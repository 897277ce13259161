"""GemmaConfig: everything about a network's shape that its checkpoint's config.json says, read strictly."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from gemcut.errors import ConfigError

LayerKind = Literal["sliding_attention", "full_attention"]
SLIDING: LayerKind = "sliding_attention"
FULL: LayerKind = "full_attention"

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "sliding_window",
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
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"config: {name} is {value}; it must be a positive number")
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
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path.parent} has no config.json: not a checkpoint folder") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from None
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
        model_type = data.get("model_type")
        if model_type not in ("gemma2", "gemma3_text"):
            raise ConfigError(f"model_type is {model_type!r}; gemcut reads 'gemma2' and 'gemma3_text'")
        _refuse_unknown_behaviour(data)
        layers = _integer(data, "num_hidden_layers")
        hidden = _integer(data, "hidden_size")
        gemma3 = model_type == "gemma3_text"
        theta, local_theta, factor = _rope(data, gemma3)
        if "head_dim" not in data:
            raise ConfigError("head_dim is missing; it cannot be derived from hidden_size in this family")
        dtype = data.get("dtype", data.get("torch_dtype"))
        return cls(
            model_type=cast(Literal["gemma2", "gemma3_text"], model_type),
            vocab_size=_integer(data, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_integer(data, "intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=_integer(data, "num_attention_heads"),
            num_key_value_heads=_integer(data, "num_key_value_heads"),
            head_dim=_integer(data, "head_dim"),
            query_pre_attn_scalar=_number(data, "query_pre_attn_scalar", 256),
            rms_norm_eps=_number(data, "rms_norm_eps", 1e-6),
            max_position_embeddings=_integer(data, "max_position_embeddings", 32768 if gemma3 else 8192),
            sliding_window=_sliding_window(data),
            layer_types=_layer_types(data, layers, gemma3),
            attn_logit_softcapping=_cap(data, "attn_logit_softcapping", None if gemma3 else 50.0),
            final_logit_softcapping=_cap(data, "final_logit_softcapping", None if gemma3 else 30.0),
            rope_theta=theta,
            rope_local_theta=local_theta,
            rope_scaling_factor=factor,
            qk_norm=gemma3,
            bos_token_id=_integer(data, "bos_token_id", 2),
            eos_token_ids=token_ids(1 if data.get("eos_token_id") is None else data["eos_token_id"], "eos_token_id"),
            pad_token_id=_integer(data, "pad_token_id", 0),
            torch_dtype=str(dtype).removeprefix("torch.") if dtype is not None else None,
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


def token_ids(value: object, name: str) -> tuple[int, ...]:
    """A config's token id, which may be one number or a list of them, as a tuple."""
    values = value if isinstance(value, (list, tuple)) else [value]
    if not values or any(isinstance(v, bool) or not isinstance(v, int) or v < 0 for v in values):
        raise ConfigError(f"{name} is {value!r}; expected a token id or a list of token ids")
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
            raise ConfigError(f"{name} is {value!r}; gemcut knows only {known[0]!r}")


def _number(data: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = data.get(name)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"{name} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name} is {value!r}; expected a number")
    return float(value)


def _integer(data: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = data.get(name)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"{name} is missing")
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} is {value!r}; expected a whole number")
    return value


def _mapping(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = data.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{name} is {value!r}; expected an object")
    return value or {}


def _cap(data: Mapping[str, Any], name: str, default: float | None) -> float | None:
    if name not in data:
        return default
    return None if data[name] is None else _number(data, name)  # null switches the cap off


def _sliding_window(data: Mapping[str, Any]) -> int:
    names = [name for name in ("sliding_window", "sliding_window_size") if data.get(name) is not None]
    windows = {name: _integer(data, name) for name in names}
    if len(set(windows.values())) > 1:
        raise ConfigError(
            f"sliding_window {windows['sliding_window']} contradicts sliding_window_size "
            f"{windows['sliding_window_size']}"
        )
    if not windows:
        raise ConfigError("sliding_window is missing")
    return next(iter(windows.values()))


def _layer_types(data: Mapping[str, Any], layers: int, gemma3: bool) -> tuple[LayerKind, ...]:
    given = data.get("layer_types")
    if given is not None:
        if not isinstance(given, (list, tuple)) or any(kind not in (SLIDING, FULL) for kind in given):
            raise ConfigError(f"layer_types holds {given!r}; known kinds are {SLIDING!r} and {FULL!r}")
        return tuple(given)
    # Gemma 2: 0-indexed even layers slide. Gemma 3: every sixth layer is full.
    period = _integer(data, "sliding_window_pattern", _integer(data, "_sliding_window_pattern", 6)) if gemma3 else 2
    if period < 1:
        raise ConfigError(f"sliding_window_pattern is {period}; expected 1 or more")
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
            raise ConfigError(f"rope_type is {kind!r}; gemcut knows 'default', and 'linear' for Gemma 3")
    return theta, local, factor


def _published(model_type: str, vocab_size: int, window: int, shape: tuple[int, ...]) -> GemmaConfig:
    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    names += ["head_dim", "query_pre_attn_scalar"]
    data: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": vocab_size,
        "sliding_window": window,
        "torch_dtype": "bfloat16",
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
