"""A table of requests that no good client sends: bytes on the wire, the status they get, and what the answer says."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from gemcut.server.errors import ApiError
from gemcut.server.fields import ChatRequest, decode
from server.host import NAME, Served, new_gemma, serving

CHAT_PATH = "/v1/chat/completions"
GOOD = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "temperature": 0})


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(new_gemma(), max_body=100_000, header_timeout=2.0, body_timeout=1.0) as found:
        yield found
        found.nothing_held()


def head(line: str, *lines: str, body: str | bytes = "", length: int | str | None = None) -> bytes:
    """A request with its length, unless there is another in ``lines``."""
    data = body.encode() if isinstance(body, str) else body
    if length is None:
        length = len(data)
    own = [line, "host: localhost", "connection: close", *lines]
    if not any(each.lower().startswith(("content-length", "transfer-encoding")) for each in lines):
        own.append(f"content-length: {length}")
    return "\r\n".join(own).encode("latin-1") + b"\r\n\r\n" + data


def post(body: str | bytes, *lines: str, path: str = CHAT_PATH, kind: str = "application/json") -> bytes:
    return head(f"POST {path} HTTP/1.1", f"content-type: {kind}", *lines, body=body)


def get(path: str, *lines: str) -> bytes:
    return head(f"GET {path} HTTP/1.1", *lines)


def field(**fields: object) -> bytes:
    return post(json.dumps({**json.loads(GOOD), **fields}))


DEEP = '{"messages": ' + "[" * 40_000 + "]" * 40_000 + "}"
CHUNKS = b"5\r\nhello\r\n"
TABLE: list[tuple[str, bytes, int, str]] = [
    # what it is, the bytes, the status, words of the answer
    ("a good one", post(GOOD), 200, '"object":"chat.completion"'),
    ("a charset", post(GOOD, kind="application/json; charset=utf-8"), 200, "chat.completion"),
    ("another case", post(GOOD, kind="Application/JSON"), 200, "chat.completion"),
    ("HTTP/1.0", post(GOOD).replace(b"HTTP/1.1", b"HTTP/1.0"), 200, "chat.completion"),
    ("HTTP/1.0, no host", b"GET /live HTTP/1.0\r\n\r\n", 200, "ok"),
    ("a body for GET", head("GET /live HTTP/1.1", body="x" * 500), 200, "ok"),
    ("a query", get("/v1/models?limit=1&after[]=%00"), 200, NAME),
    ("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n", 400, "no valid HTTP"),
    ("no version: HTTP/0.9", b"GET /live\r\n\r\n", 200, "ok"),
    ("a space in the path", b"GET /a b HTTP/1.1\r\nhost: localhost\r\n\r\n", 400, "no valid HTTP"),
    ("a header without a name", b"GET /live HTTP/1.1\r\n: x\r\n\r\n", 400, "no valid HTTP"),
    ("a NUL in a header", b"GET /live HTTP/1.1\r\nhost: local\0host\r\n\r\n", 400, "no valid HTTP"),
    ("a head of 100 kB", get("/live", "x-large: " + "x" * 100_000), 431, "65,536 bytes"),
    ("a path of 100 kB", get("/" + "x" * 100_000), 431, "65,536 bytes"),
    ("2,000 headers", get("/live", *(f"x-{n}: {'x' * 40}" for n in range(2000))), 431, "65,536 bytes"),
    ("a negative length", head(f"POST {CHAT_PATH} HTTP/1.1", "content-length: -1"), 400, "no valid HTTP"),
    ("a length that is none", head(f"POST {CHAT_PATH} HTTP/1.1", "content-length: ten"), 400, "no valid HTTP"),
    ("two lengths", head(f"POST {CHAT_PATH} HTTP/1.1", "content-length: 2", "content-length: 3"), 400, "no valid HTTP"),
    (
        "a length and chunks (request smuggling)",
        post(CHUNKS + b"0\r\n\r\n", "content-length: 5", "transfer-encoding: chunked"),
        400,
        "no valid HTTP",
    ),
    ("a bad chunk", post(b"zz\r\nhello\r\n0\r\n\r\n", "transfer-encoding: chunked"), 400, ""),
    ("chunks that are no JSON", post(CHUNKS + b"0\r\n\r\n", "transfer-encoding: chunked"), 400, "not JSON"),
    ("chunks that do not end", post(CHUNKS, "transfer-encoding: chunked"), 408, "did not come whole"),
    ("a body that does not come", post("").replace(b"length: 0", b"length: 50"), 408, "within 1"),
    ("a length of 50 MB", post("", "expect: 100-continue", "content-length: 50000000"), 413, "100,000 bytes"),
    ("an unknown method", head("BREW /live HTTP/1.1"), 400, "no valid HTTP"),
    ("TRACE", head("TRACE /live HTTP/1.1"), 405, "TRACE /live is not possible; use GET"),
    ("OPTIONS", head("OPTIONS /v1/models HTTP/1.1"), 405, "use GET"),
    ("DELETE", head("DELETE /v1/models/tiny HTTP/1.1"), 405, "use GET"),
    ("no such path", get("/v1/engines"), 404, "there is nothing at '/v1/engines'"),
    ("two slashes", get("//v1//models"), 404, "there is nothing at"),
    ("a slash at the end", get("/v1/models/"), 404, "there is no model ''"),
    ("out of the folder", get("/page/../../../../etc/passwd"), 404, ""),
    ("out of the folder, quoted", get("/page/%2e%2e/%2e%2e/app.py"), 404, ""),
    ("a NUL in the path", get("/page/%00"), 404, ""),
    ("a newline in the path", get("/v1/models/a%0d%0aset-cookie:%20b"), 404, r"a\\r\\nset-cookie: b"),
    ("a terminal's commands in the path", get("/%1b%5b2J"), 404, r"\\x1b[2J"),
    ("bytes that are no UTF-8 in the path", get("/v1/models/%ff%fe"), 404, "there is no model"),
    ("a whole address", get("http://localhost/live"), 200, "ok"),
    ("a form", post("messages=x", kind="application/x-www-form-urlencoded"), 415, "expected application/json"),
    ("a page's plain text", post(GOOD, kind="text/plain"), 415, "expected application/json"),
    ("a zipped body", post(b"\x1f\x8b\x08\0", "content-encoding: gzip"), 400, ""),
    ("no body", post(""), 400, "not JSON"),
    ("half a body", post(GOOD[:-5]), 400, "not JSON"),
    ("UTF-16", post(GOOD.encode("utf-16")), 400, "not JSON"),
    ("a byte order mark", post(b"\xef\xbb\xbf" + GOOD.encode()), 400, "not JSON"),
    ("NaN", post(GOOD.replace(": 0}", ": NaN}")), 400, "not JSON"),
    ("1e999", post(GOOD.replace(": 0}", ": 1e999}")), 400, ""),
    ("a list", post("[]"), 400, "expected object"),
    ("null", post("null"), 400, "expected object"),
    ("nested 40,000 deep", post(DEEP), 400, ""),
    ("a number of 50,000 digits", post(GOOD.replace('"max_tokens": 2', f'"max_tokens": {"9" * 50_000}')), 400, ""),
    ("2 ** 63", field(seed=2**63), 400, "seed"),
    ("true for a number", field(max_tokens=True), 400, "max_tokens: expected"),
    ("a number for a text", field(stop=5), 400, "stop: expected"),
    ("a long unknown name", field(**{"x" * 50_000: 1}), 400, "unknown field"),
    ("an unknown name with a line break", field(**{"a\r\nb\x1b[31m": 1}), 400, "unknown field"),
    ("a prototype", field(__proto__={"n": 1}), 400, "unknown field"),
    ("a lone surrogate", post(GOOD.replace("Hi", "\\ud800")), 400, ""),
    ("a model's name with a NUL", field(model="\0"), 404, "there is no model"),
    ("the longest prompt", field(messages=[{"role": "user", "content": "x " * 40_000}]), 400, "512 tokens"),
    ("a websocket", get("/v1/chat/completions", "upgrade: websocket", "connection: upgrade"), 405, "use POST"),
]  # fmt: skip


LOOKALIKES = ["a", "a` - at `$.messages", "` - at `$[0]", "a` - at `$.messages[0].b[9]", "a\nb", "$", ""]


@pytest.mark.parametrize("name", LOOKALIKES)
@pytest.mark.parametrize("value", [b"1", b"[" * 50_000 + b"]" * 50_000, b"tru"], ids=["one", "deep", "no JSON"])
def test_unknown_names_that_are_allowed_but_look_like_something_else(name: str, value: bytes) -> None:
    """They are left out, or refused; never a failure of the server."""
    body = GOOD[:-1].encode() + b", " + json.dumps(name).encode() + b": " + value + b"}"
    try:
        _, ignored = decode(body, ChatRequest, allow_unknown=True)
    except ApiError as error:
        refused = error
    else:
        assert (ignored, value) == ([name], b"1")
        return
    assert refused.status == 400
    assert value != b"1" or " - at " in name


def parsed(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a whole answer."""
    top, _, body = answer.partition(b"\r\n\r\n")
    line, *rest = top.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in rest)}
    if headers.get("transfer-encoding") == "chunked":
        body = b"".join(body.split(b"\r\n")[1::2])
    return int(line.split()[1]), headers, body


