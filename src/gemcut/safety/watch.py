"""Watch: one request under a guard. It judges the prompt, then the answer piece by piece, and reports.

    Guard -> Watch.input(prompt) -> Pieces.cut(text) -> Watch.output(text so far) -> Pieces.release(piece)

The server (asyncio) and the Python API (threads) both go this way; how they wait for a judge is theirs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from gemcut.errors import RefusedError
from gemcut.safety.guard import Decision, Guard, Side
from gemcut.safety.guard_file import Mode

#: Where a piece of an answer ends that can be checked and let out: behind a sentence or a line.
_END = re.compile(r"[.!?…。！？](?=\s)|\n")
#: A piece without such an end is let out at this length, or when it has so many tokens.
_LONG = 400
PIECE_TOKENS = 32


class Watch:
    """The judges for one request: they know its mode, and its prompt once that was judged."""

    def __init__(self, guard: Guard, mode: Mode | None = None) -> None:
        """``mode``: one that the guard file allows (`Guard.mode` checks); None: the file's own."""
        self.guard, self.mode = guard, mode or guard.file.mode
        self.refusal, self.piece_tokens = guard.file.refusal, guard.file.piece_tokens
        self.prompt: str | None = None
        self._input: list[Decision] = []
        self._output: list[Decision] = []

    def input(self, text: str) -> Decision:
        """Judge a prompt."""
        return self.note("input", text, self.guard.check("input", text, mode=self.mode))

    def output(self, text: str) -> Decision:
        """Judge an answer as far as it is known, beside its prompt."""
        return self.note("output", text, self.guard.check("output", text, prompt=self.prompt, mode=self.mode))

    def checked_input(self, text: str) -> Watch:
        """This watch, once its prompt was judged. Raises RefusedError where it may not pass."""
        decision = self.input(text)
        if decision.blocked:
            raise RefusedError(refused("prompt", decision), self.refusal)
        return self

    def note(self, side: Side, text: str, decision: Decision) -> Decision:
        """Remember what was decided, for the report."""
        if side == "input" and self.prompt is None:
            self.prompt = text
        (self._input if side == "input" else self._output).append(decision)
        return decision

    def sibling(self) -> Watch:
        """The watch of another answer to the same prompt, which was judged already."""
        other = Watch(self.guard, self.mode)
        other.prompt, other._input = self.prompt, list(self._input)
        return other

    def report(self) -> dict[str, Any]:
        """The member ``moderation`` of an answer: of each side the highest scores of all looks."""
        names = self.guard.policies
        return {
            "mode": self.mode,
            "input": _joined(self._input).report(names("input")),
            "output": _joined(self._output).report(names("output")),
        }


def said(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of a dialogue as it is judged: what stands in its messages."""
    return "\n\n".join(str(message.get("content") or "") for message in messages)


def refused(what: str, decision: Decision) -> str:
    """A sentence for what was refused, and by which policies. Never the text."""
    return f"the {what} was refused ({decision.category})"


def _joined(decisions: Sequence[Decision]) -> Decision:
    scores: dict[str, float] = {}
    for decision in decisions:
        for name, value in decision.scores.items():
            scores[name] = max(scores.get(name, 0.0), value)
    flagged = tuple(dict.fromkeys(name for decision in decisions for name in decision.flagged))
    failed = tuple(dict.fromkeys(why for decision in decisions for why in decision.failed))
    return Decision(scores, flagged, failed)


class Pieces:
    """The text of one answer, cut into pieces that can be judged and let out.

    Attributes:
        out: what was let out.
        held: what waits.
    """

    def __init__(self, most_tokens: int = PIECE_TOKENS) -> None:
        self.out, self.held = "", ""
        self._tokens, self._most = 0, most_tokens

    def cut(self, text: str, *, tokens: int = 0, last: bool = False) -> str:
        """Take more text, of so many tokens; return the piece that is to be judged now, "" for none.

        That is whole sentences; where no sentence ends within ``most_tokens`` tokens, what there is; at the end
        everything.
        """
        self.held += text
        self._tokens += tokens
        if last:
            cut = len(self.held)
        else:
            ends = [found.end() for found in _END.finditer(self.held)]
            full = self._tokens >= self._most or len(self.held) >= _LONG
            cut = ends[-1] if ends else len(self.held) if full else 0
        piece, self.held = self.held[:cut], self.held[cut:]
        if piece:
            self._tokens = 0
        return piece

    def release(self, piece: str) -> str:
        """A piece that may pass."""
        self.out += piece
        return piece


class HasText(Protocol):
    """An event with text, which may be ""."""

    @property
    def text(self) -> str:
        """The text it adds."""


Event = TypeVar("Event", bound=HasText)


class HeldEvents(Generic[Event]):
    """Events whose text is held back: a token and its log-probability come behind their text, never before."""

    def __init__(self) -> None:
        self._held: list[Event] = []
        self._ahead = 0  # characters of the first one that are out already

    def add(self, events: Sequence[Event]) -> None:
        """Hold more of them."""
        self._held += events

    def all(self) -> list[Event]:
        """Take all that are left."""
        found, self._held = self._held, []
        return found

    def let_out(self, characters: int) -> list[Event]:
        """Take the events whose whole text is out once so many more characters are."""
        held, room = self._held, characters + self._ahead
        count = 0
        while count < len(held) and len(held[count].text) <= room and room > 0:
            room -= len(held[count].text)
            count += 1
        self._ahead = room
        self._held = held[count:]
        return held[:count]
