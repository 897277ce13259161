"""Texts into words, terms and lines, many texts at once, with a hash of each piece: made once, shared by every step.

A *word* is what stands between white space, as ``str.split()`` gives it; the published quality rules count these. A
*term* is a run of letters, digits and underscores in lower case (``\\w+`` of the ``re`` module), a Chinese, Japanese
kana or Thai character being a term of its own; deduplication, decontamination and the lexicon compare these. A *line*
is what ``text.split("\\n")`` gives, without white space at its ends, empty ones left out. A *paragraph* is the lines
between empty lines.

All pieces are found with numpy on the array of code points. The hash of a piece is a polynomial of random numbers
drawn for its code points, computed from prefix sums, so that its cost does not depend on the number of pieces. Hashes
are stored (indexes, signatures): ``HASH_VERSION`` must change when they do.
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

HASH_VERSION = "gemcut-poly64-1"

SPACE, LETTER, WORDLIKE, ALONE = 1, 2, 4, 8
#: Code points from here on (the last planes of Unicode) hold no letters, digits or spaces.
_LIMIT = 0x32400
_ODD = 0x9E3779B97F4A7C15  # of SplitMix64; odd, so it has an inverse modulo 2^64
_STEP = 0xD1342543DE82EF95


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class Split:
    """What one text consists of. ``codes`` are its code points; ``breaks[i]`` says that line i begins a paragraph."""

    codes: NDArray[np.uint32]
    words: Pieces
    terms: Pieces
    lines: Pieces
    breaks: NDArray[np.bool_]
    newlines: int


def split_text(text: str) -> Split:
    """One text; ``split_texts`` is much faster where there are many."""
    return split_texts([text])[0]


def split_texts(texts: Sequence[str]) -> list[Split]:
    """Every text's pieces, in order.

    Raises UnicodeEncodeError for a text with lone surrogates, which the readers let none through.
    """
    joined = "\n".join(texts)
    codes = np.frombuffer(joined.encode("utf-32-le"), np.uint32)
    flags, lower, random = _tables()
    known = np.minimum(codes, _LIMIT - 1)  # the last entry of the tables stands for all above
    kind = flags.take(known)
    sizes = np.fromiter(map(len, texts), np.int64, len(texts))
    begins = np.zeros(len(texts) + 1, np.int64)
    np.cumsum(sizes + 1, out=begins[1:])

    high = codes if len(codes) and codes.max() >= _LIMIT - 1 else None
    exact = _Hasher(_replace(random.take(known), high))
    folded = _Hasher(_replace(random.take(lower.take(known)), high))

    words = _runs((kind & SPACE) == 0)
    terms = _terms(kind)
    lines, paragraph = _lines(codes, kind)
    columns = [
        (words, exact.hash(*words), _cut(words[0], begins)),
        (terms, folded.hash(*terms), _cut(terms[0], begins)),
        (lines, exact.hash(*lines), _cut(lines[0], begins)),
    ]
    breaks = np.cumsum(codes == 10)
    out = []
    ends = begins.tolist()
    for i in range(len(texts)):
        base, stop = ends[i], ends[i + 1] - 1
        found = []
        for (start, end), hashed, cut in columns:
            a, b = cut[i], cut[i + 1]
            found.append(Pieces(start[a:b] - base, end[a:b] - base, hashed[a:b]))
        newline = int(breaks[stop - 1] - (breaks[base - 1] if base else 0)) if stop > base else 0
        begin = paragraph[columns[2][2][i] : columns[2][2][i + 1]].copy()
        begin[:1] = True
        out.append(Split(codes[base:stop], found[0], found[1], found[2], begin, newline))
    return out


def _replace(values: U64, codes: NDArray[np.uint32] | None) -> U64:
    """Random numbers where some code points are above the tables: theirs are computed from the code point itself."""
    if codes is None:
        return values
    return np.where(codes >= _LIMIT - 1, mix(codes.astype(np.uint64) + np.uint64(_STEP)), values)


class _Hasher:
    """Hashes of any pieces of one sequence of 64-bit numbers, from prefix sums modulo 2^64."""

    def __init__(self, values: U64) -> None:
        powers, self._inverse = _powers(len(values))
        self._sums = np.zeros(len(values) + 1, np.uint64)
        np.cumsum(values * powers, out=self._sums[1:])

    def hash(self, start: I64, end: I64) -> U64:
        return mix((self._sums[end] - self._sums[start]) * self._inverse[start] + (end - start).astype(np.uint64))


def mix(values: U64) -> U64:
    """SplitMix64's last steps: every bit of the result depends on every bit of the value."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_POWERS: list[U64] = []


