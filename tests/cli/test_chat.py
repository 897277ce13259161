"""gemcut chat: one message in a pipe, and a session at a real terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import support
from gemcut import Gemma
from gemcut.checkpoint.source import Source
from gemcut.cli.conversation import Conversation
from gemcut.cli.options import LoadOptions
from gemcut.names import tuned

from .conftest import Cli, environment

SEED = ("--seed", "7", "-n", "12")
SAMPLING = {"seed": 7, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def gemma(tiny: Path) -> Gemma:
    return Gemma.load(tiny, progress=False)


# ---- one message -----------------------------------------------------------------------------------------------------


def test_one_message(cli: Cli, tiny: Path, gemma: Gemma) -> None:
    expected = gemma.chat([{"role": "user", "content": "Hello there"}], **SAMPLING) + "\n"
    for run in (
        cli("chat", tiny, *SEED, "--once", "Hello there"),
        cli("chat", tiny, *SEED, stdin=b"Hello there\n"),
        cli("chat", tiny, *SEED, "--no-markdown", "--once", "Hello there"),
    ):
        assert (run.code, run.err) == (0, "")
        assert run.out == expected


def test_system_text_is_folded_in(cli: Cli, tiny: Path, gemma: Gemma) -> None:
    messages = [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "Hello"}]
    run = cli("chat", tiny, *SEED, "--system", "Rhyme.", "--once", "Hello", "--stats")
    assert run.out == gemma.chat(messages, **SAMPLING) + "\n"
    assert "decode" in run.err


@pytest.mark.parametrize(
    ("args", "stdin", "part"),
    [
        ((), b"", "empty"),
        ((), b"a\xc3", "byte 0xc3 at offset 1"),
        (("--once", "  "), b"", "empty"),
        (("--once", "hi", "-t", "-1"), b"", "temperature is -1"),
        (("--once", "word " * 9000), b"", "8192"),
    ],
)
def test_bad_input(cli: Cli, tiny: Path, args: tuple[str, ...], stdin: bytes, part: str) -> None:
    run = cli("chat", tiny, *args, stdin=stdin)
    assert run.code == 2
    assert run.out == ""
    assert part in run.error


@pytest.mark.slow
def test_a_base_model_is_called_one_and_talks_at_a_low_temperature_unless_something_else_is_set(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    support.gguf_path()  # skips without the demo extra
    gemma = Gemma.load("gemma-3-270m", progress=False)
    levels = list(gemma.sampling_levels)
    monkeypatch.setattr(LoadOptions, "load", lambda self, name, **_: gemma)

    def temperature(*more: str) -> Any:
        gemma.sampling_levels[:] = levels
        run = cli("chat", "gemma-3-270m", "--once", "Hello", "-n", "1", "--json", *more)
        assert run.code == 0
        assert "gemma-3-270m is a base model" in run.error
        return json.loads(run.out)["sampling"]["temperature"]

    assert temperature() == {"value": 0.3, "origin": "base model"}
    assert temperature("-t", "0.9") == {"value": 0.9, "origin": "given"}
    monkeypatch.setenv("GEMCUT_TEMPERATURE", "0.8")
    assert temperature() == {"value": 0.8, "origin": "GEMCUT_TEMPERATURE"}


@pytest.mark.parametrize(
    ("name", "template", "expected"),
    [
        ("google/gemma-2-2b-it", None, True),
        ("/x/gemma-2-2b-it-Q4_K_M.gguf", None, True),
        ("mine/Gemma-Instruct", None, True),
        ("/x/mine", "{{ messages }}", True),
        ("/x/mine", None, False),
        ("google/gemma-2-2b", None, False),
        ("/it/bitten-2b.gguf", None, False),
    ],
)
def test_what_a_base_model_is(name: str, template: str | None, expected: bool) -> None:
    source = Source("folder", Path(name), name)
    assert tuned(source, SimpleNamespace(chat_template=template)) is expected  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_model_without_turn_markers_is_refused(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace("<start_of_turn>", "<unused_turn_a>"))
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
    run = cli("chat", tmp_path, "--once", "Hello")
    assert run.code == 2
    assert "cannot chat" in run.error


def test_a_saved_chat_goes_on(cli: Cli, tiny: Path, gemma: Gemma, tmp_path: Path) -> None:
    saved = Conversation("Rhyme.")
    saved.add("Hello", "Hi")
    saved.save(tmp_path / "chat.json", "")
    expected = gemma.chat(saved.messages("And?"), **SAMPLING) + "\n"
    assert cli("chat", tiny, *SEED, "--load", tmp_path / "chat.json", "--once", "And?").out == expected
    saved.system = "Other."
    expected = gemma.chat(saved.messages("And?"), **SAMPLING) + "\n"
    assert (
        cli("chat", tiny, *SEED, "--load", tmp_path / "chat.json", "--system", "Other.", "--once", "And?").out
        == expected
    )
    run = cli("chat", tiny, "--load", tmp_path / "none.json", "--once", "hi")
    assert (run.code, run.out) == (2, "")
    assert "none.json" in run.error


def test_one_answer_as_json(cli: Cli, tiny: Path, gemma: Gemma) -> None:
    run = cli("chat", tiny, "--seed", "7", "-n", "12", "--json", "--once", "Hello there")
    assert (run.code, run.err) == (0, "")
    report = json.loads(run.out)
    stream = gemma.chat([{"role": "user", "content": "Hello there"}], stream=True, **SAMPLING)
    assert report["text"] == stream.result.text
    assert report["prompt_tokens"] == stream.result.prompt_tokens
    assert report["completion_tokens"] == 12
    assert report["finish_reason"] == "length"
    assert report["sampling"]["seed"] == {"value": 7, "origin": "given"}


# ---- at a real terminal ----------------------------------------------------------------------------------------------


class Terminal:
    """A process at a pseudo-terminal."""

    def __init__(self, *args: str | Path, **env: str) -> None:
        command = [sys.executable, "-m", "gemcut", *map(str, args)]
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(command[0], command, environment(TERM="xterm", **env))
        termios.tcsetwinsize(self.fd, (24, 80))
        self.text = ""

    def type(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def wait_for(self, part: str, seconds: float = 60) -> str:
        """Read until ``part`` appears; gives what came up to then, and forgets it."""
        deadline = time.monotonic() + seconds
        while part not in self.text:
            ready, _, _ = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{part!r} did not come; there is {self.text!r}"
            try:
                arrived = os.read(self.fd, 65536).decode(errors="replace")
            except OSError:
                pytest.fail(f"the process ended before {part!r}; there is {self.text!r}")
            for _ in range(arrived.count("\x1b[6n")):  # where is the cursor?
                self.type("\x1b[1;1R")
            self.text += arrived
        before, _, self.text = self.text.partition(part)
        return before

    def close(self, *, echo: bool | None = None) -> int:
        """Wait for the end; the exit code. ``echo``: whether the terminal must show what is typed then."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if select.select([self.fd], [], [], 0.1)[0]:
                    self.text += os.read(self.fd, 65536).decode(errors="replace")
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                assert echo is None or bool(termios.tcgetattr(self.fd)[3] & termios.ECHO) is echo
                os.close(self.fd)
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        pytest.fail(f"the process did not end; there is {self.text!r}")


