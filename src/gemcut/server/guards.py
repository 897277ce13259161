"""Guards at serving: texts are judged before and after the model, and streams let out what was judged already.

JudgeDoor (of the server) -> JudgeDoor.of(request) -> RequestGuard -> CheckedText (of each answer)
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from gemcut.errors import ParameterError
from gemcut.safety.guard import Decision
from gemcut.safety.watch import PIECE_TOKENS, Pieces, Watch, refused
from gemcut.server.errors import ApiError

if TYPE_CHECKING:
    from gemcut.safety.guard import Guard as Judges
    from gemcut.safety.guard_file import Mode
    from gemcut.safety.private import Shown
    from gemcut.server.logs import Log


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
    """The judges for one request, as a ``Guard`` of the server."""

    def __init__(self, door: JudgeDoor, request_id: str, log: Log, mode: Mode) -> None:
        self.watch = Watch(door.judges, mode)
        self.mode, self.refusal, self.piece_tokens = mode, self.watch.refusal, self.watch.piece_tokens
        self.blocked = False
        self._door, self._id, self._log = door, request_id, log

    async def check(self, kind: Literal["input", "output"], text: str) -> Verdict:
        """See ``Guard``. What was flagged, blocked or could not be judged is logged, without the text."""
        decision = await self._door.look(kind, text, self.watch.prompt if kind == "output" else None, self.mode)
        self.watch.note(kind, text, decision)
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
        self.blocked = True
        return Verdict(False, decision.category, refused("request" if kind == "input" else "answer", decision))

    def report(self) -> dict[str, Any]:
        """See ``Watch.report``."""
        return self.watch.report()


class CheckedText:
    """The text of one answer, let out in pieces that the guards have seen.

    Attributes:
        refused: the verdict of the guard that ended it; None while it may go on.
    """

    def __init__(self, guards: Sequence[Guard], shown: Shown | None = None) -> None:
        """``shown``: what takes personal data out of the text behind the guards."""
        self._guards, self._shown = guards, shown
        most = min((getattr(guard, "piece_tokens", PIECE_TOKENS) for guard in guards), default=PIECE_TOKENS)
        self._pieces = Pieces(most)
        self.refused: Verdict | None = None
        self._refuser: Guard | None = None

    @property
    def refusal(self) -> str:
        """What a refused answer says instead of its text."""
        own = getattr(self._refuser, "refusal", None)
        return (
            str(own)
            if own is not None
            else next((str(guard.refusal) for guard in self._guards if hasattr(guard, "refusal")), "")
        )

    async def push(self, text: str, *, tokens: int = 0, last: bool = False) -> str:
        """Take more text, of so many tokens; return what may be shown now (see ``Pieces.cut``).

        Each piece is judged together with all that went before it.
        """
        if self.refused is not None:
            return ""
        piece = self._pieces.cut(text, tokens=tokens, last=last)
        if not piece:
            return self._show("", last=last)
        for guard in self._guards:
            verdict = await guard.check("output", self._pieces.out + piece)
            if not verdict.passed:
                self.refused, self._refuser = verdict, guard
                return ""
        return self._show(self._pieces.release(piece), last=last)

    def _show(self, piece: str, *, last: bool) -> str:
        return piece if self._shown is None else self._shown.push(piece, last=last)
