"""A long text in chunks that each fit: cut before headings, else between paragraphs, else between sentences."""

from __future__ import annotations

import re
from collections.abc import Callable

#: Where a unit ends: behind blank lines, behind a sentence's end with its white space, before a heading's line.
_END = re.compile(
    r"\n[ \t]*\n\s*"  # a paragraph
    r"|[.!?…][\"'”’)\]]*\s+"  # a sentence
    r"|[。！？][」』”’）]*\s*"  # a sentence, where none is followed by a space
    r"|\n(?=#{1,6} )"  # a line before a heading
)
_HEADING = re.compile(r"#{1,6} |[^\n]+\n(?:=+|-+)[ \t]*(?:\n|$)")


def units(text: str) -> list[str]:
    """Sentences, paragraphs' ends and headings with the white space behind them: joined they are the text."""
    found, start = [], 0
    for end in _END.finditer(text):
        if end.end() > start:
            found.append(text[start : end.end()])
            start = end.end()
    return [*found, text[start:]] if start < len(text) else found


def split_text(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Chunks that joined are ``text``; each ``fits``.

    A chunk takes as many sentences as fit. It ends before a heading, or else a paragraph, where one of them stands in
    its second half. A sentence that does not fit is cut between words, a word between characters; a single character
    is taken as it is.

    Args:
        text: anything.
        fits: whether a text is short enough. What is shorter than one that fits must fit, too.
    """
    pieces = [part for unit in units(text) for part in _smaller(unit, fits)]
    chunks, start = [], 0
    while start < len(pieces):
        count = _most(len(pieces) - start, lambda n, start=start: fits("".join(pieces[start : start + n])))  # type: ignore[misc]
        end = start + count
        if end < len(pieces):
            end = _good_end(pieces, start, end)
        chunks.append("".join(pieces[start:end]))
        start = end
    return chunks


def _smaller(unit: str, fits: Callable[[str], bool]) -> list[str]:
    if fits(unit) or len(unit) == 1:
        return [unit]
    words = re.findall(r"\s*\S+\s*$|\s*\S+", unit) or [unit]
    if len(words) == 1:
        words = list(unit)
    return [part for word in words for part in _smaller(word, fits)]


def _most(top: int, good: Callable[[int], bool]) -> int:
    """The largest count up to ``top`` that is good, 1 at least: in doubling steps, then by halving."""
    low, high = 1, 2
    while high <= top and good(high):
        low, high = high, 2 * high
    high = min(high, top + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


def _good_end(pieces: list[str], start: int, end: int) -> int:
    half = start + (end - start + 1) // 2
    places = range(end, max(half, start + 1) - 1, -1)
    heading = next((place for place in places if _HEADING.match(pieces[place])), None)
    if heading is not None:
        return heading
    paragraph = next((place for place in places if re.search(r"\n[ \t]*\n\s*$", pieces[place - 1])), None)
    return end if paragraph is None else paragraph
