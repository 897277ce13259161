"""Clients that leave, read slowly, send slowly or come in crowds: nothing hangs, and no block is lost."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from gemcut.engine.request import Sequence

from .host import (
    CHAT,
    NAME,
    Served,
    error_of,
    events,
    new_gemma,
    read_all,
    request_bytes,
    serving,
    slow_down,
    wait_until,
)

#: Nothing ends an answer but its length.
ENDLESS = {"max_tokens": 400, "logit_bias": {"1": -100, "107": -100}}
LONG = [{"role": "user", "content": "word " * 400}]
STEP = 0.03


@contextmanager
def slow_server(step: float = STEP, sizes: dict[str, Any] | None = None, **settings: Any) -> Iterator[Served]:
    gemma = new_gemma(**(sizes or {}))
    slow_down(gemma, step)
    with serving(gemma, **settings) as served:
        yield served
        served.nothing_held()


# ---- leaving -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow() -> Iterator[Served]:
    with slow_server(sizes={"max_batch_size": 2}) as served:
        yield served


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
def test_leaving_in_decode(slow: Served, stream: bool) -> None:
    connection = slow.send({**ENDLESS, "stream": stream})
    (sequence,) = wait_until(slow.sequences)
    wait_until(lambda: sequence.output_length >= 3)
    before = sequence.output_length
    connection.close()
    wait_until(lambda: sequence.finished)
    assert sequence.events[-1].finish_reason == "cancelled"
    assert sequence.output_length <= before + 2  # the step under way, and at most one more
    slow.nothing_held()


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
def test_leaving_in_prefill(slow: Served, stream: bool) -> None:
    connection = slow.send({"messages": LONG, "max_tokens": 5, "stream": stream})
    (sequence,) = wait_until(slow.sequences)
    wait_until(lambda: sequence.computed >= 64)
    before = sequence.computed
    connection.close()
    wait_until(lambda: sequence.finished)
    assert sequence.events[-1].finish_reason == "cancelled"
    assert sequence.computed <= before + 64 < sequence.prompt_length
    assert sequence.output_length == 0
    slow.nothing_held()


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
def test_leaving_in_the_queue(slow: Served, stream: bool) -> None:
    others = [slow.send(ENDLESS) for _ in range(2)]
    wait_until(lambda: len(slow.sequences()) == 2 and all(s.output_length for s in slow.sequences()))
    first = slow.sequences()
    waiting = slow.send({**ENDLESS, "stream": stream})
    (sequence,) = wait_until(lambda: [s for s in slow.sequences() if s not in first])
    waiting.close()
    wait_until(lambda: sequence.finished, 2)
    assert sequence.started is None
    assert not any(other.finished for other in first)
    for connection in others:
        connection.close()
    wait_until(lambda: all(other.finished for other in first))
    slow.nothing_held()


def test_leaving_after_a_large_body(slow: Served) -> None:
    """A body of more than 64 KB pauses the reading of the connection."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gemcut.server.chat.check_length", lambda *args: None)
        connection = slow.send({**ENDLESS, "messages": [{"role": "user", "content": " " * 200_000 + "x"}]})
        (sequence,) = wait_until(slow.sequences)
    connection.close()
    wait_until(lambda: sequence.finished)
    assert sequence.events[-1].finish_reason == "cancelled"
    slow.nothing_held()


def test_leaving_before_the_body_is_whole(slow: Served) -> None:
    connection = socket.create_connection(("127.0.0.1", slow.port))
    connection.sendall(request_bytes({"max_tokens": 3})[:-5])
    wait_until(lambda: slow.state.metrics.running == 1)
    connection.close()
    slow.nothing_held()


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
def test_leaving_under_another_servers_protocol(stream: bool) -> None:
    """Ray Serve and others know nothing of ours: ASGI's own message says that the client has left."""
    with slow_server(own_protocol=False) as served:
        assert served.chat().status_code == 200
        connection = served.send({**ENDLESS, "stream": stream})
        (sequence,) = wait_until(served.sequences)
        wait_until(lambda: sequence.output_length >= 3)
        connection.close()
        wait_until(lambda: sequence.finished)
        assert sequence.events[-1].finish_reason == "cancelled"


