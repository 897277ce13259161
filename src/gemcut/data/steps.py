"""What a step is, and the counting around it.

A *step* is called with an iterator of documents, its rank and the world size, and gives an iterator: each document
that it keeps, and for each one that it drops a ``Dropped`` with the reason. Rank and world size count the parts of the
input, not the workers: with them the output depends on the input alone. A *filter* judges one document: ``True`` keeps
it, ``(False, reason)`` drops it. What goes in must come out or be dropped, or the run fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from gemcut.data.document import Document, Dropped
from gemcut.errors import DataError
from gemcut.files import shown

Verdict = bool | tuple[bool, str]
#: Documents that a filter sees together, and their characters: as many as the processor's cache holds the arrays of.
BATCH, BATCH_CHARACTERS = 256, 1 << 16


class Step(Protocol):
    """Anything that is called like this is a step."""

    def __call__(self, documents: Iterator[Document], rank: int, world_size: int) -> Iterator[Document | Dropped]: ...


class BaseStep:
    """A built-in step: a dataclass whose fields are its keys in a recipe."""

    #: Its name in recipes.
    NAME: ClassVar[str]
    #: False: what it drops is never written anywhere (child safety).
    KEEPS_REJECTS: ClassVar[bool] = True
    #: False: it looks at addresses alone.
    READS_TEXTS: ClassVar[bool] = True

    def __call__(self, documents: Iterator[Document], rank: int, world_size: int) -> Iterator[Document | Dropped]:
        raise NotImplementedError

    def prepare(self, folder: Path) -> None:
        """Write into ``folder`` what every part needs and takes long to make; called once a run."""

    def use(self, folder: Path) -> None:
        """Take what ``prepare`` wrote, if anything; called in each process that runs the step."""

    def files(self) -> Sequence[str]:
        """Files whose content decides what the step does."""
        return ()

    def refuses(self, url: str) -> bool:
        """Whether the step drops every document of this address, whatever its text. Steps before the first that reads
        texts, and that one, are asked before a page's text is made."""
        return False

    @property
    def alarm(self) -> str:
        """What a person must know of the step before they use what a run made, "" where there is nothing."""
        return ""

    @property
    def notes(self) -> Counter[str]:
        """What else the step counts, by name: added up over all parts for the report."""
        found: Counter[str] = self.__dict__.setdefault("_notes", Counter())
        return found


class Filter(BaseStep):
    """A step that drops documents or leaves them as they are."""

    def judge(self, documents: Sequence[Document]) -> Sequence[str | None]:
        """For each document None to keep it, or the reason why it is dropped."""
        raise NotImplementedError

    def __call__(self, documents: Iterator[Document], rank: int, world_size: int) -> Iterator[Document | Dropped]:
        for batch in batches(documents):
            for document, reason in zip(batch, self.judge(batch), strict=True):
                yield document if reason is None else Dropped(document, reason)


class Collector(Protocol):
    """What a barrier keeps of one part's documents until it decides."""

    def add(self, documents: Sequence[Document]) -> None: ...

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""


class Barrier(BaseStep):
    """A step that must have seen every document before it can judge one, such as deduplication.

    Documents are known by their place: the number of the part, and the number within the part.
    """

    def collector(self) -> Collector:
        """For one part; ``add`` gets its documents in order."""
        raise NotImplementedError

    def decide(self, collected: Sequence[Path | None], folder: Path) -> dict[str, int]:
        """Read what was collected (None: a part the step does not see), write what ``apply`` needs; counts by name."""
        raise NotImplementedError

    def apply(self, documents: Iterator[Document], part: int, folder: Path) -> Iterator[Document | Dropped]:
        """Carry out for one part what was decided."""
        raise NotImplementedError


class FunctionFilter(Filter):
    """A user's function of one document. An error in it drops the document, with the error's name as the reason."""

    def __init__(self, function: Callable[[Document], Verdict], name: str) -> None:
        self._function, self._name = function, name

    def judge(self, documents: Sequence[Document]) -> list[str | None]:
        return [self._one(document) for document in documents]

    def _one(self, document: Document) -> str | None:
        try:
            verdict = self._function(document)
        except Exception as error:
            return f"raised {type(error).__name__}"
        if verdict is True:
            return None
        if verdict is False:
            return self._name
        if isinstance(verdict, tuple) and len(verdict) == 2 and isinstance(verdict[0], bool):
            kept, reason = verdict
            if kept or (isinstance(reason, str) and reason):
                return None if kept else reason
        raise DataError(
            f"the filter {self._name} gave {shown(verdict)} for {document.source}/{document.id}; "
            "expected True to keep it or (False, reason) to drop it"
        )


