"""A Quantization from what a person wrote."""

from __future__ import annotations

from typing import Any, cast

from gemcut.errors import ParameterError
from gemcut.quantization.spec import FORMATS, Format, Quantization


def parse_quantization(value: Any) -> Quantization | None:
    """``None``, a format's name, a Quantization, or anything with ``to_quantization()`` (a BitsAndBytesConfig).

    A format's name keeps the head whole and uses double quantization where the format has it.
    Raises ParameterError.
    """
    if value is None or isinstance(value, Quantization):
        return value
    if hasattr(value, "to_quantization"):
        return cast("Quantization | None", value.to_quantization())
    if isinstance(value, str) and value.lower() in FORMATS:
        return Quantization(cast(Format, value.lower()))
    raise ParameterError(f"quantization is {value!r}; expected one of {', '.join(FORMATS)}, or a Quantization")