# ---- crowds ------------------------------------------------------------------------------------------------------


def test_queue_timeout(slow: Served) -> None:
    """An answer that is not begun in time gets 503 and a time to come again; those under way go on."""
    with slow_server(sizes={"max_batch_size": 1}, queue_timeout=0.3) as served:
        first = served.send({**ENDLESS, "max_tokens": 60})
        (running,) = wait_until(served.sequences)
        wait_until(lambda: running.output_length)
        for stream in (False, True):
            response = served.chat(stream=stream)
            assert response.status_code == 503
            assert error_of(response)["code"] == "queue_timeout"
            assert int(response.headers["retry-after"]) >= 1
            assert response.headers["x-should-retry"] == "true"
        assert not running.finished or running.events[-1].finish_reason == "length"
        head = first.recv(100)
        assert head.startswith(b"HTTP/1.1 200")
        first.close()


def test_full_house() -> None:
    with slow_server(max_requests=2) as served:
        connections = [served.send(ENDLESS) for _ in range(2)]
        wait_until(lambda: served.state.rows == 2)
        refused = served.chat()
        assert refused.status_code == 503
        assert error_of(refused)["code"] == "overloaded"
        assert refused.headers["retry-after"]
        connections[0].close()
        wait_until(lambda: served.state.rows == 1)
        assert served.chat().status_code == 200
        connections[1].close()


def test_request_timeout() -> None:
    with slow_server(request_timeout=0.4) as served:
        response = served.chat(**ENDLESS)
        assert response.status_code == 503
        assert error_of(response)["code"] == "request_timeout"
        found = events(served.chat(**ENDLESS, stream=True))
        assert found[-1] == "[DONE]"
        assert found[-2]["error"]["code"] == "request_timeout"
        assert set(found[-2]["error"]) == {"message", "type", "param", "code"}
        assert found[0]["choices"][0]["delta"]["role"] == "assistant"


def test_many_at_once_get_their_own_answers() -> None:
    right = new_gemma()
    with serving(new_gemma()) as served:
        answers: dict[int, str] = {}

        def ask(seed: int) -> None:
            response = served.chat(seed=seed, max_tokens=8, stream=bool(seed % 2))
            if seed % 2:
                chunks = events(response)[:-1]
                answers[seed] = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
            else:
                answers[seed] = response.json()["choices"][0]["message"]["content"]

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == {seed: right.chat(CHAT, seed=seed, max_new_tokens=8) for seed in range(24)}
        served.nothing_held()


# ---- slow clients ------------------------------------------------------------------------------------------------


def test_a_client_that_never_reads_is_cut_and_blocks_nobody() -> None:
    body = {**ENDLESS, "max_tokens": 400, "stream": True, "logprobs": True, "top_logprobs": 20}
    with serving(new_gemma(), send_buffer=4096, send_timeout=1.0) as served:
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        deaf.connect(("127.0.0.1", served.port))
        deaf.sendall(request_bytes(body))
        wait_until(lambda: served.state.rows == 1)
        started = time.monotonic()
        while served.state.rows:
            assert served.chat().status_code == 200
            assert time.monotonic() - started < 20
        served.nothing_held()
        deaf.close()


def test_a_slow_reader_gets_everything() -> None:
    body = {**ENDLESS, "max_tokens": 100, "stream": True, "logprobs": True, "top_logprobs": 20, "seed": 1}
    with serving(new_gemma(), send_buffer=4096) as served:
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.connect(("127.0.0.1", served.port))
        slow.sendall(request_bytes(body))
        time.sleep(1)
        data = b""
        while b"[DONE]" not in data:
            data += slow.recv(16384)
        slow.close()
        tokens = data.count(b'"top_logprobs"')
        assert tokens == 100
        served.nothing_held()


@pytest.mark.parametrize("part", ["nothing", "head", "body"])
def test_slow_senders_get_408(part: str) -> None:
    whole = request_bytes({"max_tokens": 2})
    sent = {"nothing": b"", "head": whole[:40], "body": whole[:-10]}[part]
    with serving(new_gemma(), header_timeout=0.3, body_timeout=0.3) as served:
        started = time.monotonic()
        answer = served.raw(sent)
        assert time.monotonic() - started < 5
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in head
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        assert served.chat().status_code == 200


