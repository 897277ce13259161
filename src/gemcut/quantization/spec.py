"""Quantization: which format a model's weights are cut to, and everything that is to be chosen about it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch

from gemcut.errors import ParameterError

Format = Literal["nf4", "fp4", "int8"]
FORMATS = ("nf4", "fp4", "int8")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Quantization:
    """How the linear layers, and if wanted the head, are cut.

    Attributes:
        format: "nf4", "fp4" or "int8".
        double_quant: quantize the 4-bit formats' block statistics too (0.37 bits a weight less, no cost in quality).
        block_size: values that share a statistic in a 4-bit format.
        head: "int8" cuts the embedding, which is also the output head, to 8 bits a value; None keeps it whole.
        compute_dtype: what linear layers compute in; None: the model's dtype.
        skip: modules left whole, by the end of their Hugging Face name or one of its parts, as transformers matches
            them. None: the head alone.
        activation_threshold: int8 only. None keeps activations whole. A number runs LLM.int8()'s arithmetic: rows of
            activations are rounded to 8 bits, except columns that hold a magnitude of at least this.
    """

    format: Format
    double_quant: bool = True
    block_size: int = 64
    head: Literal["int8"] | None = None
    compute_dtype: torch.dtype | None = None
    skip: tuple[str, ...] | None = None
    activation_threshold: float | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ParameterError(f"quantization is {self.format!r}; expected one of {', '.join(FORMATS)}")
        if self.head not in (None, "int8"):
            raise ParameterError(f"head is {self.head!r}; expected int8, or None to keep it whole")
        if self.block_size not in BLOCK_SIZES:
            raise ParameterError(
                f"block_size is {self.block_size!r}; expected one of {', '.join(map(str, BLOCK_SIZES))}"
            )
        if self.activation_threshold is not None and (self.format != "int8" or not self.activation_threshold >= 0):
            raise ParameterError(
                f"activation_threshold is {self.activation_threshold!r}; expected a number of 0 or more, with int8 only"
            )

    def replace(self, **changes: object) -> Quantization:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
