"""Tools for a model that has no format for them: what its prompt says, what its answer may look like, how it is read.

Gemma 2 was not taught to call tools. Here the tools stand in the system text, which comes in front of the first user's;
a grammar lets the answer be either words or JSON that names a tool and its arguments; results come back as a user's
turn. docs/server.md has the texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

from gemcut.engine.grammar import Grammar
from gemcut.server.errors import ApiError
from gemcut.server.fields import ChatMessage, ChatRequest

#: Most calls in one answer, where several are asked for.
MOST_CALLS = 8
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_INTRODUCTION = """You can call tools. To call one, answer with nothing but a JSON object of this form:
{"name": "name of the tool", "arguments": {arguments by name}}"""
_SEVERAL = "To call several, answer with a JSON array of such objects."
_OR_WORDS = "Where no tool is of use, answer in words."
_MUST = "Answer with a call."
_MUST_THIS = "Answer with a call of {}."
_LIST = "The tools, one a line, with the JSON schema of their arguments:"
_RESULT = "Result of the tool {}:\n{}"


@dataclass(frozen=True)
class Tools:
    """The tools of one request.

    Attributes:
        functions: of each its name, description and the schema of its arguments.
        must: whether the answer has to be a call; ``name``: of this tool.
        several: whether an answer may hold several calls.
    """

    functions: tuple[dict[str, Any], ...]
    must: bool
    name: str | None
    several: bool

    @property
    def prompt(self) -> str:
        """What the system text says of them."""
        how = _MUST_THIS.format(self.name) if self.name is not None else _MUST if self.must else _OR_WORDS
        lines = [json.dumps(each, ensure_ascii=False) for each in self.functions]
        return "\n".join([_INTRODUCTION, *([_SEVERAL] if self.several else []), how, _LIST, *lines])

    @property
    def grammar(self) -> Grammar:
        """What the answer may look like. Raises ParameterError where the schemas are too large."""
        offered = [each for each in self.functions if self.name in (None, each["name"])]
        definitions, calls = {}, []
        for number, function in enumerate(offered):
            definitions[f"tool{number}"] = _moved(function["parameters"], f"#/$defs/tool{number}")
            calls.append(
                {
                    "type": "object",
                    "properties": {
                        "name": {"const": function["name"]},
                        "arguments": {"$ref": f"#/$defs/tool{number}"},
                    },
                    "required": ["name", "arguments"],
                    "additionalProperties": False,
                }
            )
        call: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
        if self.several:
            many = {"type": "array", "items": call, "minItems": 1, "maxItems": MOST_CALLS}
            call = {"anyOf": [*calls, many]}
        schema = {"$defs": definitions, **call}
        return Grammar.json_schema(schema) if self.must else Grammar.json_or_text(schema)


def tools_of(body: ChatRequest) -> Tools | None:
    """The tools that a request offers. None: it offers none, or forbids them.

    Raises ApiError 400, which names the field.
    """
    choice = body.tool_choice
    if not body.tools:
        for field in ("tool_choice", "parallel_tool_calls"):
            if getattr(body, field) not in (None, "none", "auto"):
                raise _bad(field, f"{field} is given without tools; add tools, or leave it out")
        return None
    functions = tuple(_function(place, tool) for place, tool in enumerate(body.tools))
    names = [function["name"] for function in functions]
    if twice := [name for name in names if names.count(name) > 1]:
        raise _bad("tools", f"tools has two functions named {twice[0]!r}; give each a name of its own")
    name: str | None = None
    if isinstance(choice, dict):
        named = choice.get("function")
        right = set(choice) == {"type", "function"} and choice["type"] == "function" and isinstance(named, dict)
        if not right or not isinstance(named, dict) or set(named) != {"name"} or named["name"] not in names:
            raise _bad(
                "tool_choice",
                f"tool_choice is {_short(choice)}; expected {{'type': 'function', 'function': {{'name': …}}}}",
            )
        name = str(named["name"])
    elif choice not in (None, "none", "auto", "required"):
        raise _bad("tool_choice", f"tool_choice is {_short(choice)}; expected 'none', 'auto', 'required' or a function")
    if choice == "none":
        return None
    must = name is not None or choice == "required"
    return Tools(functions, must, name, several=bool(body.parallel_tool_calls))


def as_turns(messages: Many[ChatMessage], tools: Tools | None) -> list[ChatMessage]:
    """A dialogue with tools as one without: calls are the assistant's words, results the user's, tools the system's.

    Raises ApiError 400 for a result that answers no call, or a call that is none.
    """
    turns: list[ChatMessage] = []
    calls: dict[str, str] = {}
    within_results = False
    for place, message in enumerate(messages):
        if message.role == "tool":
            text = _result(place, message, calls)
            if within_results:
                turns[-1] = ChatMessage(role="user", content=f"{turns[-1].content}\n\n{text}")
            else:
                turns.append(ChatMessage(role="user", content=text))
            within_results = True
            continue
        if message.tool_call_id is not None:
            raise _bad(
                f"messages[{place}].tool_call_id", f"messages[{place}] has tool_call_id, but its role is not tool"
            )
        if message.role == "user" and within_results and isinstance(message.content, str):
            turns[-1] = ChatMessage(role="user", content=f"{turns[-1].content}\n\n{message.content}")
        elif message.tool_calls:
            turns.append(_called(place, message, calls))
        else:
            turns.append(message)
        within_results = False
    if tools is not None:
        first = next((i for i, turn in enumerate(turns) if turn.role not in ("system", "developer")), len(turns))
        turns.insert(first, ChatMessage(role="system", content=tools.prompt))
    return turns


class CallReader:
    """Reads an answer's text as it comes: words, or calls of tools. Gives what OpenAI's streams call deltas.

    Attributes:
        calls: the calls so far, as OpenAI's messages have them.
        words: the text so far, where it is no call.
    """

    _HEAD = re.compile(r'[\s,\[]*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*')

    def __init__(self, name: str) -> None:
        """``name`` begins the calls' ids."""
        self.calls: list[dict[str, Any]] = []
        self.words = ""
        self._name = name
        self._kind: str | None = None
        self._held = ""
        self._within = False  # the arguments of a call
        self._depth, self._in_string, self._escaped = 0, False, False

    def feed(self, text: str, *, last: bool = False) -> list[dict[str, Any]]:
        """The deltas of more text. ``last``: there will be no more."""
        if self._kind is None:
            self._held += text
            start = self._held.lstrip()
            if not start and not last:
                return []
            self._kind = "calls" if start[:1] in ("{", "[") else "words"
            text, self._held = self._held, ""
        if self._kind == "words":
            self.words += text
            return [{"content": text}] if text else []
        self._held += text
        deltas: list[dict[str, Any]] = []
        while self._held:
            if self._within:
                deltas += self._arguments()
                continue
            head = self._HEAD.match(self._held)
            if head is None:
                # The brace that closes a call is between it and the next one.
                if self._held[0] in "} \t\r\n":
                    self._held = self._held[1:]
                    continue
                break
            self._held, self._within = self._held[head.end() :], True
            deltas.append(self._open(json.loads(head[1], strict=False)))
        return deltas

    def _open(self, name: str) -> dict[str, Any]:
        index = len(self.calls)
        call = {
            "id": f"{self._name}_{index}",
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }
        self.calls.append(call)
        return {"tool_calls": [{"index": index, **call, "function": {"name": name, "arguments": ""}}]}

    def _arguments(self) -> list[dict[str, Any]]:
        if not self._depth:
            self._held = self._held.lstrip()
        end = len(self._held)
        for place, character in enumerate(self._held):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    end, self._within = place + 1, False
                    break
        piece, self._held = self._held[:end], self._held[end:]
        if not piece:
            return []
        self.calls[-1]["function"]["arguments"] += piece
        return [{"tool_calls": [{"index": len(self.calls) - 1, "function": {"arguments": piece}}]}]