def _powers(count: int) -> tuple[U64, U64]:
    """Powers of ``_ODD`` and of its inverse modulo 2^64, for at least ``count`` places."""
    if not _POWERS or len(_POWERS[0]) < count:
        size = max(1 << 20, 1 << (count - 1).bit_length())
        _POWERS[:] = [_progression(_ODD, size), _progression(pow(_ODD, -1, 1 << 64), size)]
    return _POWERS[0][:count], _POWERS[1]


def _progression(base: int, size: int) -> U64:
    powers = np.ones(size, np.uint64)
    done = 1
    while done < size:  # doubling: powers[done:2 done] = powers[:done] * base^done
        more = min(done, size - done)
        powers[done : done + more] = powers[:more] * np.uint64(pow(base, done, 1 << 64))
        done += more
    return powers


@cache
def _tables() -> tuple[NDArray[np.uint8], NDArray[np.uint32], U64]:
    """For each code point: its flags, its lower case, its random number."""
    characters = [chr(i) for i in range(_LIMIT)]
    flags = np.zeros(_LIMIT, np.uint8)
    flags |= np.fromiter((c.isspace() for c in characters), np.uint8, _LIMIT) * np.uint8(SPACE)
    flags |= np.fromiter((c.isalpha() for c in characters), np.uint8, _LIMIT) * np.uint8(LETTER)
    flags |= np.fromiter((c.isalnum() or c == "_" for c in characters), np.uint8, _LIMIT) * np.uint8(WORDLIKE)
    for first, last in ((0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323FF), (0x3040, 0x30FF), (0x0E00, 0x0E7F)):
        inside = flags[first : last + 1]
        inside[(inside & WORDLIKE) > 0] |= ALONE
    lower = np.fromiter((ord(c.lower()[0]) for c in characters), np.uint32, _LIMIT)
    return flags, lower, mix(np.arange(_LIMIT, dtype=np.uint64) * np.uint64(_ODD) + np.uint64(_STEP))


def _edges(inside: NDArray[np.bool_]) -> I64:
    """Where ``inside`` changes, with a first and last change at the ends."""
    padded = np.zeros(len(inside) + 2, np.bool_)
    padded[1:-1] = inside
    return np.flatnonzero(padded[1:] != padded[:-1])


def _runs(inside: NDArray[np.bool_]) -> tuple[I64, I64]:
    edges = _edges(inside)
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


def _lines(codes: NDArray[np.uint32], kind: NDArray[np.uint8]) -> tuple[tuple[I64, I64], NDArray[np.bool_]]:
    """Lines without white space at their ends, empty ones left out; and which of them follow an empty line."""
    stops = np.append(np.flatnonzero(codes == 10), len(codes))
    begins = np.concatenate([np.zeros(1, np.int64), stops[:-1] + 1])
    visible = np.flatnonzero((kind & SPACE) == 0)
    first = np.searchsorted(visible, begins)
    last = np.searchsorted(visible, stops)
    full = last > first
    follows = np.zeros(len(full), np.bool_)
    follows[1:] = ~full[:-1]
    start = visible[first[full]]
    end = visible[last[full] - 1] + 1
    return (start.astype(np.int64), end.astype(np.int64)), follows[full]


def _cut(start: I64, begins: I64) -> list[int]:
    """For each text the number of pieces before it, and of all at last."""
    cut: list[int] = np.searchsorted(start, begins).tolist()
    return cut
