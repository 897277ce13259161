"""Near duplicates: candidates by bands of MinHash signatures, each verified by Jaccard before it counts.

Memory is that of one band at a time: 17 bytes a document for keys, order and clusters. Signatures and n-grams lie in
files that are mapped, and are read where two documents are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from gemcut.data.dedup import minhash
from gemcut.data.dedup.arrays import load, save
from gemcut.data.document import Document, Dropped
from gemcut.data.steps import Barrier, Collector
from gemcut.errors import DataError, ParameterError

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: A band is 8 of the 112 values. 14 bands that lie side by side miss a pair of similarity 0.8 with probability 7.7 %,
#: and two kinds of signatures miss other pairs. With bands that overlap by half, 27 of them, it is 2.1 % (0.2 % at
#: 0.85).
ROWS = 8
BANDS = range(0, minhash.PERMUTATIONS - ROWS + 1, ROWS // 2)
#: Documents of one bucket that a new one is compared with, at most: the first of each group that was found there.
GROUPS = 32


@dataclass
class NearDuplicates(Barrier):
    """Keeps the first of documents whose ``words``-grams are alike to at least ``min_jaccard``.

    Two documents are joined only where their Jaccard similarity was computed and is large enough. A cluster grows to
    ``max_cluster`` documents at the most. ``signatures``: "rensa" (the faster) or "numpy".
    """

    NAME: ClassVar[str] = "near-duplicates"

    min_jaccard: float = 0.8
    words: int = 5
    max_cluster: int = 1000
    signatures: Literal["rensa", "numpy"] = "rensa"

    def __post_init__(self) -> None:
        if not 0 < self.min_jaccard <= 1:
            raise ParameterError(f"min_jaccard is {self.min_jaccard:g}; expected more than 0 and at most 1")
        if not 1 <= self.words <= 64 or self.max_cluster < 2:
            raise ParameterError("words must be 1 to 64 and max_cluster at least 2")

    def collector(self) -> Collector:
        return _Signatures(self)

    def decide(self, collected: Sequence[Path | None], folder: Path) -> dict[str, int]:
        library = Library([path for path in collected if path is not None])
        clusters = Clusters(len(library), self.max_cluster)
        notes = {"documents": len(library), "compared": 0, "pairs": 0, "left by the cap": 0}
        for first in BANDS:
            for bucket in buckets(library.keys(first)):
                _join(bucket, library, clusters, self.min_jaccard, notes)
        removed = clusters.later()
        notes["clusters"] = int((clusters.sizes() > 1).sum())
        notes["largest cluster"] = int(clusters.sizes().max(initial=0))
        at = 0
        for part, path in enumerate(collected):
            if path is not None:
                count = len(load(path, "begin")) - 1
                save(folder / f"{part:05d}", removed=removed[at : at + count])
                at += count
        return notes

    def apply(self, documents: Iterator[Document], part: int, folder: Path) -> Iterator[Document | Dropped]:
        removed = load(folder / f"{part:05d}", "removed")
        for number, document in enumerate(documents):
            yield Dropped(document, "near duplicate") if removed[number] else document


class _Signatures:
    def __init__(self, step: NearDuplicates) -> None:
        self._step = step
        self._signatures: list[NDArray[np.uint32]] = []
        self._shingles: list[NDArray[np.uint32]] = []
        self._counts: list[NDArray[np.int64]] = []

    def add(self, documents: Sequence[Document]) -> None:
        hashes, begin = minhash.shingles(documents, self._step.words)
        self._signatures.append(minhash.signatures(hashes, begin, self._step.signatures))
        # For Jaccard the upper half of each hash will do; its order is that of the whole.
        self._shingles.append((hashes >> np.uint64(32)).astype(np.uint32))
        self._counts.append(np.diff(begin))

    def save(self, path: Path) -> None:
        empty = np.zeros((0, minhash.PERMUTATIONS), np.uint32)
        stamp = minhash.stamp(self._step.signatures, self._step.words)
        save(
            path,
            signatures=np.concatenate([empty, *self._signatures]),
            shingles=np.concatenate([np.zeros(0, np.uint32), *self._shingles]),
            begin=np.concatenate([[0], np.cumsum(np.concatenate([np.zeros(0, np.int64), *self._counts]))]),
            stamp=np.frombuffer(stamp.encode(), np.uint8),
        )


class Library:
    """Signatures and n-grams of all parts, by a document's number over all of them. Raises DataError for two stamps."""

    def __init__(self, folders: Sequence[Path]) -> None:
        stamps = {load(folder, "stamp").tobytes().decode() for folder in folders}
        if len(stamps) > 1:
            raise DataError(f"signatures of two kinds cannot be compared ({', '.join(sorted(stamps))}); begin anew")
        self._signatures = [load(folder, "signatures") for folder in folders]
        self._shingles = [load(folder, "shingles") for folder in folders]
        self._begin = [load(folder, "begin") for folder in folders]
        counts = [len(begin) - 1 for begin in self._begin]
        self._first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._first[-1])

    def keys(self, band: int) -> NDArray[np.uint64]:
        """The key of every document in the band that begins with value ``band``; 0 for documents without n-grams."""
        out = np.zeros(len(self), np.uint64)
        for first, found, begin in zip(self._first[:-1].tolist(), self._signatures, self._begin, strict=True):
            keys = minhash.band_keys(found, band, ROWS)
            out[first : first + len(keys)] = np.where(np.diff(begin) > 0, keys, 0)
        return out

    def jaccard(self, a: int, b: int) -> float:
        """The Jaccard similarity of two documents' n-grams."""
        one, other = self._set(a), self._set(b)
        if len(one) == 0 or len(other) == 0:
            return 0.0
        common = len(np.intersect1d(one, other, assume_unique=False))
        return common / (len(one) + len(other) - common)

    def bound(self, a: int, b: int) -> float:
        """The most that ``jaccard`` can be, from the numbers of n-grams alone."""
        one, other = len(self._set(a)), len(self._set(b))
        return min(one, other) / max(one, other, 1)

    def _set(self, number: int) -> NDArray[np.uint32]:
        part = int(np.searchsorted(self._first, number, "right")) - 1
        begin = self._begin[part]
        at = number - int(self._first[part])
        found: NDArray[np.uint32] = self._shingles[part][begin[at] : begin[at + 1]]
        return found


