"""Who may come in: the gates that stand before every route.

`HostGate` refuses what a web page of somebody else makes a browser send; `KeyGate` asks for API keys and keeps their
limits. Without keys the server listens on this machine's own addresses alone (`check_address`).
"""

from __future__ import annotations

import ipaddress
import re
import socket
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from gemcut.errors import ParameterError
from gemcut.server.asgi import Request
from gemcut.server.errors import ApiError
from gemcut.server.keys import Keys
from gemcut.server.limits import Use

if TYPE_CHECKING:
    from gemcut.server.state import ServerState

#: Paths that need no key: static files without data, and probes.
OPEN = ("/", "/health", "/live", "/ready")
OPEN_BELOW = ("/page/",)
_LOCAL = ("localhost", "127.0.0.1", "[::1]")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::([0-9]{1,5}))?")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:[0-9]{1,5})?")
_HEADER_NAMES = re.compile(r"[a-z0-9_, -]{1,1024}")
_PREFLIGHT_AGE = b"600"  # seconds


def is_loopback(host: str) -> bool:
    """Whether ``host``, an address or a name, is one of this machine alone.

    Raises ParameterError where it is no address and no name that is known.
    """
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        raise ParameterError(f"--host is {host[:100]!r}, which is no address of this machine; try 127.0.0.1") from None
    return all(ipaddress.ip_address(str(address[4][0]).partition("%")[0]).is_loopback for address in found)


def check_address(host: str, keys: Keys | None) -> bool:
    """Whether ``host`` is one of this machine alone. Raises ParameterError where it is not and there are no keys."""
    own = is_loopback(host)
    if not own and not keys:
        raise ParameterError(
            f"--host is {host}, which others can reach; that needs API keys: give --api-key-file FILE, or listen on "
            "127.0.0.1"
        )
    return own


def check_origin(origin: str) -> str:
    """An origin as browsers write it, or "*". Raises ParameterError where it is none."""
    plain = origin.strip().rstrip("/").lower()
    if plain != "*" and not _ORIGIN.fullmatch(plain):
        raise ParameterError(f"--allow-origin is {origin[:100]!r}; expected one such as https://chat.example.org, or *")
    return plain


def check_host_name(host: str) -> str:
    """A host name as the header Host has it, without a port. Raises ParameterError where it is none."""
    plain = host.strip().lower()
    found = _HOST.fullmatch(plain)
    if found is None or found[2]:
        raise ParameterError(f"--allow-host is {host[:100]!r}; expected a name or an address, without a port")
    return plain


