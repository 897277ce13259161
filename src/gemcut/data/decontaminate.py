"""Documents that hold questions or answers of benchmarks.

Every text of every benchmark file goes into an index of hashed n-grams of terms: 13-grams of texts that are long
enough, 8-grams of shorter ones; where all texts of a record are short, those of the record together. Each gram knows
its benchmarks. A folder below the index's folder is one benchmark.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from gemcut.data.dedup.arrays import load, save
from gemcut.data.document import Document, Dropped
from gemcut.data.steps import BaseStep, batches
from gemcut.errors import ParameterError
from gemcut.paths import BENCHMARKS, benchmark_folder
from gemcut.text.measures import Batch, Column, ngrams_by_place

if TYPE_CHECKING:
    from numpy.typing import NDArray

LONG, SHORT = 13, 8
MUCH, STRIDE = 20, 4
_KINDS = ("hashes", "sets")
#: What describes a benchmark is none of its questions.
_NO_DATA = ("LICENSE", "LICENCE", "SOURCE", "README", "NOTICE")
MOST = 32  # benchmarks: a bit each


@dataclass
class Decontaminate(BaseStep):
    """Drops documents that hold an n-gram of a benchmark, or cuts the lines that do (``action = "cut"``).

    ``benchmarks`` is a folder with a folder for each; "" takes the one that GEMCUT_BENCHMARKS names. ``min_hits``:
    how many n-grams make a hit. With ``optional`` a run without benchmarks drops nothing and gives an alarm.
    """

    NAME: ClassVar[str] = "decontaminate"

    benchmarks: str = field(default="", metadata={"path": True})
    action: Literal["drop", "cut"] = "drop"
    min_hits: int = 1
    optional: bool = False

    def __post_init__(self) -> None:
        folder = benchmark_folder(self.benchmarks)
        if folder is None and not self.optional:
            raise ParameterError(
                f"benchmarks is not given and {BENCHMARKS} is not set; expected a folder of benchmarks"
            )
        if folder is not None and not folder.is_dir():
            raise ParameterError(f"benchmarks: there is no folder {folder}")
        self._folder = folder
        self._index: Index | None = None

    @property
    def alarm(self) -> str:
        return "" if self._folder else f"compared with no benchmark, since {BENCHMARKS} is not set"

    def files(self) -> Sequence[str]:
        if self._folder is None:
            return ()
        return [str(path) for _, path in benchmark_files(self._folder)]

    def prepare(self, folder: Path) -> None:
        if self._folder is None:
            return
        Index.build(self._folder).save(folder)

    def use(self, folder: Path) -> None:
        self._index = Index.load(folder)

    def __call__(self, documents: Iterator[Document], rank: int, world_size: int) -> Iterator[Document | Dropped]:
        if self._folder is None:
            yield from documents
            return
        index = self._index = self._index or Index.build(self._folder)
        for some in batches(documents):
            batch = Batch(some)
            hits = index.find(batch.terms)
            owner = batch.terms.document[hits.place]
            counts = np.bincount(owner, minlength=len(some))
            for i, document in enumerate(some):
                if counts[i] < self.min_hits:
                    yield document
                    continue
                own = owner == i
                names = index.names_of(hits.sets[own])
                for name in names:
                    self.notes[name] += 1
                places = hits.place[own]
                start = batch.terms.start[places] - batch.starts[i]
                last = batch.terms.end[places + hits.size[own] - 1] - batch.starts[i]
                left = _without(document.text, start, last) if self.action == "cut" else ""
                if left:
                    self.notes["documents cut"] += 1
                    document.text = left
                    yield document
                else:
                    yield Dropped(document, f"benchmark: {names[0]}")


def _without(text: str, start: NDArray[np.int64], end: NDArray[np.int64]) -> str:
    """The text without the lines that a hit touches."""
    gone = np.zeros(len(text) + 1, np.int32)
    np.add.at(gone, start, 1)
    np.add.at(gone, end, -1)
    inside = np.concatenate([[0], np.cumsum(np.cumsum(gone) > 0)])
    kept, at = [], 0
    for line in text.split("\n"):
        if inside[at + len(line)] == inside[at]:
            kept.append(line)
        at += len(line) + 1
    return "\n".join(kept).strip()


@dataclass
class Hits:
    """``place``: the term an n-gram begins with; ``size``: its terms; ``sets``: a bit for each benchmark."""

    place: NDArray[np.int64]
    size: NDArray[np.int64]
    sets: NDArray[np.uint32]


class Index:
    """Sorted hashes of n-grams of two lengths, and the benchmarks of each: 12 bytes an n-gram, and a filter of 2 MB."""

    def __init__(self, names: Sequence[str], grams: dict[int, tuple[NDArray[np.uint64], NDArray[np.uint32]]]) -> None:
        self.names, self._grams = tuple(names), grams
        self._filters = {size: _bits(hashes) for size, (hashes, _) in grams.items()}

    @property
    def nbytes(self) -> int:
        """Memory of the whole index."""
        arrays = [array for pair in self._grams.values() for array in pair] + list(self._filters.values())
        return sum(array.nbytes for array in arrays)

    def __len__(self) -> int:
        return sum(len(hashes) for hashes, _ in self._grams.values())

    @classmethod
    def build(cls, folder: Path) -> Index:
        """From every file of every benchmark in ``folder``. Raises ParameterError where there is none or too many."""
        files = benchmark_files(folder)
        names = sorted({name for name, _ in files})
        if not names or len(names) > MOST:
            raise ParameterError(f"{folder} holds {len(names)} benchmarks; expected 1 to {MOST} folders with files")
        found: dict[int, list[tuple[NDArray[np.uint64], NDArray[np.uint32]]]] = {LONG: [], SHORT: []}
        for name, path in files:
            bit = np.uint32(1 << names.index(name))
            for some in batches(_items(path)):
                terms = Batch(some).terms
                long = terms.count >= LONG
                short = (terms.count >= SHORT) & ~long
                within = np.arange(len(terms.hash)) - terms.begin[terms.document]
                # Of a text beyond MUCH terms every STRIDE-th: what is copied from it is found from 16 words on.
                dense = (terms.count <= MUCH)[terms.document] | (within % STRIDE == 0)
                for size, which in ((LONG, long), (SHORT, short)):
                    hashes, valid = ngrams_by_place(terms, size)
                    chosen = np.unique(hashes[valid & which[terms.document] & dense])
                    found[size].append((chosen, np.full(len(chosen), bit, np.uint32)))
        return cls(names, {size: _merge(parts) for size, parts in found.items()})

    def save(self, folder: Path) -> None:
        """Write it into a folder."""
        arrays = {f"{kind}-{size}": pair[i] for size, pair in self._grams.items() for i, kind in enumerate(_KINDS)}
        save(folder, names=np.frombuffer("\n".join(self.names).encode(), np.uint8), **arrays)

    @classmethod
    def load(cls, folder: Path) -> Index:
        """The index that ``save`` wrote; its arrays are mapped."""
        names = load(folder, "names").tobytes().decode().split("\n")
        hashes, sets = ({size: load(folder, f"{kind}-{size}") for size in (LONG, SHORT)} for kind in _KINDS)
        return cls(names, {size: (hashes[size], sets[size]) for size in (LONG, SHORT)})

    def find(self, terms: Column) -> Hits:
        """Every n-gram of the terms that is in the index."""
        places, sizes, sets = [], [], []
        for size, (known, bits) in self._grams.items():
            hashes, valid = ngrams_by_place(terms, size)
            quick = self._filters[size]
            low = hashes & np.uint64(quick.size * 8 - 1)
            marked = quick[low >> np.uint64(3)] >> (low & np.uint64(7)).astype(np.uint8)
            maybe = np.flatnonzero(valid & (marked & 1 > 0))
            if len(maybe) and len(known):
                at = np.minimum(np.searchsorted(known, hashes[maybe]), len(known) - 1)
                hit = known[at] == hashes[maybe]
                places.append(maybe[hit])
                sizes.append(np.full(int(hit.sum()), size))
                sets.append(bits[at[hit]])
        if not places:
            empty = np.zeros(0, np.int64)
            return Hits(empty, empty, np.zeros(0, np.uint32))
        return Hits(np.concatenate(places), np.concatenate(sizes), np.concatenate(sets))

    def names_of(self, sets: NDArray[np.uint32]) -> list[str]:
        """The benchmarks of some hits."""
        together = int(np.bitwise_or.reduce(sets)) if len(sets) else 0
        return [name for i, name in enumerate(self.names) if together >> i & 1]


def _bits(hashes: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """A set of the lowest bits of the hashes, at least 8 times as many places as hashes: 1 MB at least."""
    places = 1 << max(20, min(24, int(8 * max(1, len(hashes))).bit_length()))
    marks = np.zeros(places, np.uint8)
    marks[hashes & np.uint64(places - 1)] = 1
    return np.packbits(marks, bitorder="little")


def _merge(
    parts: list[tuple[NDArray[np.uint64], NDArray[np.uint32]]],
) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    hashes = np.concatenate([np.zeros(0, np.uint64), *(h for h, _ in parts)])
    bits = np.concatenate([np.zeros(0, np.uint32), *(b for _, b in parts)])
    order = np.argsort(hashes, kind="stable")
    hashes, bits = hashes[order], bits[order]
    first = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]])) if len(hashes) else np.zeros(0, int)
    return hashes[first], np.bitwise_or.reduceat(bits, first) if len(first) else bits


def benchmark_files(folder: Path) -> list[tuple[str, Path]]:
    """(benchmark, file) for every file with data, in order."""
    return [
        (path.relative_to(folder).parts[0], path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and len(path.relative_to(folder).parts) > 1 and not path.name.upper().startswith(_NO_DATA)
    ]


def _items(path: Path) -> Iterator[Document]:
    """The texts of a file, each as a document: every text of at least SHORT words, or a record's texts together.

    A text is taken in lines where one of them is long enough by itself: prompts are lists of lines in changing order.
    """
    seen: set[str] = set()
    for number, texts in enumerate(_records(path)):
        pieces: list[str] = []
        for text in texts:
            lines = text.split("\n")
            pieces += lines if any(len(line.split()) >= LONG for line in lines) else [text]
        long = [text for text in pieces if len(text.split()) >= SHORT]
        for i, text in enumerate(long or [" ".join(texts)]):
            if text in seen:
                continue
            seen.add(text)
            yield Document(f"{number}.{i}", path.name, text.replace("\x00", " "))


def _records(path: Path) -> Iterator[list[str]]:
    """The texts of each record of a JSON, JSON lines, CSV, TSV or plain text file, packed or not.

    Raises ParameterError where one cannot be read.
    """
    try:
        name = path.name.lower()
        if name.endswith((".tar.gz", ".tgz", ".tar")):
            with tarfile.open(path) as archive:
                for member in archive:
                    if member.isfile() and (opened := archive.extractfile(member)) is not None:
                        yield from _parse(member.name.lower(), opened.read())
            return
        data = path.read_bytes()
        if name.endswith(".gz"):
            data, name = gzip.decompress(data), name.removesuffix(".gz")
        elif name.endswith(".bz2"):
            data, name = bz2.decompress(data), name.removesuffix(".bz2")
        yield from _parse(name, data)
    except (OSError, EOFError, ValueError, tarfile.TarError, csv.Error) as error:
        raise ParameterError(f"cannot read the benchmark file {path}: {error}") from None


def _parse(name: str, data: bytes) -> Iterator[list[str]]:
    text = data.decode("utf-8", "replace").encode("utf-8", "replace").decode()
    if name.endswith((".json", ".jsonl")):
        try:
            whole = json.loads(text)
            records = whole if isinstance(whole, list) else list(whole.values()) if isinstance(whole, dict) else [whole]
            if len(records) and isinstance(records[-1], list):
                records = [each for record in records if isinstance(record, list) for each in record]
        except ValueError:
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        for record in records:
            yield list(_texts(record))
    elif name.endswith((".csv", ".tsv")):
        csv.field_size_limit(1 << 24)
        yield from csv.reader(io.StringIO(text), delimiter="\t" if name.endswith(".tsv") else ",")
    else:
        for line in text.splitlines():
            if line.strip():
                yield [line]


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value.encode("utf-8", "replace").decode()
    elif isinstance(value, dict):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
