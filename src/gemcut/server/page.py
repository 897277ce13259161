"""The chat page: static files of the package, under headers that let them do what they need and nothing else.

A model's output reaches the page, so the page must not be able to run what it shows. The policy allows scripts and
styles of this server alone, no inline ones, no connection to anywhere else, no image from anywhere else, and no way
from a text to a script (trusted types, with no policy that could make any).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from gemcut.server.asgi import Request, Send, respond_bytes
from gemcut.server.errors import ApiError
from gemcut.server.state import ServerState

if TYPE_CHECKING:
    from gemcut.server.app import Routes

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
#: Of every file. `App` adds nosniff to all it sends.
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-cache",  # kept, but asked about each time: a new version of gemcut is a new page
}
_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


@dataclass(frozen=True)
class Answer:
    """A file as it is sent: status 200, or 304 without a body where the browser has it."""

    status: int
    headers: list[tuple[bytes, bytes]]
    content_type: bytes
    body: bytes


@dataclass(frozen=True)
class _File:
    body: bytes
    content_type: str
    etag: str


@cache
def page_files() -> Mapping[str, _File]:
    """The page's files by their addresses; read once, so that no request names a file of the disk."""
    found = {}
    for entry in (files("gemcut.server") / "page").iterdir():
        kind = entry.name.rpartition(".")[2]
        if kind in _TYPES:
            body = entry.read_bytes()
            etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            address = "/" if entry.name == "index.html" else f"/page/{entry.name}"
            found[address] = _File(body, _TYPES[kind], etag)
    return found


def answer(path: str, if_none_match: str = "") -> Answer | None:
    """What to send for a path; None where the page has no such file. ``if_none_match`` is the request's header."""
    file = page_files().get(path)
    if file is None:
        return None
    headers = [(name.encode(), value.encode()) for name, value in {**HEADERS, "etag": file.etag}.items()]
    known = {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}
    if file.etag in known or "*" in known:
        return Answer(304, headers, file.content_type.encode(), b"")
    return Answer(200, headers, file.content_type.encode(), file.body)


async def _page(state: ServerState, request: Request, send: Send) -> None:
    found = answer(request.path, request.headers.get("if-none-match", ""))
    if found is None:
        raise ApiError(404, f"the page has no file {request.path}")
    if found.status == 304:  # has no body, and no length of one
        head = [(b"content-type", found.content_type), *found.headers]
        await send({"type": "http.response.start", "status": 304, "headers": head})
        await send.raw({"type": "http.response.body", "body": b""})
    else:
        await respond_bytes(send, found.body, found.content_type, 200, found.headers)


ROUTES: Routes = {("GET", "/"): _page, ("GET", "/page/*"): _page}
