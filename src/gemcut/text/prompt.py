"""Dialogues to prompts, in Gemma's own format or a checkpoint's template; no text of people becomes a control token."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gemcut.errors import ChatTemplateError, ParameterError
from gemcut.text.chat import System, encode_chat, normalize_messages, render_chat, uses_gemma_format
from gemcut.text.control import ControlTokens
from gemcut.text.template import Message, Template, compile_template, plain_data
from gemcut.text.tokenizer import Tokenizer

_ROLE = re.compile(r"[a-z_]+")
#: Roles of the services' messages; a template may have more.
_ROLES = frozenset(("system", "developer", "user", "assistant", "model", "tool", "function", "ipython"))
_SYSTEM_PROBE = {"role": "system", "content": "SYSTEMPROBE"}
#: What a message may carry besides its text; a template that never names it would lose it.
_PAYLOADS = ("tool_calls", "function_call", "audio")


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How a dialogue is written.

    Attributes:
        add_generation_prompt: end with the opening of the model's turn.
        continue_final_message: leave the last turn open, to be continued: True in its content, a text in the field of
            that name.
        system: what to do with system messages where the template has no place for them: "fold" them into the first
            user's text, or "error".
        template: the Jinja source, or the name of one of the checkpoint's templates; None is the checkpoint's own,
            or Gemma's format, which is built in.
        tools, documents: what templates read under these names.
        variables: what else the template reads.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool | str = False
    system: System = "fold"
    template: str | None = None
    tools: Sequence[Any] | None = None
    documents: Sequence[Any] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.add_generation_prompt and self.continue_final_message:
            raise ParameterError(
                "add_generation_prompt and continue_final_message exclude each other: "
                "the first opens a new turn, the second leaves the last one open"
            )
        if not isinstance(self.continue_final_message, (bool, str)) or self.continue_final_message == "":
            raise ParameterError(
                f"continue_final_message is {self.continue_final_message!r}; expected True, False or a field's name"
            )
        if self.system not in ("fold", "error"):
            raise ParameterError(f"system is {self.system!r}; expected 'fold' or 'error'")

    @property
    def extra(self) -> dict[str, Any]:
        """tools, documents and variables that were given, by name."""
        given = {"tools": self.tools, "documents": self.documents}
        return {name: value for name, value in given.items() if value is not None} | dict(self.variables)


class ChatWriter:
    """Writes dialogues for one tokenizer, each template of which is examined once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._formats: dict[str, _Format] = {}

    def render(self, messages: Sequence[Message], options: ChatOptions) -> str:
        """The dialogue as a string, for people to read.

        Raises:
            ChatTemplateError: the format cannot express the dialogue.
            ParameterError: an option that the format has no place for.
        """
        chosen = self._format(options)
        if chosen is None:
            return render_chat(self.tokenizer, messages, **_layout_options(options))
        prepared = chosen.prepare(messages, options)
        if prepared is None:
            return render_chat(self.tokenizer, messages, **_layout_options(options))
        return chosen.render(prepared, options, options.extra, datetime.datetime.now())

    def prompt(self, messages: Sequence[Message], options: ChatOptions) -> list[int]:
        """What `encode` gives, with exactly one ``<bos>`` in front: Gemma needs it, and some templates write none."""
        ids = self.encode(messages, options)
        bos = self.tokenizer.bos_id
        start = next((at for at, token_id in enumerate(ids) if token_id != bos), len(ids))
        return [bos, *ids[start:]]

    def encode(self, messages: Sequence[Message], options: ChatOptions) -> list[int]:
        """The dialogue as token ids: those of the rendered string, except that control tokens which people typed are
        plain text.

        Raises:
            ChatTemplateError: the format cannot express the dialogue, or the template changes a message in such a way
                that its text and the template's control tokens cannot be told apart.
            ParameterError: an option that the format has no place for, or a text without a UTF-8 form.
        """
        chosen = self._format(options)
        prepared = None if chosen is None else chosen.prepare(messages, options)
        if chosen is None or prepared is None:
            return encode_chat(self.tokenizer, messages, **_layout_options(options))
        return chosen.encode(prepared, options)

    def built_in(self, options: ChatOptions) -> bool:
        """Whether these options ask for Gemma's own format."""
        chosen = self._format(options)
        return chosen is None or chosen.gemma

    def reads(self, options: ChatOptions) -> frozenset[str]:
        """Names of the variables that the template of these options reads."""
        source = self._source(options)
        return frozenset() if source is None else self._examined(source).template.variables

    def _format(self, options: ChatOptions) -> _Format | None:
        """The format to write in; None is Gemma's without a template of the checkpoint's."""
        known, source = self.reads(options), self._source(options)
        unknown = next((name for name in options.extra if name not in known), None)
        if unknown is not None:
            raise ParameterError(
                f"apply_chat_template has no argument {unknown!r}, and the chat template reads no such variable"
            )
        return None if source is None else self._examined(source)

    def _examined(self, source: str) -> _Format:
        if source not in self._formats:
            self._formats[source] = _Format(self.tokenizer, compile_template(source))
        return self._formats[source]

    def _source(self, options: ChatOptions) -> str | None:
        named = self.tokenizer.chat_templates
        if options.template is not None:
            return named.get(options.template, options.template)
        if options.tools is not None and "tool_use" in named:
            return named["tool_use"]
        if self.tokenizer.chat_template is None and named:
            raise ChatTemplateError(
                f"this checkpoint has several chat templates and no default; choose one of {', '.join(sorted(named))}"
            )
        return self.tokenizer.chat_template


