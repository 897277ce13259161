"""/v1/embeddings: the mean of a text's hidden states behind the final norm."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from torch import Tensor

from gemcut.engine.results import Completion
from gemcut.errors import ParameterError
from gemcut.gemma import Gemma
from gemcut.server.answers import Waiting, check_length, checked
from gemcut.server.asgi import Request, Send, respond_json
from gemcut.server.errors import ApiError
from gemcut.server.fields import MAX_PROMPTS, Label, Name
from gemcut.server.state import ServerState


class EmbeddingRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of /v1/embeddings.

    Attributes:
        input: a text, a list of texts, a list of token ids, or a list of such lists.
        encoding_format: "float" gives lists of numbers, "base64" the bytes of little-endian fp32.
        dimensions: the model's own number of them, if anything.
        user: informational.
    """

    input: str | Annotated[list[Any], Meta(min_length=1, max_length=100_000)]
    model: Name | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    user: Label | None = None


async def embeddings(state: ServerState, request: Request, send: Send) -> None:
    """Vectors of texts, which are not normalised. One prefill for each, all of them together."""
    body = await state.read(request, EmbeddingRequest)
    gemma = state.model(body.model)
    width = gemma.config.hidden_size
    if body.dimensions not in (None, width):
        raise ApiError(
            400,
            f"dimensions is {body.dimensions}; this model's vectors have {width} and cannot be shortened: leave it out",
            param="dimensions",
            code="invalid_value",
        )
    texts = inputs(gemma, body.input)
    size = sum(map(len, texts))
    try:
        streams = await state.encode(size, lambda: gemma.embed_streams(texts, cache_salt=request.cache_salt))
    except ParameterError as error:
        raise ApiError(400, f"input: {error}", param="input", code="invalid_value") from None
    with Waiting(state, request, streams, each=False) as waiting:
        while not waiting.box.finished:
            await waiting.news()
        results = []
        for sequence in waiting.box.sequences:
            checked(sequence.events[-1], sequence)
            results.append(Completion.of(sequence))
    encode = _base64 if body.encoding_format == "base64" else _floats
    tokens = sum(result.prompt_tokens for result in results)
    data = [
        {"object": "embedding", "index": index, "embedding": encode(result.embedding)}
        for index, result in enumerate(results)
        if result.embedding is not None
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    await respond_json(send, {"object": "list", "data": data, "model": state.name, "usage": usage})


def inputs(gemma: Gemma, given: str | list[Any]) -> list[Any]:
    """The texts, or lists of token ids, of a request. Raises ApiError where it is neither."""
    one = isinstance(given, str) or all(type(each) is int for each in given)
    texts: list[Any] = [given] if one else list(given)
    if len(texts) > MAX_PROMPTS:
        raise ApiError(
            400,
            f"input has {len(texts)} texts; {MAX_PROMPTS} is the most of one request",
            param="input",
            code="invalid_value",
        )
    for place, text in enumerate(texts):
        name = "input" if one else f"input[{place}]"
        if isinstance(text, str):
            check_length(gemma, len(text), name)
        elif not isinstance(text, list) or not all(type(token) is int for token in text):
            raise ApiError(400, f"{name} is neither a text nor a list of token ids", param=name, code="invalid_value")
        if not text:
            raise ApiError(400, f"{name} is empty; expected at least one token", param=name, code="invalid_value")
    return texts


def _floats(vector: Tensor) -> list[float]:
    numbers: list[float] = vector.tolist()
    return numbers


def _base64(vector: Tensor) -> str:
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()


#: This module's part of the routes.
ROUTES = {("POST", "/v1/embeddings"): embeddings}
