"""/v1/chat/completions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Many
from typing import Any

import msgspec

from gemcut.engine.request import Sequence, TokenEvent, TokenLogprob
from gemcut.errors import ParameterError
from gemcut.server.answers import check_length, copies, resolve, sampling_fields
from gemcut.server.app import Routes
from gemcut.server.asgi import Request, Send
from gemcut.server.errors import ApiError
from gemcut.server.fields import ChatMessage, ChatRequest
from gemcut.server.guards import check_input, guards_of
from gemcut.server.state import ServerState
from gemcut.server.streaming import Answer
from gemcut.server.structured import structured_of
from gemcut.server.tools import CallReader, as_turns
from gemcut.text import ChatOptions, Tokenizer
from gemcut.text.invisible import strip_invisible, words

_json = msgspec.json.Encoder().encode


async def chat_completions(state: ServerState, request: Request, send: Send) -> None:
    """Answer a dialogue, whole or as a stream."""
    body = await state.read(request, ChatRequest)
    gemma = state.model(body.model)
    seen, removed = without_invisible(body.messages)
    structured = await structured_of(gemma, body)
    turns = as_turns(seen, structured.tools)
    messages = [as_message(place, message) for place, message in enumerate(turns)]
    characters = sum(len(message["content"] or "") for message in messages)
    check_length(gemma, characters, "messages")
    options = ChatOptions(
        add_generation_prompt=not body.continue_final_message,
        continue_final_message=bool(body.continue_final_message),
    )
    if body.continue_final_message and messages[-1]["role"] not in ("assistant", "model"):
        raise ParameterError("continue_final_message is true, but the last message is not the assistant's")
    private = None
    if state.pii is not None:
        private = state.pii.of(request, [message["content"] or "" for message in messages])
        private.check_fields(body.logprobs)
        for message in messages:
            message["content"] = message["content"] and private.hide(message["content"])
    ids = await state.encode(characters, lambda: gemma.chat_ids(messages, options))
    asked = None if body.moderation is None else body.moderation.mode
    guards, judge = guards_of(state.guards, state.judges, request.id, state.log, asked)
    request.notes |= {"judge": judge, "user": body.safety_identifier or body.user}
    if private is not None and private.mode != "redact":
        guards = [private, *guards]
    if guards:
        await check_input(guards, "\n\n".join(message["content"] or "" for message in messages))
    params = resolve(state, gemma, len(ids), chat_sampling(body) | structured.sampling, chat=True)
    streams = [
        gemma.prepare_stream(ids, own, cache_salt=request.cache_salt, watch=False)
        for own in copies(params, body.n or 1)
    ]
    answer = ChatAnswer(state, request, gemma, body, streams, guards=guards, judge=judge)
    if structured.tools is not None:
        answer.readers = [CallReader(f"call_{request.id}_{index}") for index in range(len(streams))]
    if removed:
        answer.headers += removed_header(removed)
        answer.extra["warnings"] = [f"{words(removed)} were taken out of the messages, since nobody sees them"]
    await answer.send(send)


ROUTES: Routes = {("POST", "/v1/chat/completions"): chat_completions}


def as_message(place: int, message: ChatMessage) -> dict[str, Any]:
    """A message as text/prompt reads it. Raises ApiError for what is no text."""
    role = "system" if message.role == "developer" else message.role
    content = message.content
    if content and isinstance(content, list):
        for part in content:
            if part.type != "text" or part.text is None:
                raise ApiError(
                    400,
                    f"messages[{place}] has a content part of type {part.type!r}; this model reads text alone",
                    param=f"messages[{place}].content",
                    code="unsupported_content",
                )
        content = "".join(part.text or "" for part in content)
    found: dict[str, Any] = {"role": role, "content": content}
    for name in ("tool_calls", "function_call", "audio", "annotations", "refusal", "tool_call_id"):
        if value := getattr(message, name):
            found[name] = value
            if name in ("refusal", "annotations", "tool_call_id"):
                raise ApiError(
                    400,
                    f"messages[{place}] has {name!r}, which this model's chat format cannot express",
                    param=f"messages[{place}].{name}",
                )
    if content in (None, []) and not message.tool_calls:
        raise ApiError(400, f"messages[{place}] has no content; expected a text", param=f"messages[{place}].content")
    return found


def without_invisible(messages: Many[ChatMessage]) -> tuple[list[ChatMessage], dict[str, int]]:
    """(messages without characters that nobody sees, how many of each kind those of people and tools had)."""
    seen: list[ChatMessage] = []
    removed: Counter[str] = Counter()

    def cleaned(text: str) -> str:
        text, found = strip_invisible(text)
        removed.update(found)
        return text

    for message in messages:
        content: Any = message.content
        if message.role != "assistant" and isinstance(content, str):
            content = cleaned(content)
        elif message.role != "assistant" and content:
            content = [
                msgspec.structs.replace(part, text=cleaned(part.text)) if part.text else part for part in content
            ]
        seen.append(message if content is message.content else msgspec.structs.replace(message, content=content))
    return seen, dict(removed)


def removed_header(removed: Mapping[str, int]) -> list[tuple[bytes, bytes]]:
    """The header that says which invisible characters were taken out: ``tag-characters=12``."""
    each = (f"{kind.replace(' ', '-')}={count}" for kind, count in removed.items())
    return [(b"x-gemcut-removed", ", ".join(each).encode())]


def chat_sampling(body: ChatRequest) -> dict[str, Any]:
    """The fields of SamplingParams that a body names. Raises ParameterError for fields that contradict each other."""
    fields = sampling_fields(body)
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise ParameterError(
            f"max_tokens is {body.max_tokens} and max_completion_tokens is {body.max_completion_tokens}; give one"
        )
    limit = body.max_tokens if body.max_tokens is not None else body.max_completion_tokens
    if limit is not None:
        fields["max_new_tokens"] = limit
    if body.top_logprobs is not None and not body.logprobs:
        raise ParameterError("top_logprobs is given without logprobs; set logprobs to true")
    if body.logprobs:
        fields["logprobs"] = body.top_logprobs or 0
    return fields


def logprob_entry(tokenizer: Tokenizer, found: TokenLogprob) -> dict[str, Any]:
    """One token's log-probability as OpenAI's chat answers have it."""
    entry = _token(tokenizer, found.token_id, found.logprob)
    entry["top_logprobs"] = [_token(tokenizer, token_id, logprob) for token_id, logprob in found.top]
    return entry


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}


class ChatAnswer(Answer[ChatRequest]):
    """The answers to one dialogue on their way to the client."""

    PREFIX, KIND, CHUNK = "chatcmpl-", "chat.completion", "chat.completion.chunk"
    TEXT = (b'"delta":{"content":', b"}")
    LAST = b'"delta":{}'

    #: Where there are tools: reads each answer's calls.
    readers: Many[CallReader] = ()

    def opening(self, index: int) -> bytes:
        """The first chunk says who speaks."""
        empty = b"null" if self.readers else b'""'
        return b'"delta":{"role":"assistant","content":' + empty + b'},"logprobs":null'

    def parts(self, index: int, text: str, *, last: bool) -> Many[bytes] | None:
        if not self.readers:
            return None
        return [b'"delta":' + _json(delta) for delta in self.readers[index].feed(text, last=last)]

    def ending(self, index: int, reason: str | None) -> str | None:
        return "tool_calls" if reason == "stop" and self.readers and self.readers[index].calls else reason

    def choice(self, index: int, text: str, sequence: Sequence) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self.readers:
            self.readers[index].feed(text, last=True)
            if calls := self.readers[index].calls:
                message |= {"content": None, "tool_calls": calls}
        return {"index": index, "message": message, "logprobs": self.logprobs(index, sequence.events)}

    def refused_choice(self, index: int, refusal: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": "", "refusal": refusal or None}
        found = {"index": index, "message": message, "logprobs": None}
        return found | {"finish_reason": "content_filter", "stop_reason": None}

    def refused_part(self, refusal: str) -> bytes:
        return b'"delta":{"refusal":' + _json(refusal) + b"}" if refusal else b""

    def logprobs(self, index: int, events: Many[TokenEvent]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        tokenizer = self.gemma.tokenizer
        content = [logprob_entry(tokenizer, each.logprob) for each in events if each.logprob is not None]
        return {"content": content, "refusal": None}
