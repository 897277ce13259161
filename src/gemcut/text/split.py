"""Texts into words, terms and lines, many texts at once, with a hash of each piece: made once, shared by every step.

A *word* is what stands between white space, as ``str.split()`` gives it; the published quality rules count these. A
*term* is a run of letters, digits and underscores in lower case (``\\w+`` of the ``re`` module), a Chinese, Japanese
kana or Thai character being a term of its own; deduplication, decontamination and the lexicon compare these. A *line*
is what ``text.split("\\n")`` gives, without white space at its ends, empty ones left out. A *paragraph* is the lines
between empty lines.

A piece's hash is taken over its bytes in UTF-8, eight at a time: numpy does each round for all pieces that are long
enough. A line's hash is that of its words in their order. Hashes are stored (indexes, signatures): ``HASH_VERSION``
must change when they do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    U64 = NDArray[np.uint64]
    I64 = NDArray[np.int64]
    Codes = NDArray[np.uint8] | NDArray[np.uint32]

HASH_VERSION = "gemcut-chunk64-1"

SPACE, LETTER, WORDLIKE, ALONE = 1, 2, 4, 8
#: Code points from here on (the last planes of Unicode) hold no letters, digits or spaces.
_LIMIT = 0x32400
_ODD = np.uint64(0x9E3779B97F4A7C15)  # of SplitMix64
_CHUNK = np.uint64(0xD1342543DE82EF95)
#: For the last, shorter chunk of a piece: which of its eight bytes count, by their number.
_MASKS = np.array([(1 << 8 * n) - 1 for n in range(8)] + [(1 << 64) - 1], np.uint64)


@dataclass(slots=True)
class Pieces:
    """Pieces of one text: ``start`` and ``end`` in code points, and a 64-bit ``hash`` of each."""

    start: I64
    end: I64
    hash: U64

    def __len__(self) -> int:
        return len(self.start)

    def texts(self, text: str) -> list[str]:
        """The pieces as strings of ``text``, the text they were found in."""
        return [text[a:b] for a, b in zip(self.start.tolist(), self.end.tolist(), strict=True)]


@dataclass(slots=True)
class Split:
    """What one text consists of.

    ``codes`` are its code points (uint8 where the texts that were split together are ASCII, else uint32),
    ``letters[i]`` says that word i holds a letter, ``breaks[i]`` that line i begins a paragraph.
    """

    codes: Codes
    words: Pieces
    terms: Pieces
    lines: Pieces
    breaks: NDArray[np.bool_]
    letters: NDArray[np.bool_]


class Many:
    """Texts that were split together: flat arrays over all of them, places counted from the first text's beginning.

    Text i's code points are ``codes[begin[i] : begin[i + 1] - 1]``; its pieces of a kind (0 words, 1 terms, 2 lines)
    those from ``cuts[kind][i]`` to ``cuts[kind][i + 1]`` of ``pieces[kind]``. ``letters`` and ``breaks`` are those of
    ``Split``, over all words and lines.
    """

    __slots__ = ("begin", "breaks", "codes", "cuts", "letters", "pieces")

    def __init__(self, texts: Sequence[str]) -> None:
        """Raises UnicodeEncodeError for a text with lone surrogates, which the readers let none through."""
        joined = "\n".join(texts)
        sizes = np.fromiter(map(len, texts), np.int64, len(texts))
        begins = np.zeros(len(texts) + 1, np.int64)
        np.cumsum(sizes + 1, out=begins[1:])
        found = _ascii(joined) if joined.isascii() else _unicode(joined)
        words = Pieces(*(run := _runs((found.kind & SPACE) == 0)), found.exact.hash(*run))
        terms = Pieces(*(run := _terms(found.kind)), found.lower.hash(*run))
        lines, self.breaks = _lines(found.codes, words)
        # From each word's first character to the next word's: the white space between them holds no letters.
        some = len(words) > 0
        self.letters = (np.bitwise_or.reduceat(found.kind, words.start) & LETTER) > 0 if some else np.zeros(0, np.bool_)
        self.codes = found.codes
        self.begin: list[int] = begins.tolist()
        self.pieces = (words, terms, lines)
        self.cuts: list[list[int]] = [np.searchsorted(piece.start, begins).tolist() for piece in self.pieces]
        own = np.array(self.cuts[2][:-1])
        self.breaks[own[own < len(self.breaks)]] = True

    def one(self, i: int) -> Split:
        """Text i's."""
        base, stop = self.begin[i], self.begin[i + 1] - 1
        own = []
        for piece, cut in zip(self.pieces, self.cuts, strict=True):
            a, b = cut[i], cut[i + 1]
            own.append(Pieces(piece.start[a:b] - base, piece.end[a:b] - base, piece.hash[a:b]))
        breaks = self.breaks[self.cuts[2][i] : self.cuts[2][i + 1]]
        letters = self.letters[self.cuts[0][i] : self.cuts[0][i + 1]]
        return Split(self.codes[base:stop], own[0], own[1], own[2], breaks, letters)


def split_text(text: str) -> Split:
    """One text; several are split much faster together (``Many``)."""
    return Many([text]).one(0)


@dataclass(frozen=True, slots=True)
class _Characters:
    """All characters of some texts: their code points and flags, and their bytes as they are and in lower case."""

    codes: Codes
    kind: NDArray[np.uint8]
    exact: _Bytes
    lower: _Bytes


