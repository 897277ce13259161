"""``gemcut serve`` as a process: what it says, and how it ends."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import support
from cli.conftest import environment
from gemcut.cli.main import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny Gemma 2 with the real tokenizer."""
    config = support.tiny_config(vocab_size=256_000, hidden_size=16, max_position_embeddings=4096)
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    return support.save_checkpoint(folder, support.hf_model(config), tokenizer=True, do_sample=True, temperature=0.5)


class Process:
    """A server that runs."""

    def __init__(self, *args: str | Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gemcut", "serve", *map(str, args)],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def said(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        """Wait for a line."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for line in list(self.lines):
                if found := re.search(pattern, line):
                    return found
            if self.process.poll() is not None:
                self._reader.join(5)
                if not any(re.search(pattern, line) for line in self.lines):
                    raise AssertionError(f"ended with {self.process.returncode}: {self.lines}")
            time.sleep(0.02)
        raise AssertionError(f"never said {pattern}: {self.lines}")

    def end(self, seconds: float = 60) -> int:
        """Its exit code."""
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code


@contextmanager
def running(*args: str | Path) -> Iterator[tuple[Process, httpx.Client]]:
    process = Process(*args, "--port", "0")
    try:
        url = process.said(r"listens at (http://\S+)")[1]
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            yield process, client
    finally:
        if process.process.poll() is None:
            process.process.kill()
            process.process.wait()


def ask(client: httpx.Client, **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, **fields}
    return client.post("/v1/chat/completions", json=body)


def test_life(tiny: Path) -> None:
    """The port is open while the model loads; SIGTERM lets an answer end; the exit code is 0."""
    with running(tiny, "--top-k", "7") as (process, client):
        assert client.get("/live").status_code == 200
        early = client.get("/ready")
        assert early.status_code in (200, 503)
        process.said("^ready: checkpoint at http://127.0.0.1:\\d+/v1")
        process.said(r"device cpu, dtype float32, context 4096, 64 rows")
        for words in ("temperature 0.5 (checkpoint)", "top_k 7 (command line)", "max_new_tokens 1024 (built-in)"):
            process.said("sampling .*" + re.escape(words))
        assert client.get("/ready").json() == {"status": "ready"}
        assert ask(client, model="checkpoint").status_code == 200
        answers: list[httpx.Response] = []
        slow = threading.Thread(
            target=lambda: answers.append(ask(client, max_tokens=600, logit_bias={"1": -100, "107": -100}))
        )
        slow.start()
        time.sleep(0.3)
        process.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        with httpx.Client(base_url=client.base_url, timeout=60, trust_env=False) as other:
            assert other.get("/ready").json() == {"status": "draining"}
            assert ask(other).status_code == 503
        slow.join(60)
        assert answers[0].status_code == 200
        assert process.end() == 0
    assert not any("Traceback" in line for line in process.lines)


def test_second_signal_ends_at_once(tiny: Path) -> None:
    with running(tiny) as (process, client):
        process.said("^ready")

        def cut_off() -> None:
            with pytest.raises(httpx.HTTPError):
                ask(client, max_tokens=4000, logit_bias={"1": -100, "107": -100})

        slow = threading.Thread(target=cut_off)
        slow.start()
        time.sleep(0.3)
        process.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert process.process.poll() is None
        process.process.send_signal(signal.SIGTERM)
        assert process.end(5) == 128 + signal.SIGTERM
        slow.join(20)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The one line of a server that cannot start, without a process of its own."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # main() sets its own

    def run(*args: str | Path) -> str:
        capsys.readouterr()
        assert main(["serve", *map(str, args)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


def test_cannot_start(refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is in use" in refused("model", "--port", port)
    assert "--host" in refused("model", "--host", "no.such.host.invalid", "--port", "0")
    assert "port is 65536" in refused("model", "--port", "65536")
    assert "max_requests is 0" in refused("model", "--max-requests", "0")
    assert "queue_timeout is -1" in refused("model", "--queue-timeout", "-1")
    assert "there is no such file" in refused("model", "--ssl-certfile", tmp_path / "none.pem")
    (tmp_path / "bad.pem").write_text("nothing")
    assert "cannot be used" in refused("model", "--ssl-certfile", tmp_path / "bad.pem")
    assert "--ssl-keyfile needs --ssl-certfile" in refused("model", "--ssl-keyfile", tmp_path / "bad.pem")
    assert "temperature is 200" in refused("model", "--temperature", "200")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'gemcut[serve]'" in refused("model")


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    """The port was open already; the process ends with the reason."""
    process = Process(tmp_path / "missing", "--port", "0")
    assert process.end() == 2
    lines = [line for line in process.lines if "listens at" not in line]
    assert len(lines) == 1, process.lines
    assert lines[0].startswith("error: ")
    assert "missing" in lines[0]


def test_signal_while_loading(tiny: Path) -> None:
    with running(tiny) as (process, _):
        process.process.send_signal(signal.SIGTERM)
        assert process.end() == 0


def test_help_imports_no_server() -> None:
    code = "import sys; from gemcut.cli.main import main; main(['serve', '--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    for module in ("'torch'", "'uvicorn'", "'msgspec'", "'prometheus_client'"):
        assert module not in done.stdout.splitlines()[-1]
