"""Steps around safety/: child safety, personal data, a lexicon, a linear judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from gemcut.data.document import Document, Dropped
from gemcut.data.own_code import load_function
from gemcut.data.steps import BaseStep, Filter
from gemcut.errors import DataError, ParameterError
from gemcut.safety import pii
from gemcut.safety.child_safety import ChildSafety
from gemcut.safety.judge import check_policy
from gemcut.safety.lexicon import Lexicon
from gemcut.safety.linear import LinearJudge


@dataclass
class ChildSafetyStep(Filter):
    """Drops what an operator's ``lists`` of keyed hashes match, address first; ``key_file`` holds the key.

    ``classifier = "file.py:name"`` is a function of a text that gives a score; from ``threshold`` on it is a match.

    What it drops is written nowhere: the report holds counts, and the keyed hash of each document's source and id.
    Use it first, and again after steps that change texts.
    """

    NAME: ClassVar[str] = "child-safety"
    KEEPS_REJECTS: ClassVar[bool] = False

    lists: tuple[str, ...] = field(metadata={"path": True})
    key_file: str = field(metadata={"path": True})
    classifier: str = field(default="", metadata={"path": True})
    threshold: float = 0.5

    def __post_init__(self) -> None:
        self._code, _, name = self.classifier.rpartition(":")
        scores = None
        if self.classifier:
            if not self._code.endswith(".py") or not name.isidentifier():
                raise ParameterError('classifier: expected "file.py:name"')
            scores = _guarded(load_function(Path(self._code), name, "(text)", {}))
        self._matcher = ChildSafety.read(self.lists, self.key_file, scores, self.threshold)

    def files(self) -> Sequence[str]:
        return (*self.lists, self.key_file, *([self._code] if self.classifier else []))

    def refuses(self, url: str) -> bool:
        return self._matcher.match_url(url)

    def judge(self, documents: Sequence[Document]) -> list[str | None]:
        reasons: list[str | None] = []
        for document in documents:
            reason = None
            if self._matcher.match_url(document.url):
                reason = "child safety: address"
            elif self._matcher.match_text(document.text):
                reason = "child safety: text"
            if reason is not None:
                name = self._matcher.keyed(f"{document.source}/{document.id}").hex()
                self.notes[f"quarantined {name}"] += 1
            reasons.append(reason)
        return reasons


def _guarded(classifier: Callable[[str], object]) -> Callable[[str], float]:
    """The operator's classifier; where it fails the run ends, with nothing said of the text."""

    def score(text: str) -> float:
        try:
            found = classifier(text)
        except Exception as error:
            what = f"raised {type(error).__name__}"
        else:
            if isinstance(found, (int, float)) and 0 <= found <= 1:
                return float(found)
            what = f"gave {type(found).__name__}, no number from 0 to 1"
        raise DataError(f"the child-safety classifier {what}; mend it and run again")

    return score


@dataclass
class Pii(BaseStep):
    """Replaces personal data and secrets of ``kinds`` (all) by reserved values; drops nothing."""

    NAME: ClassVar[str] = "pii"

    kinds: tuple[str, ...] = pii.NAMES

    def __post_init__(self) -> None:
        pii.check_kinds(self.kinds)

    def __call__(self, documents: Iterator[Document], rank: int, world_size: int) -> Iterator[Document | Dropped]:
        for document in documents:
            document.text, counts = pii.replace(document.text, self.kinds)
            self.notes.update(counts)
            yield document


@dataclass
class LexiconStep(Filter):
    """Drops texts that score more than ``max_score`` by the words and phrases in the file ``list``."""

    NAME: ClassVar[str] = "lexicon"

    list: str = field(metadata={"path": True})
    max_score: float = 0.5

    def __post_init__(self) -> None:
        self._lexicon = Lexicon.read(Path(self.list))

    def files(self) -> Sequence[str]:
        return (self.list,)

    def judge(self, documents: Sequence[Document]) -> Sequence[str | None]:
        return ["lexicon" if score > self.max_score else None for score in self._lexicon.scores(documents).tolist()]


@dataclass
class LinearStep(Filter):
    """Drops texts that a linear ``model`` scores below ``min_score`` or above ``max_score`` for ``policy``."""

    NAME: ClassVar[str] = "linear"

    model: str = field(metadata={"path": True})
    policy: str
    min_score: float = 0.0
    max_score: float = 1.0

    def __post_init__(self) -> None:
        self._judge = LinearJudge.load(Path(self.model))
        check_policy(self.policy, self._judge.policies)
        if not 0 <= self.min_score <= self.max_score <= 1:
            raise ParameterError("min_score and max_score must be from 0 to 1, and min_score not the larger")

    def files(self) -> Sequence[str]:
        return (self.model,)

    def judge(self, documents: Sequence[Document]) -> Sequence[str | None]:
        scores = self._judge.scores(documents, self.policy).tolist()
        low, high = f"linear: {self.policy} too low", f"linear: {self.policy} too high"
        return [low if s < self.min_score else high if s > self.max_score else None for s in scores]