class FunctionStep(BaseStep):
    """A user's generator. An error in it ends the run: nobody can know which documents it had taken."""

    def __init__(self, function: Step, name: str) -> None:
        self._function, self._name = function, name

    def __call__(self, documents: Iterator[Document], rank: int, world_size: int) -> Iterator[Document | Dropped]:
        last = "before the first document"

        def watched() -> Iterator[Document]:
            nonlocal last
            for document in documents:
                last = f"at {document.source}/{document.id}"
                yield document

        try:
            yield from self._function(watched(), rank, world_size)
        except (DataError, OSError):
            raise
        except Exception as error:
            raise DataError(
                f"the step {self._name} raised {type(error).__name__} {last}: {error}; mend it and run again, "
                "finished parts are kept"
            ) from error


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """The documents in lists of a bounded size."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if len(batch) == BATCH or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass
class Count:
    """Documents and their bytes in UTF-8."""

    documents: int = 0
    bytes: int = 0

    def add(self, document: Document) -> None:
        self.documents += 1
        self.bytes += document.nbytes

    def merge(self, other: Count) -> None:
        self.documents += other.documents
        self.bytes += other.bytes


@dataclass
class Flow:
    """What went into a step from one source, came out, and was dropped for which reasons."""

    taken: Count = field(default_factory=Count)
    kept: Count = field(default_factory=Count)
    dropped: dict[str, Count] = field(default_factory=dict)

    def merge(self, other: Flow) -> None:
        self.taken.merge(other.taken)
        self.kept.merge(other.kept)
        for reason, count in other.dropped.items():
            self.dropped.setdefault(reason, Count()).merge(count)

    def check(self, step: str, source: str) -> None:
        """Raises DataError unless documents in = documents out + documents dropped."""
        dropped = sum(count.documents for count in self.dropped.values())
        if self.taken.documents != self.kept.documents + dropped:
            raise DataError(
                f"the step {step} took {self.taken.documents:,} documents of {source}, gave {self.kept.documents:,} "
                f"and dropped {dropped:,}; a step must yield each document, or Dropped(document, reason) in its place"
            )

    def as_dict(self) -> dict[str, Any]:
        return {
            "documents_in": self.taken.documents,
            "bytes_in": self.taken.bytes,
            "documents_out": self.kept.documents,
            "bytes_out": self.kept.bytes,
            "dropped": {
                reason: {"documents": count.documents, "bytes": count.bytes}
                for reason, count in sorted(self.dropped.items())
            },
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Flow:
        return cls(
            Count(data["documents_in"], data["bytes_in"]),
            Count(data["documents_out"], data["bytes_out"]),
            {reason: Count(c["documents"], c["bytes"]) for reason, c in data["dropped"].items()},
        )


#: Hears of each document that is dropped: (step's name, what it dropped, may it be written).
Rejects = Callable[[str, Dropped, bool], None]


def run_step(
    step: Step,
    name: str,
    documents: Iterator[Document],
    rank: int,
    world_size: int,
    flow: Flow,
    rejects: Rejects,
) -> Iterator[Document]:
    """The documents that ``step`` keeps, everything counted in ``flow``. The caller checks it at the end."""

    def taken() -> Iterator[Document]:
        for document in documents:
            flow.taken.add(document)
            yield document

    writes = getattr(step, "KEEPS_REJECTS", True)
    for item in step(taken(), rank, world_size):
        if isinstance(item, Document):
            flow.kept.add(item)
            yield item
        elif isinstance(item, Dropped):
            flow.dropped.setdefault(item.reason, Count()).add(item.document)
            rejects(name, item, writes)
        else:
            raise DataError(f"the step {name} gave {shown(item)}; expected a Document or Dropped(document, reason)")