class HostGate:
    """Refuses requests under a foreign name (DNS rebinding), and of foreign pages (cross-site requests)."""

    def __init__(
        self, *, loopback: bool, host: str = "", hosts: Iterable[str] = (), origins: Iterable[str] = ()
    ) -> None:
        """
        Args:
            loopback: the server listens on this machine's own addresses alone: then nobody has another name for it
                than those of ``_LOCAL`` and ``hosts``. Else, without ``hosts``, any name will do, since keys are asked
                for.
            host: the address it listens on.
            hosts: more names that it has.
            origins: origins (``https://name``) whose pages may use it; "*" is every one.
        """
        own = f"[{host}]" if ":" in host and not host.startswith("[") else host.lower()
        names = {check_host_name(name) for name in hosts}
        self.names = names | {*_LOCAL, own} if loopback or names else None
        self.origins = frozenset(map(check_origin, origins))

    async def enter(self, state: ServerState, request: Request) -> None:
        """Raises ApiError 400 or 403."""
        host = request.headers.get("host", "").lower()
        if sum(name == b"host" for name, _ in request.scope["headers"]) > 1:
            raise ApiError(400, "the request has several Host headers; send one", code="bad_host")
        if host:
            self._check_host(host)
        origin = request.headers.get("origin")
        if origin is not None and origin.lower().partition("://")[2] != host:
            self._check_origin(request, origin)
        elif request.headers.get("sec-fetch-site") in ("cross-site", "same-site") and not _is_navigation(request):
            raise ApiError(
                403, "a page of another site may not use this server; open it by its address", code="cross_site"
            )

    def leave(self, state: ServerState, request: Request) -> None:
        """Nothing."""

    def _check_host(self, host: str) -> None:
        found = _HOST.fullmatch(host)
        if found is None:
            raise ApiError(400, "the Host header is no host name; expected a name and perhaps a port", code="bad_host")
        if self.names is not None and found[1].rstrip(".") not in self.names:
            raise ApiError(
                403,
                f"this server is not {found[1][:100]}; whoever runs it can allow that name: --allow-host "
                f"{found[1][:100]}",
                code="host_not_allowed",
            )

    def _check_origin(self, request: Request, origin: str) -> None:
        if "*" not in self.origins and origin.lower() not in self.origins:
            shown = origin[:100] if _ORIGIN.fullmatch(origin.lower()) else "of this origin"
            raise ApiError(
                403,
                f"pages {'at ' if shown != 'of this origin' else ''}{shown} may not use this server; whoever runs it "
                f"can allow them: --allow-origin {shown if shown != 'of this origin' else 'ORIGIN'}",
                code="origin_not_allowed",
            )
        allowed = b"*" if "*" in self.origins else origin.encode("latin-1")
        request.reply += [
            (b"access-control-allow-origin", allowed),
            (b"access-control-expose-headers", b"x-request-id, retry-after, x-gemcut-ignored"),
            (b"vary", b"origin"),
        ]
        if request.method == "OPTIONS" and "access-control-request-method" in request.headers:
            request.preflight = True
            asked = request.headers.get("access-control-request-headers", "").lower()
            names = asked if _HEADER_NAMES.fullmatch(asked) else "authorization, content-type, x-request-id"
            request.reply += [
                (b"access-control-allow-methods", b"GET, POST"),
                (b"access-control-allow-headers", names.encode()),
                (b"access-control-max-age", _PREFLIGHT_AGE),
            ]


def _is_navigation(request: Request) -> bool:
    """Whether a person follows a link to a page."""
    return request.method in ("GET", "HEAD") and request.headers.get("sec-fetch-mode") == "navigate"


class KeyGate:
    """Asks for API keys, where there are any, and keeps each key's limits."""

    def __init__(self, keys: Keys | None, *, share_cache: bool = False) -> None:
        """``share_cache``: what the requests of all keys have in common is computed once for all. A key's holder could
        then find out by the clock whether somebody else has sent a text."""
        self.keys, self.share_cache = keys, share_cache
        now = time.monotonic()
        self.uses = {key.name: Use(key.limits, now) for key in keys.keys} if keys else {}

    async def enter(self, state: ServerState, request: Request) -> None:
        """Raises ApiError 401 without a known key, 429 where one of its limits is reached."""
        if not self.keys or request.preflight or is_open(request.path):
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _unauthorized(
                "no API key came with the request; send the header Authorization: Bearer KEY", "missing_api_key"
            )
        found = self.keys.find(key.strip())
        if found is None:
            raise _unauthorized("the API key is not one of this server's", "invalid_api_key")
        request.key = found.name
        if not self.share_cache:
            request.cache_salt = b"key:" + found.name.encode()
        if request.method not in ("GET", "HEAD"):
            use, now = self.uses[found.name], time.monotonic()
            use.enter(now)
            request.notes["use"] = use
            request.reply += use.headers(now)

    def leave(self, state: ServerState, request: Request) -> None:
        """The request has its answer: what it used is taken from its key's tokens."""
        use: Use | None = request.notes.pop("use", None)
        if use is not None:
            use.leave(sum(len(sequence.tokens) for sequence in request.sequences), time.monotonic())


def is_open(path: str) -> bool:
    """Whether a path needs no key."""
    return path in OPEN or path.startswith(OPEN_BELOW)


def _unauthorized(message: str, code: str) -> ApiError:
    return ApiError(401, message, code=code, headers=[(b"www-authenticate", b"Bearer")])
