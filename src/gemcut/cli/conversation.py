"""Conversation: the messages of a chat, and how they are kept in a file."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemcut.cli.files import MAX_CHAT, read_bounded
from gemcut.errors import ChatTemplateError, ParameterError

FORMAT = "gemcut-chat"
VERSION = 1
#: Stands in front of the summary of what is no longer there.
EARLIER = "Earlier in this conversation:"


@dataclass
class Conversation:
    """A dialogue between user and model.

    Attributes:
        system: instructions that are put in front of the first user turn; "" for none.
        turns: messages with role "user" and "assistant" in turn.
        examples: such messages that stand before them; they are a persona's, and no part of what is saved.
        summary: of exchanges that are no longer among the turns; the model sees it behind the instructions.
    """

    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)
    examples: Sequence[dict[str, str]] = ()
    summary: str = ""

    def messages(self, question: str | None = None) -> list[dict[str, str]]:
        """The dialogue as Gemma.chat takes it, with one more question if given."""
        earlier = [f"{EARLIER}\n{self.summary}"] if self.summary else []
        system = "\n\n".join([*([self.system] if self.system else []), *earlier])
        first = [{"role": "system", "content": system}] if system else []
        last = [{"role": "user", "content": question}] if question is not None else []
        return [*first, *self.examples, *self.turns, *last]

    def add(self, question: str, answer: str) -> None:
        """Take a question and its answer."""
        self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def undo(self) -> str | None:
        """Drop the last exchange; its question, or None where there is nothing to drop."""
        if not self.turns:
            return None
        question = self.turns[-2]["content"]
        del self.turns[-2:]
        return question

    def save(self, path: Path, model: str) -> bool:
        """Write the dialogue as JSON, whole or not at all. Returns whether a saved chat was replaced.

        Raises ParameterError where the file is something else than a saved chat, OSError where it can't be written.
        """
        replaced = path.exists()
        if replaced:
            try:
                Conversation.load(path)
            except (ParameterError, ChatTemplateError):
                raise ParameterError(f"{path} exists and is not a saved chat; choose another name") from None
        data = {
            "format": FORMAT,
            "version": VERSION,
            "model": model,
            "system": self.system,
            "messages": self.turns,
        } | ({"summary": self.summary} if self.summary else {})
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with open(part, "w", encoding="utf-8") as file:
                json.dump(data, file, ensure_ascii=False, indent=2)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        return replaced

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """Read what ``save`` wrote, or a JSON list of messages. Raises ParameterError or ChatTemplateError."""
        from gemcut.text import normalize_messages

        raw = read_bounded(path, MAX_CHAT)
        try:
            data = json.loads(raw)
        except (ValueError, RecursionError):
            raise ParameterError(f"{path} is not JSON; expected a file that /save wrote") from None
        messages, system, summary = data, "", ""
        if isinstance(data, dict):
            if data.get("format") != FORMAT or data.get("version") != VERSION:
                raise ParameterError(f"{path} is not a saved chat (format {FORMAT!r}, version {VERSION})")
            messages, system, summary = data.get("messages"), data.get("system", ""), data.get("summary", "")
        if not isinstance(messages, list) or not isinstance(system, str) or not isinstance(summary, str):
            raise ParameterError(f"{path} is not a saved chat: expected a list of messages and a system text")
        if not messages:
            return cls(system, summary=summary)
        normalize_messages(messages)  # refuses roles that do not alternate, content that is no text, …
        texts = [(str(message["role"]), _text(message)) for message in messages]
        folded = [text for role, text in texts if role == "system"]
        dialogue = [text for role, text in texts if role != "system"]
        if len(dialogue) % 2:
            raise ParameterError(f"{path} ends with a question that has no answer; a saved chat ends with an answer")
        loaded = cls("\n\n".join([system, *folded] if system else folded), summary=summary)
        for question, answer in zip(dialogue[::2], dialogue[1::2], strict=True):
            loaded.add(question, answer)
        return loaded


def _text(message: Mapping[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
