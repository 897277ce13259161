"""Personas, and what chat does when the context is nearly full."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from cli.conftest import Cli, cli  # noqa: F401
from gemcut import Gemma
from gemcut.cli import output
from gemcut.cli.chat_session import ChatSession
from gemcut.cli.conversation import EARLIER, Conversation
from gemcut.cli.options import LoadOptions
from gemcut.errors import ParameterError
from gemcut.uses.persona import Persona, read_persona
from gemcut.uses.room import fewest, reserve
from gemcut.uses.summarize import Summarizer
from server.host import NAME, new_gemma

LIBRARIAN = """
system = "You are a librarian."
[[examples]]
user = "What is a glacier?"
assistant = "A river of ice."
[sampling]
temperature = 0.5
seed = 3
stop = "END"
"""
EXAMPLES = ({"role": "user", "content": "What is a glacier?"}, {"role": "assistant", "content": "A river of ice."})
SAMPLING = {"seed": 7, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def gemma() -> Gemma:
    return new_gemma(max_context=400)


@pytest.fixture
def keyboard() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


def test_what_a_file_says(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(LIBRARIAN)
    assert read_persona(path) == Persona(
        "You are a librarian.", EXAMPLES, {"temperature": 0.5, "seed": 3, "stop": ["END"]}
    )
    path.write_text('system = "x"')
    assert read_persona(path) == Persona("x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sistem = 'x'", "unknown key 'sistem'; did you mean system?"),
        ("[sampling]\ntemprature = 1", "sampling has an unknown key 'temprature'; did you mean temperature?"),
        ("[sampling]\nmodel = 'x'", "unknown key 'model'"),
        ("[sampling]\ntemperature = -1", "temperature is -1; expected a number from 0 to 100"),
        ("[sampling]\ntop_k = true", "top_k is True; expected a whole number"),
        ("sampling = 3", "sampling is no table"),
        ("examples = 'x'", "examples is no list of tables"),
        ("[[examples]]\nuser = 'x'", "example 1: assistant is None"),
        ("[[examples]]\nuser = 'x'\nmodel = 'y'", "unknown key 'model'; expected one of user, assistant"),
        ("system = ' '", "system is ' '; expected a text"),
        ("system", "is not TOML"),
        ("", "says nothing; expected system, examples, sampling"),
    ],
)
def test_what_no_persona_says(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text(text)
    with pytest.raises(ParameterError) as caught:
        read_persona(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    for path, said in [(tmp_path, "it is a folder"), (tmp_path / "x", "No such file")]:
        with pytest.raises(ParameterError, match=said):
            read_persona(path)
    (tmp_path / "b").write_bytes(b"\xff")
    with pytest.raises(ParameterError, match="not UTF-8"):
        read_persona(tmp_path / "b")


def test_the_command(cli: Cli, gemma: Gemma, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(LoadOptions, "load", lambda self, name, **_: gemma)
    levels = list(gemma.sampling_levels)
    path = tmp_path / "a.toml"
    path.write_text(LIBRARIAN)

    def asked(system: str, **sampling: Any) -> str:
        messages = [{"role": "system", "content": system}, *EXAMPLES, {"role": "user", "content": "Hi"}]
        return gemma.chat(messages, max_new_tokens=8, **sampling) + "\n"

    def run(*more: str) -> str:
        done = cli("chat", NAME, "--persona", path, "-n", "8", "--once", "Hi", *more)
        gemma.sampling_levels[:] = levels
        assert done.code == 0, done.err
        return done.out

    librarian = "You are a librarian."
    assert run() == asked(librarian, temperature=0.5, seed=3, stop=("END",))
    assert run("-t", "0") == asked(librarian, temperature=0, stop=("END",))  # an option comes first
    assert run("--system", "Rhyme.") == asked("Rhyme.", temperature=0.5, seed=3, stop=("END",))
    assert "--when-full is 'x'; expected one of ask" in cli("chat", NAME, "--when-full", "x", "--once", "Hi").error


@given(st.lists(st.integers(1, 50), max_size=12), st.integers(0, 300))
def test_the_fewest_exchanges(sizes: list[int], room: int) -> None:
    turns = [{"role": role, "content": "x" * size} for size in sizes for role in ("user", "assistant")]

    def length(own: Any) -> int:
        return 20 + sum(len(turn["content"]) for turn in own)

    good = [count for count in range(len(sizes) + 1) if length(turns[2 * count :]) <= room]
    assert fewest(turns, length, room) == (good[0] if good else None)


def _full(count: int = 8) -> Conversation:
    conversation = Conversation("Be short.", examples=EXAMPLES)
    for number in range(count):
        conversation.add(f"Question {number} of many that are asked here?", f"Answer {number} is as long as that, too.")
    return conversation


def _talk(gemma: Gemma, keyboard: PipeInput, keys: str, **options: Any) -> ChatSession:
    session = ChatSession(gemma, dict(SAMPLING), markdown=False, conversation=_full(), **options)
    keyboard.send_text(f"{keys}\x03\x04")  # a message that comes back stands in the line
    session.run()
    return session


LONG = "word " * 150


def test_stop_keeps_everything(gemma: Gemma, keyboard: PipeInput, capsys: pytest.CaptureFixture[str]) -> None:
    for how in ("stop", "ask"):  # there is nobody to ask in a pipe
        session = _talk(gemma, keyboard, f"{LONG}\r", full=how)
        assert session.conversation == _full()
        assert "the context holds 400" in " ".join(capsys.readouterr().out.split())


def test_drop(gemma: Gemma, keyboard: PipeInput, capsys: pytest.CaptureFixture[str]) -> None:
    session = _talk(gemma, keyboard, f"/full drop\r{LONG}\r")
    shown = " ".join(capsys.readouterr().out.split())
    kept = session.conversation.turns[:-2]
    count = (16 - len(kept)) // 2
    assert 0 < count < 8
    assert kept == _full().turns[2 * count :]
    assert f"the {count} oldest exchanges dropped" in shown
    room = 400 - reserve(400, 8)
    lengths = []
    for turns in (kept, _full().turns[2 * (count - 1) :]):
        messages = Conversation("Be short.", turns, EXAMPLES).messages(LONG.strip())
        lengths.append(len(gemma.encode_messages(messages)))
    assert lengths[0] <= room < lengths[1]  # no more than had to be


def test_summarise(gemma: Gemma, keyboard: PipeInput, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    session = _talk(gemma, keyboard, f"{'word ' * 120}\r/save {path}\r", full="summarise")
    shown = " ".join(capsys.readouterr().out.split())
    kept = session.conversation.turns[:-2]
    gone = _full().turns[: 16 - len(kept)]
    assert gone
    names = {"user": "User", "assistant": "Model"}
    text = "\n\n".join(f"{names[turn['role']]}: {turn['content']}" for turn in gone)
    (right,) = Summarizer(gemma, length="medium", max_new_tokens=25)([text])
    assert session.conversation.summary == right.text.strip()
    assert "replaced by this summary" in shown
    first = session.conversation.messages()[0]
    assert first == {"role": "system", "content": f"Be short.\n\n{EARLIER}\n{right.text.strip()}"}
    assert json.loads(path.read_text())["messages"] == session.conversation.turns  # no examples
    assert Conversation.load(path).summary == session.conversation.summary


@pytest.mark.parametrize(("key", "gone"), [("d", True), ("", False), ("k", False), ("\x04", False)])
def test_a_person_is_asked(
    gemma: Gemma,
    keyboard: PipeInput,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    gone: bool,
) -> None:
    monkeypatch.setattr(output, "is_terminal", lambda stream: stream is sys.stdin)
    questions = []

    def ask(self: Any, question: str) -> str:
        questions.append(question)
        if "not saved" in question:
            return "y"
        if key == "\x04":
            raise EOFError
        return key

    monkeypatch.setattr("gemcut.cli.chat_input.ChatInput.ask", ask)
    session = _talk(gemma, keyboard, f"{LONG}\r")
    assert "nearly full" in questions[0]
    assert (session.conversation.turns[:2] != _full().turns[:2]) == gone


def test_one_message_makes_room_too(
    cli: Cli,  # noqa: F811
    gemma: Gemma,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LoadOptions, "load", lambda self, name, **_: gemma)
    levels = list(gemma.sampling_levels)
    _full().save(tmp_path / "a.json", "")
    more = ("--load", tmp_path / "a.json", "-n", "8", "-t", "0", "--once", LONG)
    assert "400" in cli("chat", NAME, *more).error
    done = cli("chat", NAME, *more, "--when-full", "drop")
    gemma.sampling_levels[:] = levels
    assert done.code == 0
    assert "dropped, the model no longer sees them" in done.error
