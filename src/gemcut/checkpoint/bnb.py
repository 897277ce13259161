"""What a folder says of weights that bitsandbytes' format packs: its config.json, and the names of the tensors."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from gemcut.errors import CheckpointError, ParameterError
from gemcut.files import read_json, shown
from gemcut.quantization.spec import COMPUTE_DTYPES, Quantization

_BESIDE_4BIT = re.compile(
    r"(?P<base>.+\.weight)\."
    r"(?P<leaf>absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__[a-z0-9]{1,16})"
)
_BESIDE_8BIT = re.compile(r"(?P<module>.+)\.(?P<leaf>SCB|weight_format)")
_METHODS = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "exl2": "EXL2",
    "mlx": "MLX",
    "compressed-tensors": "compressed-tensors (llm-compressor's fp8, int8 or int4)",
    "fp8": "fp8",
    "fbgemm_fp8": "fp8 (fbgemm)",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "quanto": "quanto",
    "torchao": "torchao",
}
_LOADS = "gemcut reads whole weights and bitsandbytes' 4-bit and int8 checkpoints"


def companion(name: str) -> tuple[str, str]:
    """("….up_proj.weight", "absmax") of a tensor that stands beside a packed weight; (name, "") of any other."""
    match = _BESIDE_4BIT.fullmatch(name)
    if match:
        return match["base"], match["leaf"]
    match = _BESIDE_8BIT.fullmatch(name)
    return (f"{match['module']}.weight", match["leaf"]) if match else (name, "")


def stored_quantization(config: Path) -> Quantization | None:
    """How the weights beside this config.json are cut; None where they are whole.

    Missing keys have transformers' defaults (fp4, no double quantization, fp32 compute).
    Raises CheckpointError for another method than bitsandbytes, naming it, and for damaged values.
    """
    try:
        data = read_json(config)
        raw, own = data.get("quantization_config"), data.get("gemcut")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"cannot read {config}: {error}") from None
    head = own.get("head") if isinstance(own, dict) else None
    if raw is None and isinstance(data.get("quantization"), dict) and "group_size" in data["quantization"]:
        raw = data["quantization"]  # where older mlx-lm says it
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{config}: quantization_config is no JSON object")
    method = raw.get("quant_method", "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & raw.keys() else None)
    if method is None and {"group_size", "bits"} <= raw.keys():
        method = "mlx"  # mlx-lm writes these two alone
    if method is None:
        raise CheckpointError(
            f"{config}: quantization_config names no quant_method, so how the weights are cut is not known: {_LOADS}; "
            "if they are whole, remove quantization_config"
        )
    if method != "bitsandbytes":
        name = _METHODS.get(str(method).lower(), shown(method, 40))
        raise CheckpointError(
            f"{config.parent} is quantized by {name}, which is not supported: {_LOADS}; take the whole weights it was "
            "made from and cut them to nf4 or int8 while loading, or take a GGUF file"
        )
    try:
        return _spec(raw, head)
    except (ParameterError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{config}: quantization_config is damaged: {error}") from None


def _spec(raw: dict[str, Any], head: Any) -> Quantization:
    four = raw.get("load_in_4bit", raw.get("_load_in_4bit", False)) is True
    eight = raw.get("load_in_8bit", raw.get("_load_in_8bit", False)) is True
    if four == eight:
        raise ParameterError("it must set one of load_in_4bit and load_in_8bit")
    skip = raw.get("llm_int8_skip_modules")
    if skip is not None and not (isinstance(skip, list) and all(isinstance(module, str) for module in skip)):
        raise ParameterError("llm_int8_skip_modules is no list of names")
    modules = None if skip is None else tuple(skip)
    if eight:
        threshold = raw.get("llm_int8_threshold", 6.0)
        if type(threshold) not in (int, float) or not math.isfinite(threshold):
            raise ParameterError("llm_int8_threshold is no number")
        return Quantization("int8", head=head, skip=modules)
    compute = str(raw.get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch.")
    if compute not in COMPUTE_DTYPES:
        expected = ", ".join(COMPUTE_DTYPES)
        raise ParameterError(f"bnb_4bit_compute_dtype is {compute[:20]!r}; expected one of {expected}")
    return Quantization(
        raw.get("bnb_4bit_quant_type", "fp4"),
        double_quant=raw.get("bnb_4bit_use_double_quant", False) is True,
        head=head,
        compute_dtype=compute,
        skip=modules,
    )


def config_entries(spec: Quantization, dtype: str) -> dict[str, Any]:
    """What config.json says of cut weights: transformers' ``quantization_config``, and our own word for the head."""
    own = {} if spec.head is None else {"gemcut": {"head": spec.head}}
    return {"quantization_config": bnb_config(spec, dtype), **own}


def bnb_config(spec: Quantization, dtype: str) -> dict[str, Any]:
    """``quantization_config`` of config.json, as transformers writes it for bitsandbytes."""
    eight = spec.format == "int8"
    compute = spec.compute_dtype or dtype
    return {
        "_load_in_4bit": not eight,
        "_load_in_8bit": eight,
        "bnb_4bit_compute_dtype": "float32" if eight else compute,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4" if eight else spec.format,
        "bnb_4bit_use_double_quant": spec.double_quant and not eight,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None if spec.skip is None else list(spec.skip),
        "llm_int8_threshold": 6.0 if spec.activation_threshold is None else spec.activation_threshold,
        "load_in_4bit": not eight,
        "load_in_8bit": eight,
        "quant_method": "bitsandbytes",
    }
