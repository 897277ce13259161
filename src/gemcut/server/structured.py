"""Structured output and tools: what of them a request asks for, made ready before its answer begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gemcut.engine.grammar import Grammar
from gemcut.errors import ParameterError
from gemcut.gemma import Gemma
from gemcut.server.errors import ApiError
from gemcut.server.fields import ChatRequest
from gemcut.server.tools import Tools, tools_of


@dataclass(frozen=True)
class Structured:
    """What an answer must look like.

    Attributes:
        sampling: fields of SamplingParams.
        tools: what it may call.
    """

    sampling: dict[str, Any]
    tools: Tools | None = None


async def structured_of(gemma: Gemma, body: ChatRequest) -> Structured:
    """What ``response_format`` and ``tools`` ask for. The grammar is compiled by a worker, and then kept.

    Raises ApiError or ParameterError, which name the field.
    """
    tools, grammar = tools_of(body), _format_of(body.response_format)
    field = "response_format"
    if tools is not None:
        if grammar is not None:
            raise _bad("response_format and tools are both given; leave one out, or set tool_choice to 'none'")
        grammar, field = tools.grammar, "tools"
    if grammar is None:
        return Structured({})
    try:
        await gemma.grammars.acompile(grammar)
    except ParameterError as error:
        raise ApiError(400, f"{field}: {error}", param=field, code="invalid_grammar") from None
    return Structured({"grammar": grammar}, tools)


def _format_of(given: dict[str, Any] | None) -> Grammar | None:
    """The grammar of a ``response_format``. Raises ApiError."""
    kind = (given or {}).get("type", "text")
    if given is None or (kind == "text" and set(given) <= {"type"}):
        return None
    if kind == "json_object" and set(given) == {"type"}:
        return Grammar.json_object()
    inner = given.get("json_schema")
    if kind != "json_schema" or set(given) != {"type", "json_schema"} or not isinstance(inner, dict):
        raise _bad(
            f"response_format is of type {str(kind)[:60]!r} with {', '.join(map(str, given))[:100] or 'no members'}; "
            "expected {'type': 'text'}, {'type': 'json_object'} or {'type': 'json_schema', 'json_schema': {…}}"
        )
    if unknown := sorted(set(inner) - {"name", "description", "schema", "strict"}):
        raise _bad(f"response_format.json_schema has the unknown member {unknown[0][:60]!r}; leave it out")
    for name, right in (("name", str), ("description", str), ("strict", bool)):
        if not isinstance(inner.get(name), right | None):
            raise _bad(f"response_format.json_schema.{name} is {str(inner[name])[:60]!r}; expected {right.__name__}")
    if not isinstance(inner.get("schema"), dict):
        raise _bad("response_format.json_schema has no schema; expected a JSON schema as an object")
    try:
        return Grammar.json_schema(inner["schema"])
    except ParameterError as error:
        raise _bad(f"response_format: {error}") from None


def _bad(message: str) -> ApiError:
    return ApiError(400, message, param="response_format", code="invalid_value")
