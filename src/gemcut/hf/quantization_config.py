"""BitsAndBytesConfig: transformers' words for how a model is cut, each honoured or refused by name."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from gemcut.errors import ParameterError, UnsupportedError
from gemcut.hf.common import warn_once
from gemcut.placement.devices import parse_dtype
from gemcut.quantization.spec import FOUR_BIT, Format, Quantization
from gemcut.text.files import write_text

_STORAGE = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")
#: What a saved config holds beside the arguments.
_SAVED = ("quant_method", "_load_in_4bit", "_load_in_8bit")
_BOTH = "load_in_4bit and load_in_8bit are both True, but a model is cut to one of them; set one"


class BitsAndBytesConfig:
    """How ``from_pretrained`` cuts the linear layers, with the arguments and defaults of transformers' class.

    The stored numbers are bitsandbytes' own, bit for bit; bitsandbytes itself is not needed. ``Gemma.load`` takes
    this as its ``quantization`` too, but has more to choose there (block size, an 8-bit head): see
    ``gemcut.quantization.spec.Quantization``.

    Args:
        load_in_8bit: 8 bits a value, one scale a row (the format of LLM.int8()).
        load_in_4bit: 4 bits a value in blocks of 64.
        llm_int8_threshold: activations at or above it are to be kept whole. gemcut keeps all activations whole, which
            meets every threshold and is more exact than LLM.int8() at any of them. The arithmetic of LLM.int8() itself
            (rows of activations rounded to 8 bits) is had from ``Quantization("int8", activation_threshold=6.0)``.
        llm_int8_skip_modules: modules left whole, in 4-bit too: ends of their names, or regular expressions for the
            beginning. In gemcut the output head is always among them.
        llm_int8_enable_fp32_cpu_offload: lets modules stay whole on the CPU while others are on a GPU. A model is on
            one device here, so there are none.
        llm_int8_has_fp16_weight: refused with ``load_in_8bit``: it keeps whole weights, for training.
        bnb_4bit_compute_dtype: what linear layers compute in; None is float32, as in transformers.
        bnb_4bit_quant_type: "fp4", as in transformers, or "nf4", which is clearly better.
        bnb_4bit_use_double_quant: quantize the block statistics too: 0.37 bits a weight less.
        bnb_4bit_quant_storage: the dtype packed bytes are labelled with, for sharded training. gemcut keeps them as
            uint8, with a warning for any other: the numbers are the same.
        others: what saved configs hold beside these; anything else is refused.

    Raises:
        ParameterError: an argument is unknown, of a wrong type, or contradicts another.
        UnsupportedError: ``llm_int8_has_fp16_weight``.
    """

    def __init__(
        self,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        llm_int8_threshold: float = 6.0,
        llm_int8_skip_modules: list[str] | None = None,
        llm_int8_enable_fp32_cpu_offload: bool = False,
        llm_int8_has_fp16_weight: bool = False,
        bnb_4bit_compute_dtype: torch.dtype | str | None = None,
        bnb_4bit_quant_type: str = "fp4",
        bnb_4bit_use_double_quant: bool = False,
        bnb_4bit_quant_storage: torch.dtype | str | None = None,
        **others: Any,
    ) -> None:
        for name, value in others.items():
            if name not in _SAVED:
                raise ParameterError(f"BitsAndBytesConfig has no argument {name!r}; check its spelling or leave it out")
            if name == "quant_method" and getattr(value, "value", value) != "bitsandbytes":
                raise ParameterError(f"quant_method is {value!r}; a BitsAndBytesConfig is of 'bitsandbytes'")
        self.quant_method = "bitsandbytes"
        self._load_in_8bit, self._load_in_4bit = load_in_8bit, load_in_4bit
        self.llm_int8_threshold = llm_int8_threshold
        self.llm_int8_skip_modules = llm_int8_skip_modules
        self.llm_int8_enable_fp32_cpu_offload = llm_int8_enable_fp32_cpu_offload
        self.llm_int8_has_fp16_weight = llm_int8_has_fp16_weight
        self.bnb_4bit_quant_type = bnb_4bit_quant_type
        self.bnb_4bit_use_double_quant = bnb_4bit_use_double_quant
        self.bnb_4bit_compute_dtype = _compute_dtype(bnb_4bit_compute_dtype)
        self.bnb_4bit_quant_storage = _storage_dtype(bnb_4bit_quant_storage)
        self.post_init()

    @property
    def load_in_4bit(self) -> bool:
        """Whether linear layers are cut to 4 bits."""
        return self._load_in_4bit

    @load_in_4bit.setter
    def load_in_4bit(self, value: bool) -> None:
        _require("load_in_4bit", value, bool, "True or False")
        if value and self._load_in_8bit:
            raise ParameterError(_BOTH)
        self._load_in_4bit = value

    @property
    def load_in_8bit(self) -> bool:
        """Whether linear layers are cut to 8 bits."""
        return self._load_in_8bit

    @load_in_8bit.setter
    def load_in_8bit(self, value: bool) -> None:
        _require("load_in_8bit", value, bool, "True or False")
        if value and self._load_in_4bit:
            raise ParameterError(_BOTH)
        self._load_in_8bit = value

    def post_init(self) -> None:
        """Check every value. Raises ParameterError or UnsupportedError."""
        for name in (
            "load_in_4bit",
            "load_in_8bit",
            "llm_int8_enable_fp32_cpu_offload",
            "llm_int8_has_fp16_weight",
            "bnb_4bit_use_double_quant",
        ):
            _require(name, getattr(self, name), bool, "True or False")
        if self.load_in_4bit and self.load_in_8bit:
            raise ParameterError(_BOTH)
        threshold, skip = self.llm_int8_threshold, self.llm_int8_skip_modules
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < math.inf:
            raise ParameterError(f"llm_int8_threshold is {threshold!r}; expected a number of 0 or more")
        if skip is not None and (not isinstance(skip, list) or not all(isinstance(module, str) for module in skip)):
            raise ParameterError(f"llm_int8_skip_modules is {skip!r}; expected a list of module names")
        if self.bnb_4bit_quant_type not in FOUR_BIT:
            raise ParameterError(f"bnb_4bit_quant_type is {self.bnb_4bit_quant_type!r}; expected 'nf4' or 'fp4'")
        _require("bnb_4bit_compute_dtype", self.bnb_4bit_compute_dtype, torch.dtype, "a torch.dtype")
        if self.load_in_8bit and self.llm_int8_has_fp16_weight:
            raise UnsupportedError(
                "llm_int8_has_fp16_weight=True is not supported: it keeps whole weights, for training; leave it out"
            )

    def to_quantization(self) -> Quantization:
        """The same in gemcut's own words.

        Raises:
            ParameterError: neither ``load_in_4bit`` nor ``load_in_8bit`` is set, or a value is wrong.
        """
        self.post_init()  # attributes may have been set since
        if not self.is_quantizable():
            raise ParameterError(
                "this BitsAndBytesConfig sets neither load_in_4bit nor load_in_8bit; set one, or leave the "
                "quantization out to keep the weights whole"
            )
        skip = self.llm_int8_skip_modules
        if skip is not None and "lm_head" not in skip:  # so that the saved list says what is true, to transformers too
            skip = [*skip, "lm_head"]
        kept = None if skip is None else tuple(skip)
        if self.load_in_8bit:
            return Quantization("int8", skip=kept)
        if self.bnb_4bit_quant_storage is not torch.uint8:
            warn_once(
                f"bnb_4bit_quant_storage={self.bnb_4bit_quant_storage} has no effect: packed bytes are kept as uint8, "
                "with the same numbers"
            )
        return Quantization(
            cast(Format, self.bnb_4bit_quant_type),
            double_quant=self.bnb_4bit_use_double_quant,
            compute_dtype=str(self.bnb_4bit_compute_dtype),
            skip=kept,
        )

    @classmethod
    def from_quantization(cls, spec: Quantization) -> BitsAndBytesConfig:
        """What says the same to transformers. Block size, and an 8-bit head, have no field here and are left out."""
        return cls(
            load_in_8bit=spec.format == "int8",
            load_in_4bit=spec.format != "int8",
            llm_int8_threshold=6.0 if spec.activation_threshold is None else spec.activation_threshold,
            llm_int8_skip_modules=None if spec.skip is None else list(spec.skip),
            bnb_4bit_compute_dtype=spec.compute_dtype,
            bnb_4bit_quant_type="fp4" if spec.format == "int8" else spec.format,
            bnb_4bit_use_double_quant=spec.double_quant and spec.format != "int8",
        )

    def is_quantizable(self) -> bool:
        """Whether anything is cut."""
        return self.load_in_8bit or self.load_in_4bit

    def quantization_method(self) -> str | None:
        """ "llm_int8", "fp4", "nf4", or None where nothing is cut."""
        if self.load_in_8bit:
            return "llm_int8"
        return self.bnb_4bit_quant_type if self.load_in_4bit else None

    # ---- as a dictionary and as JSON -----------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A config from what ``to_dict`` gave; ``kwargs`` change fields of it.

        With ``return_unused_kwargs`` the result is (config, those of ``kwargs`` that are no fields).
        """
        if not isinstance(config_dict, Mapping):
            raise ParameterError(f"quantization_config is of type {type(config_dict).__name__}; expected a dictionary")
        method = config_dict.get("quant_method", "bitsandbytes")
        if getattr(method, "value", method) != "bitsandbytes":
            raise UnsupportedError(
                f"quantization_config has quant_method {getattr(method, 'value', method)!r}, which is not supported; "
                "gemcut has the formats of bitsandbytes: use a BitsAndBytesConfig"
            )
        config = cls(**dict(config_dict))
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Set fields by name; returns those of ``kwargs`` that are no fields."""
        fields = self.to_dict()
        for name in kwargs:
            if name in fields:
                setattr(self, name, kwargs[name])
        self.bnb_4bit_compute_dtype = _compute_dtype(self.bnb_4bit_compute_dtype)
        self.bnb_4bit_quant_storage = _storage_dtype(self.bnb_4bit_quant_storage)
        self.post_init()
        return {name: value for name, value in kwargs.items() if name not in fields}

    def to_dict(self) -> dict[str, Any]:
        """All fields, dtypes as names: what stands in config.json."""
        fields = copy.deepcopy(self.__dict__)
        for name in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):
            fields[name] = str(fields[name]).removeprefix("torch.")
        return {**fields, "load_in_4bit": self.load_in_4bit, "load_in_8bit": self.load_in_8bit}

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields that differ from the defaults."""
        default = BitsAndBytesConfig().to_dict()
        return {name: value for name, value in self.to_dict().items() if value != default[name]}

    def to_json_string(self, use_diff: bool = True) -> str:
        """``to_diff_dict``, or with ``use_diff=False`` ``to_dict``, as JSON."""
        fields = self.to_diff_dict() if use_diff else self.to_dict()
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | Path) -> None:
        """Write ``to_dict`` as JSON. Raises CheckpointError when it cannot be written."""
        write_text(Path(json_file_path), self.to_json_string(use_diff=False))

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from copy.deepcopy(self.__dict__).items()

    def __repr__(self) -> str:
        return f"BitsAndBytesConfig {self.to_json_string(use_diff=False)}"