class Clusters:
    """Documents joined in pairs. The root of a cluster is its first document."""

    def __init__(self, count: int, most: int) -> None:
        self._parent = np.arange(count)
        self._size = np.ones(count, np.int32)
        self._most = most

    def root(self, number: int) -> int:
        """The first document of its cluster."""
        while (parent := int(self._parent[number])) != number:
            self._parent[number] = self._parent[parent]
            number = parent
        return number

    def join(self, a: int, b: int) -> bool:
        """Make one cluster of two; False where it would be too large."""
        a, b = sorted((self.root(a), self.root(b)))
        if a == b:
            return True
        if self._size[a] + self._size[b] > self._most:
            return False
        self._parent[b] = a
        self._size[a] += self._size[b]
        return True

    def later(self) -> NDArray[np.bool_]:
        """All but the first document of each cluster."""
        found: NDArray[np.bool_] = self._parent != np.arange(len(self._parent))
        return found

    def sizes(self) -> NDArray[np.int32]:
        """For the first document of each cluster its size, for the others 0."""
        found: NDArray[np.int32] = np.where(self.later(), 0, self._size)
        return found


def buckets(keys: NDArray[np.uint64]) -> Iterator[list[int]]:
    """The numbers of documents with equal keys, in order; key 0 is none."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    same = (ordered[1:] == ordered[:-1]) & (ordered[1:] != 0)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], same.astype(np.int8), [0]])))
    for first, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        yield order[first : last + 1].tolist()


def _join(bucket: list[int], library: Library, clusters: Clusters, least: float, notes: dict[str, int]) -> None:
    """Join the documents of a bucket that are alike: each is compared with the first ones of the groups before it."""
    firsts: list[int] = []
    for number in bucket:
        root = clusters.root(number)
        for first in firsts:
            if clusters.root(first) == root:
                break
            if library.bound(first, number) < least:
                continue
            notes["compared"] += 1
            if library.jaccard(first, number) >= least:
                notes["pairs"] += 1
                notes["left by the cap"] += not clusters.join(first, number)
                break
        else:
            if len(firsts) < GROUPS:
                firsts.append(number)