class _Format:
    """One template with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, template: Template) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.gemma = uses_gemma_format(tokenizer, template.source)

    @cached_property
    def control(self) -> ControlTokens:
        return ControlTokens(self.tokenizer, self.template)

    @cached_property
    def reads_system(self) -> bool:
        """Whether the template writes a system message; many refuse it, some leave it out."""
        return "SYSTEMPROBE" in (self._probe([_SYSTEM_PROBE, _user("hello")]) or "")

    @property
    def drops_system(self) -> bool:
        """Whether the template leaves a system message out without a word."""
        return not self.reads_system and self._probe([_SYSTEM_PROBE, _user("hello")]) is not None

    @cached_property
    def reads_parts(self) -> bool:
        """Whether the template takes a list of parts as content; others print it as Python does."""
        written = self._probe([_user([{"type": "text", "text": "PARTPROBE"}])]) or ""
        return "PARTPROBE" in written and not re.search("""['"](type|text)['"]""", written)

    def _probe(self, messages: list[dict[str, Any]]) -> str | None:
        """A rendering; None where the template refuses it."""
        try:
            return self.template.render(messages, {**self.tokenizer.template_tokens, "add_generation_prompt": True})
        except ChatTemplateError:
            return None

    def prepare(self, messages: Sequence[Message], options: ChatOptions) -> list[dict[str, Any]] | None:
        """Check a dialogue and bring it to what the template reads; None if Gemma's layout says the same."""
        if self.gemma and not options.extra:
            normalize_messages(messages, options.system)
        chat = self._checked(messages)
        systems = sum(message["role"] == "system" for message in chat)
        if not self.reads_parts:
            chat = [message | {"content": _joined(i, message["content"])} for i, message in enumerate(chat)]
        if systems and not self.reads_system:
            if self.gemma and not options.extra:
                return None
            if self.drops_system:  # one that refuses them says so itself
                chat = _folded(chat, options.system)
        if not self.gemma or options.extra:
            return chat
        if systems > 1:  # Gemma 3's template takes one
            return None
        rendered = self.render(chat, options, {}, datetime.datetime.now())
        return None if rendered == render_chat(self.tokenizer, messages, **_layout_options(options)) else chat

    def render(
        self, chat: list[dict[str, Any]], options: ChatOptions, extra: Mapping[str, Any], now: datetime.datetime
    ) -> str:
        return self.template.render(
            chat,
            {**self.tokenizer.template_tokens, **extra, "add_generation_prompt": options.add_generation_prompt},
            now=now,
            continue_final_message=options.continue_final_message,
        )

    def encode(self, chat: list[dict[str, Any]], options: ChatOptions) -> list[int]:
        """Token ids: the rendering is compared with one in which people's text cannot hold a control token."""
        now = datetime.datetime.now()
        extra = plain_data(options.extra)
        rendered = self.render(chat, options, extra, now)
        ids, places = self.tokenizer.encode_with_places(rendered)
        control = self.control
        mask = control.mask(rendered + self.template.source)
        masked = [mask.message(message) for message in chat]
        masked_extra = {name: mask.value(value) for name, value in extra.items()}
        if not mask.used:
            return ids
        try:
            safe, restored = mask.restore(self.render(masked, options, masked_extra, now))
        except ChatTemplateError:
            safe = restored = ""
        if restored != rendered:
            name = control.typed(repr((chat, extra)))
            what = "characters such as '<'" if name is None else f"{name!r}, the name of a control token,"
            raise ChatTemplateError(
                f"a text of the dialogue holds {what} and the chat template changes or examines it, so that it cannot "
                "be kept apart from the template's own tokens; remove it from the text"
            )
        safe_ids, safe_places = self.tokenizer.encode_with_places(safe)
        spans = control.spans(safe_places, safe_ids)
        if spans == control.spans(places, ids):
            return ids
        found: list[int] = []
        at = 0
        for start, end, token_id in spans:
            found += [*control.encode_plain(rendered[at:start]), token_id]
            at = end
        return found + control.encode_plain(rendered[at:])

    def _checked(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages as plain dicts, or ChatTemplateError naming the one that is wrong."""
        if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
            raise ChatTemplateError(f"messages is of type {type(messages).__name__}; expected a list of messages")
        if not messages:
            raise ChatTemplateError("messages is empty; expected at least one message with role 'user'")
        try:
            chat: list[Any] = plain_data(list(messages))
        except RecursionError:
            raise ChatTemplateError("messages are nested too deeply") from None
        for index, message in enumerate(chat):
            if not isinstance(message, dict):
                kind = type(messages[index]).__name__
                raise ChatTemplateError(
                    f"messages[{index}] is of type {kind}; expected a mapping with role and content"
                )
            self._check_message(index, message)
        return chat

    def _check_message(self, index: int, message: dict[str, Any]) -> None:
        role = message.get("role")
        known = _ROLES | self.template.constants
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise ChatTemplateError(f"messages[{index}] has role {role!r}; expected a role such as user or assistant")
        if role not in known and self.control.named_in(role):
            raise ChatTemplateError(f"messages[{index}] has role {role!r}, which is part of a control token's name")
        for name in _PAYLOADS:
            if message.get(name) and name not in self.template.source:
                raise ChatTemplateError(f"messages[{index}] has {name!r}, which the chat template does not write")
        content = message.setdefault("content", None)
        if content is None and any(message.get(name) for name in _PAYLOADS):
            return
        if isinstance(content, (list, tuple)) and content:
            for part in content:
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                if kind != "text" or not isinstance(part.get("text"), str):
                    raise ChatTemplateError(
                        f"messages[{index}] has a content part of type {kind!r}; expected parts of type 'text' with "
                        "a text"
                    )
        elif not isinstance(content, str):
            shown = "an empty list as content" if content in ([], ()) else f"content of type {type(content).__name__}"
            raise ChatTemplateError(f"messages[{index}] has {shown}; expected a text or a list of text parts")


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _joined(index: int, content: Any) -> Any:
    return "".join(part["text"] for part in content) if isinstance(content, (list, tuple)) else content


def _folded(chat: list[dict[str, Any]], system: System) -> list[dict[str, Any]]:
    """System messages in front of the first user's text, for a template that has no place for them."""
    if system == "error":
        index = next(i for i, message in enumerate(chat) if message["role"] == "system")
        raise ChatTemplateError(f"messages[{index}] has role 'system', which the chat template does not write")
    first = next((i for i, message in enumerate(chat) if message["role"] != "system"), None)
    late = next((i for i, message in enumerate(chat) if message["role"] == "system" and i > (first or 0)), None)
    if late is not None and first is not None:
        raise ChatTemplateError(f"messages[{late}] has role 'system'; system messages may only come first")
    if first is None or chat[first]["role"] != "user":
        raise ChatTemplateError("the system message needs a message with role 'user' right after it")
    texts = [text for text in (_joined(i, message["content"]) for i, message in enumerate(chat[: first + 1])) if text]
    return [chat[first] | {"content": "\n\n".join(texts)}, *chat[first + 1 :]]


def _layout_options(options: ChatOptions) -> dict[str, Any]:
    """Arguments of `encode_chat`. Raises ChatTemplateError where another field than the content is to be continued."""
    field = options.continue_final_message
    if isinstance(field, str) and field != "content":
        raise ChatTemplateError(f"continue_final_message: Gemma's format has no field {field!r}; it has content alone")
    return {
        "add_generation_prompt": options.add_generation_prompt,
        "continue_final_message": bool(field),
        "system": options.system,
    }
