"""Room in a chat whose context is nearly full: its oldest exchanges are dropped, or summarized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, cast, get_args

from gemcut.errors import ParameterError
from gemcut.gemma import Gemma
from gemcut.uses.summarize import Summarizer

Full = Literal["ask", "drop", "summarise", "stop"]
#: The part of the context that an answer is to have; with less the context counts as nearly full.
RESERVE = 8

Turns = Sequence[dict[str, str]]


def parse_full(text: str, what: str) -> Full:
    """What to do when the context is nearly full; raises ParameterError naming ``what`` where it is unknown."""
    name = "summarise" if text == "summarize" else text
    if name not in get_args(Full):
        raise ParameterError(f"{what} is {text!r}; expected one of {', '.join(get_args(Full))}")
    return cast("Full", name)


def reserve(limit: int, most: int | None = None) -> int:
    """Tokens that an answer is to have room for in a context of ``limit``; ``most``: it takes no more than that."""
    return min(limit // RESERVE, limit if most is None else most)


def fewest(turns: Turns, length: Callable[[Turns], int], room: int) -> int | None:
    """The fewest oldest exchanges without which the rest has at most ``room`` tokens; None where none of them helps.

    ``length`` gives the tokens of a conversation with these turns.
    """
    low, high = 0, len(turns) // 2
    if length(turns[2 * high :]) > room:
        return None
    while low < high:  # fewer turns are never more tokens
        middle = (low + high) // 2
        low, high = (low, middle) if length(turns[2 * middle :]) <= room else (middle + 1, high)
    return low


def summarize_turns(gemma: Gemma, turns: Turns, before: str = "") -> str:
    """A summary of some exchanges, and of the summary ``before`` them.

    Raises ParameterError or ContextLengthError where the context is too small for one.
    """
    names = {"user": "User", "assistant": "Model"}
    lines = [f"{names[turn['role']]}: {turn['content']}" for turn in turns]
    most = max(16, gemma.engine.max_context // (2 * RESERVE))
    summarizer = Summarizer(gemma, length="medium", max_new_tokens=min(256, most))
    (summary,) = summarizer(["\n\n".join([before, *lines] if before else lines)])
    return summary.text.strip()
