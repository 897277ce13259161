"""Numbers in JSON that end: a grammar allows 0.333… for ever, and 1e999, which no program reads as a number.

A number has at most ``MOST_CHARACTERS`` characters and two digits of exponent, unless the schema demands more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from gemcut.engine.closing import Array

MOST_CHARACTERS = 24
_DIGITS = frozenset(b"0123456789")
_QUOTE, _ESCAPE = 0x22, 0x5C
_LARGE = re.compile(rb"[0-9][eE][+-]?[0-9]{3}")


class NumberScan:
    """Where in a JSON text one is, as far as its numbers are concerned."""

    def __init__(self, *, or_words: bool = False) -> None:
        """``or_words``: it may also be words, which do not begin as an object or an array."""
        self._or_words = or_words
        self.words = False  # it is no JSON: it did not begin so
        self._begun = False
        self.in_string = self._escaped = False
        self.length = 0  # characters of the number that is being written
        self.exponent: int | None = None  # digits of its exponent

    def feed(self, text: bytes) -> None:
        """Go on by a token's bytes."""
        if self.words or (self.in_string and not self._escaped and b'"' not in text and b"\\" not in text):
            return
        if not self._begun and (start := text.lstrip(b" \t\r\n")):
            self._begun = True
            self.words = self._or_words and start[0] not in b"{["
        for byte in text:
            if self.in_string:
                if self._escaped:
                    self._escaped = False
                elif byte == _ESCAPE:
                    self._escaped = True
                elif byte == _QUOTE:
                    self.in_string = False
            elif byte in _DIGITS or (byte in b"-+.eE" and (self.length or byte == 0x2D)):
                self.length += 1
                if byte in b"eE":
                    self.exponent = 0
                elif self.exponent is not None and byte in _DIGITS:
                    self.exponent += 1
            else:
                self.in_string = byte == _QUOTE
                self.length, self.exponent = 0, None


class NumberLimits:
    """The tokens of a vocabulary that make numbers too long, at each point of one."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        def bits(found: Sequence[bool]) -> Array:
            padded = np.zeros(-(-len(tokens) // 32) * 32, dtype=np.uint8)
            padded[: len(found)] = found
            return np.packbits(padded, bitorder="little").view(np.int32)

        digits = [len(text) - len(text.lstrip(b"0123456789")) for text in tokens]
        self._longer = bits([text[:1] in (b"-", b"+", b".", b"e", b"E") or text[:1].isdigit() for text in tokens])
        #: By digits of the exponent that are there: tokens that give it a third.
        self._exponents = [bits([n > 2 - have for n in digits]) for have in range(3)]
        self._large = bits([_LARGE.search(text) is not None for text in tokens])

    def narrow(self, row: Array, scan: NumberScan) -> None:
        """Take what makes a number too long out of a mask, unless nothing would be left."""
        if scan.in_string or scan.words:
            return
        if scan.length >= MOST_CHARACTERS:
            forbidden = self._longer
        elif scan.exponent is not None:
            forbidden = self._exponents[min(scan.exponent, 2)]
        else:
            forbidden = self._large
        left = row & ~forbidden
        if left.any():
            row[:] = left
