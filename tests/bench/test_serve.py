"""`gemcut bench serve` against servers with known times, and against what is no such server."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import support
from gemcut.cli.main import main

from .timed import Timed, running, sends, stream_of

Bench = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Bench:
    """Run the command: (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["bench", "serve", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{support.ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"}


def test_it_measures_what_the_server_does(bench: Bench, tmp_path: Path) -> None:
    """Three answers of 5 pieces, 100 ms to the first 20 ms between: the figures follow. The machine adds to them."""
    server = Timed(first=0.1, gap=0.02, per_piece=2)
    with running(server) as url:
        code, out, err = bench(
            *("--url", url, "--rate", "20,40", "--requests", 3, "--prompt-tokens", 9, "--output-tokens", 5),
            *("--json", tmp_path / "out.json", "--ttft-limit", 5000, "--tpot-limit", 5000),
        )
    assert (code, err) == (0, "")
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["model"], report["endpoint"], report["url"]) == ("timed", "completions", url)
    assert [found["rate"] for found in report["rounds"]] == [20, 40]
    for found in report["rounds"]:
        assert (found["planned"], found["good"], found["errors"], found["cut"]) == (3, 3, {}, False)
        assert found["output_tokens"] == 3 * 10
        assert found["prompt_tokens"] == 3 * 9
        late = 150  # a loaded machine's share
        assert 100 <= found["ttft_ms"]["p50"] <= 100 + late
        assert 5 <= found["itl_ms"]["p50"] <= 20 + late
        assert 4 * 20 / 9 * 0.9 <= found["tpot_ms"]["p50"] <= 4 * 20 / 9 + late  # 10 tokens, 80 ms after the first
        assert 180 <= found["e2e_ms"]["p50"] <= 180 + late
        assert found["goodput"] == pytest.approx(found["requests_per_second"])
        assert found["output_tokens_per_second"] == pytest.approx(30 / found["seconds"])
        for request in found["requests"]:
            assert request["e2e"] >= request["ttft"] >= 0.1
    assert "3 of 3" in out
    assert "TTFT p99, ms" in out
    warm, *bodies = server.bodies
    assert len(bodies) == 6
    assert set(bodies[0]) == {"model", "stream", "stream_options", "max_tokens", "temperature", "seed", "prompt"}
    assert all(len(body["prompt"]) == 9 and body["max_tokens"] == 5 for body in bodies)
    assert len({tuple(body["prompt"]) for body in [warm, *bodies]}) == 7  # nothing that a cache knows


def test_the_loop_is_open(bench: Bench, tmp_path: Path) -> None:
    """A server that takes a second for each does not keep the next ones from being sent."""
    with running(Timed(first=0.8, gap=0, tokens=1)) as url:
        code, _, _ = bench(*("--url", url, "--rate", "100", "--requests", 20, "--warmup", 0, "--json", tmp_path / "o"))
    assert code == 0
    (found,) = json.loads((tmp_path / "o").read_text())["rounds"]
    assert found["most_at_once"] == 20
    assert found["seconds"] < 4


def test_times_count_from_when_a_request_was_due() -> None:
    """Also where this program itself was late: else a busy client would flatter the server."""
    import asyncio

    from gemcut.bench.client import Asker
    from gemcut.bench.http import Address, Client
    from gemcut.bench.load import send_round
    from gemcut.bench.traffic import Row

    async def measure(url: str) -> Any:
        asker = Asker(Client(Address.parse(url)), "timed", "completions", {}, 10.0)
        loop = asyncio.get_running_loop()
        loop.call_later(0.01, time.sleep, 0.3)  # the client is busy when the request is due
        return await send_round(asker, [Row(0.1, (2, 5), 1)], 1.0)

    with running(Timed(first=0.05, gap=0)) as url:
        (outcome,) = asyncio.run(measure(url)).outcomes
    assert outcome.sent - outcome.due >= 0.15
    assert outcome.ttft >= 0.2


def test_a_trace_is_sent_as_it_is(bench: Bench, tmp_path: Path) -> None:
    server = Timed(first=0.01, gap=0)
    trace = tmp_path / "trace.jsonl"
    code, out, err = bench("--write-trace", trace, "--rate", "50", "--requests", 4, "--output-tokens", "2-3")
    assert (code, out, err) == (0, "", "")
    with running(server) as url:
        code, out, _ = bench("--url", url, "--trace", trace, "--model", "m", "--warmup", 2)
    assert code == 0
    assert "trace" in out
    rows = [json.loads(line) for line in trace.read_text().splitlines()]
    before, server.bodies = server.bodies[:2], server.bodies[2:]
    assert all(len(body["prompt"]) <= max(len(row["prompt"]) for row in rows) for body in before)  # what it can take
    assert [body["prompt"] for body in server.bodies] == [row["prompt"] for row in rows]
    assert [body["max_tokens"] for body in server.bodies] == [row["new"] for row in rows]
    assert {body["model"] for body in server.bodies} == {"m"}


def test_chat_and_extra_fields_and_a_key(bench: Bench, tmp_path: Path) -> None:
    server = Timed(first=0.01, gap=0)
    (tmp_path / "key").write_text("# a comment\nsk-secret\n")
    with running(server) as url:
        code, _, _ = bench(
            *("--url", url + "/v1/", "--chat", "--extra", '{"ignore_eos": true}', "--requests", 1, "--rate", "inf"),
            *("--api-key-file", tmp_path / "key", "--prompt-tokens", 20),
        )
    assert code == 0
    assert server.bodies[0]["ignore_eos"] is True
    (message,) = server.bodies[0]["messages"]
    assert (message["role"], len(message["content"].split())) == ("user", 19)


def test_refusals_are_counted_by_kind(bench: Bench, tmp_path: Path) -> None:
    with running(Timed(first=0.01, gap=0, tokens=2, refuse=3)) as url:
        code, out, _ = bench("--url", url, "--rate", "inf", "--requests", 9, "--warmup", 0, "--json", tmp_path / "o")
    assert code == 0
    (found,) = json.loads((tmp_path / "o").read_text())["rounds"]
    assert (found["good"], found["errors"]) == (6, {"HTTP 503": 3})
    assert "rate inf: 3 × HTTP 503: HTTP 503: the queue is full" in out


def test_tls(bench: Bench, tmp_path: Path) -> None:
    made = subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "cert")),
        ],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("needs the openssl command")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    with running(Timed(first=0.01, gap=0), tls) as url:
        code, out, err = bench("--url", url, "--requests", 2, "--rate", "inf")
        assert code == 2
        assert err.startswith(f"error: no connection to {url}: TLS: self")
        code, out, err = bench("--url", url, "--requests", 2, "--rate", "inf", "--insecure")
        assert (code, err) == (0, "")
        assert "2 of 2" in out


