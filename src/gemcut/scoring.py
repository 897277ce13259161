"""Scoring many texts: each place that several of them share, with all that stands before it, is scored once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from gemcut.engine.request import PromptLogprob
from gemcut.errors import ParameterError


@dataclass(frozen=True)
class Portion:
    """What is computed of one text: the scores from place ``start`` on. Those before it another text has.

    Attributes:
        text: which text of all.
        start: a place from 1 to the text's length; with the length nothing is left to compute.
        source: the text that has the same tokens up to there; -1 where none is needed.
    """

    text: int
    start: int
    source: int


def portions(texts: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Portion]:
    """What to compute of each text, in an order in which texts that begin alike stand together.

    Args:
        texts: token ids, none of them empty.
        starts: of each text the place from which its tokens are to be scored.
    """
    order = sorted(range(len(texts)), key=lambda i: (texts[i], starts[i]))
    found = [Portion(order[0], starts[order[0]], -1)] if order else []
    for before, text in pairwise(order):
        shared = _common(texts[before], texts[text])
        if starts[before] <= starts[text] < shared:
            found.append(Portion(text, shared, before))
        else:
            found.append(Portion(text, starts[text], -1))
    return found


def score_texts(
    texts: Sequence[Sequence[int]],
    starts: Sequence[int],
    compute: Callable[[list[Portion]], Iterable[Sequence[PromptLogprob]]],
) -> list[list[PromptLogprob]]:
    """The scores of each text's tokens from its place of ``starts`` on.

    ``compute`` gives the scores of some portions, from each one's start to its text's end, in their order.
    """
    parts = portions(texts, starts)
    left = [part for part in parts if part.source < 0 or part.start < len(texts[part.text])]
    computed = {part.text: scores for part, scores in zip(left, compute(left), strict=True)}
    results: list[list[PromptLogprob]] = [[] for _ in texts]
    for part in parts:
        own = list(computed.get(part.text, ()))
        if part.source >= 0:
            start, other = starts[part.text], starts[part.source]
            own = results[part.source][start - other : part.start - other] + own
        results[part.text] = own
    return results


def check_starts(start: Any, texts: Sequence[Sequence[int]]) -> list[int]:
    """A start for each text, from one for all or a sequence of them.

    Raises:
        ParameterError: another number of them, or one that is no place from 1 to its text's length.
    """
    if isinstance(start, int):
        starts: list[Any] = [start] * len(texts)
    elif isinstance(start, Iterable) and not isinstance(start, (str, bytes)):
        starts = list(start)
    else:
        raise ParameterError(f"start is {start!r}; expected a place from 1 on, or one for each text")
    if len(starts) != len(texts):
        raise ParameterError(f"{len(texts)} texts but {len(starts)} places in start")
    for place, text in zip(starts, texts, strict=True):
        if not text:
            raise ParameterError("the prompt is empty; expected at least one token (<bos> counts)")
        if type(place) is not int or not 1 <= place <= len(text):
            raise ParameterError(
                f"start is {place!r}; expected a place from 1 (the second token) to the text's length, {len(text)}"
            )
    return starts


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))
