"""/v1/models: what this server has, and what can be asked of it."""

from __future__ import annotations

import importlib.util
from typing import Any
from urllib.parse import unquote

from gemcut.gemma import Gemma
from gemcut.names import tuned
from gemcut.server.asgi import Request, Send, respond_json
from gemcut.server.state import ServerState


async def models(state: ServerState, request: Request, send: Send) -> None:
    """The models that this server answers for: one, by all its names."""
    gemma = state.model()
    await respond_json(send, {"object": "list", "data": [entry(state, gemma, name) for name in state.settings.names]})


async def model(state: ServerState, request: Request, send: Send) -> None:
    """One model by its name."""
    name = unquote(request.path.removeprefix("/v1/models/"))
    gemma = state.model(name)
    await respond_json(send, entry(state, gemma, name))


def entry(state: ServerState, gemma: Gemma, name: str) -> dict[str, Any]:
    """What OpenAI's API says of a model, and more.

    ``root`` is where its weights came from; ``sampling_defaults`` hold where a request says nothing.
    ``instruction_tuned`` is false for a base model, and null where nothing says what it is.
    """
    settings = gemma.resolve_sampling(1, {}, chat=True)
    defaults = {name: getattr(settings.params, name) for name in _DEFAULTS}
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "google",
        "root": name if gemma.source is None else str(gemma.source.name),
        "parent": None,
        "max_model_len": gemma.engine.max_context,
        "sampling_defaults": defaults,
        "capabilities": capabilities(state),
        "instruction_tuned": None if gemma.source is None else tuned(gemma.source, gemma.tokenizer),
    }


_DEFAULTS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def capabilities(state: ServerState) -> list[str]:
    """What this server can do, in words that programs look for."""
    found = ["chat", "completions", "embeddings", "logprobs", "streaming"]
    if importlib.util.find_spec("llguidance") is not None:
        found += ["json_schema", "tools"]
    if state.judges is not None:
        found.append("moderations")
    if state.audit is not None:
        found.append("reports")
    return found


#: This module's part of the routes.
ROUTES = {("GET", "/v1/models"): models, ("GET", "/v1/models/*"): model}
