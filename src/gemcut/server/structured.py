"""Structured output and tools: what of them a request may ask for."""

from __future__ import annotations

from typing import Any

from gemcut.errors import ParameterError
from gemcut.server.fields import ChatRequest


def structured_sampling(body: ChatRequest) -> dict[str, Any]:
    """Fields of SamplingParams that ``response_format`` and ``tools`` ask for.

    Raises ParameterError naming the field for what this server does not have.
    """
    kind = (body.response_format or {}).get("type", "text")
    if kind != "text" or set(body.response_format or ()) - {"type"}:
        raise ParameterError(f"response_format is of type {str(kind)[:60]!r}; this server has 'text' alone")
    if body.tools:
        raise ParameterError("tools is not empty; this server has no tools")
    if body.tool_choice not in (None, "none", "auto"):
        raise ParameterError(f"tool_choice is {str(body.tool_choice)[:60]!r}; this server has no tools")
    return {}
