"""Measures of many documents at once, over the pieces of their splits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from gemcut.text.document import Document, split_all
from gemcut.text.split import Many, mix, split_text

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]
    Codes = NDArray[Any]  # uint8 or uint32

T = TypeVar("T", bound=np.generic)
_FACTOR = np.uint64(0xA0761D6478BD642F)  # odd; between the words of an n-gram


class Column:
    """One kind of piece of all documents of a batch, as flat arrays; ``document[i]`` is whose piece i is."""

    def __init__(self, runs: Sequence[_Run], kind: int) -> None:
        cuts = [(run.many.pieces[kind], run.many.cuts[kind], run) for run in runs]
        counts = [cut[i + 1] - cut[i] for _, cut, run in cuts for i in range(run.first, run.last)]
        self.count = np.array(counts, np.int64)
        self.document = np.repeat(np.arange(len(counts)), self.count)
        self.begin = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.count)])
        self.start = _join([p.start[cut[r.first] : cut[r.last]] + r.shift for p, cut, r in cuts])
        self.end = _join([p.end[cut[r.first] : cut[r.last]] + r.shift for p, cut, r in cuts])
        self.hash = _join([p.hash[cut[r.first] : cut[r.last]] for p, cut, r in cuts])

    @cached_property
    def length(self) -> NDArray[np.int64]:
        """Characters of each piece."""
        found: NDArray[np.int64] = self.end - self.start
        return found

    def sums(self, values: NDArray[np.generic]) -> NDArray[np.int64]:
        """For each document the sum of a value of its pieces."""
        total = np.zeros(len(values) + 1, np.int64)
        np.cumsum(values, out=total[1:])
        found: NDArray[np.int64] = total[self.begin[1:]] - total[self.begin[:-1]]
        return found


class _Run(NamedTuple):
    """Neighbours in ``many``, ``first`` to before ``last``; ``shift`` moves its places to those of the batch."""

    many: Many
    first: int
    last: int
    shift: int


def _join(arrays: list[NDArray[T]]) -> NDArray[T]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


class Batch:
    """The splits of some documents side by side; those that were split together are taken over as they are."""

    def __init__(self, documents: Sequence[Document]) -> None:
        split_all(documents)
        self.size = len(documents)
        self._runs: list[_Run] = []
        codes: list[NDArray[Any]] = []
        length, i = 0, 0
        while i < len(documents):
            many, first = documents[i].place
            last = first + 1
            i += 1
            while i < len(documents) and documents[i].place == (many, last):
                last, i = last + 1, i + 1
            self._runs.append(_Run(many, first, last, length - many.begin[first]))
            codes.append(many.codes[many.begin[first] : many.begin[last]])
            length += len(codes[-1])
        self.codes: Codes = _join(codes) if codes else np.zeros(0, np.uint8)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Where each document begins in ``codes``."""
        return np.array([r.many.begin[i] + r.shift for r in self._runs for i in range(r.first, r.last)], np.int64)

    @cached_property
    def words(self) -> Column:
        return Column(self._runs, 0)

    @cached_property
    def terms(self) -> Column:
        return Column(self._runs, 1)

    @cached_property
    def lines(self) -> Column:
        return Column(self._runs, 2)

    @cached_property
    def letters(self) -> Bools:
        """Which words hold a letter."""
        return _join([r.many.letters[r.many.cuts[0][r.first] : r.many.cuts[0][r.last]] for r in self._runs])

    @cached_property
    def breaks(self) -> Bools:
        """Which lines begin a paragraph."""
        return _join([r.many.breaks[r.many.cuts[2][r.first] : r.many.cuts[2][r.last]] for r in self._runs])

    def counts(self, mask: Bools) -> NDArray[np.int64]:
        """For each document how many of its code points a mask over ``codes`` marks."""
        marked = np.flatnonzero(mask)
        return np.diff(np.searchsorted(marked, self.starts), append=len(marked))

    def first(self, column: Column) -> Codes:
        """The first character of each piece."""
        found: Codes = self.codes[column.start]
        return found

    def last(self, column: Column) -> Codes:
        """The last character of each piece."""
        found: Codes = self.codes[column.end - 1]
        return found


def share(part: NDArray[np.generic], whole: NDArray[np.generic]) -> Floats:
    """part / whole, 0 where the whole is 0."""
    found: Floats = np.divide(part, whole, out=np.zeros(len(part), np.float64), where=np.asarray(whole) > 0)
    return found


@cache
def word_hashes(words: tuple[str, ...]) -> NDArray[np.uint64]:
    """Hashes of single words, in their order."""
    return split_text(" ".join(words)).words.hash


