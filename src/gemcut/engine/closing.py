"""The shortest way from amid an answer to an end that its grammar allows, so that no answer is cut off in the middle.

When an answer's tokens run out, what is open must be closed: strings, arrays, members that the schema requires. The way
is searched by going on with a copy of the matcher, each time with the token that closes most. What is found is an end,
and usually the shortest one; nothing proves that there is no shorter one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from llguidance import LLMatcher

Array = np.ndarray[Any, np.dtype[Any]]

#: Tokens of the longest way that is looked for.
MOST_STEPS = 768
_CLOSERS = b'"}]'
_VALUES = (b"null", b'""', b"0", b"1", b"[]", b"{}", b"true", b"false")
_PUNCTUATION = (b'"', b":", b",", b"{", b"[")


class Closer:
    """Ways to an end over one vocabulary.

    Attributes:
        plain: int32 [ceil(V / 32)]: bits of the tokens that may stand within any JSON string and end none.
        plain_count: how many these are.
        quotes: ids of the tokens that begin with a quotation mark.
    """

    def __init__(self, tokens: Sequence[bytes], special: frozenset[int]) -> None:
        """``tokens`` are the texts of all V tokens, ``special`` the ids of those that have no text."""
        words = -(-len(tokens) // 32)
        plain = np.zeros(words * 32, dtype=np.uint8)
        by_text: dict[bytes, int] = {}
        closing: list[bytes] = []
        quotes: set[int] = set()
        for token_id, text in enumerate(tokens):
            if not text or token_id in special:
                continue
            by_text.setdefault(text, token_id)
            if b'"' not in text and b"\\" not in text and min(text) >= 0x20 and b"\x7f" not in text:
                plain[token_id] = _is_utf8(text)
            if text.startswith(b'"'):
                quotes.add(token_id)
            if len(text) <= 8 and not text.strip(_CLOSERS):
                closing.append(text)
        self.plain: Array = np.packbits(plain, bitorder="little").view(np.int32)
        self.plain_count = int(plain.sum())
        self.quotes = frozenset(quotes)
        closing = sorted(set(closing), key=lambda text: (-len(text), text))
        outside = [text for text in closing if not text.startswith(b'"')]
        within = [text for text in closing if text.startswith(b'"') and text != b'""']
        single = [bytes([byte]) for byte in range(0x20, 0x7F) if byte not in b' "\\:,{[]}']

        def ids(*groups: Sequence[bytes]) -> Array:
            found = dict.fromkeys(by_text[text] for group in groups for text in group if text in by_text)
            return np.fromiter(found, dtype=np.int64)

        # What is tried first, outside of strings and within them.
        self._outside = ids(outside, _VALUES, _PUNCTUATION, within, single, (b"\\",))
        self._within = ids(within, [b'"'], single, (b"\\",), outside)
        # Letters that no JSON value begins with: where one of them may come, a string is open.
        self._letters = ids([b"x", b"q", b"Z", b"K"])
        self._structure = frozenset(i for text, i in by_text.items() if set(text) & set(b'"{}[]:,'))
        self._escape = by_text.get(b"\\", -1)
        self._words = words

    def way(self, matcher: LLMatcher) -> list[int] | None:
        """Tokens that end the answer from ``matcher``'s place on, [] where it may end there. None: no way was found."""
        matcher = matcher.deep_copy()
        way: list[int] = []
        # Masks within the string or number that is being written, and those from which every token led to one of them.
        seen: set[bytes] = set()
        barren: set[bytes] = set()
        mask = np.zeros(self._words, dtype=np.int32)
        while len(way) < MOST_STEPS:
            if matcher.is_accepting():
                return way
            forced = matcher.compute_ff_tokens()
            if forced:
                if not matcher.consume_tokens(forced):
                    return None
                way += forced
                seen.clear()
                continue
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            allowed = self._ordered(mask)
            if matcher.is_error() or not len(allowed):
                return None
            token, place = int(allowed[0]), _digest(mask)
            if place in seen and place not in barren:
                # The same choice again: in a pattern such as [a-z]+@ the first letter leads nowhere.
                elsewhere = self._elsewhere(matcher, allowed, seen)
                if elsewhere is None:
                    barren.add(place)
                else:
                    token = elsewhere
            seen.add(place)
            if token in self._structure:
                seen.clear()
            if not matcher.consume_token(token):
                return None
            way.append(token)
        return None

    def _ordered(self, mask: Array) -> Array:
        """The tokens to go on with that ``mask`` allows, the one that closes most first."""
        open_string = bool(_bits(mask, self._letters).any())
        order = self._within if open_string else self._outside
        allowed: Array = order[_bits(mask, order)]
        if not len(allowed):
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))[:64]
        return allowed

    def _elsewhere(self, matcher: LLMatcher, allowed: Array, seen: set[bytes]) -> int | None:
        """The first token behind which other tokens are allowed than at any place before. None: there is none."""
        mask = np.zeros(self._words, dtype=np.int32)
        for token in allowed.tolist():
            if token == self._escape:
                continue
            ahead = matcher.deep_copy()
            if not ahead.consume_token(token):
                continue
            if ahead.is_accepting():
                return int(token)
            ahead.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            if not ahead.is_error() and _digest(mask) not in seen:
                return int(token)
        return None


def _digest(mask: Array) -> bytes:
    """What tells masks apart."""
    return hashlib.blake2b(mask.data, digest_size=16).digest()


def _bits(mask: Array, ids: Array) -> Array:
    """bool [k]: whether the bit of each id is set."""
    found: Array = (mask[ids >> 5] >> (ids & 31)) & 1
    return found.astype(bool)


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