@pytest.mark.slow
def test_a_session_at_a_terminal(tiny: Path, tmp_path: Path) -> None:
    terminal = Terminal("chat", tiny, "-n", "8000", XDG_STATE_HOME=str(tmp_path))
    terminal.wait_for("0 / 8,192 tokens")
    terminal.type("Hello\r")
    terminal.wait_for("\x1b[?25l")  # rich hides the cursor: the answer streams
    time.sleep(1.5)
    terminal.type("\x03")  # Ctrl-C
    terminal.wait_for("Stopped.")
    terminal.wait_for("/ 8,192 tokens")
    saved = tmp_path / "chat.json"
    terminal.type(f"/save {saved}\r")
    terminal.wait_for("Saved")
    terminal.wait_for("/ 8,192 tokens")
    terminal.type("\x04")  # Ctrl-D
    assert terminal.close() == 0
    assert "Traceback" not in terminal.text
    turns = json.loads(saved.read_text())["messages"]
    assert turns[0]["content"] == "Hello"
    assert turns[1]["content"].strip()
    assert (tmp_path / "gemcut" / "chat_history").is_file()


@pytest.mark.slow
def test_the_keyboard_is_silent_while_a_model_loads_and_restored(tiny: Path, tmp_path: Path) -> None:
    """Keys typed meanwhile show nowhere and are no message, and the terminal echoes again however the load ends."""
    config = json.loads((tiny / "config.json").read_text())
    for file in tiny.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))  # one more than there are
    terminal = Terminal("chat", tmp_path, XDG_STATE_HOME=str(tmp_path))
    _wait_for_echo(terminal, on=False)
    terminal.type("typed too early\r")
    terminal.wait_for("error: ")
    _wait_for_echo(terminal, on=True)
    assert terminal.close() == 2
    assert "too early" not in terminal.text
    terminal = Terminal("chat", tiny, XDG_STATE_HOME=str(tmp_path))
    _wait_for_echo(terminal, on=False)
    os.kill(terminal.pid, signal.SIGTERM)
    assert terminal.close(echo=True) == 128 + signal.SIGTERM


