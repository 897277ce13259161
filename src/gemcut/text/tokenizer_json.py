"""Checks of a tokenizer.json before the tokenizers library sees it.

That library aborts the whole process on some files (an error of its own that no ``except`` catches) and panics on
others while it encodes, depending on the text. What does so was found by the fuzzer in tests/text.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Tokenizer as Backend

from gemcut.errors import TokenizerError

# Normalizers and splitters that can panic on some text. No Gemma tokenizer has them.
_KINDS = frozenset(("Precompiled", "FixedLength"))
# A real file is tens of megabytes, and parsing it twice takes a second: only a file that has one of these is parsed
# here. Letters written as escapes could hide a name.
_SUSPICIOUS = re.compile(
    rb'"continuing_subword_prefix"\s*:\s*[^n\s]|"type"\s*:\s*"(?:Precompiled|FixedLength)"|\\u00[4-7][0-9a-fA-F]'
)


def read_backend(data: bytes) -> Backend:
    """The tokenizer that a tokenizer.json describes.

    Raises:
        TokenizerError: it is damaged, or asks for what the library cannot do safely.
    """
    if _SUSPICIOUS.search(data):
        try:
            json.loads(data, object_pairs_hook=_check)
        except (ValueError, RecursionError) as error:
            if isinstance(error, TokenizerError):
                raise
            raise TokenizerError(f"damaged or not a tokenizer ({' '.join(str(error).split())})") from error
    try:
        return Backend.from_buffer(data)
    except BaseException as error:  # bare Exception for every kind of damage, and BaseException for a panic
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise TokenizerError(f"damaged or not a tokenizer ({' '.join(str(error).split())})") from error


def _check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """One object of the file, as soon as it is read; of a name that stands twice, both values are looked at."""
    for name, value in pairs:
        if name == "continuing_subword_prefix" and value is not None and not isinstance(value, int):
            raise TokenizerError(f"not a Gemma tokenizer: its continuing_subword_prefix is {value!r}; expected null")
        if name == "type" and isinstance(value, str) and value in _KINDS:
            raise TokenizerError(f"not a Gemma tokenizer: it has a part of type {value!r}, which Gemma's lack")
    return dict(pairs)
