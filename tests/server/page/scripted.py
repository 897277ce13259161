"""A server whose model says what a test wrote down: the page's real files, and answers piece by piece."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from gemcut.server.page import answer

Body = dict[str, Any]


@dataclass
class Script:
    """What the server does, and what it has seen.

    Attributes:
        say: from a request's body to the pieces of the answer.
        pause: seconds before each piece.
        model: the entry of /v1/models.
        ready: the status and body of /ready.
        key: demanded where it is not "".
        failures: (status, body) for the next chat requests, first one first; a status of 0 cuts the connection.
        break_after: after so many pieces an error event comes; 0 never.
        finish: the finish reason.
        chats: bodies of the chat requests.
        reports: bodies of the reports of misuse.
        left: clients that left before their answer was whole.
        paths: what was asked for.
    """

    say: Callable[[Body], list[str]] = lambda body: ["Hello ", "there."]
    pause: float = 0.0
    model: Body = field(
        default_factory=lambda: {
            "id": "gemma-test-it",
            "object": "model",
            "max_model_len": 8192,
            "sampling_defaults": {"temperature": 0.7, "top_p": 0.95, "top_k": 64, "max_tokens": 1024},
            "capabilities": ["chat", "completions"],
            "instruction_tuned": True,
        }
    )
    ready: tuple[int, Body] = (200, {"status": "ready"})
    key: str = ""
    failures: list[tuple[int, Body]] = field(default_factory=list)
    break_after: int = 0
    finish: str = "stop"
    chats: list[Body] = field(default_factory=list)
    reports: list[Body] = field(default_factory=list)
    left: int = 0
    paths: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    desk: Desk

    @property
    def script(self) -> Script:
        """The script that counted when the request came."""
        return self._script

    def parse_request(self) -> bool:
        self._script = self.desk.script
        return super().parse_request()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.script.paths.append(self.path)
        found = answer(self.path.partition("?")[0], self.headers.get("If-None-Match", ""))
        if found is not None:
            headers = {name.decode(): value.decode() for name, value in found.headers}
            self._send(found.status, found.content_type.decode(), found.body, headers)
        elif self.path == "/ready":
            self._json(*self.script.ready)
        elif not self._allowed():
            pass
        elif self.path == "/v1/models":
            self._json(200, {"object": "list", "data": [self.script.model]})
        else:
            self._json(404, {"error": {"message": f"there is nothing at {self.path}", "type": "not_found"}})

    def do_POST(self) -> None:
        self.script.paths.append(self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return
        if self.path == "/v1/reports":
            self.script.reports.append(body)
            status, error = self.script.failures.pop(0) if self.script.failures else (200, {"object": "report"})
            self._json(status, error)
            return
        self.script.chats.append(body)
        if self.script.failures:
            status, error = self.script.failures.pop(0)
            if status:
                self._json(status, error)
            self.close_connection = True
            return
        with contextlib.suppress(ConnectionError):
            self._stream(body)
            return
        self.script.left += 1
        self.close_connection = True

    def _stream(self, body: Body) -> None:
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self._event(": prefill 1/2\n\n")
        count = 0
        for count, piece in enumerate(self.script.say(body), 1):
            time.sleep(self.script.pause)
            said: Body = {"text": piece} if "prompt" in body else {"delta": {"content": piece}}
            self._data({"id": "chatcmpl-7", "choices": [{"index": 0, **said, "finish_reason": None}]})
            if count == self.script.break_after:
                self._data({"error": {"message": "the engine stopped", "type": "server_error", "code": None}})
                return
        self._data({"choices": [{"index": 0, "delta": {}, "finish_reason": self.script.finish}]})
        usage = {"prompt_tokens": 100, "completion_tokens": count, "timings": {"predicted_per_second": 42.5}}
        self._data({"choices": [], "usage": {**usage, "total_tokens": 100 + count}})
        self._event("data: [DONE]\n\n")

    def _data(self, value: Body) -> None:
        self._event(f"data: {json.dumps(value)}\n\n")

    def _event(self, text: str) -> None:
        self.wfile.write(text.encode())
        self.wfile.flush()

    def _allowed(self) -> bool:
        if not self.script.key or self.headers.get("Authorization") == f"Bearer {self.script.key}":
            return True
        self._json(401, {"error": {"message": "no valid API key", "type": "authentication_error"}})
        return False

    def _json(self, status: int, value: Body) -> None:
        self._send(status, "application/json", json.dumps(value).encode(), {})

    def _send(self, status: int, kind: str, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in {**headers, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            if status != 304 or name != "Content-Length":
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@dataclass
class Desk:
    """Where a running server finds its script; another one may be put here for the next requests."""

    script: Script


@contextlib.contextmanager
def serving(desk: Desk) -> Iterator[str]:
    """The address of a server that follows the script on ``desk``."""
    handler = type("Handler", (_Handler,), {"desk": desk})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
