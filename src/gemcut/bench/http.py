"""A small HTTP/1.1 client on asyncio, for measuring: it reads an answer line by line and says when each line came.

Of our own, because the client must cost little beside what it measures, and a measurement needs no redirects, cookies
or compression. Whatever the other side sends is bounded: a head, a line, a chunk, the time.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from gemcut.errors import ParameterError

MAX_HEAD = 64 << 10
MAX_LINE = 4 << 20
MAX_BODY = 16 << 20
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})(?: |\r?\n|$)")


class ConnectionFailedError(Exception):
    """No connection came about: refused, unknown name, a bad certificate."""


class BrokenAnswerError(Exception):
    """What came is no HTTP, or the connection ended in the middle."""


@dataclass(frozen=True)
class Address:
    """Where a server is: ``http://host:port/prefix``."""

    scheme: str
    host: str
    port: int
    prefix: str

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises ParameterError where ``text`` is no address of a web server."""
        wanted = "expected an address such as http://127.0.0.1:8000"
        try:
            parts = urlsplit(text if "://" in text else f"http://{text}")
            port = parts.port
            host = (parts.hostname or "").encode("idna").decode() if parts.hostname else ""
        except ValueError:
            raise ParameterError(f"--url is {text[:100]!r}; {wanted}") from None
        known = parts.scheme in ("http", "https") and host and not parts.query and not parts.fragment
        if not known or parts.username is not None or re.search(r"[^\x21-\x7e]", parts.path):
            raise ParameterError(f"--url is {text[:100]!r}; {wanted}")
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.scheme, host, port or (443 if parts.scheme == "https" else 80), prefix)

    @property
    def authority(self) -> str:
        """The value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        usual = self.port == (443 if self.scheme == "https" else 80)
        return host if usual else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.prefix}"


class Answer:
    """One answer whose head is here and whose body is read as it comes."""

    def __init__(self, status: int, headers: Mapping[str, str], reader: asyncio.StreamReader) -> None:
        self.status, self.headers = status, headers
        self.whole = False  # the body was read to its end, so the connection can take another request
        self._reader = reader

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises BrokenAnswerError where it is cut or no HTTP."""
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            while size := await self._chunk_size():
                yield await self._exactly(size)
                if (await self._line()).strip():
                    raise BrokenAnswerError("a chunk is longer than it says")
            while (await self._line()).strip():  # trailers
                pass
            self.whole = True
        elif (declared := self.headers.get("content-length")) is not None:
            if not declared.isdigit() or len(declared) > 15:
                raise BrokenAnswerError(f"its Content-Length is {declared[:40]!r}")
            rest = int(declared)
            while rest:
                piece = await self._reader.read(min(rest, 1 << 16))
                if not piece:
                    raise BrokenAnswerError("the connection ended in the middle of the answer")
                rest -= len(piece)
                yield piece
            self.whole = True
        else:  # until the connection ends
            while piece := await self._reader.read(1 << 16):
                yield piece

    async def lines(self) -> AsyncIterator[bytes]:
        """The body's lines, without their ends."""
        rest = b""
        async for piece in self.pieces():
            *whole, rest = (rest + piece).split(b"\n")
            for line in whole:
                yield line.rstrip(b"\r")
            if len(rest) > MAX_LINE:
                raise BrokenAnswerError(f"a line of its stream has more than {MAX_LINE:,} bytes")
        if rest:
            yield rest

    async def read(self) -> bytes:
        """The whole body. Raises BrokenAnswerError where it has more than ``MAX_BODY`` bytes."""
        body = b""
        async for piece in self.pieces():
            body += piece
            if len(body) > MAX_BODY:
                raise BrokenAnswerError(f"its body has more than {MAX_BODY:,} bytes")
        return body

    async def _chunk_size(self) -> int:
        line = await self._line()
        digits = line.split(b";", 1)[0].strip()
        if not re.fullmatch(rb"[0-9a-fA-F]{1,8}", digits):
            raise BrokenAnswerError(f"a chunk's size is {line[:40]!r}")
        return int(digits, 16)

    async def _exactly(self, size: int) -> bytes:
        if size > MAX_BODY:
            raise BrokenAnswerError(f"a chunk of its stream has {size:,} bytes")
        try:
            return await self._reader.readexactly(size)
        except asyncio.IncompleteReadError:
            raise BrokenAnswerError("the connection ended in the middle of the answer") from None

    async def _line(self) -> bytes:
        return await _line(self._reader)


