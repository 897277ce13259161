"""A Hugging Face hub on the loopback interface: enough of its HTTP interface for huggingface_hub to download from.

``FakeHub`` is a context manager; its thread and socket end with it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Branch name -> folder with that branch's files."""

    branches: dict[str, Path]
    gated_for: str | None = None  # "everyone", or a token that alone has access

    def commit(self, revision: str) -> str | None:
        for branch, folder in self.branches.items():
            sha = hashlib.sha1(f"{branch}{folder}".encode()).hexdigest()
            if revision in (branch, sha):
                return sha
        return None

    def folder(self, revision: str) -> Path:
        return next(folder for branch, folder in self.branches.items() if self.commit(branch) == self.commit(revision))


@dataclass
class FakeHub:
    repositories: dict[str, Repository]
    cut_after: int | None = None  # bytes of a weight file after which the connection breaks
    ranges: bool = True  # whether it answers requests for parts of a file with these parts
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)  # method, path, headers
    sent: dict[str, int] = field(default_factory=dict)  # bytes by file

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def asked(self, method: str, part: str) -> list[str]:
        """Paths of requests of one method that contain ``part``."""
        return [path for verb, path, _ in self.requests if verb == method and part in path]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    timeout = 20

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            self._api("/".join(parts[2:4]), parts[4:])
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._answer(404, {}, b"{}")

    def _api(self, name: str, rest: list[str]) -> None:
        found = self._find(name, rest[1] if len(rest) > 1 else "main")
        if not found:
            return
        folder, sha = found
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": _etag(path)}
                for path in files
            ]
            self._answer(200, {"Content-Type": "application/json"}, json.dumps(tree).encode())
            return
        siblings = [{"rfilename": str(path.relative_to(folder))} for path in files]
        info = {"_id": "0", "id": name, "modelId": name, "sha": sha, "siblings": siblings, "private": False, "tags": []}
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(info).encode())

    def _file(self, name: str, revision: str, file: str) -> None:
        found = self._find(name, revision, gate=True)
        if not found:
            return
        path = found[0] / file
        if not path.is_file():
            self._answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": found[1]}, b"")
            return
        data = path.read_bytes()
        headers = {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": found[1], "Accept-Ranges": "bytes"}
        start, stop = 0, len(data)
        asked = self.headers.get("Range")
        if asked and self.hub.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(stop, int(last) + 1 if last else stop)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self.hub.sent[file] = self.hub.sent.get(file, 0) + (stop - start if self.command == "GET" else 0)
        partial = asked and self.hub.ranges
        self._answer(206 if partial else 200, headers, data[start:stop], cut=file.endswith(".safetensors"))

    def _find(self, name: str, revision: str, gate: bool = False) -> tuple[Path, str] | None:
        """The folder and commit, or None after the error has been sent."""
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._answer(401, {"X-Error-Code": "RepoNotFound"}, b'{"error":"Repository not found"}')
            return None
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if gate and repository.gated_for is not None and token != repository.gated_for:
            status = 403 if token else 401
            self._answer(status, {"X-Error-Code": "GatedRepo"}, b'{"error":"Access to this model is restricted"}')
            return None
        sha = repository.commit(revision)
        if sha is None:
            self._answer(404, {"X-Error-Code": "RevisionNotFound"}, b'{"error":"Invalid rev id"}')
            return None
        return repository.folder(revision), sha

    def _answer(self, status: int, headers: dict[str, str], body: bytes, cut: bool = False) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut and self.hub.cut_after is not None:
            self.wfile.write(body[: self.hub.cut_after])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(body)


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
