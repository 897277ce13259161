"""/v1/moderations: what the guard's judges say of texts, in OpenAI's shape."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from gemcut.server.app import Routes
from gemcut.server.asgi import Request, Send, respond_json
from gemcut.server.errors import ApiError
from gemcut.server.fields import MAX_PROMPTS, Name
from gemcut.server.state import ServerState

#: Characters of one text: about those of the longest context there is.
_LONGEST = 400_000


class ModerationRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of /v1/moderations: a text or several, judged as prompts are."""

    input: str | Annotated[list[str], Meta(min_length=1, max_length=MAX_PROMPTS)]
    model: Name | None = None


async def moderations(state: ServerState, request: Request, send: Send) -> None:
    """Judge texts by the server's policies. Nothing is generated, and nothing kept."""
    body = await state.read(request, ModerationRequest)
    if state.judges is None:
        raise ApiError(400, "this server has no guard; start it with --guard FILE", code="no_guard")
    if body.model is not None and body.model not in ("guard", *state.settings.names):
        raise ApiError(404, f"there is no model {body.model[:100]!r} here; leave model out", param="model")
    texts = [body.input] if isinstance(body.input, str) else body.input
    for place, text in enumerate(texts):
        if len(text) > _LONGEST:
            raise ApiError(400, f"input[{place}] has {len(text):,} characters; {_LONGEST:,} is the most", param="input")
    known = state.judges.judges.policies("input")
    results = [(await state.judges.look("input", text, mode="score")).report(known) for text in texts]
    await respond_json(send, {"id": f"modr-{request.id}", "model": "guard", "results": results})


#: This module's part of the routes.
ROUTES: Routes = {("POST", "/v1/moderations"): moderations}
