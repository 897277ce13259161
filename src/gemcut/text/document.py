"""A document: a text, what is known of it, and its split into words, made once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gemcut.files import shown
from gemcut.text.split import Many, Split

#: Characters that are split together: 3 to 4 times as fast as ten times as many, whose arrays leave the L2 cache.
TOGETHER = 1 << 16


class Document:
    """One text and what is known of it.

    Attributes:
        id: unique within a source, and the same each time the source is read.
        source: the name of its source in the recipe.
        text: the text; assigning another one drops the word split.
        licence: SPDX identifier, "" where none is known.
        url: where it came from, "" where that is no address.
        language: code of two or three letters, "" where it was not looked at.
        meta: whatever a step wants to say to a later one or to the reader of the output; JSON values.
    """

    __slots__ = ("_nbytes", "_split", "_text", "id", "language", "licence", "meta", "source", "url")

    def __init__(
        self,
        id: str,
        source: str,
        text: str,
        *,
        licence: str = "",
        url: str = "",
        language: str = "",
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        self.id, self.source, self.licence, self.url, self.language = id, source, licence, url, language
        self.meta: dict[str, Any] = dict(meta or {})
        self._text = text
        self._split: tuple[Many, int] | None = None
        self._nbytes = -1

    @property
    def text(self) -> str:
        return self._text

    @text.setter
    def text(self, text: str) -> None:
        if text != self._text:
            self._text, self._split, self._nbytes = text, None, -1

    @property
    def nbytes(self) -> int:
        """Size of the text in UTF-8."""
        if self._nbytes < 0:
            self._nbytes = len(self._text) if self._text.isascii() else len(self._text.encode("utf-8", "surrogatepass"))
        return self._nbytes

    @property
    def split(self) -> Split:
        """Words, terms and lines; found at the first use and kept until the text changes."""
        many, i = self.place
        return many.one(i)

    @property
    def place(self) -> tuple[Many, int]:
        """The texts it was split together with, and which of them it is."""
        if self._split is None:
            self._split = (Many([self._text]), 0)
        return self._split

    def release(self) -> None:
        """Forget the split: it takes many times the memory of the text."""
        self._split = None

    def as_dict(self) -> dict[str, Any]:
        """What is written of it."""
        fields = {name: getattr(self, name) for name in ("id", "source", "text", "licence", "url", "language", "meta")}
        return {name: value for name, value in fields.items() if value or name in ("id", "source", "text")}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Document:
        """The document that ``as_dict`` wrote; raises ValueError for anything else."""
        texts = {name: data.get(name, "") for name in ("id", "source", "text", "licence", "url", "language")}
        if not all(isinstance(value, str) for value in texts.values()) or not isinstance(data.get("meta", {}), dict):
            raise ValueError(f"not a document: {shown(dict(data))}")
        return cls(meta=data.get("meta"), **texts)

    def __repr__(self) -> str:
        return f"Document({self.source}/{self.id}, {len(self.text):,} characters)"


def split_all(documents: Sequence[Document]) -> None:
    """Split those that are not yet, together, as many at a time as the processor's cache holds."""
    together: list[Document] = []
    size = 0
    for document in documents:
        if document._split is None:
            together.append(document)
            size += len(document.text)
        if size > TOGETHER:
            _make(together)
            together, size = [], 0
    _make(together)


def _make(documents: Sequence[Document]) -> None:
    if documents:
        many = Many([document.text for document in documents])
        for i, document in enumerate(documents):
            document._split = (many, i)