def test_idle_connections_are_closed_and_used_ones_are_not() -> None:
    with (
        serving(new_gemma(), keep_alive=1, header_timeout=0.5) as served,
        socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection,
    ):
        for _ in range(2):
            connection.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            time.sleep(0.6)  # longer than a head may take to come: nothing has begun to come
        assert connection.recv(1000) == b""


# ---- HTTP --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(new_gemma()) as found:
        yield found
        found.nothing_held()


def split_answer(data: bytes) -> tuple[bytes, bytes]:
    head, _, body = data.partition(b"\r\n\r\n")
    return head, body


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
def test_http_1_0(served: Served, stream: bool) -> None:
    """No chunks, and the connection ends."""
    with served.send({"max_tokens": 3, "seed": 1, "stream": stream}, version="1.0") as connection:
        head, body = split_answer(read_all(connection))
    assert head.startswith(b"HTTP/1.1 200")
    assert b"transfer-encoding" not in head
    assert f"content-length: {len(body)}".encode() in head
    right = served.chat(max_tokens=3, seed=1).json()["choices"][0]["message"]["content"]
    if stream:
        chunks = [json.loads(block[6:]) for block in body.split(b"\n\n") if block.startswith(b"data: {")]
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == right
        assert body.endswith(b"data: [DONE]\n\n")
    else:
        assert json.loads(body)["choices"][0]["message"]["content"] == right


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n", 400),
        (b"GET /live HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 100_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"y" * 100_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", 431),
        (b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n", 400),
    ],
    ids=["nonsense", "path", "header", "url", "length"],
)
def test_bad_http(served: Served, data: bytes, status: int) -> None:
    head, body = split_answer(served.raw(data))
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_expect_continue(served: Served) -> None:
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-type: application/json\r\n"
    )
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        connection.sendall(head + b"content-length: 50000000\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 413")
    data = json.dumps({"messages": CHAT, "max_tokens": 1}).encode()
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        connection.sendall(head + b"content-length: %d\r\nconnection: close\r\n\r\n" % len(data))
        assert connection.recv(1000).startswith(b"HTTP/1.1 100")
        connection.sendall(data)
        assert read_all(connection).startswith(b"HTTP/1.1 200")


def test_head_and_pipelining(served: Served) -> None:
    assert served.http.head("/live").content == b""
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        one = b"GET /version HTTP/1.1\r\nhost: x\r\n"
        connection.sendall((one + b"\r\n") * 2 + one + b"connection: close\r\n\r\n")
        assert read_all(connection).count(b"HTTP/1.1 200") == 3


def test_request_ids(served: Served) -> None:
    assert served.http.get("/live", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for bad in ("a b", "x" * 65, "é"):
        given = served.http.get("/live", headers={"x-request-id": bad.encode()}).headers["x-request-id"]
        assert given != bad
        assert given.isalnum()


def test_keep_alive_comments_while_a_prompt_is_computed() -> None:
    with slow_server(0.1, ping=0.2) as served:
        text = served.chat(messages=LONG, max_tokens=3, stream=True).text
        pings = [line for line in text.splitlines() if line.startswith(": ")]
        assert len(pings) >= 2
        total = len(served.gemma.encode_messages(LONG))
        done = [int(ping.split()[-1].split("/")[0]) for ping in pings]
        assert all(ping.endswith(f"/{total}") for ping in pings)
        assert done == sorted(done)
        assert 0 < done[-1] <= total
        assert text.endswith("data: [DONE]\n\n")


def test_large_prompt_does_not_keep_others_waiting() -> None:
    gemma = new_gemma()
    with serving(gemma) as served:
        busy = threading.Event()
        encode = type(gemma.tokenizer).encode

        def slow_encode(self: Any, text: str, **how: Any) -> list[int]:
            if len(text) > 9000:
                busy.set()
                time.sleep(1.0)
            return encode(self, text, **how)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(gemma.tokenizer), "encode", slow_encode)
            large = threading.Thread(target=lambda: served.chat(messages=[{"role": "user", "content": "x" * 10_000}]))
            large.start()
            assert busy.wait(10)
            started = time.perf_counter()
            assert served.http.get("/live").status_code == 200
            assert time.perf_counter() - started < 0.5
            large.join()


