"""A Python function as a tool: the JSON schema that a chat template writes, from its type hints and its docstring."""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable
from enum import Enum
from typing import Any, Literal, Union

from gemcut.errors import ParameterError

_SCALARS: dict[type, str] = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
_HEADINGS = re.compile(r"Args:|Returns:|Raises:")
_ENTRY = re.compile(r"([ \t]*)(\w+):\s*(.*)")
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def is_function(tool: object) -> bool:
    """Whether a tool is one that a schema can be made of: a function or a method."""
    return inspect.isfunction(tool) or inspect.ismethod(tool)


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The schema of a function, equal to that of ``transformers.utils.get_json_schema``.

    Args:
        function: every argument has a type hint, and a description under ``Args:`` in a docstring of Google's format.
            Types are int, float, str, bool, None, Any, list, tuple, dict, Enum, Literal and unions of these. A
            description may end with ``(choices: ["a", "b"])``.

    Returns:
        ``{"type": "function", "function": {"name", "description", "parameters", "return"}}``

    Raises:
        ParameterError: a hint or a description is missing, or a type has no schema.
    """
    name = getattr(function, "__name__", "operation")
    document = (inspect.getdoc(function) or "").strip()
    if not document:
        raise _refusal(name, "it has no docstring")
    try:
        hints = typing.get_type_hints(function)
    except Exception as error:  # a name in a hint may be anything
        raise _refusal(name, f"its type hints cannot be read ({' '.join(str(error).split())})") from None
    parameters = dict(inspect.signature(function).parameters)
    first = next(iter(parameters.values()), None)
    if first is not None and first.name in ("self", "cls") and first.annotation is inspect.Parameter.empty:
        del parameters[first.name]
    for parameter in parameters.values():
        if parameter.annotation is inspect.Parameter.empty:
            raise _refusal(name, f"its argument {parameter.name} has no type hint")
    described = _descriptions(document)
    properties = {}
    for argument, hint in hints.items():
        if argument == "return":
            continue
        try:
            schema = _schema(hint)
        except TypeError as error:
            raise _refusal(name, f"the type of its argument {argument} has none: {error}") from None
        if argument not in described:
            raise _refusal(name, f"its docstring does not describe {argument} under Args:")
        properties[argument] = _with_description(schema, described[argument], name, argument)
    required = [one.name for one in parameters.values() if one.default is inspect.Parameter.empty]
    content: dict[str, Any] = {
        "name": name,
        "description": _HEADINGS.split(document, maxsplit=1)[0].strip(),
        "parameters": {"type": "object", "properties": properties} | ({"required": required} if required else {}),
    }
    if (returned := _returned(hints, document)) is not None:
        content["return"] = returned
    return {"type": "function", "function": content}


def _refusal(name: str, why: str) -> ParameterError:
    return ParameterError(f"no JSON schema of the function {name}: {why}; add it, or give the schema as a dict")


def _schema(hint: Any) -> dict[str, Any]:
    """The schema of one type. Raises TypeError, whose text says why there is none."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is None and isinstance(hint, type) and issubclass(hint, Enum):
        return _choices([member.value for member in hint], f"the Enum {hint.__name__}")
    if origin is Literal:
        return _choices(list(inner), "Literal")
    if origin is Union or origin is types.UnionType:
        return _union(inner)
    if origin is tuple and inner:
        if len(inner) == 1 or ... in inner:
            raise TypeError(f"{_spelled(hint)} is of one entry or of any number; use list")
        return {"type": "array", "prefixItems": [_schema(one) for one in inner]}
    if hint is Any:
        return {}
    kind = hint if origin is None else origin
    if origin is None and kind in _SCALARS:
        return {"type": _SCALARS[kind]}
    if kind is list or kind is tuple:
        return {"type": "array"} | ({"items": _schema(inner[0])} if inner else {})
    if kind is dict:
        return {"type": "object"} | ({"additionalProperties": _schema(inner[1])} if len(inner) == 2 else {})
    raise TypeError(f"{_spelled(hint)} is neither a basic type nor made of these")


def _union(members: tuple[Any, ...]) -> dict[str, Any]:
    """A union; None in it makes it nullable."""
    schemas = [_schema(one) for one in members if one is not type(None)]
    if len(schemas) == 1:
        found = schemas[0]
    elif all(list(one) == ["type"] and isinstance(one["type"], str) for one in schemas):
        names = sorted({one["type"] for one in schemas})
        found = {"type": names[0] if len(names) == 1 else names}
    else:
        found = {"anyOf": schemas}
    return found | ({"nullable": True} if type(None) in members else {})


def _choices(values: list[Any], what: str) -> dict[str, Any]:
    if not values or any(type(value) not in _SCALARS for value in values):
        raise TypeError(f"{what} has no values, or some that JSON has not")
    kinds = list(dict.fromkeys(_SCALARS[type(value)] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


def _spelled(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _descriptions(document: str) -> dict[str, str]:
    """What the docstring says of each argument; a line indented deeper than its name goes on with it."""
    found: dict[str, list[str]] = {}
    heading = re.search(r"\n\s*Args:\n", document)
    block = re.split("Returns:|Raises:", document[heading.end() :], maxsplit=1)[0] if heading is not None else ""
    name, indent = "", ""
    for line in block.split("\n"):
        entry = _ENTRY.fullmatch(line)
        deeper = bool(name) and line.startswith((f"{indent} ", f"{indent}\t"))
        if entry is not None and not deeper:
            indent, name = entry[1], entry[2]
            found[name] = [entry[3].strip()]
        elif name and line.strip():
            found[name].append(line.strip())
    return {argument: " ".join(lines).strip() for argument, lines in found.items()}


def _with_description(schema: dict[str, Any], text: str, function: str, argument: str) -> dict[str, Any]:
    choices = _CHOICES.search(text)
    if choices is None:
        return schema | {"description": text}
    try:
        values = json.loads(choices[1])
        listed = [value.strip() if isinstance(value, str) else value for value in values]
    except (ValueError, TypeError):
        raise _refusal(function, f"the choices of {argument} are no JSON list") from None
    return schema | {"enum": listed, "description": text[: choices.start()].strip()}


def _returned(hints: dict[str, Any], document: str) -> dict[str, Any] | None:
    """The schema of what comes back, where its type has one: no model makes it, so that another is left out."""
    if "return" not in hints:
        return None
    try:
        schema = _schema(hints["return"])
    except TypeError:
        return None
    found = re.search(r"\n\s*Returns:\n\s*", document)
    if found is None:
        return schema
    return schema | {"description": document[found.end() :].split("Raises:", 1)[0].strip()}
