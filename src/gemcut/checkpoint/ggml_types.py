"""The types a GGUF tensor can have, by their numbers in the file: names, block sizes, and what has gone.

Numbers and sizes: https://github.com/ggml-org/ggml/blob/master/include/ggml.h. They stand here too because importing
the ``gguf`` library takes a quarter of a second, which a look at a header need not wait for; tests compare the two.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GgmlType:
    """A storage format: ``block`` values are kept in ``nbytes`` bytes. ``readable``: gemcut can read it."""

    number: int
    name: str
    block: int
    nbytes: int
    readable: bool = True


_WHOLE = [(0, "F32", 1, 4), (1, "F16", 1, 2), (30, "BF16", 1, 2)]
_QUANTIZED = [
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (29, "IQ1_M", 256, 56),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
]
_UNREADABLE = [
    (9, "Q8_1", 32, 40),
    (15, "Q8_K", 256, 292),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (41, "Q1_0", 128, 18),
]

#: Every type that exists, by number.
TYPES = {row[0]: GgmlType(*row) for row in _WHOLE + _QUANTIZED} | {
    row[0]: GgmlType(*row, readable=False) for row in _UNREADABLE
}
#: Types whose values are stored as they are.
WHOLE = frozenset(name for _, name, _, _ in _WHOLE)
#: Types that llama.cpp had and took out again, each with the type to take instead.
REMOVED = {
    4: ("Q4_2", "Q4_0"),
    5: ("Q4_3", "Q4_1"),
    31: ("Q4_0_4_4", "Q4_0"),
    32: ("Q4_0_4_8", "Q4_0"),
    33: ("Q4_0_8_8", "Q4_0"),
    36: ("IQ4_NL_4_4", "IQ4_NL"),
    37: ("IQ4_NL_4_8", "IQ4_NL"),
    38: ("IQ4_NL_8_8", "IQ4_NL"),
}
#: From here on the numbers are those of ik_llama.cpp, which has types of its own.
FIRST_FOREIGN = 97


def refusal(number: int) -> str:
    """Why a tensor of a type that is not in TYPES, or not readable, is refused, and what to take instead."""
    if number in REMOVED:
        name, instead = REMOVED[number]
        return f"{name}, which llama.cpp removed; take the {instead} file of this model (or any of Q4_K_M, Q8_0, F16)"
    if number in TYPES:
        name = TYPES[number].name
        return f"{name}, which cannot be dequantized here; take a file quantized as Q4_K_M, Q8_0, F16 or similar"
    if FIRST_FOREIGN <= number < 1000:
        return f"{number}, one of ik_llama.cpp's own; take a file quantized as Q4_K_M, Q8_0, F16 or similar"
    return f"{number}, which gemcut does not know; take a file quantized as Q4_K_M, Q8_0, F16 or similar"
