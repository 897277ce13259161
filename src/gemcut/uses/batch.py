"""A file of requests answered into a file: OpenAI's batch shape, one JSON object a line.

Each request goes the way of the server's own (fields, bounds, structured answers, tools, error shape), without HTTP.
Answers stand in the order of the requests, and the file of answers is always a whole beginning of what it will be: a
run that was ended in any way goes on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from gemcut import files
from gemcut.errors import ParameterError
from gemcut.gemma import Gemma
from gemcut.server.asgi import LEFT, Message, Request, Scope, Send
from gemcut.server.chat import chat_completions
from gemcut.server.completions import completions
from gemcut.server.embeddings import embeddings
from gemcut.server.errors import ApiError, api_error
from gemcut.server.fields import decode
from gemcut.server.state import ServerSettings, ServerState

#: What a line's ``url`` may be.
PATHS = {
    "/v1/chat/completions": chat_completions,
    "/v1/completions": completions,
    "/v1/embeddings": embeddings,
}
#: Most bytes of one line, which are those of a request's body at the server, and a little.
MAX_LINE = (8 << 20) + 4096
#: Requests under way for each row of an engine step: a long answer at the front must not keep the rows empty.
_AHEAD = 4
_HOURS = 10_000 * 3600.0


class Line(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One request of a batch file."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _Named(msgspec.Struct):
    """The one field that is looked for in a line that is wrong elsewhere."""

    custom_id: Any = None


class _Streamed(msgspec.Struct):
    stream: Any = None


@dataclass
class Totals:
    """What became of a file of requests.

    Attributes:
        lines: answers in the file, those of earlier runs included.
        kept: answers that earlier runs had written.
        failed: of this run's lines, those whose answer is an error.
        tokens: tokens that this run generated.
        seconds: that this run took.
        first_error: (number of the line, what is wrong) of this run's first error.
    """

    lines: int = 0
    kept: int = 0
    failed: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_error: tuple[int, str] | None = None


@dataclass(frozen=True)
class _Answer:
    """What is written for one line."""

    text: bytes
    error: str | None
    tokens: int


#: Hears the totals after each answer that was written.
Heard = Callable[[Totals], None]


async def run_batch(
    gemma: Gemma, source: Path, target: Path, *, names: tuple[str, ...], heard: Heard | None = None
) -> Totals:
    """Answer the requests of ``source`` into ``target``, as many at a time as the engine takes.

    A line that is wrong gets an answer that says so, and the others are done. An answer file that a run left
    unfinished is gone on with; half a line at its end is dropped. When the task is cancelled the answers under way are
    ended and what was written stays.

    Args:
        gemma: the model.
        source: requests, one JSON object a line: custom_id, method, url, body. Empty lines are passed over.
        target: the answers; made where it is not there.
        names: what ``model`` may be in a request.
        heard: called after each answer.

    Raises:
        ParameterError: a file cannot be read or written, has no requests, or ``target`` holds answers to others.
    """
    state = ServerState(
        ServerSettings(
            names=names, max_requests=1 << 30, queue_timeout=_HOURS, request_timeout=_HOURS, max_body=MAX_LINE
        ),
        gemma=gemma,
    )
    totals, started = Totals(), time.perf_counter()
    with _opened(source) as lines, _answers(target, source) as answers:
        numbered = _numbered(lines)
        seen = _resume(numbered, answers, names, totals, source, target)
        waiting: deque[tuple[int, asyncio.Task[_Answer]]] = deque()
        ahead = _AHEAD * (gemma.engine.config.max_batch_size or 64)
        more = True
        try:
            while more or waiting:
                while more and len(waiting) < ahead:
                    entry = next(numbered, None)
                    if entry is None:
                        more = False
                        break
                    number, line = entry
                    waiting.append((number, asyncio.ensure_future(_answer(state, line, names, seen))))
                if not waiting:
                    break
                number, task = waiting[0]
                answer = await task
                waiting.popleft()
                answers.write(answer.text)
                answers.flush()  # what is written survives kill -9
                totals.lines += 1
                totals.tokens += answer.tokens
                totals.seconds = time.perf_counter() - started
                if answer.error is not None:
                    totals.failed += 1
                    totals.first_error = totals.first_error or (number, answer.error)
                if heard is not None:
                    heard(totals)
                await asyncio.sleep(0)  # where answers are there already, nothing else lets a cancellation in
        finally:
            for _, task in waiting:
                task.cancel()
            await asyncio.gather(*(task for _, task in waiting), return_exceptions=True)
            answers.flush()
            with contextlib.suppress(OSError):  # a pipe has nothing to sync
                os.fsync(answers.fileno())
    if not totals.lines:
        raise ParameterError(f"{source} holds no requests; expected one JSON object a line with custom_id, url, body")
    totals.seconds = time.perf_counter() - started
    return totals


# ---- one line ----------------------------------------------------------------------------------------------------


async def _answer(state: ServerState, line: bytes, names: tuple[str, ...], seen: set[bytes]) -> _Answer:
    """The answer to one line, which may be an error's."""
    custom_id = _custom_id(line)
    try:
        request = _read(line, seen)
        status, request_id, body = await _respond(state, request)
    except ApiError as error:
        detail = error.body["error"]
        outcome: dict[str, Any] = {"response": None, "error": {"code": detail["code"], "message": detail["message"]}}
        said: str | None = error.message
        tokens = 0
    else:
        value = msgspec.json.decode(body)
        outcome = {"response": {"status_code": status, "request_id": request_id, "body": value}, "error": None}
        said = None if status < 400 else str(value["error"]["message"])
        tokens = value.get("usage", {}).get("completion_tokens", 0)
    entry = {"id": f"batch_req_{_digest(line, names)}", "custom_id": custom_id, **outcome}
    return _Answer(msgspec.json.encode(entry) + b"\n", said, tokens)


