"""The session of gemcut chat, its keyboard a pipe: commands, Ctrl-C, a full context."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from gemcut import Gemma
from gemcut.cli.chat_input import is_open, unquoted
from gemcut.cli.chat_session import ChatSession
from gemcut.cli.conversation import Conversation
from gemcut.engine.results import TextStream
from gemcut.text import encode_chat

from .conftest import Cli

SEED = ("--seed", "7", "-n", "12")
SAMPLING = {"seed": 7, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def gemma(tiny: Path) -> Gemma:
    return Gemma.load(tiny, progress=False)


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


def test_stats_are_those_of_the_last_answer_whatever_was_set_since(talk: Talk) -> None:
    _, shown = talk("/set temperature 0.5", "Hello", "/set temperature 0.25", "/stats")
    stats = shown[shown.rindex("sampling ") :]
    assert "0.5" in stats
    assert "0.25" not in stats


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
    assert "Ctrl-C again, Ctrl-D or /exit leaves." in shown


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


@pytest.mark.slow
def test_a_long_conversation_is_not_lost_without_a_question(
    talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, saved = Conversation(), tmp_path / "saved.json"
    other.add("Else", "where")
    other.save(tmp_path / "other.json", "")
    three = ("one", "two", "three")
    load = f"/load {tmp_path / 'other.json'}"

    def questions(*lines: str) -> list[str]:
        session, shown = talk(*lines)
        assert shown.count("Still here") == sum(line in ("n", "\x04", "") for line in lines)
        return [turn["content"] for turn in session.conversation.turns[::2]]

    assert questions(*three, "/clear") == []  # nobody is there to answer
    monkeypatch.setattr("gemcut.cli.chat_session.output.is_terminal", lambda stream: True)
    assert questions("one", "two", "/clear") == []  # not long
    assert questions(*three, "/clear", "y") == []
    assert questions(*three, "/clear", "n", load, "n", load, "y") == ["Else"]
    assert questions(*three, load, "", "/clear", "\x04", f"/save {saved}") == [*three]
    assert questions(*three, f"/save {saved}", "/clear", f"/load {saved}", load) == ["Else"]
    assert questions(*three, f"/load {tmp_path / 'none.json'}", f"/save {saved}") == [*three]  # no file, no question


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


def test_retry_answers_again_and_keeps_the_old_answer_where_there_is_no_new_one(
    talk: Talk, gemma: Gemma, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, shown = talk("Hello", "/set seed 8", "/retry", "/retry")
    message = [{"role": "user", "content": "Hello"}]
    new = gemma.chat(message, seed=8, max_new_tokens=12)
    assert new != gemma.chat(message, **SAMPLING)
    assert session.conversation.messages() == [*message, {"role": "assistant", "content": new}]
    assert "With a seed the answer is the same each time" in shown
    assert "nothing to answer again" in talk("/retry")[1]
    real = TextStream.events

    def broken(stream: TextStream) -> Iterator[Any]:
        stream.cancel()
        return real(stream)

    before = list(session.conversation.turns)
    monkeypatch.setattr(TextStream, "events", broken)
    session.do_retry("")
    assert session.conversation.turns == before
    assert session.draft == ""


def test_set_shows_and_changes_sampling(talk: Talk, gemma: Gemma) -> None:
    session, shown = talk("/set", "/set temperature 0.25", "/set top-k 5", "/set stop a b", "/set seed -", "/set")
    assert session.sampling == {"max_new_tokens": 12, "temperature": 0.25, "top_k": 5, "stop": ["a b"]}
    for part in (
        "temperature 1.0 built-in",
        "seed 7 given",
        "temperature is 0.25 (given).",
        "temperature 0.25 given",
        "seed is None (built-in).",
        "seed none built-in",
        "stop 'a b' given",
    ):
        assert part in shown
    session, shown = talk(
        "/set temprature 1", "/set temperature warm", "/set top_p 0", "/set model x", "/set temperature"
    )
    for part in (
        "unknown key 'temprature'; did you mean temperature?",
        "temperature is 'warm'; expected a number from 0 to 100",
        "top_p is '0'; expected a number above 0 up to 1",
        "unknown key 'model'",
        "temperature is 1.0 (built-in).",
    ):
        assert part in shown
    assert session.sampling == SAMPLING


def test_a_file_goes_in_front_of_the_next_message(talk: Talk, tmp_path: Path) -> None:
    path, image, latin = tmp_path / "a note.txt", tmp_path / "x.png", tmp_path / "latin.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    image.write_bytes(b"\x89PNG\x00")
    latin.write_bytes(b"caf\xe9")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "long").write_text("word " * 9000)
    (tmp_path / "huge").write_bytes(b"x" * 4_000_001)
    os.mkfifo(tmp_path / "pipe")
    bad = [tmp_path / name for name in ("x.png", "latin.txt", "empty", "long", "huge", "pipe", "none", ".")]
    session, shown = talk(*(f"/file {each}" for each in bad), f"/file '{path}'", "And?", "More", "/file")
    for part in (
        "x.png is a binary file",
        "byte 0xe9 at offset 3",
        "empty holds no text",
        "tokens, the context has room for 8,192",
        "has more than 4 MB",
        "pipe is not a file",
        "No such file",
        "a note.txt, ",
        "/file needs the name of a file",
    ):
        assert part in shown
    questions = [turn["content"] for turn in session.conversation.turns[::2]]
    assert questions == ["a note.txt:\n\none\ntwo\n\nAnd?", "More"]
    session, _ = talk(f"/file {path}", "/file -", "Hello")
    assert session.conversation.turns[0]["content"] == "Hello"


def test_attached_text_is_counted(talk: Talk, tmp_path: Path, gemma: Gemma) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("word " * 100)
    session, _ = talk(f"/file {path}")
    text = f"notes.txt:\n\n{path.read_text()}"
    assert session.used == len(encode_chat(gemma.tokenizer, [{"role": "user", "content": text}]))


def test_the_meter_does_not_pass_the_limit(talk: Talk) -> None:
    session, _ = talk()
    session.used = 8200
    assert "8,192 / 8,192 tokens" in session._meter()[0]


def test_ctrl_c_twice_leaves(talk: Talk) -> None:
    session, shown = talk("Hello", "\x03Again", "\x03\x03Never sent")
    assert shown.count("Ctrl-C again") == 2  # something was sent between them: the first does not count any more
    assert len(session.conversation.turns) == 4


def test_whatever_was_said_can_be_saved_and_loaded(gemma: Gemma, tmp_path: Path) -> None:
    for i, (system, question, answer) in enumerate(
        [("", "a", ""), ("x\n", " a\n\n", "\x00\u2028 "), ("", "<end_of_turn>", "\N{GRINNING FACE}"), ("only", "", "")]
    ):
        conversation = Conversation(system)
        if question:
            conversation.add(question, answer)
        conversation.save(tmp_path / f"{i}.json", "model")
        assert Conversation.load(tmp_path / f"{i}.json") == conversation
