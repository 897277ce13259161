"""From requests to token ids: what several prompts begin with is tokenized once, and exactly as if it were not."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from gemcut.errors import ChatTemplateError
from gemcut.evaluation.requests import Dialogue
from gemcut.gemma import Gemma


class Prompts:
    """Makes token ids of prompts, each with exactly one ``<bos>`` (where the model has one).

    A text may be cut behind a line break where no piece of the vocabulary holds a line break beside another character:
    no merge then crosses the cut, and both parts alone give the tokens of the whole. Gemma's vocabulary is of this
    kind; with any other one whole texts are tokenized.
    """

    def __init__(self, gemma: Gemma) -> None:
        self.gemma = gemma
        self._known: dict[str, list[int]] = {}
        self._context: tuple[tuple[str, str], list[int]] = (("", ""), [])

    @cached_property
    def may_be_cut(self) -> bool:
        """Whether texts may be cut behind line breaks."""
        tokenizer = self.gemma.tokenizer
        mixed = any(b"\n" in piece and piece.strip(b"\n") for piece in tokenizer.all_token_bytes())
        # A tokenizer that puts a space in front of every text shows itself here.
        parts = [tokenizer.encode(text, add_bos=False) for text in ("One:\nTwo", "One:\n", "Two")]
        return not mixed and parts[0] == parts[1] + parts[2]

    def text(self, text: str, prefix: str = "") -> list[int]:
        """Token ids of ``prefix`` and ``text``, ``<bos>`` before them. Control tokens in a text are characters."""
        if not prefix or not (prefix.endswith("\n") and text[:1] not in ("", "\n") and self.may_be_cut):
            return [self.gemma.bos_id, *self._plain(prefix + text)]
        if prefix not in self._known:
            self._known[prefix] = self._plain(prefix)
        return [self.gemma.bos_id, *self._known[prefix], *self._plain(text)]

    def continuation(self, context: str, continuation: str, prefix: str = "") -> tuple[list[int], int]:
        """(ids of the whole, place of the continuation's first token).

        Spaces at the context's end belong to the continuation, whose first piece they are part of. Where a piece spans
        the seam, it counts as the continuation's.
        """
        bare = context.rstrip(" ")
        if self._context[0] != (prefix, bare):  # all choices of a question have the same
            self._context = (prefix, bare), self.text(bare, prefix)
        whole, before = self.text(context + continuation, prefix), self._context[1]
        start = len(before)
        while start > 1 and whole[:start] != before[:start]:
            start -= 1
        return whole, min(start, len(whole))

    def dialogue(self, dialogue: Dialogue) -> list[int]:
        """Token ids of a dialogue up to where the model answers. Raises ChatTemplateError where there is no template.

        Gemma has no system turn: a system message goes in front of the first user turn.
        """
        tokenizer = self.gemma.tokenizer
        if tokenizer.chat_template is None and not tokenizer.chat_templates:
            name = self.gemma.source.name if self.gemma.source is not None else "this model"
            raise ChatTemplateError(
                f"{name} has no chat template (a base model?), and the row is asked in the chat format: "
                "take an instruction-tuned model, or --no-chat to ask in plain text"
            )
        messages: list[dict[str, Any]] = [{"role": each.role, "content": each.content} for each in dialogue]
        return self.gemma.encode_messages(messages, system="fold")

    def single(self, texts: tuple[str, ...], context: str) -> list[int] | None:
        """The one token that each text is behind ``context``; None where one of them is not a single one."""
        line = context[context.rfind("\n") + 1 :] if self.may_be_cut else context
        key = "\0".join((line, *texts))
        if key not in self._known:
            before = self._plain(line)
            found = [self._plain(line + text) for text in texts]
            good = all(len(ids) == len(before) + 1 and ids[:-1] == before for ids in found)
            self._known[key] = [ids[-1] for ids in found] if good else []
        return self._known[key] or None

    def bare(self, text: str) -> list[int]:
        """Token ids of what follows a dialogue: the model's turn begins with it."""
        return self._plain(text)

    def _plain(self, text: str) -> list[int]:
        return self.gemma.tokenizer.encode(text, add_bos=False, parse_special=False) if text else []