def _function(place: int, tool: dict[str, Any]) -> dict[str, Any]:
    """A tool's name, description and schema. Raises ApiError for what is none."""
    where = f"tools[{place}]"
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict) or set(tool) - {"type", "function"}:
        raise _bad(where, f"{where} is {_short(tool)}; expected {{'type': 'function', 'function': {{…}}}}")
    if unknown := sorted(set(function) - {"name", "description", "parameters", "strict"}):
        raise _bad(f"{where}.function", f"{where}.function has the unknown member {unknown[0][:60]!r}; leave it out")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _bad(
            f"{where}.function.name",
            f"{where}.function.name is {_short(name)}; expected at most 64 letters, digits, _ and -",
        )
    if parameters is None:
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise _bad(f"{where}.function.parameters", f"{where}.function.parameters is no schema of an object")
    if not isinstance(function.get("description", ""), str | None) or not isinstance(
        function.get("strict"), bool | None
    ):
        raise _bad(
            f"{where}.function", f"{where}.function has a description that is no text, or a strict that is no bool"
        )
    description = function.get("description")
    found = {"name": name, **({"description": description} if description else {})}
    return found | {"parameters": {"type": "object"} | parameters}


def _moved(schema: Any, root: str) -> Any:
    """A schema with its references to itself where it now stands."""
    if isinstance(schema, dict):
        return {
            key: root + value[1:]
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, root)
            for key, value in schema.items()
            if key != "$schema"
        }
    return [_moved(each, root) for each in schema] if isinstance(schema, list) else schema


def _called(place: int, message: ChatMessage, calls: dict[str, str]) -> ChatMessage:
    """The assistant's message that holds calls, in the words in which it wrote them."""
    where = f"messages[{place}].tool_calls"
    if message.role != "assistant":
        raise _bad(where, f"messages[{place}] has tool_calls, but its role is {message.role[:60]!r}")
    written = []
    for call in message.tool_calls or ():
        function = call.get("function")
        if call.get("type") != "function" or not isinstance(function, dict):
            raise _bad(where, f"{where} holds {_short(call)}; expected a call of a function")
        name, arguments = function.get("name"), function.get("arguments")
        try:
            value = json.loads(arguments) if isinstance(arguments, str) else None
        except (ValueError, RecursionError):
            value = None
        if not isinstance(name, str) or not isinstance(value, dict):
            raise _bad(where, f"{where} has a function without a name, or whose arguments are no JSON object as a text")
        if isinstance(call.get("id"), str):
            calls[call["id"]] = name
        written.append({"name": name, "arguments": value})
    text = json.dumps(written[0] if len(written) == 1 else written, ensure_ascii=False)
    if isinstance(message.content, str) and message.content:
        text = f"{message.content}\n{text}"
    return ChatMessage(role="assistant", content=text)


def _result(place: int, message: ChatMessage, calls: dict[str, str]) -> str:
    where = f"messages[{place}]"
    if message.tool_call_id not in calls:
        raise _bad(
            f"{where}.tool_call_id",
            f"{where} has the tool_call_id {_short(message.tool_call_id)}, which no call before it has",
        )
    content = message.content
    if isinstance(content, list):
        if any(part.type != "text" or part.text is None for part in content):
            raise _bad(f"{where}.content", f"{where} has a content part that is no text; this model reads text alone")
        content = "".join(part.text or "" for part in content)
    if content is None:
        raise _bad(f"{where}.content", f"{where} has no content; expected the tool's result as a text")
    return _RESULT.format(calls[str(message.tool_call_id)], content)


def _bad(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "…"
