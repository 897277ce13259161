"""Exact duplicates, of documents and of paragraphs, by xxh3-128."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from gemcut.data.dedup.arrays import load, save
from gemcut.data.document import Document, Dropped
from gemcut.data.steps import Barrier, Collector
from gemcut.data.store import needs

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass
class ExactDuplicates(Barrier):
    """Keeps the first of documents whose text is the same but for white space, in the order of the sources."""

    NAME: ClassVar[str] = "exact-duplicates"

    def pieces(self, document: Document) -> list[str]:
        """What is compared."""
        return [document.text]

    def collector(self) -> Collector:
        return _Hashes(self)

    def decide(self, collected: Sequence[Path | None], folder: Path) -> dict[str, int]:
        counts = [0 if path is None else len(load(path, "hashes")) for path in collected]
        again = repeats([load(path, "hashes") for path in collected if path is not None])
        ends = np.cumsum(counts)
        for part, path in enumerate(collected):
            if path is not None:
                save(folder / f"{part:05d}", again=again[ends[part] - counts[part] : ends[part]])
        return {"pieces": len(again), "repeated": int(again.sum())}

    def apply(self, documents: Iterator[Document], part: int, folder: Path) -> Iterator[Document | Dropped]:
        again = load(folder / f"{part:05d}", "again")
        for number, document in enumerate(documents):
            yield Dropped(document, "exact duplicate") if again[number] else document


@dataclass
class ExactParagraphs(ExactDuplicates):
    """Cuts paragraphs of at least ``min_characters`` that stood before, in any document; the rest of a text is kept."""

    NAME: ClassVar[str] = "exact-paragraphs"

    min_characters: int = 100

    def pieces(self, document: Document) -> list[str]:
        return document.text.split("\n\n")

    def apply(self, documents: Iterator[Document], part: int, folder: Path) -> Iterator[Document | Dropped]:
        again = load(folder / f"{part:05d}", "again")
        at = 0
        for document in documents:
            pieces = self.pieces(document)
            cut = again[at : at + len(pieces)]
            at += len(pieces)
            long = np.fromiter((len(piece) >= self.min_characters for piece in pieces), np.bool_, len(pieces))
            cut = cut & long
            if not cut.any():
                yield document
                continue
            kept = [piece for piece, gone in zip(pieces, cut.tolist(), strict=True) if not gone]
            if any(piece.strip() for piece in kept):
                self.notes["paragraphs cut"] += int(cut.sum())
                document.text = "\n\n".join(kept)
                yield document
            else:
                yield Dropped(document, "all paragraphs stood before")


class _Hashes:
    def __init__(self, step: ExactDuplicates) -> None:
        try:
            from xxhash import xxh3_128_digest
        except ImportError:
            raise needs("xxhash") from None
        self._digest, self._step = xxh3_128_digest, step
        self._digests: list[bytes] = []

    def add(self, documents: Sequence[Document]) -> None:
        for document in documents:
            for piece in self._step.pieces(document):
                self._digests.append(self._digest(" ".join(piece.split()).encode()))

    def save(self, path: Path) -> None:
        save(path, hashes=np.frombuffer(b"".join(self._digests), np.uint64).reshape(-1, 2))


def repeats(parts: Sequence[NDArray[np.uint64]]) -> NDArray[np.bool_]:
    """For 128-bit hashes (n, 2) of all parts together: which stood before. 25 bytes of memory a hash."""
    hashes = np.concatenate(parts) if parts else np.zeros((0, 2), np.uint64)
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal ones stay in their order
    same = (hashes[order[1:]] == hashes[order[:-1]]).all(1)
    again = np.zeros(len(hashes), np.bool_)
    again[order[1:][same]] = True
    return again
