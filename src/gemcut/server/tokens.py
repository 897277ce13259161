"""/tokenize, /detokenize and /tokenizer_info, in the shapes that other servers and lm-evaluation-harness have."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from gemcut.gemma import Gemma
from gemcut.server.answers import check_length
from gemcut.server.asgi import Request, Send, respond_json
from gemcut.server.chat import as_message
from gemcut.server.errors import ApiError
from gemcut.server.fields import MAX_MESSAGES, ChatMessage, Name
from gemcut.server.state import ServerState
from gemcut.text import ChatOptions

#: Most ids of one request: several times the longest context.
MAX_IDS = 100_000


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of /tokenize: a text, or a dialogue.

    Attributes:
        prompt: the text.
        messages: the dialogue.
        add_special_tokens: put ``<bos>`` before a text; a dialogue always has it.
        add_generation_prompt, continue_final_message: how a dialogue ends.
        return_token_strs: also give each token's text.
    """

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of /detokenize."""

    model: Name | None = None
    tokens: Annotated[list[Annotated[int, Meta(ge=0, le=2**31 - 1)]], Meta(max_length=MAX_IDS)]


async def tokenize(state: ServerState, request: Request, send: Send) -> None:
    """The token ids of a text or a dialogue, and how many there are."""
    body = await state.read(request, TokenizeRequest)
    gemma = state.model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "expected either prompt or messages", param="prompt", code="invalid_value")
    ids = await (_text_ids if body.prompt is not None else _dialogue_ids)(state, gemma, body)
    names = [gemma.tokenizer.id_to_token(token) for token in ids] if body.return_token_strs else None
    answer = {"count": len(ids), "max_model_len": gemma.engine.max_context, "tokens": ids, "token_strs": names}
    await respond_json(send, answer)


async def _text_ids(state: ServerState, gemma: Gemma, body: TokenizeRequest) -> list[int]:
    text = body.prompt or ""
    for name in ("add_generation_prompt", "continue_final_message"):
        if getattr(body, name) is not None:
            raise ApiError(400, f"{name} is for messages; leave it out beside prompt", param=name, code="invalid_value")
    check_length(gemma, len(text), "prompt")
    with_bos = body.add_special_tokens is not False
    return await state.encode(len(text), lambda: gemma.tokenizer.encode(text, add_bos=with_bos))


async def _dialogue_ids(state: ServerState, gemma: Gemma, body: TokenizeRequest) -> list[int]:
    if body.add_special_tokens is False:
        raise ApiError(
            400,
            "add_special_tokens is false, but a dialogue always has its special tokens; leave it out",
            param="add_special_tokens",
            code="invalid_value",
        )
    messages = [as_message(place, message) for place, message in enumerate(body.messages or [])]
    characters = sum(len(message["content"] or "") for message in messages)
    check_length(gemma, characters, "messages")
    goes_on = bool(body.continue_final_message)
    options = ChatOptions(
        add_generation_prompt=not goes_on if body.add_generation_prompt is None else body.add_generation_prompt,
        continue_final_message=goes_on,
    )
    return await state.encode(characters, lambda: gemma.chat_ids(messages, options))


async def detokenize(state: ServerState, request: Request, send: Send) -> None:
    """The text of token ids, with special tokens as they are called."""
    body = await state.read(request, DetokenizeRequest)
    gemma = state.model(body.model)
    size = gemma.tokenizer.vocab_size
    for place, token in enumerate(body.tokens):
        if token >= size:
            raise ApiError(
                400,
                f"tokens[{place}] is {token}; this model's ids go from 0 to {size - 1}",
                param=f"tokens[{place}]",
                code="invalid_value",
            )
    text = await state.encode(len(body.tokens), lambda: gemma.tokenizer.decode(body.tokens, skip_special_tokens=False))
    await respond_json(send, {"prompt": text})


async def tokenizer_info(state: ServerState, request: Request, send: Send) -> None:
    """Names of the special tokens, and the chat template of the checkpoint."""
    tokenizer = state.model().tokenizer
    names: dict[str, Any] = {
        f"{role}_token": tokenizer.id_to_token(getattr(tokenizer, f"{role}_id"))
        for role in ("bos", "eos", "pad", "unk")
    }
    await respond_json(
        send,
        {
            "tokenizer_class": "gemcut",
            "vocab_size": tokenizer.vocab_size,
            **names,
            "chat_template": tokenizer.chat_template,
        },
    )


#: This module's part of the routes.
ROUTES = {
    ("POST", "/tokenize"): tokenize,
    ("POST", "/detokenize"): detokenize,
    ("GET", "/tokenizer_info"): tokenizer_info,
}
