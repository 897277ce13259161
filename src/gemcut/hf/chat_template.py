"""What transformers' apply_chat_template takes, as options of gemcut's one writer of dialogues."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemcut.errors import ParameterError, UnsupportedError
from gemcut.hf.common import warn_once
from gemcut.hf.tool_schema import function_schema, is_function
from gemcut.text import ChatOptions, ChatWriter

__all__ = ["ChatWriter", "chat_options"]

#: Variables of well-known templates, with the value under which a template that lacks them writes the same.
_IDLE = {"enable_thinking": False}


def chat_options(
    writer: ChatWriter, *, tools: object, documents: object, variables: Mapping[str, Any], **options: Any
) -> ChatOptions:
    """The arguments of apply_chat_template, checked.

    Raises:
        UnsupportedError: the template has no place for tools or documents.
        ParameterError: tools or documents of another type, or a function that says too little for a schema.
    """
    plain = ChatOptions(**options)
    known = writer.reads(plain)
    kept = {name: value for name, value in variables.items() if not _idle(name, value, known)}
    return ChatOptions(
        **options,
        tools=_schemas("tools", tools, writer.reads(ChatOptions(**options, tools=_list(tools)))),
        documents=_schemas("documents", documents, known),
        variables=kept,
    )


def _list(value: object) -> list[Any] | None:
    return list(value) if isinstance(value, (list, tuple)) else None


def _schemas(name: str, value: object, known: frozenset[str]) -> list[Any] | None:
    """tools or documents as a list of mappings; None where there are none."""
    if value is None:
        return None
    expected = "a dict or a documented function" if name == "tools" else "a dict"
    entries = _list(value)
    if entries is None:
        raise ParameterError(f"{name} is of type {type(value).__name__}; expected a list, each {expected}")
    for index, entry in enumerate(entries):
        if name == "tools" and is_function(entry):
            entries[index] = function_schema(entry)
        elif not isinstance(entry, Mapping):
            raise ParameterError(f"{name}[{index}] is of type {type(entry).__name__}; expected {expected}")
    if name in known:
        return entries
    if entries:
        raise UnsupportedError(
            f"apply_chat_template: {name}=… is not supported: the chat template has no place for them; put their text "
            "into a message"
        )
    return None


def _idle(name: str, value: object, known: frozenset[str]) -> bool:
    """Whether a variable changes nothing here; then a warning says so."""
    if name not in _IDLE or name in known or value is not _IDLE[name]:
        return False
    warn_once(f"apply_chat_template: {name}={value} changes nothing; the chat template has no such switch")
    return True
