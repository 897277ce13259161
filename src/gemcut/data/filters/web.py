"""Quality rules for web text, each as its paper states it.

Gopher: Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training Gopher", A.1.1 (quality)
and table A1 (repetition). C4: Raffel et al. 2020, "Exploring the Limits of Transfer Learning", section 2.2. FineWeb:
Penedo et al. 2024, "The FineWeb Datasets", section 3.6. Words are what stands between white space.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from gemcut.data.document import Document, Dropped
from gemcut.data.steps import BaseStep, Filter, batches
from gemcut.text.measures import (
    Batch,
    paragraphs,
    repeated_ngrams,
    seen_before,
    share,
    top_ngrams,
    word_hashes,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bools = NDArray[np.bool_]

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
BULLETS = "•‣▶◀◦■□▪▫–-*"
ELLIPSIS = "…"
#: What ends a sentence, and quotation marks that may close it.
TERMINAL = ".!?"
QUOTES = "\"'”’»"


def _among(codes: NDArray[Any], characters: str) -> Bools:
    """Which code points are one of a few characters."""
    found = np.zeros(len(codes), np.bool_)
    for character in characters:
        if codes.dtype != np.uint8 or character.isascii():
            found |= codes == ord(character)
    return found


def _first_reason(count: int, rules: Sequence[tuple[str, Bools]]) -> list[str | None]:
    """For each document the name of the first rule that it breaks."""
    reasons: list[str | None] = [None] * count
    for name, broken in reversed(rules):
        for i in np.flatnonzero(broken).tolist():
            reasons[i] = name
    return reasons


@dataclass
class GopherQuality(Filter):
    """Gopher's quality rules: number and length of words, symbols, bullets, ellipses, letters, stop words."""

    NAME: ClassVar[str] = "gopher-quality"

    min_words: int = 50
    max_words: int = 100_000
    min_word_length: float = 3.0
    max_word_length: float = 10.0
    max_symbols: float = 0.1
    max_bullets: float = 0.9
    max_ellipses: float = 0.3
    min_letters: float = 0.8
    min_stop_words: int = 2

    def judge(self, documents: Sequence[Document]) -> list[str | None]:
        batch = Batch(documents)
        words, lines, codes = batch.words, batch.lines, batch.codes
        count = words.count
        mean = share(words.sums(words.length), count)
        hashes = _among(codes, "#" + ELLIPSIS)
        dots = codes == ord(".")
        three = np.zeros(len(codes), np.bool_)
        if len(codes) > 2:
            three[2:] = dots[2:] & dots[1:-1] & dots[:-2]
        symbols = batch.counts(hashes)
        for i in np.flatnonzero(batch.counts(three)).tolist():
            symbols[i] += documents[i].text.count("...")
        last = batch.last(lines)
        ellipsis = last == ord(ELLIPSIS)
        long = lines.length >= 3
        ends = lines.end[long]
        dotted = (codes[ends - 1] == 46) & (codes[ends - 2] == 46) & (codes[ends - 3] == 46)
        ellipsis[np.flatnonzero(long)[dotted]] = True
        bullets = _among(batch.first(lines), BULLETS)
        stop = np.zeros(len(documents), np.int64)
        lower = _stop_words(batch)
        for kind in range(len(STOP_WORDS)):
            stop += words.sums(lower == kind) > 0
        return _first_reason(
            len(documents),
            [
                ("gopher: too few words", count < self.min_words),
                ("gopher: too many words", count > self.max_words),
                ("gopher: words too short", mean < self.min_word_length),
                ("gopher: words too long", mean > self.max_word_length),
                ("gopher: symbols", share(symbols, count) > self.max_symbols),
                ("gopher: bullet lines", share(lines.sums(bullets), lines.count) > self.max_bullets),
                ("gopher: lines ending in an ellipsis", share(lines.sums(ellipsis), lines.count) > self.max_ellipses),
                ("gopher: words without letters", share(words.sums(batch.letters), count) < self.min_letters),
                ("gopher: too few stop words", stop < self.min_stop_words),
            ],
        )


def _stop_words(batch: Batch) -> NDArray[np.int8]:
    """For each word which stop word it is, -1 for none. Words are compared as they stand."""
    words = batch.words
    kinds = np.full(len(words.hash), -1, np.int8)
    short = np.flatnonzero(words.length <= 4)
    hashes = words.hash[short]
    for i, stop in enumerate(word_hashes(STOP_WORDS)):
        kinds[short[hashes == stop]] = i
    return kinds


@dataclass
class GopherRepetition(Filter):
    """Gopher's repetition rules: repeated lines, paragraphs and n-grams of words, in all lengths of table A1."""

    NAME: ClassVar[str] = "gopher-repetition"

    max_lines: float = 0.30
    max_paragraphs: float = 0.30
    max_line_characters: float = 0.20
    max_paragraph_characters: float = 0.20
    max_top: dict[str, float] | None = None
    max_repeated: dict[str, float] | None = None

    TOP: ClassVar[dict[int, float]] = {2: 0.20, 3: 0.18, 4: 0.16}
    REPEATED: ClassVar[dict[int, float]] = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

    def __post_init__(self) -> None:
        self._top = _limits(self.max_top, self.TOP, "max_top")
        self._repeated = _limits(self.max_repeated, self.REPEATED, "max_repeated")

    def judge(self, documents: Sequence[Document]) -> list[str | None]:
        batch = Batch(documents)
        rules = []
        for what, column, most, most_characters in (
            ("lines", batch.lines, self.max_lines, self.max_line_characters),
            ("paragraphs", paragraphs(batch), self.max_paragraphs, self.max_paragraph_characters),
        ):
            again = seen_before(column)
            rules.append((f"gopher: repeated {what}", share(column.sums(again), column.count) > most))
            characters = share(column.sums(again * column.length), column.sums(column.length))
            rules.append((f"gopher: characters in repeated {what}", characters > most_characters))
        for n, shares in top_ngrams(batch.words, list(self._top), len(documents)).items():
            rules.append((f"gopher: most frequent {n}-gram", shares > self._top[n]))
        for n, shares in repeated_ngrams(batch.words, list(self._repeated), len(documents)).items():
            rules.append((f"gopher: repeated {n}-grams", shares > self._repeated[n]))
        return _first_reason(len(documents), rules)


