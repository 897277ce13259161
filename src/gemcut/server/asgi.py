"""What ASGI gives a handler: the request with its bounded body, and ways to answer. No framework."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from collections.abc import Sequence as Many
from typing import Any

import msgspec

from gemcut.engine.request import Sequence
from gemcut.server.errors import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
RawSend = Callable[[Message], Awaitable[None]]
Headers = Many[tuple[bytes, bytes]]

JSON = b"application/json"
#: Ids of requests: one random part a process, and a number.
_START = secrets.token_hex(9)
_numbers = itertools.count()
_encode = msgspec.json.Encoder().encode
#: Of a body that is too large so many bytes are read and dropped, so that the client is there to read the answer.
_DRAINED = 1 << 26
#: Name of the scope's extension whose "callbacks" are called when the client leaves.
LEFT = "gemcut.left"
_CLOSE = [(b"connection", b"close")]


class ClientLeftError(Exception):
    """The client has left; there is nobody to answer."""


class Request:
    """One HTTP request.

    Attributes:
        id: a name for logs; the client's ``x-request-id`` where that is a plain word.
        method, path: as they came; the path is unquoted.
        headers: by lower-case name; of several with one name the last.
        client: the other side's address.
        arrived: `time.perf_counter` at which the head was there.
        key: the name of the API key it came with, None where none was needed. Set by the gate that checks keys.
        cache_salt: prompts of different salts share no part of the prefix cache. Set by the same gate.
        preflight: a browser's question whether a page of another origin may send the real request.
        reply: headers that go with its answer, whichever that is.
        sequences: what the engine computes for it.
        notes: what gates and handlers leave for those behind them (metrics, logs).
    """

    __slots__ = (
        "_body",
        "_receive",
        "arrived",
        "cache_salt",
        "client",
        "headers",
        "id",
        "key",
        "method",
        "notes",
        "path",
        "preflight",
        "reply",
        "scope",
        "sequences",
    )

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.scope, self._receive = scope, receive
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[str, str] = {n.decode("latin-1"): v.decode("latin-1") for n, v in scope["headers"]}
        client = scope.get("client")
        self.client: str = client[0] if client else ""
        asked = self.headers.get("x-request-id", "")
        plain = 0 < len(asked) <= 64 and asked.isascii() and asked.replace("-", "").replace("_", "").isalnum()
        self.id = asked if plain else f"{_START}{next(_numbers):06x}"
        self.arrived = time.perf_counter()
        self.key: str | None = None
        self.cache_salt = b""
        self.preflight = False
        self.reply: list[tuple[bytes, bytes]] = [
            (b"x-request-id", self.id.encode()),
            (b"x-content-type-options", b"nosniff"),
        ]
        self.sequences: list[Sequence] = []
        self.notes: dict[str, Any] = {}
        self._body: bytes | None = None

    @property
    def query(self) -> bytes:
        """What stands behind the question mark."""
        found: bytes = self.scope.get("query_string", b"")
        return found

    async def body(self, limit: int) -> bytes:
        """The whole body.

        Raises:
            ApiError: 413 where it has more than ``limit`` bytes.
            ClientLeftError: the client left before it was whole.
        """
        if self._body is None:
            declared = self.headers.get("content-length", "")
            too_large = declared.isdigit() and int(declared) > limit
            if not too_large or "expect" not in self.headers:
                self._body = await self._read(limit)
            if self._body is None:
                raise ApiError(
                    413,
                    f"the body has more than {limit:,} bytes, the most this server reads; send less",
                    code="body_too_large",
                    headers=_CLOSE,
                )
        return self._body

    async def _read(self, limit: int) -> bytes | None:
        """None where it has more than ``limit`` bytes, of which many are read away."""
        pieces: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientLeftError
            piece: bytes = message.get("body", b"")
            size += len(piece)
            if size <= limit:
                pieces.append(piece)
            elif size > _DRAINED:
                return None
            if not message.get("more_body", False):
                return b"".join(pieces) if size <= limit else None

    def when_left(self, left: Callable[[], None]) -> Callable[[], object]:
        """Have ``left`` called when the client leaves; what is returned undoes that. The body must have been read.

        Our own protocol says it at once (see protocol.py). Under another ASGI server a task waits for its message.
        """
        extension = (self.scope.get("extensions") or {}).get(LEFT)
        if extension is not None:
            known: list[Callable[[], None]] = extension["callbacks"]
            if extension["gone"]():  # before anybody asked, while the prompt was tokenized
                left()
            known.append(left)
            return lambda: known.remove(left)
        waiting = asyncio.ensure_future(self._disconnected())

        def end(task: asyncio.Future[None]) -> None:
            if not task.cancelled():
                task.exception()  # whatever it was, the client cannot be answered
                left()

        waiting.add_done_callback(end)
        return waiting.cancel

    async def _disconnected(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


class Send:
    """ASGI's ``send``, which remembers the status and adds headers to every answer."""

    __slots__ = ("headers", "http_version", "raw", "status")

    def __init__(self, send: RawSend, scope: Scope, headers: list[tuple[bytes, bytes]]) -> None:
        self.raw = send
        self.http_version: str = scope.get("http_version", "1.1")
        #: Headers that go with the answer, whichever it is.
        self.headers = headers
        #: The status that was sent; None before.
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *self.headers]
        await self.raw(message)


async def respond_bytes(
    send: Send, body: bytes, content_type: bytes, status: int = 200, headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """Answer with a body."""
    head = [(b"content-type", content_type), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send.raw({"type": "http.response.body", "body": body})


async def respond_json(send: Send, value: Any, status: int = 200, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """Answer with a value as JSON."""
    await respond_bytes(send, _encode(value), JSON, status, headers)


async def respond_error(send: Send, error: ApiError) -> None:
    """Answer with an error."""
    await respond_json(send, error.body, error.status, error.headers)


class EventStream:
    """Server-sent events. ``write`` takes them as they go over the wire (``data: …`` and an empty line).

    HTTP/1.0 has no chunks: there the events are kept and sent as one body at the end.
    """

    __slots__ = ("_kept", "_send", "started")

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False
        self._kept: list[bytes] | None = [] if send.http_version == "1.0" else None

    async def start(self) -> None:
        """Send the head, once."""
        if not self.started:
            self.started = True
            if self._kept is None:
                await self._send({"type": "http.response.start", "status": 200, "headers": _SSE_HEAD})

    async def write(self, events: bytes) -> None:
        """Send events; waits while the client reads slowly."""
        if self._kept is not None:
            self._kept.append(events)
        else:
            if not self.started:
                await self.start()
            await self._send.raw({"type": "http.response.body", "body": events, "more_body": True})

    async def end(self, events: bytes = b"") -> None:
        """Send the last events."""
        if self._kept is not None:
            await respond_bytes(
                self._send, b"".join([*self._kept, events]), b"text/event-stream", headers=_SSE_HEAD[1:]
            )
        else:
            if not self.started:
                await self.start()
            await self._send.raw({"type": "http.response.body", "body": events, "more_body": False})


_SSE_HEAD = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold the events back
]


def event(value: Any) -> bytes:
    """A value as one event."""
    return b"data: " + _encode(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"
