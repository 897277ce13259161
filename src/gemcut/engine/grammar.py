"""Grammar: what an answer must look like, as a JSON schema, a regular expression or a Lark grammar. Free of torch.

A Grammar is cheap to make: its size and nesting are checked here, what it says is checked when it is compiled
(``gemcut.engine.constrain``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from gemcut.errors import ParameterError

Kind = Literal["json_object", "json_schema", "json_or_text", "regex", "lark"]

#: Bytes of a grammar's source, and how deeply a schema's objects and arrays may be nested.
MAX_BYTES = 64 * 1024
MAX_DEPTH = 32

_EXPECTED = "expected a gemcut.Grammar, or a JSON schema as a dict"


@dataclass(frozen=True)
class Grammar:
    """What an answer must match as a whole. Make one with `json_schema`, `json_object`, `regex` or `lark`.

    Attributes:
        kind: "json_object" (any JSON object), "json_schema", "json_or_text" (JSON of a schema, or words that do not
            begin as an object or array does), "regex" or "lark".
        source: the schema as JSON, the expression, or the grammar's text; "" for json_object.
    """

    kind: Kind
    source: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ParameterError(f"grammar kind is {self.kind!r}; expected one of {', '.join(get_args(Kind))}")
        if not isinstance(self.source, str):
            raise ParameterError(f"grammar source is of type {type(self.source).__name__}; expected a text")
        try:
            size = len(self.source.encode())
        except UnicodeEncodeError:
            raise ParameterError("the grammar holds half of a surrogate pair; give it as valid Unicode") from None
        if size > MAX_BYTES:
            raise ParameterError(f"the grammar has {size:,} bytes; at most {MAX_BYTES:,} are allowed")
        if self.kind in ("json_schema", "json_or_text"):
            _check_schema(self.source)
        elif self.kind != "json_object" and not self.source:
            raise ParameterError(f"the {self.kind} grammar is empty; expected its text")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Grammar:
        """JSON that a schema describes. Members of an object come in the order in which the schema lists them.

        Args:
            schema: a dict, or JSON text.

        Raises:
            ParameterError: it is no JSON object, larger than 64 KB, or nested deeper than 32.
        """
        if isinstance(schema, str):
            return cls("json_schema", schema)
        if not isinstance(schema, Mapping):
            raise ParameterError(f"the schema is of type {type(schema).__name__}; expected a dict or JSON text")
        try:
            return cls("json_schema", json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
        except (TypeError, ValueError, RecursionError) as error:
            if isinstance(error, ParameterError):
                raise
            raise ParameterError(f"the schema is no JSON: {' '.join(str(error).split())}") from None

    @classmethod
    def json_or_text(cls, schema: Mapping[str, Any]) -> Grammar:
        """JSON that a schema describes, or any text whose first character is neither ``{`` nor ``[``.

        Raises ParameterError as `json_schema`.
        """
        return cls("json_or_text", cls.json_schema(schema).source)

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls("json_object")

    @classmethod
    def regex(cls, expression: str) -> Grammar:
        """Text that a regular expression (the syntax of Rust's regex crate) matches from its first character to its
        last. Raises ParameterError where it is empty or too long."""
        return cls("regex", expression)

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """Text that a context-free grammar in llguidance's variant of Lark's notation derives from ``start``."""
        return cls("lark", text)

    @classmethod
    def of(cls, value: object) -> Grammar:
        """A Grammar from what a caller gave: one, a JSON schema, or a pydantic model's class.

        Raises:
            ParameterError: anything else.
        """
        if isinstance(value, Grammar):
            return value
        if isinstance(value, Mapping):
            return cls.json_schema(cast("Mapping[str, Any]", value))
        if isinstance(value, type) and callable(make := getattr(value, "model_json_schema", None)):
            return cls.json_schema(make())
        raise ParameterError(f"grammar is of type {type(value).__name__}; {_EXPECTED}")

    def __str__(self) -> str:
        return self.kind if not self.source else f"{self.kind} of {len(self.source):,} characters"


def _check_schema(source: str) -> None:
    try:
        schema = json.loads(source, parse_constant=_no_constant, parse_int=_whole)
    except RecursionError:
        raise ParameterError(f"the schema is nested deeper than {MAX_DEPTH}") from None
    except ValueError as error:
        raise ParameterError(f"the schema is no JSON: {' '.join(str(error).split())}") from None
    if not isinstance(schema, dict):
        raise ParameterError(f"the schema is a JSON {type(schema).__name__}; expected an object such as {{}}")
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise ParameterError(f"the schema is nested deeper than {MAX_DEPTH}; flatten it, or use $defs and $ref")


def _whole(text: str) -> int:
    """llguidance reads numbers as 64-bit floats, which would make others of these without a word."""
    if len(text) > 17 or abs(int(text)) > 2**53:
        raise ValueError(f"the whole number {text[:20]} is beyond 2**53; write it as a float, or as a text")
    return int(text)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
