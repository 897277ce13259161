"""Guards at serving: texts are judged before and after the model, and streams let out what was judged already.

JudgeDoor (of the server) -> JudgeDoor.of(request) -> RequestGuard -> CheckedText (of each answer)
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from gemcut.errors import ParameterError
from gemcut.safety.guard import Decision
from gemcut.server.errors import ApiError

if TYPE_CHECKING:
    from gemcut.safety.guard import Guard as Judges
    from gemcut.safety.guard_file import Mode
    from gemcut.server.logs import Log

#: Where a piece of an answer ends that can be checked and let out: behind a sentence or a line.
_END = re.compile(r"[.!?…。！？](?=\s)|\n")
#: A piece without such an end is let out at this length, or when it has so many tokens.
_LONG = 400
PIECE_TOKENS = 32


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


def guards_of(
    own: Sequence[Guard], door: JudgeDoor | None, request_id: str, log: Log, asked: str | None
) -> tuple[list[Guard], RequestGuard | None]:
    """(the guards of one request, the one of them that has the judges). Raises ApiError 400 where it asks for a mode
    that there is not. The server's own mode cannot be lowered."""
    if door is None:
        if asked not in (None, "off"):
            message = "moderation is given, but this server has no guard; leave it out, or start it with --guard FILE"
            raise ApiError(400, message, param="moderation", code="no_guard")
        return list(own), None
    try:
        guard = door.of(request_id, log, asked)
    except ParameterError as error:
        raise ApiError(400, str(error), param="moderation.mode", code="invalid_value") from None
    return ([*own, guard] if guard.mode != "off" else list(own)), (guard if guard.mode != "off" else None)


async def check_input(guards: Sequence[Guard], text: str) -> None:
    """Raise ApiError 400 where a guard refuses a prompt."""
    for guard in guards:
        verdict = await guard.check("input", text)
        if not verdict.passed:
            message = verdict.message or f"the request was refused ({verdict.category})"
            raise ApiError(400, message, code="content_filter", param="messages")


class JudgeDoor:
    """The judges of a server. A look that takes time is taken in a thread, so that other requests go on."""

    def __init__(self, judges: Judges) -> None:
        self.judges = judges
        self._threads = ThreadPoolExecutor(32, thread_name_prefix="guard")

    def of(self, request_id: str, log: Log, asked: str | None) -> RequestGuard:
        """The guard of one request, which asked for a mode. Raises ParameterError where that is below the server's."""
        return RequestGuard(self, request_id, log, self.judges.mode(asked))

    async def look(
        self, kind: Literal["input", "output"], text: str, prompt: str | None = None, mode: Mode | None = None
    ) -> Decision:
        """What the judges say of a text."""
        if self.judges.quick:
            return self.judges.check(kind, text, prompt=prompt, mode=mode)

        def work() -> Decision:
            return self.judges.check(kind, text, prompt=prompt, mode=mode)

        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def words(self) -> str:
        """A line for the end of a server: what its guard did and cost."""
        judges, p95 = self.judges, self.judges.latency()
        took = "" if p95 is None else f", p95 of a check {p95 * 1e3:.2f} ms"
        return (
            f"guard: {judges.checks:,} checks, {judges.blocks:,} blocked, {judges.failures:,} with a failed judge{took}"
        )


class RequestGuard:
    """The judges for one request: they know its mode, and its prompt once that was judged."""

    def __init__(self, door: JudgeDoor, request_id: str, log: Log, mode: Mode) -> None:
        self.mode, self.refusal = mode, door.judges.file.refusal
        self.piece_tokens = door.judges.file.piece_tokens
        self._door, self._id, self._log = door, request_id, log
        self._prompt: str | None = None
        self._input: list[Decision] = []
        self._output: list[Decision] = []

    async def check(self, kind: Literal["input", "output"], text: str) -> Verdict:
        """See ``Guard``. What was flagged, blocked or could not be judged is logged, without the text."""
        decision = await self._door.look(kind, text, self._prompt if kind == "output" else None, self.mode)
        if kind == "input":
            self._prompt = text if self._prompt is None else self._prompt
        (self._input if kind == "input" else self._output).append(decision)
        if decision.flagged or decision.failed:
            self._log.write(
                "warning",
                "guard",
                id=self._id,
                side=kind,
                flagged=list(decision.flagged),
                failed=list(decision.failed),
                blocked=decision.blocked,
            )
        if not decision.blocked:
            return Verdict()
        what = "request" if kind == "input" else "answer"
        return Verdict(False, decision.category, f"the {what} was refused ({decision.category})")

    def report(self) -> dict[str, Any]:
        """The member ``moderation`` of an answer: of each side the highest scores of all looks."""
        names = self._door.judges.policies
        return {
            "mode": self.mode,
            "input": _joined(self._input).report(names("input")),
            "output": _joined(self._output).report(names("output")),
        }


def _joined(decisions: Sequence[Decision]) -> Decision:
    scores: dict[str, float] = {}
    for decision in decisions:
        for name, value in decision.scores.items():
            scores[name] = max(scores.get(name, 0.0), value)
    flagged = tuple(dict.fromkeys(name for decision in decisions for name in decision.flagged))
    failed = tuple(dict.fromkeys(why for decision in decisions for why in decision.failed))
    return Decision(scores, flagged, failed)


class CheckedText:
    """The text of one answer, let out in pieces that the guards have seen.

    Attributes:
        refused: the verdict of the guard that ended it; None while it may go on.
    """

    def __init__(self, guards: Sequence[Guard]) -> None:
        self._guards = guards
        self._out, self._held, self._tokens = "", "", 0
        self._most = min((getattr(guard, "piece_tokens", PIECE_TOKENS) for guard in guards), default=PIECE_TOKENS)
        self.refused: Verdict | None = None

    @property
    def refusal(self) -> str:
        """What a refused answer says instead of its text."""
        return next((str(guard.refusal) for guard in self._guards if hasattr(guard, "refusal")), "")

    async def push(self, text: str, *, tokens: int = 0, last: bool = False) -> str:
        """Take more text, of so many tokens; return what may be shown now.

        That is whole sentences; where no sentence ends within ``piece_tokens`` tokens, what there is; at the end
        everything. Each piece is judged together with all that went before it.
        """
        if self.refused is not None:
            return ""
        self._held += text
        self._tokens += tokens
        if last:
            cut = len(self._held)
        else:
            ends = [found.end() for found in _END.finditer(self._held)]
            full = self._tokens >= self._most or len(self._held) >= _LONG
            cut = ends[-1] if ends else len(self._held) if full else 0
        piece, self._held = self._held[:cut], self._held[cut:]
        if piece:
            self._tokens = 0
        if not piece:
            return ""
        for guard in self._guards:
            verdict = await guard.check("output", self._out + piece)
            if not verdict.passed:
                self.refused = verdict
                return ""
        self._out += piece
        return piece
