"""The audit log at serving, and /v1/reports: what people say of answers."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from gemcut.errors import GemcutError, ParameterError
from gemcut.safety.audit import AuditLog
from gemcut.safety.reports import LONGEST_COMMENT, LONGEST_TEXT, Report
from gemcut.server.asgi import Request, Send, respond_json
from gemcut.server.errors import ApiError
from gemcut.server.fields import Label, Name

if TYPE_CHECKING:
    from gemcut.server.app import Routes
    from gemcut.server.guards import RequestGuard
    from gemcut.server.private import Private
    from gemcut.server.state import ServerState

#: Bytes of a report's body.
MOST_BYTES = 1 << 16


class Audit:
    """A server's audit log, written by one thread, so that no request waits for the disk."""

    def __init__(self, log: AuditLog) -> None:
        self.log = log
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="audit")

    def request(self, state: ServerState, request: Request, status: int, error: str | None) -> None:
        """The line of a request that a guard judged. A line that cannot be written is named in the server's log."""
        judge: RequestGuard | None = request.notes.get("judge")
        if judge is None:
            return
        private: Private | None = request.notes.get("pii")
        found = judge.report()
        sides = {
            side: {
                "flagged": [name for name, flagged in found[side]["categories"].items() if flagged],
                "scores": {n: round(v, 4) for n, v in found[side]["category_scores"].items() if v is not None},
                "failed": len(found[side]["failed"]),
            }
            for side in ("input", "output")
        }
        fields = {
            "request": request.id,
            "path": request.path,
            "status": status,
            "error": error,
            "mode": found["mode"],
            **sides,
            "blocked": judge.blocked,
            "personal_data": None if private is None else private.report(),
            **self._who(state, request),
        }

        def work() -> None:
            try:
                self.log.write("request", fields)
            except (GemcutError, OSError) as failure:
                state.log.write("error", "audit", id=request.id, message=str(failure))

        self._thread.submit(work)

    async def report(self, state: ServerState, request: Request, report: Report) -> dict[str, Any]:
        """Write a report down, on the disk. Raises ApiError 503 where that cannot be done."""
        fields = {**report.fields(), **self._who(state, request)}

        def work() -> dict[str, Any]:
            return self.log.write("report", fields, safe=True)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (GemcutError, OSError) as failure:
            state.log.write("error", "audit", id=request.id, message=str(failure))
            raise ApiError(503, "the report could not be written down; tell whoever runs this server") from None

    def close(self) -> None:
        """Write what is left."""
        self._thread.shutdown()

    def _who(self, state: ServerState, request: Request) -> dict[str, Any]:
        user = request.notes.get("user")
        return {
            "model": state.name,
            "config": state.config_hash,
            "key": request.key,
            "user": None if not user else self.log.user(user),
        }


class ReportRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of /v1/reports. ``text``: what the reporter wants to include of the exchange; nothing else is kept."""

    request_id: Name
    reason: Annotated[str, Meta(min_length=1, max_length=80)]
    comment: Annotated[str, Meta(max_length=LONGEST_COMMENT)] = ""
    text: Annotated[str, Meta(max_length=LONGEST_TEXT)] = ""
    user: Label | None = None


async def reports(state: ServerState, request: Request, send: Send) -> None:
    """Take a report of misuse."""
    await request.body(MOST_BYTES)
    body = await state.read(request, ReportRequest)
    if state.audit is None:
        raise ApiError(400, "this server takes no reports; start it with --audit-log FILE", code="no_audit_log")
    request.notes["user"] = body.user
    try:
        report = Report(body.request_id, body.reason, body.comment, body.text)
    except ParameterError as error:
        raise ApiError(400, str(error), param="reason", code="invalid_value") from None
    line = await state.audit.report(state, request, report)
    await respond_json(send, {"id": f"report-{line['n']}", "object": "report", "created": line["time"]})


#: This module's part of the routes.
ROUTES: Routes = {("POST", "/v1/reports"): reports}
