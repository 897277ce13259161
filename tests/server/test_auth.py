"""The gates before every route: foreign names, foreign pages, keys and their limits."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest

from gemcut.errors import ParameterError
from gemcut.server.asgi import Request
from gemcut.server.auth import HostGate, KeyGate, check_address, check_host_name, check_origin, is_loopback
from gemcut.server.errors import ApiError
from gemcut.server.keys import ApiKey, Keys, Limits

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"
STATE: Any = None


def keys(**limits: Limits) -> Keys:
    return Keys(
        [
            ApiKey(name, hashlib.sha256(key.encode()).digest(), limits.get(name, Limits()))
            for name, key in (("alice", ALICE), ("bob", BOB))
        ]
    )


def request(
    path: str = "/v1/chat/completions", method: str = "POST", *more: tuple[str, str], **headers: str
) -> Request:
    every = [(name.replace("_", "-"), value) for name, value in headers.items()] + list(more)
    scope = {"method": method, "path": path, "headers": [(n.encode(), v.encode("latin-1")) for n, v in every]}
    scope |= {"client": ("127.0.0.1", 5), "type": "http"}

    async def receive() -> Any:
        raise AssertionError("a gate must not read the body")

    return Request(scope, receive)


def enter(gate: Any, asked: Request) -> tuple[int, str | None]:
    """(200, None), or (the status, the code) of the refusal."""
    try:
        asyncio.run(gate.enter(STATE, asked))
    except ApiError as error:
        return error.status, error.code
    return 200, None


LOCAL = HostGate(loopback=True, host="127.0.0.1")


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST:8000", "localhost.:8000"]
)
def test_own_names(host: str) -> None:
    assert enter(LOCAL, request(host=host)) == (200, None)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io"])
def test_a_foreign_name_is_refused(host: str) -> None:
    """DNS rebinding: a page's own name has been made to point here."""
    assert enter(LOCAL, request(host=host)) == (403, "host_not_allowed")
    assert enter(HostGate(loopback=True, hosts=[host.partition(":")[0]]), request(host=host)) == (200, None)


@pytest.mark.parametrize("host", ["a b", "local\x00host", "localhost:99999x", "http://localhost", "[::1", "ü"])
def test_a_host_that_is_none(host: str) -> None:
    assert enter(LOCAL, request(host=host)) == (400, "bad_host")


def test_two_hosts() -> None:
    assert enter(LOCAL, request("/", "GET", ("host", "evil.example"), host="localhost")) == (400, "bad_host")


def test_none_at_all() -> None:
    """HTTP/1.0: no browser is that old."""
    assert enter(LOCAL, request()) == (200, None)


def test_where_others_can_reach_it_any_name_will_do_unless_names_are_given() -> None:
    open_ = HostGate(loopback=False, host="0.0.0.0")
    assert enter(open_, request(host="gpu7.example.org:8000")) == (200, None)
    named = HostGate(loopback=False, host="0.0.0.0", hosts=["gpu7.example.org"])
    assert enter(named, request(host="gpu7.example.org:8000")) == (200, None)
    assert enter(named, request(host="other.example.org")) == (403, "host_not_allowed")


SITES = [
    ({}, 200),
    ({"origin": "http://localhost:8000"}, 200),
    ({"origin": "http://localhost:8000", "sec_fetch_site": "same-origin"}, 200),
    ({"origin": "http://localhost:3000", "sec_fetch_site": "same-site"}, 403),
    ({"origin": "http://evil.example", "sec_fetch_site": "cross-site"}, 403),
    ({"origin": "null"}, 403),
    ({"origin": "http://evil.example/\x1b"}, 403),
    ({"origin": "localhost:8000"}, 403),
    ({"sec_fetch_site": "none"}, 200),
    ({"sec_fetch_site": "same-origin"}, 200),
    ({"sec_fetch_site": "cross-site"}, 403),
    ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"}, 403),
    ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}, 403),  # a form that is sent
]


@pytest.mark.parametrize(("headers", "status"), SITES)
def test_foreign_pages(headers: dict[str, str], status: int) -> None:
    asked = request(host="localhost:8000", **headers)
    assert enter(LOCAL, asked)[0] == status
    assert not [name for name, _ in asked.reply if name.startswith(b"access-control")]


