"""gemcut chat: one message in a pipe, and the session: its commands, Ctrl-C, a full context."""

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

import support
from gemcut import Gemma
from gemcut.cli.chat_input import is_open, unquoted
from gemcut.cli.chat_session import ChatSession
from gemcut.results import TextStream
from gemcut.text import encode_chat

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


def test_a_base_model_is_called_one(cli: Cli) -> None:
    support.gguf_path()  # skips without the demo extra
    run = cli("chat", "gemma-3-270m", "--once", "Hello", "-n", "1")
    assert run.code == 0
    assert "base model" in run.error


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


# ---- the session, its keyboard a pipe --------------------------------------------------------------------------------


@pytest.fixture
def keyboard() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


Talk = Callable[..., tuple[ChatSession, str]]


@pytest.fixture
def talk(gemma: Gemma, keyboard: PipeInput, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Type keys into a session until it ends; gives the session and what it showed."""

    def run(*lines: str, **options: Any) -> tuple[ChatSession, str]:
        session = ChatSession(gemma, dict(SAMPLING), **{"markdown": False, **options})
        keyboard.send_text("".join(line if line.endswith("\x04") else f"{line}\r" for line in lines) + "\x04")
        capsys.readouterr()
        session.run()
        return session, " ".join(capsys.readouterr().out.split())

    return run


def test_the_dialogue_is_what_the_model_sees(talk: Talk, gemma: Gemma) -> None:
    session, shown = talk("Hello", "/system Rhyme.", "And now?")
    first = gemma.chat([{"role": "user", "content": "Hello"}], **SAMPLING)
    dialogue = [
        {"role": "system", "content": "Rhyme."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And now?"},
    ]
    second = gemma.chat(dialogue, **SAMPLING)
    assert session.conversation.messages() == [*dialogue, {"role": "assistant", "content": second}]
    assert " ".join(first.split()) in shown
    assert " ".join(second.split()) in shown


def test_save_and_load(talk: Talk, tmp_path: Path) -> None:
    path = tmp_path / "a chat.json"
    session, shown = talk("/system Rhyme.", "Hello", f"/save {path}", "/clear", f'/load "{path}"')
    assert "one exchange" in shown
    assert session.conversation.system == "Rhyme."
    assert [turn["role"] for turn in session.conversation.turns] == ["user", "assistant"]
    assert json.loads(path.read_text())["messages"] == session.conversation.turns


def test_undo_puts_the_message_back_to_be_changed(talk: Talk) -> None:
    session, _ = talk("Hello", "/undo", " again")
    assert [turn["content"] for turn in session.conversation.turns[::2]] == ["Hello again"]


def test_mistakes_do_not_end_the_session(talk: Talk, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    session, shown = talk(
        "/undo", f"/load {bad}", "/load", "/save", f"/save {tmp_path}/none/x.json", f"/save {bad}", "Hello"
    )
    for part in (
        "nothing to undo",
        "is not JSON",
        "/load needs the name of a file",
        "/save needs the name of a file",
        "No such file or directory",
        "is not a saved chat",
    ):
        assert part in shown
    assert len(session.conversation.turns) == 2
    assert "bug" not in shown
    assert bad.read_text() == "{"


def test_a_checkpoint_with_its_own_format_is_followed(
    tiny: Path, tmp_path: Path, cli: Cli, keyboard: PipeInput
) -> None:
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "tokenizer_config.json"
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    )
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    gemma = Gemma.load(tmp_path, progress=False)
    run = cli("chat", tmp_path, *SEED, "--once", "Hello")
    assert run.out == gemma.generate("user: Hello\nassistant:", **SAMPLING) + "\n"
    run = cli("chat", tmp_path, *SEED, "--system", "Rhyme.", "--once", "Hello")
    assert run.code == 2
    assert "no system here" in run.error
    session = ChatSession(gemma, dict(SAMPLING), markdown=False)
    keyboard.send_text("/system Rhyme.\rHello\r\x04")
    session.run()
    assert session.conversation.system == ""
    assert len(session.conversation.turns) == 2


def test_an_unknown_command_is_not_sent(talk: Talk) -> None:
    session, shown = talk("/frobnicate now\x03"[:-1], "\x03/stats")
    assert "unknown command /frobnicate" in shown
    assert session.conversation.turns == []


def test_text_that_begins_with_a_slash_can_be_sent_in_quotes(talk: Talk) -> None:
    session, _ = talk('"""/usr/bin is a folder"""')
    assert session.conversation.turns[0]["content"] == "/usr/bin is a folder"


def test_several_lines(talk: Talk) -> None:
    pasted = "\x1b[200~one\ntwo\n\nthree\n\x1b[201~"
    session, _ = talk('"""', "first", 'second"""', pasted, "alt\x1b\renter")
    questions = [turn["content"] for turn in session.conversation.turns[::2]]
    assert questions == ["first\nsecond", "one\ntwo\n\nthree", "alt\nenter"]


def test_empty_lines_send_nothing(talk: Talk) -> None:
    session, _ = talk("", "   ")
    assert session.conversation.turns == []


def test_help_and_stats_and_exit(talk: Talk) -> None:
    session, shown = talk("/help", "/stats", "Hello", "/stats", "/exit", "never sent")
    for command in ("/help", "/system TEXT", "/clear", "/undo", "/save FILE", "/load FILE", "/stats", "/exit"):
        assert command in shown
    assert "No answer yet." in shown
    assert "tok/s" in shown
    assert "Cut after 12 tokens" in shown
    assert len(session.conversation.turns) == 2


def test_ctrl_c_in_the_line_clears_it_and_then_hints(talk: Talk) -> None:
    session, shown = talk("not sent\x03sent", "\x03")
    assert [turn["content"] for turn in session.conversation.turns[::2]] == ["sent"]
    assert "Ctrl-D or /exit leaves." in shown


def test_the_meter_counts_what_the_engine_counts(talk: Talk) -> None:
    session, _ = talk("Hello")
    assert session.last is not None
    text, warn = session._meter()
    dialogue = encode_chat(session.gemma.tokenizer, session.conversation.messages())
    assert session.used == len(dialogue)
    # What the engine saw, and around it what ends the model's turn and opens the next; text may be cut otherwise.
    assert session.used == pytest.approx(session.last.prompt_tokens + len(session.last.token_ids) + 6, abs=4)
    assert f"{session.used:,} / 8,192" in text
    assert not warn
    session.used = 8000
    assert session._meter()[1]


def test_a_full_context_loses_nothing(tiny: Path, keyboard: PipeInput, capsys: pytest.CaptureFixture[str]) -> None:
    small = Gemma.load(tiny, max_context=64, progress=False)
    session = ChatSession(small, {"seed": 7, "max_new_tokens": 20}, markdown=False)
    keyboard.send_text("Hello\r" + "long " * 60 + "\r\x03Short\rMore\r\x03\x04")
    session.run()
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("the context holds 64: /undo drops the last exchange") == 2
    assert "your message is back in the line" in shown  # and is taken out of it with Ctrl-C here
    assert [turn["content"] for turn in session.conversation.turns[::2]] == ["Hello", "Short"]


def test_an_answer_that_fills_the_context_says_so(
    tiny: Path, keyboard: PipeInput, capsys: pytest.CaptureFixture[str]
) -> None:
    small = Gemma.load(tiny, max_context=40, progress=False)
    session = ChatSession(small, {"seed": 7, "max_new_tokens": 1000}, markdown=False)
    keyboard.send_text("Hello\r\x04")
    session.run()
    assert "The context of 40 tokens is full and the answer ends here" in " ".join(capsys.readouterr().out.split())
    assert session.used >= 40


def test_ctrl_c_stops_the_answer_and_keeps_it(gemma: Gemma, talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    real = TextStream.events
    seen = 0

    def events(stream: TextStream) -> Iterator[Any]:
        nonlocal seen
        for event in real(stream):
            yield event
            seen += 1
            if seen == 5:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TextStream, "events", events)
    before = signal.getsignal(signal.SIGINT)
    session, shown = talk("Hello", "Again")
    assert "Stopped." in shown
    answers = [turn["content"] for turn in session.conversation.turns[1::2]]
    assert len(answers) == 2
    assert 0 < len(answers[0]) < len(answers[1])
    assert session.last is not None
    assert session.last.finish_reason == "length"
    assert signal.getsignal(signal.SIGINT) is before
    assert not gemma.engine.has_work


def test_a_bug_saves_the_conversation(
    talk: Talk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(ChatSession, "do_stats", lambda self, rest: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        talk("Hello", "/stats")
    saved = json.loads((tmp_path / "gemcut" / "rescued_chat.json").read_text())
    assert saved["messages"][0] == {"role": "user", "content": "Hello"}
    assert "/load" in capsys.readouterr().err


def test_history(talk: Talk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "state" / "chat_history"
    talk("Hello history", history=path)
    assert "Hello history" in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    session, _ = talk("\x1b[A", history=path)  # Up
    assert session.conversation.turns[0]["content"] == "Hello history"
    session, _ = talk("Hello", history=Path("/proc/nowhere/chat_history"))
    assert len(session.conversation.turns) == 2


def test_quotes() -> None:
    assert unquoted('"""a\nb"""') == "a\nb"
    assert unquoted('say """x"""') == 'say """x"""'
    assert [is_open(text) for text in ('"""', '"""a', '""""', '"""a"""', '""""""', 'a """')] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]


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

    def close(self) -> int:
        """Wait for the end; the exit code."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if select.select([self.fd], [], [], 0.1)[0]:
                    self.text += os.read(self.fd, 65536).decode(errors="replace")
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.fd)
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        pytest.fail(f"the process did not end; there is {self.text!r}")


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
