"""Quantization: which format a model's weights are cut to, and everything that is to be chosen about it.

Free of torch: a plan for a model and a command's options need no more than this.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from gemcut.errors import ParameterError

if TYPE_CHECKING:
    import torch

FourBitType = Literal["nf4", "fp4"]
Format = Literal[FourBitType, "int8"]
FOUR_BIT: tuple[FourBitType, ...] = get_args(FourBitType)
FORMATS: tuple[Format, ...] = get_args(Format)
#: What layers compute in and unquantized weights are kept in, by its bytes; and what people call these.
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
COMPUTE_DTYPES = tuple(DTYPE_BYTES)
#: Blocks one nested statistic covers in double quantization.
NESTED_BLOCK_SIZE = 256
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Quantization:
    """How the linear layers, and if wanted the head, are cut.

    Attributes:
        format: "nf4", "fp4" or "int8".
        double_quant: quantize the 4-bit formats' block statistics too (0.37 bits a weight less, no cost in quality).
        block_size: values that share a statistic in a 4-bit format.
        head: "int8" cuts the embedding, which is also the output head, to 8 bits a value; None keeps it whole.
        compute_dtype: what linear layers compute in, "bfloat16", "float16" or "float32" (a torch.dtype is taken, too,
            and kept by its name); None: the model's dtype.
        skip: modules left whole, by the end of their Hugging Face name or one of its parts, as transformers matches
            them. None: the head alone.
        activation_threshold: int8 only. None keeps activations whole. A number runs LLM.int8()'s arithmetic: rows of
            activations are rounded to 8 bits, except columns that hold a magnitude of at least this.
    """

    format: Format
    double_quant: bool = True
    block_size: int = 64
    head: Literal["int8"] | None = None
    compute_dtype: str | None = None
    skip: tuple[str, ...] | None = None
    activation_threshold: float | None = None

    def __post_init__(self) -> None:
        if self.compute_dtype is not None:
            object.__setattr__(self, "compute_dtype", str(self.compute_dtype).removeprefix("torch."))
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

        if self.compute_dtype not in (None, *COMPUTE_DTYPES):
            raise ParameterError(
                f"compute_dtype is {self.compute_dtype!r}; expected one of {', '.join(COMPUTE_DTYPES)}, or None"
            )

    def dtype(self, models: torch.dtype) -> torch.dtype:
        """What linear layers compute in, in a model that computes in ``models``."""
        if self.compute_dtype is None:
            return models
        import torch

        found: torch.dtype = getattr(torch, self.compute_dtype)
        return found

    def replace(self, **changes: object) -> Quantization:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def skip_matcher(patterns: tuple[str, ...] | None) -> Callable[[str], bool]:
    """Whether a linear layer stays whole, given its Hugging Face module name.

    A pattern matches the end of a name, or as a regular expression its beginning up to a dot, which is how
    transformers reads ``llm_int8_skip_modules``: "o_proj", "model.layers.3" and "model.layers.*.mlp" all work.
    Raises ParameterError for a pattern that is no regular expression.
    """
    if patterns is None:
        return lambda name: False
    for pattern in patterns:
        try:
            _beginning(pattern)
        except (re.error, RecursionError, OverflowError):
            raise ParameterError(
                f"skip has {pattern!r}, which is no module name or regular expression; expected one such as 'o_proj'"
            ) from None
    return lambda name: any(name.endswith(pattern) or _beginning(pattern).match(name) for pattern in patterns)


@functools.lru_cache(maxsize=64)
def _beginning(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))")
