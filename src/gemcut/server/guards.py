"""The joint for guards, which look at texts before and after the model does. None is built in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from gemcut.server.errors import ApiError

#: Where a piece of an answer ends that can be checked and let out: behind a sentence or a line.
_END = re.compile(r"[.!?…。！？](?=\s)|\n")
#: A piece without such an end is let out at this length.
_LONG = 400


@dataclass(frozen=True)
class Verdict:
    """What a guard says of a text: whether it may pass, and if not, why, in a word and in a sentence."""

    passed: bool = True
    category: str = ""
    message: str = ""


class Guard(Protocol):
    """Checks texts. It may take its time (a judging model), other requests go on meanwhile."""

    async def check(self, kind: Literal["input", "output"], text: str) -> Verdict:
        """Judge a whole prompt's text, or an answer's text as far as it is known."""


async def check_input(guards: Sequence[Guard], text: str) -> None:
    """Raise ApiError 400 where a guard refuses a prompt."""
    for guard in guards:
        verdict = await guard.check("input", text)
        if not verdict.passed:
            message = verdict.message or f"the request was refused ({verdict.category})"
            raise ApiError(400, message, code="content_filter", param="messages")


class CheckedText:
    """The text of one answer, let out in pieces that the guards have seen.

    Attributes:
        refused: the verdict of the guard that ended it; None while it may go on.
    """

    def __init__(self, guards: Sequence[Guard]) -> None:
        self._guards = guards
        self._out, self._held = "", ""
        self.refused: Verdict | None = None

    async def push(self, text: str, *, last: bool = False) -> str:
        """Take more text; return what may be shown now: whole sentences, and at the end everything."""
        if self.refused is not None:
            return ""
        self._held += text
        if last:
            cut = len(self._held)
        else:
            ends = [found.end() for found in _END.finditer(self._held)]
            cut = ends[-1] if ends else len(self._held) if len(self._held) >= _LONG else 0
        piece, self._held = self._held[:cut], self._held[cut:]
        if not piece:
            return ""
        for guard in self._guards:
            verdict = await guard.check("output", self._out + piece)
            if not verdict.passed:
                self.refused = verdict
                return ""
        self._out += piece
        return piece