# ---- failures amid an answer -------------------------------------------------------------------------------------


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
def test_an_answer_that_fails(stream: bool) -> None:
    gemma = new_gemma()
    with serving(gemma) as served:
        text, place = gemma.tokenizer.token_text, [0]

        def failing(token_id: int) -> str:
            place[0] += 1
            if place[0] > 6:
                raise BrokenError("no text")
            return text(token_id)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gemma.tokenizer, "token_text", failing)
            response = served.chat(**ENDLESS, stream=stream)
        if stream:
            found = events(response)
            assert found[-1] == "[DONE]"
            error = found[-2]["error"]
        else:
            assert response.status_code == 500
            error = error_of(response)
        assert "no text" in error["message"]
        served.nothing_held()
        assert served.chat().status_code == 200


def test_guards() -> None:
    from gemcut.server.guards import Verdict
    from gemcut.server.state import ServerSettings, ServerState

    seen: list[tuple[str, str]] = []

    class Guard:
        limit = 20

        async def check(self, kind: str, text: str) -> Verdict:
            seen.append((kind, text))
            if "forbidden" in text or (kind == "output" and len(text) > self.limit):
                return Verdict(False, "length", "that is not for here")
            return Verdict()

    gemma, guard = new_gemma(), Guard()
    state = ServerState(ServerSettings(names=(NAME,)), guards=(guard,))
    with serving(gemma, state) as served:
        refused = served.chat(messages=[{"role": "user", "content": "forbidden"}])
        assert refused.status_code == 400
        assert error_of(refused)["code"] == "content_filter"
        assert not served.sequences()
        for stream in (False, True):
            response = served.chat(**{**ENDLESS, "max_tokens": 30}, seed=1, stream=stream)
            if stream:
                chunks = events(response)[:-1]
                text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
                reason = chunks[-1]["choices"][0]["finish_reason"]
            else:
                choice = response.json()["choices"][0]
                text, reason = choice["message"]["content"], choice["finish_reason"]
            assert reason == "content_filter"
            assert len(text) <= guard.limit
        guard.limit = 10**9
        seen.clear()
        response = served.chat(max_tokens=20, seed=1, stream=True)
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in events(response)[:-1])
        assert text == gemma.chat(CHAT, max_new_tokens=20, seed=1)
        assert seen[-1] == ("output", text)  # nothing is let out that no guard has seen
        served.nothing_held()


def test_tls(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    words = ["-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(
        ["openssl", "req", "-x509", *words, "-out", certificate, "-keyout", key], check=True, capture_output=True
    )
    with serving(new_gemma(), certificate=(certificate, key)) as served:
        assert served.url.startswith("https")
        assert served.chat().status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{served.port}/live", trust_env=False)


def test_nobody_is_told_twice() -> None:
    """One wake-up of the event loop brings the events of a whole step."""
    gemma = new_gemma()
    slow_down(gemma, 0.02)
    with serving(gemma) as served:
        wakes: list[int] = []
        threads = [threading.Thread(target=served.chat, kwargs={**ENDLESS, "max_tokens": 40}) for _ in range(8)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(served.sequences()) == 8 and all(s.output_length > 2 for s in served.sequences()))
        delivery = served.state._delivery
        assert delivery is not None
        call, steps = delivery.loop.call_soon_threadsafe, [0]
        step = delivery.step

        def counted(callback: Any, *args: Any) -> Any:
            wakes.append(1)
            return call(callback, *args)

        class Loop:
            call_soon_threadsafe = staticmethod(counted)

        def counted_step(found: Any) -> None:
            steps[0] += 1
            real, delivery.loop = delivery.loop, Loop()  # type: ignore[assignment]
            try:
                step(found)
            finally:
                delivery.loop = real

        gemma.loop.listen(counted_step)
        sequence: Sequence = served.sequences()[0]
        wait_until(lambda: sequence.finished)
        for thread in threads:
            thread.join()
        assert steps[0] > 10
        assert len(wakes) <= steps[0]
