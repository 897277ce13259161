"""The line a person types in chat: history, several lines, paste that is never sent by itself, the context meter."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import is_searching
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.styles import Style

from gemcut.cli.output import note
from gemcut.paths import user_folder

_QUOTES = '"""'
_STYLE = Style.from_dict({"prompt": "ansicyan bold", "bottom-toolbar": "noreverse", "meter.full": "ansired"})


class ChatInput:
    '''Reads messages. Enter sends, Alt-Enter adds a line; a text that begins with """ is sent when """ closes it.'''

    def __init__(self, commands: Iterable[str], meter: Callable[[], tuple[str, bool]], history: Path | None) -> None:
        """``meter`` gives the text under the line and whether to warn; ``history`` is a file, or None for none."""
        self._meter = meter
        self._session: PromptSession[str] = PromptSession(
            message=[("class:prompt", "> ")],
            multiline=True,
            prompt_continuation=lambda width, line, wrapped: "  ",
            key_bindings=_keys(),
            history=_open_history(history),
            completer=_Commands(sorted(commands)),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            bottom_toolbar=self._toolbar,
            style=_STYLE,
        )

    def read(self, draft: str = "") -> str:
        """The next message; ``draft`` stands in the line at first. EOFError: Ctrl-D. KeyboardInterrupt: Ctrl-C."""
        return self._session.prompt(default=draft).strip()

    def ask(self, question: str) -> str:
        """The answer to a question of one line. EOFError: Ctrl-D. KeyboardInterrupt: Ctrl-C."""
        session: PromptSession[str] = PromptSession(history=InMemoryHistory(), style=_STYLE)
        return session.prompt([("class:meter.full", f"{question} ")]).strip()

    def _toolbar(self) -> StyleAndTextTuples:
        text, warn = self._meter()
        return [("class:meter.full" if warn else "class:meter", text)]


def unquoted(text: str) -> str:
    '''A message without the """ around it.'''
    text = text.strip()
    if text.startswith(_QUOTES):
        text = text.removeprefix(_QUOTES).removesuffix(_QUOTES).strip("\n")
    return text


def is_open(text: str) -> bool:
    '''Whether a """ block was begun and not closed.'''
    text = text.strip()
    return text.startswith(_QUOTES) and not (text.endswith(_QUOTES) and len(text) >= 2 * len(_QUOTES))


def history_file() -> Path:
    """Where what was typed is kept: the XDG state folder."""
    return state_folder() / "chat_history"


def state_folder() -> Path:
    """gemcut's folder for what outlives a session."""
    return user_folder("XDG_STATE_HOME", ".local/state")


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter", filter=~is_searching)
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.insert_text("\n")
        elif buffer.text.strip():
            buffer.validate_and_handle()
        else:
            buffer.reset()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=~is_searching)
    def _clear(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return keys


class _Commands(Completer):
    def __init__(self, names: list[str]) -> None:
        self._names = names

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Names of commands that begin as the line does."""
        text = document.text
        if text.startswith("/") and " " not in text:
            for name in self._names:
                if name.startswith(text):
                    yield Completion(name, start_position=-len(text))


class _FileHistory(FileHistory):
    """A history that a full disk cannot turn into the end of a conversation."""

    def store_string(self, string: str) -> None:
        """Append to the file, as far as it can be written."""
        try:
            super().store_string(string)
        except OSError as error:
            note(f"the history file cannot be written: {error.strerror}")


def _open_history(path: Path | None) -> History:
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # what people ask a model is private
    except OSError as error:
        note(f"no history file: cannot open {path}: {error.strerror}")
        return InMemoryHistory()
    return _FileHistory(path)
