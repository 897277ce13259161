"""Servers for tests: our application under uvicorn, in a thread of this process, on a free port."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import openai

from engine.driver import CPU, settled, small_model
from gemcut.engine import EngineConfig
from gemcut.engine.request import Sequence
from gemcut.gemma import Gemma
from gemcut.server import run
from gemcut.server.app import App
from gemcut.server.state import ServerSettings, ServerState
from gemcut.text import Tokenizer
from support import tokenizer_dir

NAME = "tiny"
CHAT = [{"role": "user", "content": "Name a colour."}]


@cache
def tokenizer() -> Tokenizer:
    """The real Gemma 2 tokenizer."""
    return Tokenizer.from_folder(tokenizer_dir())


def new_gemma(**sizes: Any) -> Gemma:
    """A tiny random network with the real tokenizer. ``sizes`` are fields of EngineConfig."""
    sizes = {"block_size": 4, "max_batch_tokens": 32, "sequences": 8, **sizes}
    model = small_model(vocab_size=256_000, context=512)
    return Gemma(model, tokenizer(), CPU, engine=EngineConfig(**sizes))


def slow_down(gemma: Gemma, seconds: float) -> None:
    """Let each step of a model's engine take so long at least."""
    run, tokens = gemma.engine.runner.run, gemma.engine.runner.tokens

    def slow_run(*args: Any) -> Any:
        time.sleep(seconds)
        return run(*args)

    def slow_tokens(*args: Any) -> Any:
        found = tokens(*args)
        if found is not None:
            time.sleep(seconds)
        return found

    gemma.engine.runner.run = slow_run  # type: ignore[method-assign]
    gemma.engine.runner.tokens = slow_tokens  # type: ignore[method-assign]


def wait_until(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """What ``condition`` gives once it is true."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.002)
    raise AssertionError("it never came true")


class Served:
    """A running server."""

    def __init__(self, state: ServerState, port: int, certificate: Path | None) -> None:
        self.state, self.port = state, port
        self.loop: asyncio.AbstractEventLoop
        self.url = f"{'http' if certificate is None else 'https'}://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False, verify=certificate is None)

    @property
    def gemma(self) -> Gemma:
        assert self.state.gemma is not None
        return self.state.gemma

    def client(self, **more: Any) -> openai.OpenAI:
        """OpenAI's own client."""
        settings: dict[str, Any] = {"api_key": "none", "max_retries": 0, **more}
        return openai.OpenAI(base_url=f"{self.url}/v1", http_client=httpx.Client(trust_env=False), **settings)

    def chat(self, **fields: Any) -> httpx.Response:
        """One chat request; a field that is None is left out."""
        body = {"model": NAME, "messages": CHAT, "max_tokens": 4, **fields}
        return self.http.post("/v1/chat/completions", json={k: v for k, v in body.items() if v is not None})

    def complete(self, **fields: Any) -> httpx.Response:
        """One completion request."""
        body = {"model": NAME, "prompt": "The sky is", "max_tokens": 4, **fields}
        return self.http.post("/v1/completions", json={k: v for k, v in body.items() if v is not None})

    def send(self, body: dict[str, Any], path: str = "/v1/chat/completions", version: str = "1.1") -> socket.socket:
        """A connection on which a request was sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(request_bytes(body, path, version))
        return connection

    def sequences(self) -> list[Sequence]:
        """What lives in the engine."""
        return list(self.gemma.engine._sequences.values())

    def raw(self, data: bytes, *, seconds: float = 20) -> bytes:
        """What the server answers to bytes, up to the end of the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            connection.sendall(data)
            return read_all(connection)

    def nothing_held(self) -> None:
        """Every block is free and every answer has been given back."""
        settled(self.gemma.engine)
        for pool in (self.gemma.engine.cache.full, self.gemma.engine.cache.sliding):
            assert pool.free == pool.count
        assert not self.gemma.engine.has_work
        for _ in range(1000):
            if self.state.rows == 0 and self.state.metrics.running == 0:
                return
            threading.Event().wait(0.01)
        raise AssertionError(f"{self.state.rows} answers, {self.state.metrics.running} requests are still open")


def request_bytes(body: dict[str, Any], path: str = "/v1/chat/completions", version: str = "1.1") -> bytes:
    """A POST as it goes over the wire."""
    data = json.dumps({"messages": CHAT, **body} if "chat" in path else body).encode()
    head = f"POST {path} HTTP/{version}\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


def read_all(connection: socket.socket) -> bytes:
    """Everything up to the end."""
    pieces = []
    while piece := connection.recv(65536):
        pieces.append(piece)
    return b"".join(pieces)


@contextlib.contextmanager
def serving(
    gemma: Gemma | None,
    state: ServerState | None = None,
    certificate: tuple[Path, Path] | None = None,
    send_buffer: int = 0,
    own_protocol: bool = True,
    **settings: Any,
) -> Iterator[Served]:
    """A server; ``settings`` are fields of ServerSettings, ``send_buffer`` the bytes that the system keeps unsent."""
    state = state or ServerState(ServerSettings(names=(NAME,), **settings))
    state.gemma = gemma
    listener = run.open_port("127.0.0.1", 0)
    if send_buffer:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    files = {} if certificate is None else {"certificate": certificate[0], "key": certificate[1]}
    config = run.config_of(App(state), **files)
    if not own_protocol:
        config.http = "h11"
    server = run.Server(config, state)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    served = Served(state, listener.getsockname()[1], files.get("certificate"))
    thread.start()
    try:
        yield served
    finally:
        served.http.close()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def events(response: httpx.Response) -> list[Any]:
    """The data of server-sent events; the last is "[DONE]"."""
    assert response.headers["content-type"] == "text/event-stream"
    found = []
    for block in response.text.split("\n\n"):
        if block.startswith("data: "):
            data = block.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
    return found


def error_of(response: httpx.Response) -> dict[str, Any]:
    """OpenAI's error object, which has these four fields and no others."""
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    return error