MODELS = b'HTTP/1.1 200 OK\r\nContent-Length: 24\r\n\r\n{"data": [{"id": "one"}]}'
HOSTILE = {
    "not HTTP": (sends(b"SSH-2.0-OpenSSH\r\n"), "it does not speak HTTP"),
    "nothing": (sends(b""), "the connection ended without an answer"),
    "a web page": (sends(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>"), "/v1/models is no list of models"),
    "not found": (sends(b"HTTP/1.0 404 Not Found\r\n\r\nno"), "/v1/models: HTTP 404"),
    "a redirect": (sends(b"HTTP/1.1 301 Moved\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n"), "HTTP 301"),
    "an endless line": (sends(b"HTTP/1.1 200 " + b"a" * 200_000), "a line of its head has more than 65,536 bytes"),
    "an endless head": (sends(b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 20_000), "its head has more than"),
    "a bad chunk": (sends(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"), "a chunk's size is b'zz"),
    "a huge chunk": (
        sends(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n"),
        "a chunk of its stream",
    ),
    "a bad length": (sends(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"), "its Content-Length is '-1'"),
    "a short body": (sends(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}"), "ended in the middle of the answer"),
    "two models": (
        sends(b'HTTP/1.1 200 OK\r\n\r\n{"data": [{"id": "a"}, {"id": "b"}]}'),
        "it has 2 models (a, b); choose one with --model",
    ),
    "deep JSON": (sends(b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000), "is no list of models"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_openai_server_is_one_line(bench: Bench, name: str) -> None:
    answer, said = HOSTILE[name]
    with running(answer) as url:
        code, out, err = bench("--url", url, "--requests", 1)
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert said in err


TEXT = '{"choices": [{"text": "a", "index": 0}]}'
STREAMS = {
    "no JSON": (stream_of("{"), "an event of the stream is no JSON object"),
    "a list": (stream_of("[]"), "no JSON object"),
    "an error": (stream_of(TEXT, '{"error": {"message": "out of\\nmemory"}}'), "out of memory"),
    "cut": (stream_of(TEXT), "the stream ended before the answer did"),
    "empty": (stream_of("[DONE]"), "the answer ended without any text"),
    "an endless line": (stream_of("a" * 5_000_000), "a line of its stream has more than"),
    "no stream": (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{}", "not an event stream"),
    "a flat error": (b'HTTP/1.1 401 X\r\n\r\n{"error": "Unauthorized"}', "HTTP 401: Unauthorized"),
    "silence": (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n", "no whole answer within 0.3 s"),
    "odd values": (
        stream_of('{"choices": {}}', '{"choices": [[]]}', '{"choices": [{"delta": 5}], "usage": [1]}', "[DONE]"),
        "without any text",
    ),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_wrong_stream_is_one_line(bench: Bench, name: str) -> None:
    data, said = STREAMS[name]
    with running(sends(data, stay=name == "silence")) as url:
        code, _, err = bench(
            "--url", url, "--model", "m", "--requests", 1, "--timeout", 0.3 if name == "silence" else 9
        )
    assert code == 2
    assert len(err.splitlines()) == 1
    assert err.startswith(f"error: the first request to {url} failed: ")
    assert said in err


def test_an_answer_that_ends_with_a_finish_reason_alone_is_whole(bench: Bench) -> None:
    """Some servers send no [DONE] and no usage: pieces are counted then."""
    events = [TEXT, TEXT, '{"choices": [{"text": "", "finish_reason": "stop"}]}']
    with running(sends(stream_of(*events))) as url:
        code, out, _ = bench("--url", url, "--model", "m", "--requests", 1, "--rate", "inf")
    assert code == 0
    assert "1 of 1" in out


def test_nobody_there(bench: Bench) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        for more in ((), ("--model", "m")):
            code, _, err = bench("--url", url, *more)
            assert code == 2
            assert err.startswith(f"error: no connection to {url}: ")
            assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rate", "0"), "--rate is '0'"),
        (("--rate", "1,x"), "--rate is '1,x'"),
        (("--rate", "nan"), "--rate is 'nan'"),
        (("--rate", ",".join(["1"] * 33)), "--rate is"),
        (("--requests", "0"), "--requests is 0"),
        (("--prompt-tokens", "9-3"), "--prompt-tokens is '9-3'"),
        (("--output-tokens", "0"), "--output-tokens is '0'"),
        (("--output-tokens", "9" * 5000), "--output-tokens is"),
        (("--timeout", "nan"), "--timeout is nan"),
        (("--ttft-limit", "-1"), "--ttft-limit is -1"),
        (("--url", "ftp://x"), "--url is 'ftp://x'"),
        (("--url", "http://a:b@x"), "--url is"),
        (("--url", "http://x:99999"), "--url is"),
        (("--url", "http://"), "--url is"),
        (("--extra", "{"), "--extra is not valid JSON"),
        (("--extra", "[]"), "--extra is no JSON object"),
        (("--extra", '{"stream": false}'), "--extra sets stream"),
        (("--trace", "none.jsonl"), "cannot read none.jsonl"),
        (("--trace", "a", "--chat"), "--chat sends words"),
        (("--trace", "a", "--write-trace", "b"), "contradict"),
        (("--trace", "a", "--rate", "1"), "--rate and --trace contradict each other"),
        (("--trace", "a", "--output-tokens", "8-128"), "--output-tokens and --trace contradict each other"),
        (("--write-trace", "b", "--rate", "1,2"), "--write-trace writes one round"),
        (("--api-key-file", "none"), "cannot read none"),
        (("--plot", "a.txt"), "--plot is 'a.txt'"),
        (("--write-trace", "no/folder/b"), "cannot write no/folder/b"),
    ],
)
def test_bad_options_are_one_line(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = bench(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert said in err


def test_ctrl_c_shows_what_was_measured(tmp_path: Path) -> None:
    server = Timed(first=0.02, gap=0, tokens=2)
    command = [sys.executable, "-m", "gemcut", "bench", "serve", "--rate", "20", "--requests", "10000"]
    with running(server) as url:
        process = subprocess.Popen(
            [*command, "--url", url, "--json", str(tmp_path / "o")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(),
        )
        while len(server.bodies) < 10 and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == "interrupted\n"
    assert " of 10000" in out
    assert "requests had not ended" in out
    (found,) = json.loads((tmp_path / "o").read_text())["rounds"]
    assert found["cut"]
    assert 0 < found["good"] == len(found["requests"]) < 10_000


def test_a_plot_without_matplotlib_says_what_to_install(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = bench("--plot", "a.png")
    assert (code, out) == (2, "")
    assert "pip install 'gemcut[plot]'" in err


def test_a_plot(bench: Bench, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install -e '.[plot]'")
    with running(Timed(first=0.01, gap=0.001)) as url:
        code, _, err = bench(
            *("--url", url, "--rate", "50,100", "--requests", 3, "--output-tokens", 4, "--plot", tmp_path / "a.png")
        )
    assert (code, err) == (0, "")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_it_imports_no_torch() -> None:
    run = "import sys; from gemcut.cli.main import main; main(['bench', 'serve', '--rate', 'x'])"
    code = f"{run}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment(), check=True)
    assert done.stdout == "False\n"