def test_a_link_to_the_page_may_be_followed() -> None:
    headers = {"host": "localhost:8000", "sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}
    assert enter(LOCAL, request("/", "GET", **headers)) == (200, None)


def test_origins_that_were_allowed() -> None:
    gate = HostGate(loopback=True, origins=["https://Chat.example.org/"])
    asked = request(host="localhost:8000", origin="https://chat.example.org", sec_fetch_site="cross-site")
    assert enter(gate, asked) == (200, None)
    reply = dict(asked.reply)
    assert reply[b"access-control-allow-origin"] == b"https://chat.example.org"
    assert reply[b"vary"] == b"origin"
    assert b"access-control-allow-credentials" not in reply
    assert enter(gate, request(host="localhost:8000", origin="https://chat.example.org.evil.example"))[0] == 403
    assert enter(gate, request(host="localhost:8000", origin="http://chat.example.org"))[0] == 403
    anyone = HostGate(loopback=True, origins=["*"])
    asked = request(host="localhost:8000", origin="null")
    assert enter(anyone, asked) == (200, None)
    assert dict(asked.reply)[b"access-control-allow-origin"] == b"*"


def test_a_preflight() -> None:
    gate = HostGate(loopback=True, origins=["https://chat.example.org"])
    headers = {"host": "localhost", "origin": "https://chat.example.org", "access_control_request_method": "POST"}
    asked = request("/v1/models", "OPTIONS", access_control_request_headers="Authorization, x-stainless-os", **headers)
    assert enter(gate, asked) == (200, None)
    assert asked.preflight
    assert dict(asked.reply)[b"access-control-allow-headers"] == b"authorization, x-stainless-os"
    assert enter(KeyGate(keys()), asked) == (200, None)  # a browser sends no key with it
    odd = request("/", "OPTIONS", access_control_request_headers="a\r\nset-cookie: b", **headers)
    assert enter(gate, odd) == (200, None)
    assert dict(odd.reply)[b"access-control-allow-headers"] == b"authorization, content-type, x-request-id"
    assert enter(LOCAL, asked)[0] == 403


def test_keys() -> None:
    gate = KeyGate(keys())
    assert enter(gate, request()) == (401, "missing_api_key")
    for header in ("Bearer", "Bearer ", "Basic " + ALICE, ALICE, "bearer" + ALICE):
        assert enter(gate, request(authorization=header)) == (401, "missing_api_key")
    for key in (
        ALICE[:-1],
        ALICE + " " + ALICE,
        "x" * 10_000,
        "ü",
        "\udc80".encode("utf-8", "surrogatepass").decode("latin-1"),
    ):
        assert enter(gate, request(authorization=f"Bearer {key}")) == (401, "invalid_api_key")
    for header, name in (("Bearer " + ALICE, "alice"), ("bearer  " + BOB, "bob")):
        asked = request(authorization=header)
        assert enter(gate, asked) == (200, None)
        assert (asked.key, asked.cache_salt) == (name, b"key:" + name.encode())
    shared = request(authorization="Bearer " + ALICE)
    assert enter(KeyGate(keys(), share_cache=True), shared) == (200, None)
    assert (shared.key, shared.cache_salt) == ("alice", b"")


def test_a_refused_key_says_which_scheme() -> None:
    with pytest.raises(ApiError) as error:
        asyncio.run(KeyGate(keys()).enter(STATE, request(authorization="Bearer wrong-0123456789abcdef")))
    assert error.value.headers == [(b"www-authenticate", b"Bearer")]
    assert "wrong" not in error.value.message


@pytest.mark.parametrize("path", ["/", "/page/app.css", "/health", "/live", "/ready"])
def test_static_files_and_probes_need_none(path: str) -> None:
    assert enter(KeyGate(keys()), request(path, "GET")) == (200, None)


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/metrics", "/version", "/openapi.json", "/tokenize", "/page", "//page/", "/healthz", "/nothing"],
)
def test_everything_else_needs_one(path: str) -> None:
    assert enter(KeyGate(keys()), request(path, "GET")) == (401, "missing_api_key")


def test_without_keys_nobody_is_asked() -> None:
    asked = request()
    assert enter(KeyGate(None), asked) == (200, None)
    assert (asked.key, asked.cache_salt) == (None, b"")


def test_limits_are_each_keys_own() -> None:
    gate = KeyGate(keys(alice=Limits(concurrent=1), bob=Limits(requests_per_minute=2)))
    first = request(authorization="Bearer " + ALICE)
    assert enter(gate, first) == (200, None)
    refused = request(authorization="Bearer " + ALICE)
    assert enter(gate, refused) == (429, "rate_limit_exceeded")
    gate.leave(STATE, refused)  # one that was refused holds nothing, whatever is left
    assert enter(gate, request(authorization="Bearer " + ALICE))[0] == 429
    assert enter(gate, request("/v1/models", "GET", authorization="Bearer " + ALICE)) == (200, None)  # costs nothing
    gate.leave(STATE, first)
    gate.leave(STATE, first)  # twice is once
    assert enter(gate, request(authorization="Bearer " + ALICE)) == (200, None)
    assert enter(gate, request(authorization="Bearer " + ALICE))[0] == 429
    asked = request(authorization="Bearer " + BOB)
    assert enter(gate, asked) == (200, None)
    assert dict(asked.reply)[b"x-ratelimit-remaining-requests"] == b"1"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost"])
def test_addresses_of_this_machine_alone(host: str) -> None:
    assert is_loopback(host)
    assert check_address(host, None)
    assert check_address(host, keys())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "2001:db8::1"])
def test_other_addresses_need_keys(host: str) -> None:
    with pytest.raises(
        ParameterError, match=r"--host is .*, which others can reach; that needs API keys: give --api-key-file"
    ):
        check_address(host, None)
    assert not check_address(host, keys())


def test_bad_options() -> None:
    with pytest.raises(ParameterError, match="--host is 'no such name', which is no address of this machine"):
        is_loopback("no such name")
    for origin in ("evil", "https://", "https://a b", "https://a/path", ""):
        with pytest.raises(
            ParameterError, match=r"--allow-origin is .*; expected one such as https://chat.example.org"
        ):
            check_origin(origin)
    assert check_origin("HTTPS://A.example:8443/") == "https://a.example:8443"
    for host in ("a:80", "http://a", "", "a b"):
        with pytest.raises(ParameterError, match=r"--allow-host is .*; expected a name or an address, without a port"):
            check_host_name(host)
