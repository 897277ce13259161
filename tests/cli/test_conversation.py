"""Saved chats: there and back, all or nothing, and files that are something else."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from gemcut.cli.conversation import Conversation
from gemcut.errors import GemcutError


def sample() -> Conversation:
    conversation = Conversation("Be brief.")
    conversation.add("What is 2 + 2?\nSay it.", "4 😀")
    conversation.add("And in Latin?", "")
    return conversation


def test_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    assert sample().save(path, "2b-it") is False
    assert Conversation.load(path) == sample()
    assert json.loads(path.read_text())["model"] == "2b-it"
    assert sample().save(path, "2b-it") is True
    Conversation().save(path, "")
    assert Conversation.load(path) == Conversation()
    assert [entry.name for entry in tmp_path.iterdir()] == ["chat.json"]


def test_messages_and_undo() -> None:
    conversation = sample()
    assert [m["role"] for m in conversation.messages("x")] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
        "user",
    ]
    assert conversation.undo() == "And in Latin?"
    assert conversation.undo() == "What is 2 + 2?\nSay it."
    assert conversation.undo() is None
    assert conversation.messages() == [{"role": "system", "content": "Be brief."}]


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    sample().save(path, "")
    before = path.read_bytes()
    longer = sample()
    longer.add("long", "x" * 100_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            longer.save(path, "")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["chat.json"]


def test_other_files_are_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("precious")
    with pytest.raises(GemcutError, match="not a saved chat"):
        sample().save(path, "")
    assert path.read_text() == "precious"


def test_a_plain_list_of_messages_loads(tmp_path: Path) -> None:
    path = tmp_path / "messages.json"
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "model", "content": "c"},
    ]
    path.write_text(json.dumps(messages))
    loaded = Conversation.load(path)
    assert loaded.system == "S"
    assert loaded.turns == [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"\xff\xfe",
        b"7",
        b"{}",
        b'{"format": "gemcut-chat", "version": 2, "messages": []}',
        b'{"format": "gemcut-chat", "version": 1}',
        b'{"format": "gemcut-chat", "version": 1, "system": 3, "messages": []}',
        b'{"format": "gemcut-chat", "version": 1, "messages": [{"role": "user", "content": "no answer"}]}',
        b'[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]',
        b'[{"role": "robot", "content": "a"}]',
        b'[{"role": "user", "content": 5}]',
        b"[1, 2]",
        b"[" * 100_000,
    ],
)
def test_files_that_are_no_saved_chat(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "chat.json"
    path.write_bytes(content)
    with pytest.raises(GemcutError):
        Conversation.load(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(GemcutError, match="No such file"):
        Conversation.load(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError):
        sample().save(tmp_path / "none" / "chat.json", "")