@pytest.mark.slow
def test_a_session_at_a_terminal_with_files_and_a_question_before_it_is_lost(tiny: Path, tmp_path: Path) -> None:
    text, saved = tmp_path / "notes.txt", tmp_path / "chat.json"
    text.write_text("a text\n")
    terminal = Terminal("chat", "-m", tiny, "-n", "3", XDG_STATE_HOME=str(tmp_path))
    terminal.wait_for("0 / 8,192 tokens")
    terminal.type(f"/file {text}\r")
    terminal.wait_for("goes in front of your next message")
    for message in ("one", "two", "three"):
        terminal.wait_for("/ 8,192 tokens")
        terminal.type(f"{message}\r")
        terminal.wait_for("Cut after 3 tokens")
    terminal.wait_for("/ 8,192 tokens")
    terminal.type("\x03")
    terminal.wait_for("Ctrl-C again")
    terminal.wait_for("/ 8,192 tokens")
    terminal.type("\x03")
    terminal.wait_for("(3 exchanges) is not saved. Leave without it?")
    terminal.type("\r")
    terminal.wait_for("Still here")
    terminal.wait_for("/ 8,192 tokens")
    terminal.type(f"/save {saved}\r")
    terminal.wait_for("Saved")
    terminal.wait_for("/ 8,192 tokens")
    terminal.type("\x04")
    assert terminal.close() == 0
    turns = json.loads(saved.read_text())["messages"]
    assert [turn["content"] for turn in turns[::2]] == ["notes.txt:\n\na text\n\none", "two", "three"]
    terminal = Terminal("chat", tiny, "--load", saved, "-n", "3", XDG_STATE_HOME=str(tmp_path))
    terminal.wait_for("going on after 3 exchanges")
    terminal.wait_for("/ 8,192 tokens")
    terminal.type("four\r")
    terminal.wait_for("Cut after 3 tokens")
    terminal.wait_for("/ 8,192 tokens")
    terminal.type("/exit\r")
    terminal.wait_for("(4 exchanges) is not saved")
    terminal.type("\x04")
    assert terminal.close() == 0


def _wait_for_echo(terminal: Terminal, *, on: bool) -> None:
    deadline = time.monotonic() + 60
    while bool(termios.tcgetattr(terminal.fd)[3] & termios.ECHO) is not on:
        assert time.monotonic() < deadline
        time.sleep(0.005)