def read_quantization_config(config: Any, legacy: Mapping[str, Any]) -> BitsAndBytesConfig | None:
    """What ``from_pretrained`` was given: a config of gemcut's or transformers' class, a dictionary, or None.

    ``legacy`` holds load_in_4bit and load_in_8bit where they were given as arguments of their own, as programs written
    for transformers 4 do.
    Raises ParameterError or UnsupportedError.
    """
    flags = {name: value for name, value in legacy.items() if value is not None}
    wanted = [name for name, value in flags.items() if value]
    if config is None:
        return BitsAndBytesConfig(**flags) if wanted else None
    if wanted:
        raise ParameterError(f"{wanted[0]} and quantization_config were both given; put {wanted[0]} into the config")
    if isinstance(config, BitsAndBytesConfig):
        return config
    if not isinstance(config, Mapping):
        if not hasattr(config, "quant_method") or not hasattr(config, "to_dict"):
            raise ParameterError(
                f"quantization_config is of type {type(config).__name__}; expected a BitsAndBytesConfig or a dictionary"
            )
        config = config.to_dict()
    return cast(BitsAndBytesConfig, BitsAndBytesConfig.from_dict(config))


def _require(name: str, value: object, kind: type, expected: str) -> None:
    if not isinstance(value, kind):
        raise ParameterError(f"{name} is {value!r}; expected {expected}")


def _compute_dtype(value: torch.dtype | str | None) -> torch.dtype:
    if not isinstance(value, (str, torch.dtype, type(None))) or value == "auto":
        raise ParameterError(f"bnb_4bit_compute_dtype is {value!r}; expected a torch.dtype or its name")
    try:
        return parse_dtype(value, torch.float32)
    except ParameterError:
        raise ParameterError(f"bnb_4bit_compute_dtype is {value!r}; expected bfloat16, float16 or float32") from None


def _storage_dtype(value: torch.dtype | str | None) -> torch.dtype:
    name = str(torch.uint8 if value is None else value).removeprefix("torch.")
    if name not in _STORAGE or not isinstance(value, (str, torch.dtype, type(None))):
        raise ParameterError(f"bnb_4bit_quant_storage is {value!r}; expected one of {', '.join(_STORAGE)}")
    return cast(torch.dtype, getattr(torch, name))
