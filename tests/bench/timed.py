"""An OpenAI server whose times are written down, and servers that do something else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Timed:
    """Answers every request after ``first`` seconds and then a piece every ``gap`` seconds.

    Attributes:
        first, gap: seconds.
        tokens: how many pieces; None: as many as ``max_tokens`` says.
        per_piece: tokens that the usage counts for each piece.
        refuse: every so manieth request gets 503; 0 none.
        bodies: what was asked.
    """

    first: float = 0.05
    gap: float = 0.01
    tokens: int | None = None
    per_piece: int = 1
    refuse: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await _head(reader):
            length = int(head.get("content-length", "0"))
            body = json.loads(await reader.readexactly(length)) if length else {}
            if head["path"] == "/v1/models":
                _whole(writer, 200, {"object": "list", "data": [{"id": "timed"}]})
                continue
            self.bodies.append(body)
            if self.refuse and len(self.bodies) % self.refuse == 0:
                _whole(writer, 503, {"error": {"message": "the queue\nis full"}})
                continue
            await self._stream(writer, body)

    async def _stream(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        count = body["max_tokens"] if self.tokens is None else self.tokens
        loop = asyncio.get_running_loop()
        begin = loop.time()
        _event(writer, b": keep-alive\n\n")
        for i in range(count):
            await asyncio.sleep(begin + self.first + i * self.gap - loop.time())
            choice = {"delta": {"content": "a "}} if "messages" in body else {"text": "a "}
            _event(writer, _data({"choices": [{"index": 0, "finish_reason": None, **choice}]}))
        prompt = len(body.get("prompt", [])) or 7
        usage = {"prompt_tokens": prompt, "completion_tokens": count * self.per_piece}
        _event(writer, _data({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()


def sends(data: bytes, *, stay: bool = False) -> Answer:
    """A server that sends these bytes to whoever connects, and hangs up (or stays silent)."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1 << 16)
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            await writer.drain()
            if stay:
                await asyncio.sleep(30)

    return answer


def stream_of(*events: str, end: str = "") -> bytes:
    """An answer with these events, which ends with its connection."""
    head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    return (head + "".join(f"data: {event}\n\n" for event in events) + end).encode()


@contextlib.contextmanager
def running(answer: Answer, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """The address of a server, in a thread of its own."""
    loop = asyncio.new_event_loop()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await answer(reader, writer)
        writer.close()

    server = loop.run_until_complete(asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls))
    port = server.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    finally:

        async def end() -> None:
            server.close()
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            loop.stop()

        asyncio.run_coroutine_threadsafe(end(), loop)
        thread.join()
        loop.close()


async def _head(reader: asyncio.StreamReader) -> dict[str, str]:
    try:
        text = (await reader.readuntil(b"\r\n\r\n")).decode()
    except (asyncio.IncompleteReadError, ConnectionError):
        return {}
    first, *lines = text.strip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {**headers, "path": first.split()[1]}


def _whole(writer: asyncio.StreamWriter, status: int, value: dict[str, Any]) -> None:
    body = json.dumps(value).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)


def _event(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


def _data(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"
