"""Forty JSON schemas, of the kinds that people write."""

from __future__ import annotations

from typing import Any


def record(required: list[str] | None = None, /, **properties: Any) -> dict[str, Any]:
    """An object of these members and no others; all are required unless told otherwise."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def several(items: Any, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **more}


TEXT: dict[str, Any] = {"type": "string"}
WHOLE: dict[str, Any] = {"type": "integer"}
NUMBER: dict[str, Any] = {"type": "number"}
TRUTH: dict[str, Any] = {"type": "boolean"}
NOTHING: dict[str, Any] = {"type": "null"}
ZIP = {"type": "string", "pattern": "^\\d{5}$"}
POINT = record(x=NUMBER, y=NUMBER)

SCHEMAS: dict[str, dict[str, Any]] = {
    "empty": {},
    "any object": {"type": "object"},
    "any array": {"type": "array"},
    "text": TEXT,
    "short text": {"type": "string", "maxLength": 12},
    "long text": {"type": "string", "minLength": 30, "maxLength": 60},
    "whole number": WHOLE,
    "bounded number": {"type": "integer", "minimum": 10, "maximum": 99},
    "number": NUMBER,
    "percentage": {"type": "number", "minimum": 0, "maximum": 100},
    "truth": TRUTH,
    "nothing": NOTHING,
    "choice": {"enum": ["red", "green", "blue", 'a "quoted" colour', "ünïcode"]},
    "mixed choice": {"enum": [1, "one", None, True, [1, 2], {"a": 1}]},
    "constant": {"const": {"version": 2, "kind": "fixed"}},
    "several types": {"type": ["string", "integer", "null"]},
    "alternatives": {"anyOf": [TEXT, WHOLE, record(a=TRUTH)]},
    "person": record(name=TEXT, age=WHOLE, email={"type": "string", "format": "email"}),
    "person, most of it optional": record(["name"], name=TEXT, age=WHOLE, nickname=TEXT, address=record(street=TEXT)),
    "nullable": record(name=TEXT, died={"anyOf": [TEXT, NOTHING]}),
    "numbers": several(NUMBER, maxItems=5),
    "two to four": several(WHOLE, minItems=2, maxItems=4),
    "endless list": several(TEXT),
    "matrix": several(several(NUMBER, minItems=2, maxItems=2), minItems=2, maxItems=2),
    "tuple": {"type": "array", "prefixItems": [TEXT, WHOLE, TRUTH], "items": False, "minItems": 3},
    "records": several(record(id=WHOLE, label=TEXT)),
    "deep": record(a=record(b=record(c=record(d=record(e=TEXT))))),
    "polygon": record(kind={"const": "polygon"}, points=several(POINT, minItems=3, maxItems=5)),
    "shape": {"anyOf": [record(kind={"const": "circle"}, r=NUMBER), record(kind={"const": "square"}, a=NUMBER)]},
    "phone": {"type": "string", "pattern": "^\\+[0-9]{2} [0-9]{3}-[0-9]{4}$"},
    "code": record(code={"type": "string", "pattern": "^[A-Z]{3}-\\d{2,4}(-[a-z]+)?$"}),
    "date": record(on={"type": "string", "format": "date"}, at={"type": "string", "format": "date-time"}),
    "id": record(id={"type": "string", "format": "uuid"}, host={"type": "string", "format": "ipv4"}),
    "map": {"type": "object", "additionalProperties": NUMBER},
    "map of records": {"type": "object", "additionalProperties": record(n=WHOLE, t=TEXT)},
    "tree": {
        "$defs": {"node": record(["value"], value=WHOLE, children=several({"$ref": "#/$defs/node"}))},
        "$ref": "#/$defs/node",
    },
    "list": {
        "$defs": {"cell": record(head=WHOLE, tail={"anyOf": [NOTHING, {"$ref": "#/$defs/cell"}]})},
        "$ref": "#/$defs/cell",
    },
    "expression": {
        "$defs": {
            "e": {
                "anyOf": [
                    record(add=several({"$ref": "#/$defs/e"}, minItems=2, maxItems=2)),
                    record(neg={"$ref": "#/$defs/e"}),
                    NUMBER,
                ]
            }
        },
        "$ref": "#/$defs/e",
    },
    "invoice": record(
        number={"type": "string", "pattern": "^INV-[0-9]{6}$"},
        customer=record(
            name=TEXT, address=record(street=TEXT, city=TEXT, zip={"type": "string", "pattern": "^\\d{5}$"})
        ),
        lines=several(
            record(text={"type": "string", "maxLength": 80}, count={"type": "integer", "minimum": 1}, price=NUMBER),
            minItems=1,
            maxItems=20,
        ),
        currency={"enum": ["EUR", "USD", "GBP"]},
        paid=TRUTH,
    ),
    "all of": {
        "allOf": [{"type": "object", "properties": {"a": TEXT}, "required": ["a"]}, {"properties": {"b": WHOLE}}]
    },
}
