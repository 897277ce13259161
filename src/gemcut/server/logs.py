"""Logs: one JSON object a line on standard error, with sizes and times, and never a text unless that was asked for."""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from collections.abc import Sequence as Many
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

import msgspec

from gemcut.engine.request import Sequence
from gemcut.errors import GemcutError
from gemcut.server.errors import scrub

if TYPE_CHECKING:
    from gemcut.server.asgi import Request

#: Probes come every second; what went well with them is not written down.
QUIET = ("/health", "/live", "/ready", "/metrics")
#: Characters of a prompt or an answer with ``--log-prompts``.
LONGEST_TEXT = 20_000
#: Lines that wait for standard error; with more of them new ones are dropped, and that is said.
MOST_WAITING = 10_000
_SAFE = (int, float, bool)
_encode = msgspec.json.Encoder().encode


class Log:
    """Writes lines from a thread of its own, so that a slow reader of them keeps nobody waiting."""

    def __init__(self, stream: TextIO | None = None, *, prompts: bool = False) -> None:
        """
        Args:
            stream: where lines go; standard error if None.
            prompts: also write prompts and answers.
        """
        self.prompts = prompts
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(MOST_WAITING)
        self._dropped = 0
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        if prompts:
            self.write("warning", "log_prompts", message="--log-prompts: prompts and answers are written to this log")

    def write(self, level: str, event: str, **fields: Any) -> None:
        """Write a line; fields that are None are left out. Never waits, never raises."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line: dict[str, Any] = {"time": now, "level": level, "event": event}
        line |= {
            name: value if type(value) in _SAFE else _plain(value)
            for name, value in fields.items()
            if value is not None
        }
        dropped, self._dropped = self._dropped, 0
        if dropped:
            line["dropped_lines"] = dropped
        try:
            self._lines.put_nowait(_encode(line).decode())
        except queue.Full:
            self._dropped = dropped + 1
        if self._thread is None or not self._thread.is_alive():
            with self._starting:
                if self._thread is None or not self._thread.is_alive():
                    self._thread = threading.Thread(target=self._work, name="gemcut-log", daemon=True)
                    self._thread.start()

    def request(
        self, request: Request, status: int, *, error: str | None = None, texts: Callable[[], Any] | None = None
    ) -> None:
        """The line of a request that has its answer.

        Args:
            request: it.
            status: the HTTP status; 499 where the client left first.
            error: the word for what went wrong.
            texts: gives a dict of the texts, and is called with ``--log-prompts`` alone.
        """
        if request.path in QUIET and status < 400:
            return
        level = "error" if status >= 500 and status != 503 else "info"
        fields: dict[str, Any] = {
            "id": request.id,
            "method": request.method[:16],
            "path": request.path[:200],
            "status": status,
            "seconds": round(time.perf_counter() - request.arrived, 6),
            "key": request.key,
            "client": request.client,
            "error": error,
            **figures(request.sequences),
        }
        if self.prompts and texts is not None:
            fields |= texts()
        self.write(level, "request", **fields)

    def failure(self, request: Request, error: BaseException) -> None:
        """Something that nobody foresaw: where it was raised. What it says may hold a text, so only gemcut's own
        errors, which do not, are written in words; one that stands for another exception is not."""
        frames = traceback.extract_tb(error.__traceback__)[-12:]
        where = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        cause = error.__cause__
        own = isinstance(error, GemcutError) and (cause is None or isinstance(cause, GemcutError))
        self.write(
            "error",
            "failure",
            id=request.id,
            kind=type(error).__name__,
            cause=None if cause is None else type(cause).__name__,
            message=str(error) if own or self.prompts else None,
            at=where,
        )

    def close(self, seconds: float = 2.0) -> None:
        """Write what is left."""
        thread = self._thread
        if thread is not None and thread.is_alive():
            try:
                self._lines.put(None, timeout=seconds)
            except queue.Full:
                return
            thread.join(seconds)

    def _work(self) -> None:
        while (line := self._lines.get()) is not None:
            stream = self._stream if self._stream is not None else sys.stderr
            try:
                stream.write(line + "\n")
                stream.flush()
            except (OSError, ValueError):  # nobody reads it any more; the server goes on
                pass


class JsonHandler(logging.Handler):
    """Takes what libraries log (uvicorn) into a `Log`."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record as a line."""
        kind = None if record.exc_info is None or record.exc_info[0] is None else record.exc_info[0].__name__
        self._log.write(record.levelname.lower(), "library", name=record.name, message=record.getMessage(), kind=kind)


def figures(sequences: Many[Sequence]) -> dict[str, Any]:
    """Sizes and times of what the engine computed for a request; the times are those of its first answer."""
    if not sequences:
        return {}
    first = sequences[0]
    start = first.submitted
    return {
        "answers": len(sequences),
        "prompt_tokens": sum(sequence.prompt_length for sequence in sequences),
        "cached_tokens": sum(sequence.cached_tokens for sequence in sequences),
        "completion_tokens": sum(sequence.output_length for sequence in sequences),
        "queue_seconds": None if first.started is None else round(first.started - start, 6),
        "first_token_seconds": None if first.first_token is None else round(first.first_token - start, 6),
        "finish_reason": first.events[-1].finish_reason or "cancelled" if first.events else "cancelled",
    }


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return scrub(value, LONGEST_TEXT)
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value