class _Bytes:
    """Text in UTF-8, and ``place``: for each character the number of bytes before it, None where that is its number."""

    def __init__(self, data: bytes, place: I64 | None) -> None:
        # Each byte with the seven behind it, little-endian; the text is followed by zeros.
        self._chunks = np.ndarray(len(data) + 1, np.dtype("<u8"), data + bytes(8), strides=(1,))
        self._place = place

    def hash(self, start: I64, end: I64) -> U64:
        """A hash of each piece from character ``start`` to ``end``; no piece is empty."""
        if self._place is not None:
            start, end = self._place[start], self._place[end]
        left = end - start
        state = left.astype(np.uint64) * _ODD
        active: I64 | slice = slice(None)
        while len(left):
            chunk = self._chunks[start] & _MASKS[np.minimum(left, 8)]
            value = (state[active] ^ chunk) * _CHUNK
            state[active] = value ^ (value >> np.uint64(32))
            longer = np.flatnonzero(left > 8)
            active = longer if isinstance(active, slice) else active[longer]
            start, left = start[longer] + 8, left[longer] - 8
        return mix(state)


def _ascii(text: str) -> _Characters:
    data = text.encode()
    kind = np.frombuffer(data.translate(_ascii_flags()), np.uint8)
    return _Characters(np.frombuffer(data, np.uint8), kind, _Bytes(data, None), _Bytes(data.lower(), None))


def _unicode(text: str) -> _Characters:
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    flags, lower = _tables()
    known = np.minimum(codes, _LIMIT - 1)  # the last entry of the tables stands for all above
    lowered = np.where(codes < _LIMIT, lower[known], codes)
    folded = lowered.tobytes().decode("utf-32-le")
    return _Characters(
        codes, flags[known], _Bytes(text.encode(), _places(codes)), _Bytes(folded.encode(), _places(lowered))
    )


def _places(codes: NDArray[np.uint32]) -> I64:
    places = np.zeros(len(codes) + 1, np.int64)
    np.cumsum(1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF).astype(np.int64), out=places[1:])
    return places


def mix(values: U64) -> U64:
    """SplitMix64's last steps: every bit of the result depends on every bit of the value."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@cache
def _tables() -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
    """For each code point: its flags, and its lower case, of which the first where there are several."""
    characters = [chr(i) for i in range(_LIMIT)]
    flags = np.zeros(_LIMIT, np.uint8)
    flags |= np.fromiter((c.isspace() for c in characters), np.uint8, _LIMIT) * np.uint8(SPACE)
    flags |= np.fromiter((c.isalpha() for c in characters), np.uint8, _LIMIT) * np.uint8(LETTER)
    flags |= np.fromiter((c.isalnum() or c == "_" for c in characters), np.uint8, _LIMIT) * np.uint8(WORDLIKE)
    for first, last in ((0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323FF), (0x3040, 0x30FF), (0x0E00, 0x0E7F)):
        inside = flags[first : last + 1]
        inside[(inside & WORDLIKE) > 0] |= ALONE
    lower = np.fromiter((ord(c.lower()[0]) for c in characters), np.uint32, _LIMIT)
    lower[0xD800:0xE000] = np.arange(0xD800, 0xE000)  # halves of pairs stay as they are; no text holds them
    return flags, lower


@cache
def _ascii_flags() -> bytes:
    out = bytearray(256)
    for i in range(128):
        c = chr(i)
        out[i] = SPACE * c.isspace() + LETTER * c.isalpha() + WORDLIKE * (c.isalnum() or c == "_")
    return bytes(out)


def _runs(inside: NDArray[np.bool_]) -> tuple[I64, I64]:
    """Start and end of each run of True."""
    padded = np.zeros(len(inside) + 2, np.bool_)
    padded[1:-1] = inside
    edges = np.flatnonzero(padded[1:] != padded[:-1])
    return edges[::2], edges[1::2]


def _terms(kind: NDArray[np.uint8]) -> tuple[I64, I64]:
    start, end = _runs((kind & WORDLIKE) > 0)
    alone = np.flatnonzero(kind & ALONE)
    if not len(alone):
        return start, end
    # A character that stands alone ends what is before it and begins what is behind it.
    opens, closes = np.zeros(len(kind) + 1, np.bool_), np.zeros(len(kind) + 1, np.bool_)
    opens[start], closes[end] = True, True
    inside = np.zeros(len(kind) + 1, np.bool_)
    inside[:-1] = (kind & WORDLIKE) > 0
    opens[alone] = True
    closes[alone + 1] = True
    opens[alone + 1] |= inside[alone + 1]
    before = alone[alone > 0]
    closes[before] |= inside[before - 1]
    return np.flatnonzero(opens), np.flatnonzero(closes)


def _lines(codes: Codes, words: Pieces) -> tuple[Pieces, NDArray[np.bool_]]:
    """Lines that hold words, from the first word's start to the last one's end; and which follow an empty line."""
    stops = np.append(np.flatnonzero(codes == 10), len(codes))
    begins = np.concatenate([np.zeros(1, np.int64), stops[:-1] + 1])
    first = np.searchsorted(words.start, begins)
    last = np.append(first[1:], len(words))
    full = last > first
    follows = np.zeros(len(full), np.bool_)
    follows[1:] = ~full[:-1]
    first, last = first[full], last[full]
    if not len(first):
        empty = np.zeros(0, np.int64)
        return Pieces(empty, empty, np.zeros(0, np.uint64)), np.zeros(0, np.bool_)
    rank = (np.arange(len(words)) - np.repeat(first, last - first)).astype(np.uint64)
    hashes = mix(np.add.reduceat(mix(words.hash + rank * _ODD), first))
    return Pieces(words.start[first], words.end[last - 1], hashes), follows[full]