class Sorted:
    """Hashes sorted with their places, equal ones of one document together in the order of their places.

    The low bits of a hash make room for the place; at least 40 stay, and only pieces of one document are ever taken
    for equal by chance.
    """

    def __init__(self, hashes: NDArray[np.uint64], places: NDArray[np.int64], document: NDArray[np.int64]) -> None:
        bits = np.uint64(max(1, int(places[-1]).bit_length()) if len(places) else 1)
        keys = (hashes >> bits << bits) | places.astype(np.uint64)
        keys.sort()
        self.place = (keys & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
        high = keys >> bits
        owner = document[self.place]
        #: same[i]: piece i + 1 in this order equals piece i.
        self.same = (high[1:] == high[:-1]) & (owner[1:] == owner[:-1])

    @property
    def later(self) -> NDArray[np.int64]:
        """Places whose piece stands earlier in the same document, too."""
        found: NDArray[np.int64] = self.place[1:][self.same]
        return found

    @property
    def several(self) -> NDArray[np.int64]:
        """Places whose piece occurs more than once in its document, in order."""
        mask = np.zeros(len(self.place), np.bool_)
        mask[1:] |= self.same
        mask[:-1] |= self.same
        return np.sort(self.place[mask])

    def groups(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(first place, count) of each piece that occurs more than once in its document."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], self.same, [False]]).astype(np.int8)))
        return self.place[edges[::2]], edges[1::2] - edges[::2] + 1


def seen_before(column: Column) -> Bools:
    """Which pieces stand earlier in their document, too."""
    out = np.zeros(len(column.hash), np.bool_)
    if len(out):
        out[Sorted(column.hash, np.arange(len(out)), column.document).later] = True
    return out


def paragraphs(batch: Batch) -> Column:
    """The paragraphs, made of lines; ``length`` leaves out line breaks."""
    lines = batch.lines
    begins = np.flatnonzero(batch.breaks)
    out = Column.__new__(Column)
    out.document = lines.document[begins]
    out.count = np.bincount(out.document, minlength=batch.size)
    out.begin = np.concatenate([np.zeros(1, np.int64), np.cumsum(out.count)])
    out.start = lines.start[begins]
    out.end = lines.end[np.append(begins[1:], len(lines.hash)) - 1] if len(begins) else out.start
    sizes = np.diff(np.append(begins, len(lines.hash)))
    rank = (np.arange(len(lines.hash)) - np.repeat(begins, sizes)).astype(np.uint64)
    mixed = mix(lines.hash + rank * _FACTOR)  # the same lines in another order are another paragraph
    out.hash = np.add.reduceat(mixed, begins) if len(begins) else lines.hash
    out.length = np.add.reduceat(lines.length, begins) if len(begins) else lines.length
    return out


def repeated_ngrams(words: Column, sizes: Sequence[int], documents: int) -> dict[int, Floats]:
    """For each n the share of a document's word characters in n-grams that stand earlier in it, each counted once."""
    total = words.sums(words.length)
    out: dict[int, Floats] = {}
    places, hashes, size = np.arange(len(words.hash)), words.hash.copy(), 1
    for n in sorted(sizes):
        places, hashes, size = _longer(words, places, hashes, size, n)
        ordered = Sorted(hashes[places], places, words.document)
        covered = np.zeros(len(words.hash) + 1, np.int32)
        later = ordered.later
        np.add.at(covered, later, 1)
        np.add.at(covered, later + n, -1)
        inside = np.cumsum(covered[:-1]) > 0
        out[n] = share(words.sums(words.length * inside), total)
        places = ordered.several  # a longer n-gram repeats only where its beginning does
    return out


def top_ngrams(words: Column, sizes: Sequence[int], documents: int) -> dict[int, Floats]:
    """For each n the share of a document's word characters that its most frequent n-gram takes.

    Of equally frequent ones the longest counts; n-grams that occur once do not.
    """
    total = words.sums(words.length)
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(words.length)])
    out: dict[int, Floats] = {}
    places, hashes, size = np.arange(len(words.hash)), words.hash.copy(), 1
    for n in sorted(sizes):
        places, hashes, size = _longer(words, places, hashes, size, n)
        ordered = Sorted(hashes[places], places, words.document)
        first, count = ordered.groups()
        best = np.zeros(documents, np.int64)
        np.maximum.at(best, words.document[first], (count << 32) | (ends[first + n] - ends[first]))
        out[n] = share((best >> 32) * (best & 0xFFFFFFFF), total)
        places = ordered.several
    return out


def _longer(
    words: Column, places: NDArray[np.int64], hashes: NDArray[np.uint64], size: int, n: int
) -> tuple[NDArray[np.int64], NDArray[np.uint64], int]:
    """n-grams from shorter ones: those of ``places`` that do not leave their document, and hashes by place."""
    places = places[places + n <= words.begin[words.document[places] + 1]]
    for k in range(size, n):
        hashes[places] = hashes[places] * _FACTOR + words.hash[places + k]
    return places, hashes, n


def ngrams_by_place(column: Column, n: int) -> tuple[NDArray[np.uint64], Bools]:
    """(hash of the n-gram that begins at each piece, whether it ends in the same document)."""
    count = len(column.hash)
    valid = np.arange(n, count + n) <= column.begin[column.document + 1]
    out = column.hash.copy()
    # Longer ones from two shorter ones: the bits of n behind its first one, from the left.
    size = 1
    for bit in bin(n)[3:]:
        out = _pair(out, out, size, size)
        size *= 2
        if bit == "1":
            out = _pair(out, column.hash, size, 1)
            size += 1
    return mix(out), valid


def _pair(first: NDArray[np.uint64], second: NDArray[np.uint64], size: int, other: int) -> NDArray[np.uint64]:
    """Hashes of first[i] and second[i + size] together; ``other`` is the length of the second."""
    out = first * np.uint64(pow(int(_FACTOR), other, 1 << 64))
    if len(out) > size:
        out[:-size] += second[size:]
    return out


def ngrams(column: Column, n: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """(hash, document) of every n-gram."""
    hashes, valid = ngrams_by_place(column, n)
    return hashes[valid], column.document[valid]