def _limits(given: dict[str, float] | None, built_in: dict[int, float], key: str) -> dict[int, float]:
    """The limits for each n, from a table whose keys TOML has made texts of."""
    from gemcut.errors import ParameterError

    if given is None:
        return dict(built_in)
    out = {}
    for name, value in given.items():
        if not name.isdigit() or not 1 <= int(name) <= 32:
            raise ParameterError(f'{key} has the key {name!r}; expected the words of an n-gram, such as "5" = 0.15')
        out[int(name)] = value
    return out


#: Lines that hold one of these in any case are left out.
POLICY = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
    "javascript",
)
CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")


@dataclass
class C4(BaseStep):
    """C4's rules: keeps lines that end a sentence and have some words, drops pages that are too short or no prose.

    With ``terminal_punctuation = false`` lines may end as they like, as FineWeb takes it; with ``curly = false`` a page
    may hold a curly bracket.
    """

    NAME: ClassVar[str] = "c4"

    min_line_words: int = 3
    min_sentences: int = 5
    terminal_punctuation: bool = True
    curly: bool = True

    def __call__(self, documents: Iterator[Document], rank: int, world_size: int) -> Iterator[Document | Dropped]:
        for batch in batches(documents):
            yield from self._some(batch)

    def _some(self, documents: list[Document]) -> Iterator[Document | Dropped]:
        for document in documents:
            if "[" in document.text:
                document.text = CITATION.sub("", document.text)
        batch = Batch(documents)
        words, lines = batch.words, batch.lines
        inside = np.searchsorted(words.start, lines.end) - np.searchsorted(words.start, lines.start)
        keep = inside >= self.min_line_words
        if self.terminal_punctuation:
            keep &= _among(batch.last(lines), TERMINAL + QUOTES)
        last = batch.last(words)
        ends = _among(last, TERMINAL)
        quoted = np.flatnonzero(_among(last, QUOTES) & (words.length > 1))
        ends[quoted] = _among(batch.codes[words.end[quoted] - 2], TERMINAL)
        # Sentences of the lines that are kept: ends of sentences before each line's end, less those before its start.
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(ends)])
        a, b = np.searchsorted(words.start, lines.start), np.searchsorted(words.start, lines.end)
        sentences = before[b] - before[a]
        for i, document in enumerate(documents):
            own = slice(lines.begin[i], lines.begin[i + 1])
            yield self._one(document, keep[own], sentences[own])

    def _one(
        self,
        document: Document,
        keep: Bools,
        sentences: NDArray[np.int64],
    ) -> Document | Dropped:
        text = document.text
        if self.curly and "{" in text:
            return Dropped(document, "c4: curly bracket")
        lower = text.lower()
        if "lorem ipsum" in lower:
            return Dropped(document, "c4: lorem ipsum")
        if any(phrase in lower for phrase in POLICY):
            lines = [line.lower() for line in document.split.lines.texts(text)]
            keep = keep & np.array([not any(phrase in line for phrase in POLICY) for line in lines], np.bool_)
        if not keep.any():
            return Dropped(document, "c4: no line is kept")
        if int(sentences[keep].sum()) < self.min_sentences:
            return Dropped(document, "c4: too few sentences")
        if not keep.all():
            self.notes["lines removed"] += int((~keep).sum())
            lines = document.split.lines.texts(text)
            paragraph = np.cumsum(document.split.breaks)[keep]
            begins = np.append(True, paragraph[1:] != paragraph[:-1]).tolist()
            kept = [("\n" if begins[i] else "") + lines[k] for i, k in enumerate(np.flatnonzero(keep).tolist())]
            document.text = "\n".join(kept).lstrip("\n")
        return document


@dataclass
class FineWeb(Filter):
    """FineWeb's own rules: lines that end with a punctuation mark, repeated lines, short lines."""

    NAME: ClassVar[str] = "fineweb"

    min_punctuation: float = 0.12
    max_repeated_characters: float = 0.1
    short_line: int = 30
    max_short_lines: float = 0.67

    def judge(self, documents: Sequence[Document]) -> list[str | None]:
        batch = Batch(documents)
        lines = batch.lines
        ended = share(lines.sums(_among(batch.last(lines), TERMINAL + QUOTES)), lines.count)
        again = share(lines.sums(seen_before(lines) * lines.length), lines.sums(lines.length))
        short = share(lines.sums(lines.length < self.short_line), lines.count)
        return _first_reason(
            len(documents),
            [
                ("fineweb: few lines end with punctuation", ended <= self.min_punctuation),
                ("fineweb: characters in repeated lines", again >= self.max_repeated_characters),
                ("fineweb: short lines", short >= self.max_short_lines),
            ],
        )
