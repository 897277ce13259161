"""GenerationConfig, and the table of every generation option transformers has: honoured here, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemcut.checkpoint.resolve import checked_name, resolve
from gemcut.errors import ParameterError
from gemcut.hf.common import Idle, Refusal, named_folder, refuse, usable_revision, warn_once
from gemcut.paths import expand
from gemcut.text import files as text_files

#: Options that do what they do in transformers.
HONOURED = frozenset(
    {
        "max_new_tokens",
        "max_length",
        "min_new_tokens",
        "min_length",
        "max_time",
        "stop_strings",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "num_return_sequences",
        "suppress_tokens",
        "renormalize_logits",
        "output_scores",
        "output_logits",
        "return_dict_in_generate",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    }
)

_BEAMS = "beam search is not in this version"
_ONE_BEAM = "it is for beam search, and there is one beam"
_ASSIST = "assisted generation is not in this version"
_FILTER = "gemcut samples with temperature, top_k, top_p and min_p"
_ENCODER = "Gemma has no encoder"
_CACHE = "gemcut keeps keys and values in its own paged cache, in the model's dtype"
_COMPILE = "gemcut compiles nothing at generation"
_STATES = "inner states are not kept"

#: Options that are refused unless they change nothing: the values that change nothing, and why the others are refused.
FIXED: dict[str, Refusal] = {
    "num_beams": ((1,), _BEAMS),
    "early_stopping": ((False,), _BEAMS),
    "length_penalty": ((1.0,), _BEAMS),
    "num_beam_groups": ((1,), _BEAMS),
    "diversity_penalty": ((0.0,), _BEAMS),
    "constraints": ((), _BEAMS),
    "force_words_ids": ((), _BEAMS),
    "use_mtp": ((False,), "Gemma 2 predicts one token at a time"),
    "use_cache": ((True,), "expected True or False"),
    # Layers that slide and layers that do not, each with a cache of its own that grows: what gemcut always does.
    "cache_implementation": (("hybrid", "dynamic"), _CACHE),
    "cache_config": ((), _CACHE),
    "max_cache_len": ((), _CACHE),
    "low_memory": ((False,), _CACHE),
    "prefill_chunk_size": ((), "long prompts are cut into chunks by themselves"),
    "compile_config": ((), _COMPILE),
    "disable_compile": ((True, False), _COMPILE),
    "continuous_batching_config": ((), "requests are always batched continuously"),
    "top_h": ((), _FILTER),
    "typical_p": ((1.0,), _FILTER),
    "epsilon_cutoff": ((0.0,), _FILTER),
    "eta_cutoff": ((0.0,), _FILTER),
    "no_repeat_ngram_size": ((0,), "use repetition_penalty"),
    "encoder_no_repeat_ngram_size": ((0,), _ENCODER),
    "encoder_repetition_penalty": ((1.0,), _ENCODER),
    "decoder_start_token_id": ((), _ENCODER),
    "bad_words_ids": ((), "use suppress_tokens for single tokens"),
    "begin_suppress_tokens": ((), "use suppress_tokens or min_new_tokens"),
    "sequence_bias": ((), "use suppress_tokens for single tokens"),
    "forced_bos_token_id": ((), "put the token into the prompt"),
    "forced_eos_token_id": ((), "append the token yourself"),
    "remove_invalid_values": ((False,), "gemcut's logits are finite"),
    "exponential_decay_length_penalty": ((), "use max_new_tokens or stop_strings"),
    "token_healing": ((False,), "end the prompt at the end of a word"),
    "guidance_scale": ((1.0,), "guidance is not in this version"),
    "watermarking_config": ((), "watermarking is not in this version"),
    "penalty_alpha": ((0.0,), "contrastive search is not in this version"),
    "dola_layers": ((), "DoLa is not in this version"),
    "output_attentions": ((False,), _STATES),
    "output_hidden_states": ((False,), _STATES),
    "is_assistant": ((False,), _ASSIST),
    "num_assistant_tokens": ((20,), _ASSIST),
    "num_assistant_tokens_schedule": (("constant",), _ASSIST),
    "assistant_confidence_threshold": ((0.4,), _ASSIST),
    "prompt_lookup_num_tokens": ((), _ASSIST),
    "max_matching_ngram_size": ((), _ASSIST),
    "assistant_early_exit": ((), _ASSIST),
    "assistant_lookbehind": ((10,), _ASSIST),
    "target_lookbehind": ((10,), _ASSIST),
    "assistant_ensemble_weight": ((), _ASSIST),
    "speculation_type": ((), _ASSIST),
}

_CACHED = "gemcut keeps keys and values in its own paged cache"
_CHUNKS = "gemcut reads long prompts in chunks by itself"
#: Of these, the values with which transformers gives the same tokens, only slower, faster or with other memory.
IDLE: dict[str, Idle] = {
    "use_cache": ((False,), f"{_CACHED}; the tokens are the same, only sooner"),
    # All that transformers has but "quantized", which changes the tokens.
    "cache_implementation": (
        (
            *("static", "offloaded_static", "sliding_window", "hybrid_chunked", "offloaded_hybrid"),
            *("offloaded_hybrid_chunked", "offloaded", "dynamic_full", "paged"),
        ),
        _CACHED,
    ),
    "max_cache_len": ((int,), f"{_CACHED}, which grows with the text"),
    "low_memory": ((True,), _CACHED),
    "prefill_chunk_size": ((int,), _CHUNKS),
    "early_stopping": ((True, "never"), _ONE_BEAM),
    "length_penalty": ((int, float), _ONE_BEAM),
}

#: What transformers writes into the file about the file itself.
_METADATA = frozenset({"_from_model_config", "transformers_version"})
_KNOWN = HONOURED | FIXED.keys() | _METADATA
_FILE = "generation_config.json"


class GenerationConfig:
    """How to generate: transformers' fields, all None until set. None means what the model's own config says.

    ``generate`` refuses by name what it cannot honour; a name transformers does not know is refused here.
    """

    def __init__(self, **fields: Any) -> None:
        self.update(**fields)

    def __getattr__(self, name: str) -> Any:  # only called where nothing is set
        if name in _KNOWN:
            return None
        raise AttributeError(f"GenerationConfig has no field {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _KNOWN:
            raise ParameterError(f"GenerationConfig has no field {name!r}; check its spelling")
        object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GenerationConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # it can be changed

    def __repr__(self) -> str:
        return f"GenerationConfig({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    def update(self, **fields: Any) -> None:
        """Set several fields. Raises ParameterError for an unknown one."""
        for name, value in fields.items():
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields that are set: their default is None."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        """The fields that are set as JSON; ``use_diff`` changes nothing."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GenerationConfig:
        """From the content of a generation_config.json. Keys of other versions of transformers are left out, with a
        warning."""
        unknown = sorted(set(data) - _KNOWN)
        if unknown:
            warn_once(f"{_FILE} has {', '.join(unknown)}, which gemcut does not know and leaves out")
        return cls(**{name: value for name, value in data.items() if name in _KNOWN})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> GenerationConfig:
        """The generation_config.json of a checkpoint; arguments as for the model."""
        file = expand(checked_name(pretrained_model_name)) / _FILE
        if file.is_file():  # also a folder that holds nothing else
            return cls.from_dict(text_files.read_json_object(file))
        source = resolve(
            pretrained_model_name,
            revision=usable_revision(pretrained_model_name, revision),
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            weights=False,
        )
        return cls.from_dict(source.generation_config())

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write generation_config.json. Raises CheckpointError when it cannot be written."""
        text_files.write_text(named_folder(save_directory) / _FILE, json.dumps(self.to_dict(), indent=2) + "\n")


def merge_options(
    model: GenerationConfig, given: Any, arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], frozenset[str]]:
    """(the options that hold, the names the caller set): arguments before ``generation_config`` before the model's.

    ``given`` is a GenerationConfig, transformers' own, a mapping, or None.

    Raises:
        ParameterError: an option is unknown.
        UnsupportedError: an option that gemcut does not have would change something.
    """
    if given is None:
        config: dict[str, Any] = {}
    elif isinstance(given, Mapping) or hasattr(given, "to_dict"):
        config = dict(given if isinstance(given, Mapping) else given.to_dict())
    else:
        raise ParameterError(f"generation_config is of type {type(given).__name__}; expected a GenerationConfig")
    asked = {name: value for name, value in {**config, **drop_none(arguments)}.items() if value is not None}
    options = {k: v for k, v in {**model.to_dict(), **asked}.items() if k not in _METADATA}
    refuse("generate", {name: value for name, value in options.items() if name not in HONOURED}, FIXED, IDLE)
    return {k: v for k, v in options.items() if k in HONOURED}, frozenset(asked)


def drop_none(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that were given a value."""
    return {name: value for name, value in arguments.items() if value is not None}