@pytest.mark.parametrize(("data", "status", "words"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_each_gets_its_status_and_a_sentence(served: Served, data: bytes, status: int, words: str) -> None:
    found, headers, body = parsed(served.raw(data))
    assert (found, words in body.decode()) == (status, True), body[:500]
    assert "set-cookie" not in headers
    if status >= 400:
        assert headers["content-type"] == "application/json"
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"].isprintable()  # no line break, no terminal's commands
        assert len(error["message"]) < 500
    assert served.http.get("/live").status_code == 200


def test_a_second_request_in_the_same_packet_is_its_own(served: Served) -> None:
    """Pipelined; and what stands behind a refused body is not taken for a request."""
    one = b"GET /version HTTP/1.1\r\nhost: localhost\r\n\r\n"
    last = one.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
    answer = served.raw(one + one + last)
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    smuggled = post(CHUNKS + b"0\r\n\r\n" + one, "content-length: 5", "transfer-encoding: chunked")
    assert served.raw(smuggled).count(b"HTTP/1.1 ") == 1


def test_a_head_that_comes_a_byte_at_a_time(served: Served) -> None:
    """Slow-loris: the time for a head does not begin anew with each byte."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.settimeout(0.1)
        answer = b""
        for _ in range(60):
            try:
                connection.sendall(b"x")
                answer += connection.recv(1000)
            except TimeoutError:
                continue
            except OSError:
                break
            if answer:
                break
    assert b" 408 " in answer or b" 400 " in answer


@pytest.mark.parametrize("count", [100])
def test_connections_that_say_nothing(served: Served, count: int) -> None:
    """They are closed when their time is over, and keep nobody else out."""
    silent = [socket.create_connection(("127.0.0.1", served.port), timeout=10) for _ in range(count)]
    try:
        assert served.chat().status_code == 200
        for connection in silent:
            answer = connection.recv(1000)
            assert answer == b"" or b" 408 " in answer
    finally:
        for connection in silent:
            connection.close()