class Client:
    """Connections to one server. Those whose answer is whole are used again."""

    def __init__(self, address: Address, key: str = "", *, insecure: bool = False) -> None:
        self.address = address
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._tls: ssl.SSLContext | None = None
        if address.scheme == "https":
            self._tls = ssl.create_default_context()
            if insecure:
                self._tls.check_hostname, self._tls.verify_mode = False, ssl.CERT_NONE
        self._head = f"Host: {address.authority}\r\nUser-Agent: gemcut-bench\r\nAccept-Encoding: identity\r\n"
        if key:
            self._head += f"Authorization: Bearer {key}\r\n"

    def request(self, method: str, path: str, body: bytes = b"") -> _Exchange:
        """One request, for ``async with``: gives its `Answer`."""
        head = f"{method} {self.address.prefix}{path} HTTP/1.1\r\n{self._head}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return _Exchange(self, head.encode() + b"\r\n" + body)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection, an idle one if there is any. Raises ConnectionFailedError."""
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof() and not writer.is_closing():
                return reader, writer
            writer.close()
        host, port = self.address.host, self.address.port
        try:
            return await asyncio.open_connection(host, port, ssl=self._tls, limit=MAX_HEAD)
        except ssl.SSLError as error:
            raise ConnectionFailedError(f"TLS: {getattr(error, 'verify_message', '') or error.reason}") from None
        except OSError as error:
            raise ConnectionFailedError(error.strerror or str(error)) from None

    def close(self) -> None:
        """Close what is idle."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()

    def keep(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take a connection back whose answer is whole."""
        self._idle.append((reader, writer))


class _Exchange:
    def __init__(self, client: Client, data: bytes) -> None:
        self._client, self._data = client, data
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Answer:
        self._reader, self._writer = await self._client.connect()
        try:
            self._writer.write(self._data)
            await self._writer.drain()
            self._answer = await self._head()
        except BaseException as error:
            self._writer.close()
            if isinstance(error, OSError):
                raise BrokenAnswerError(error.strerror or str(error) or "the connection ended") from None
            raise
        return self._answer

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        assert self._writer is not None
        lasting = self._answer.headers.get("connection", "").lower() != "close"
        if error is None and self._answer.whole and lasting:
            self._client.keep(self._reader, self._writer)
        else:
            self._writer.close()
        if isinstance(error, OSError) and not isinstance(error, TimeoutError):
            raise BrokenAnswerError(error.strerror or str(error) or "the connection ended") from None

    async def _head(self) -> Answer:
        for _ in range(4):  # an interim answer (100 Continue, 103) may come first
            first = await _line(self._reader)
            found = _STATUS.match(first)
            if found is None:
                raise BrokenAnswerError("it does not speak HTTP" if first else "the connection ended without an answer")
            headers: dict[str, str] = {}
            size = 0
            while line := (await _line(self._reader)).rstrip(b"\r\n"):
                size += len(line)
                if size > MAX_HEAD:
                    raise BrokenAnswerError(f"its head has more than {MAX_HEAD:,} bytes")
                name, colon, value = line.decode("latin-1").partition(":")
                if not colon:
                    raise BrokenAnswerError("it does not speak HTTP")
                headers[name.strip().lower()] = value.strip()
            status = int(found[1])
            if status >= 200:
                return Answer(status, headers, self._reader)
        raise BrokenAnswerError("it sends no final answer")


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise BrokenAnswerError("the connection ended in the middle of the answer") from None
        return b""
    except asyncio.LimitOverrunError:
        raise BrokenAnswerError(f"a line of its head has more than {MAX_HEAD:,} bytes") from None
