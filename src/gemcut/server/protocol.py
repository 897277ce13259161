"""HTTP/1 over uvicorn's httptools protocol, with what it lacks: time limits for heads and for clients that never read,
a bound on heads, and errors in the one shape."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gemcut.server.asgi import LEFT
from gemcut.server.errors import ApiError
from gemcut.server.state import ServerSettings

#: Bytes of the request line and all headers together.
MAX_HEAD = 1 << 16


class Protocol(HttpToolsProtocol):
    """One connection. The application must be an `App`, whose settings have the limits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings: ServerSettings = self.config.loaded_app.state.settings
        self._head = 0
        self._problem: ApiError | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self._body_timer: asyncio.TimerHandle | None = None
        self._left: list[Callable[[], None]] = []

    # ---- a head must come whole, soon and short ------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head = 0
        if self._head_timer is None:
            self._expect_head()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._drop(self._head_timer)
        self._head_timer = None
        self.scope["extensions"] = {LEFT: {"callbacks": self._left, "gone": self.transport.is_closing}}
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # Most bodies come together with their heads; for one that does not a clock starts.
        if self._body_timer is None and self.cycle is not None and self.cycle.more_body and self._head_timer is None:
            self._body_timer = self.loop.call_later(self._settings.body_timeout, self._late_body)

    def on_message_complete(self) -> None:
        self._drop(self._body_timer)
        self._body_timer = None
        super().on_message_complete()
        if not self.pipeline:  # a large body paused it; only a connection that is read is seen to end
            self.flow.resume_reading()

    def _late_body(self) -> None:
        self._body_timer = None
        if self.transport.is_closing():
            return
        if self.cycle is not None and self.cycle.response_started:  # it was answered before its body was whole
            self._end()
            return
        seconds = self._settings.body_timeout
        self._refuse(ApiError(408, f"the body did not come whole within {seconds:g} seconds"))

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self._settings.header_timeout, self._late)

    def _late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            return  # a pipelined request: the one before it is still being answered
        seconds = self._settings.header_timeout
        self._refuse(ApiError(408, f"the request's head did not come whole within {seconds:g} seconds"))

    def _count(self, size: int) -> None:
        self._head += size
        if self._head > MAX_HEAD:
            self._problem = ApiError(431, f"the request's head has more than {MAX_HEAD:,} bytes")
            raise ValueError("too large")  # ends the parser, which then calls send_400_response

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for a request that is no HTTP."""
        self._refuse(self._problem or ApiError(400, "this is no valid HTTP request", code="invalid_http"))

    def _refuse(self, error: ApiError) -> None:
        """Answer without the application, and end the connection."""
        if self.transport.is_closing():
            return
        body = msgspec.json.encode(error.body)
        phrase = HTTPStatus(error.status).phrase
        head = f"HTTP/1.1 {error.status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self._end()

    # ---- a client must read --------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._drop(self._send_timer)
        self._send_timer = self.loop.call_later(self._settings.send_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._drop(self._send_timer)
        self._send_timer = None

    def timeout_keep_alive_handler(self) -> None:
        if not self.transport.is_closing():
            self._end()

    def _end(self) -> None:
        """Close, which waits for the client to read what is left, but not for ever."""
        self.transport.close()
        self._drop(self._send_timer)
        self._send_timer = self.loop.call_later(self._settings.send_timeout, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._send_timer, self._body_timer):
            self._drop(timer)
        self._head_timer = self._send_timer = self._body_timer = None
        super().connection_lost(exc)
        for left in list(self._left):
            left()

    @staticmethod
    def _drop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()