def _read(line: bytes, seen: set[bytes]) -> Line:
    """A line's request. Raises ApiError that says what is wrong."""
    if len(line) > MAX_LINE:
        raise ApiError(400, f"the line has more than {MAX_LINE:,} bytes; send less", code="line_too_large")
    try:
        found, _ = decode(line, Line)
    except ApiError as error:
        said = error.message.replace("the body is not JSON", "the line is not JSON").replace("the body is", "it is")
        raise ApiError(400, said, param=error.param, code=error.code) from None
    if not found.custom_id or len(found.custom_id) > 512:
        raise ApiError(400, "custom_id has no characters or more than 512", param="custom_id", code="invalid_value")
    name = _short(found.custom_id)
    if name in seen:
        raise ApiError(
            400,
            f"custom_id {found.custom_id!r} is that of an earlier line; each line needs its own",
            param="custom_id",
            code="duplicate_custom_id",
        )
    seen.add(name)
    if found.method != "POST":
        raise ApiError(400, f"method is {found.method[:40]!r}; expected POST", param="method", code="invalid_method")
    if found.url not in PATHS:
        raise ApiError(
            400, f"url is {found.url[:100]!r}; expected one of {', '.join(PATHS)}", param="url", code="invalid_url"
        )
    with contextlib.suppress(msgspec.DecodeError):  # what is wrong with the body its own reader says
        if msgspec.json.decode(found.body, type=_Streamed).stream:
            raise ApiError(
                400, "body.stream is true, but a batch has whole answers; leave it out", param="stream", code="stream"
            )
    return found


async def _respond(state: ServerState, line: Line) -> tuple[int, str, bytes]:
    """(status, id, body) of what the server would answer."""
    body = bytes(line.body)
    scope: Scope = {
        "type": "http",
        "method": "POST",
        "path": line.url,
        "headers": [(b"content-type", b"application/json")],
        "extensions": {LEFT: {"callbacks": [], "gone": lambda: False}},
    }
    pieces: list[bytes] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def raw(message: Message) -> None:
        pieces.append(message.get("body", b""))

    request = Request(scope, receive)
    send = Send(raw, scope, request.reply)
    handler: Callable[[ServerState, Request, Send], Awaitable[None]] = PATHS[line.url]
    try:
        await handler(state, request, send)
    except Exception as error:
        failure = api_error(error, request_id=request.id)
        if failure.status == 500:
            state.log.failure(request, error)
        return failure.status, request.id, msgspec.json.encode(failure.body)
    return send.status or 200, request.id, b"".join(pieces)


def _custom_id(line: bytes) -> str | None:
    """The custom_id of a line, wherever that can be read."""
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        found = msgspec.json.decode(line, type=_Named).custom_id
        if isinstance(found, str):
            return found[:512]
    return None


def _digest(line: bytes, names: tuple[str, ...]) -> str:
    """Says which request was answered, and by which model: an answer of another one is not gone on from."""
    return hashlib.sha256(json.dumps(names[:1]).encode() + b"\n" + line).hexdigest()[:24]


def _short(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=12).digest()


# ---- the files ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file of requests. Raises ParameterError where there is none."""
    try:
        files.check_regular(path)
        file = path.open("rb")
    except files.UnreadableError as error:
        raise ParameterError(f"cannot read {path}: it {error}") from None
    except (OSError, ValueError) as error:
        raise ParameterError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    with file:
        yield file


@contextlib.contextmanager
def _answers(path: Path, source: Path) -> Iterator[BinaryIO]:
    """The file of answers, which belongs to this process alone. Raises ParameterError."""
    try:
        if path.exists():
            files.check_regular(path)
            if path.samefile(source):
                raise ParameterError(f"{path} is both the requests and the answers; give the answers another name")
        file = path.open("a+b")
    except files.UnreadableError as error:
        raise ParameterError(f"cannot write {path}: it {error}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ParameterError):
            raise
        raise ParameterError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
    with file:
        _lock(file, path)
        yield file


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # a system without it: two runs into one file are then the user's own to avoid
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ParameterError(f"another gemcut batch writes {path} now; wait for it, or give another name") from None


def _numbered(lines: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(number, line) of each line with something in it; one that is too large comes cut, one byte too long."""
    number = 0
    while line := lines.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE and not line.endswith(b"\n"):
            while (rest := lines.readline(1 << 20)) and not rest.endswith(b"\n"):
                pass
        elif not (line := line.removeprefix(b"\xef\xbb\xbf").strip()):
            continue
        yield number, line


def _resume(
    numbered: Iterator[tuple[int, bytes]],
    answers: BinaryIO,
    names: tuple[str, ...],
    totals: Totals,
    source: Path,
    target: Path,
) -> set[bytes]:
    """Pass over the requests that have answers; gives the custom_ids so far. Raises ParameterError."""
    seen: set[bytes] = set()
    answers.seek(0)
    whole = 0
    while answer := answers.readline():
        if not answer.endswith(b"\n"):
            break  # half a line, of a run that was killed
        whole += len(answer)
        entry = next(numbered, None)
        try:
            written = msgspec.json.decode(answer, type=dict[str, Any]).get("id")
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            written = None
        if entry is None or written != f"batch_req_{_digest(entry[1], names)}":
            raise ParameterError(
                f"{target} line {totals.lines + 1} is no answer of model {names[0]!r} to the request there in "
                f"{source}; give another output file, or remove that one"
            )
        with contextlib.suppress(ApiError):  # it has its answer; here its custom_id is noted
            _read(entry[1], seen)
        totals.lines += 1
    totals.kept = totals.lines
    answers.seek(whole)
    answers.truncate()
    return seen
