"""/openapi.json: the API's description, made of the routes and of the classes that bodies are read with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

import gemcut
from gemcut.server import shapes
from gemcut.server.asgi import Request, Send, respond_bytes
from gemcut.server.audit import ReportRequest
from gemcut.server.auth import is_open
from gemcut.server.embeddings import EmbeddingRequest
from gemcut.server.fields import ChatRequest, CompletionRequest
from gemcut.server.moderations import ModerationRequest
from gemcut.server.state import ServerState
from gemcut.server.tokens import DetokenizeRequest, TokenizeRequest

_COMPONENT = "#/components/schemas/{name}"


@dataclass(frozen=True)
class Shape:
    """What a route reads and answers, with an example. ``text`` is the content type of an answer that is no JSON."""

    body: type[msgspec.Struct] | None = None
    answer: type[msgspec.Struct] | None = None
    streams: bool = False
    text: str = ""
    example: Mapping[str, Any] | None = None


#: Of the routes with a body or an answer of a known shape. A test looks whether bodies are read with these classes.
SHAPES: Mapping[str, Shape] = {
    "/v1/chat/completions": Shape(
        ChatRequest,
        shapes.ChatAnswer,
        streams=True,
        example={"messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 4},
    ),
    "/v1/completions": Shape(
        CompletionRequest,
        shapes.CompletionAnswer,
        streams=True,
        example={"prompt": "The sky is", "max_tokens": 4, "logprobs": 1},
    ),
    "/v1/embeddings": Shape(EmbeddingRequest, shapes.EmbeddingAnswer, example={"input": ["The sky is blue."]}),
    "/v1/moderations": Shape(ModerationRequest, shapes.ModerationAnswer, example={"input": "A fine day."}),
    "/v1/reports": Shape(
        ReportRequest, shapes.ReportAnswer, example={"request_id": "chatcmpl-1", "reason": "harassment"}
    ),
    "/v1/models": Shape(None, shapes.ModelsAnswer),
    "/v1/models/*": Shape(None, shapes.ModelAnswer),
    "/tokenize": Shape(TokenizeRequest, shapes.TokenizeAnswer, example={"prompt": "The sky is"}),
    "/detokenize": Shape(DetokenizeRequest, shapes.DetokenizeAnswer, example={"tokens": [2, 651]}),
    "/tokenizer_info": Shape(None, shapes.TokenizerInfo),
    "/version": Shape(None, shapes.Version),
    "/health": Shape(None, shapes.Readiness),
    "/ready": Shape(None, shapes.Readiness),
    "/metrics": Shape(text="text/plain"),
}
#: Errors of any route, and those of routes that read a body.
_ERRORS = {
    "401": "no API key, or an unknown one",
    "403": "a foreign page or a foreign host name",
    "404": "no such model or path",
    "405": "no such method there",
    "429": "a limit of the API key is reached",
    "500": "a failure of the server",
    "503": "loading, shutting down, or too much to do; Retry-After says when to try again",
}
_BODY_ERRORS = {
    "400": "something in the request is wrong; the error names the field",
    "408": "the body took too long to come",
    "413": "the body is too large",
    "415": "the content type is not application/json",
}


def description(routes: Mapping[tuple[str, str], Any]) -> dict[str, Any]:
    """The OpenAPI document of ``routes``, handlers by (method, path)."""
    known = [SHAPES.get(path, Shape()) for _, path in routes]
    kinds: list[Any] = [shapes.ErrorAnswer, *(kind for each in known for kind in (each.body, each.answer) if kind)]
    _, components = msgspec.json.schema_components(kinds, ref_template=_COMPONENT)
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), handler in sorted(routes.items(), key=lambda route: (route[0][1], route[0][0])):
        shown = path.replace("/*", "/{name}")
        paths.setdefault(shown, {})[method.lower()] = _operation(path, handler)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "gemcut",
            "version": gemcut.__version__,
            "description": "OpenAI's API for Gemma models. Unknown fields are refused.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "where the server has --api-key-file"}
            },
        },
    }


def _operation(path: str, handler: Any) -> dict[str, Any]:
    shape = SHAPES.get(path, Shape())
    responses: dict[str, Any] = {"200": {"description": "the answer", "content": _answer(path, shape)}}
    errors = _ERRORS | (_BODY_ERRORS if shape.body is not None else {"400": "the request is wrong"})
    error = {"application/json": {"schema": _ref(shapes.ErrorAnswer)}}
    for status, text in sorted(errors.items()):
        responses[status] = {"description": text, "content": error}
    if path in ("/health", "/ready"):
        responses["503"] = {"description": "not ready", "content": _answer(path, shape)}
    words = (handler.__doc__ or "").strip().split("\n\n")
    operation: dict[str, Any] = {
        "summary": " ".join(words[0].split()).rstrip("."),
        "operationId": handler.__name__.strip("_") + path.replace("/", "_").replace("*", "name"),
        "responses": responses,
        # Where there are keys they are asked for, where there are none nobody asks.
        "security": [{}] if is_open(path.removesuffix("*")) else [{"key": []}, {}],
    }
    if path.endswith("/*"):
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    if shape.body is not None:
        content = {"schema": _ref(shape.body), "example": shape.example}
        operation["requestBody"] = {"required": True, "content": {"application/json": content}}
    return operation


def _answer(path: str, shape: Shape) -> dict[str, Any]:
    if shape.answer is None:
        return {shape.text or ("application/json" if path.endswith(".json") else "*/*"): {}}
    found: dict[str, Any] = {"application/json": {"schema": _ref(shape.answer)}}
    if shape.streams:
        found["text/event-stream"] = {}  # OpenAPI 3.1 has no words for events; docs/server.md describes them
    return found


def _ref(kind: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": _COMPONENT.format(name=kind.__name__)}


async def openapi(state: ServerState, request: Request, send: Send) -> None:
    """This description."""
    from gemcut.server.app import all_routes

    await respond_bytes(send, msgspec.json.encode(description(all_routes())), b"application/json")


#: This module's part of the routes.
ROUTES = {("GET", "/openapi.json"): openapi}
