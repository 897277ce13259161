"""/v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence as Many
from typing import Any

import msgspec

from gemcut.engine.request import TokenEvent, TokenLogprob
from gemcut.engine.results import TextStream
from gemcut.errors import ParameterError
from gemcut.gemma import Gemma
from gemcut.server.answers import Waiting, check_length, checked, copies, sampling_fields, usage
from gemcut.server.app import Routes
from gemcut.server.asgi import DONE, ClientLeftError, EventStream, Request, Send, event, respond_json
from gemcut.server.errors import ApiError, api_error
from gemcut.server.fields import ChatMessage, ChatRequest
from gemcut.server.guards import CheckedText, check_input
from gemcut.server.state import ServerState
from gemcut.server.structured import structured_sampling
from gemcut.text import ChatOptions, Tokenizer

_json = msgspec.json.Encoder().encode


async def chat_completions(state: ServerState, request: Request, send: Send) -> None:
    """Answer a dialogue, whole or as a stream."""
    body = await state.read(request, ChatRequest)
    gemma = state.model(body.model)
    messages = [as_message(place, message) for place, message in enumerate(body.messages)]
    characters = sum(len(message["content"] or "") for message in messages)
    check_length(gemma, characters, "messages")
    options = ChatOptions(
        add_generation_prompt=not body.continue_final_message,
        continue_final_message=bool(body.continue_final_message),
    )
    if body.continue_final_message and messages[-1]["role"] not in ("assistant", "model"):
        raise ParameterError("continue_final_message is true, but the last message is not the assistant's")
    ids = await state.encode(characters, lambda: gemma.chat_ids(messages, options))
    if state.guards:
        await check_input(state.guards, "\n\n".join(message["content"] for message in messages))
    params = gemma.resolve_sampling(len(ids), chat_sampling(body), chat=True).params
    streams = [gemma.prepare_stream(ids, own) for own in copies(params, body.n or 1)]
    answer = _Answer(state, request, gemma, body, streams)
    if body.stream:
        await answer.stream(send)
    else:
        await answer.whole(send)


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
    return fields | structured_sampling(body)


def logprob_entry(tokenizer: Tokenizer, found: TokenLogprob) -> dict[str, Any]:
    """One token's log-probability as OpenAI's chat answers have it."""
    entry = _token(tokenizer, found.token_id, found.logprob)
    entry["top_logprobs"] = [_token(tokenizer, token_id, logprob) for token_id, logprob in found.top]
    return entry


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}


class _Answer:
    """The answers to one dialogue on their way to the client."""

    def __init__(
        self, state: ServerState, request: Request, gemma: Gemma, body: ChatRequest, streams: list[TextStream]
    ) -> None:
        self.state, self.request, self.gemma, self.body = state, request, gemma, body
        self.id, self.created = f"chatcmpl-{request.id}", int(time.time())
        self.waiting = Waiting(state, request, streams, each=bool(body.stream))
        self.texts = [CheckedText(state.guards) for _ in streams] if state.guards else None

    async def whole(self, send: Send) -> None:
        """One JSON answer."""
        async with self.waiting as waiting:
            while not waiting.box.finished:
                await waiting.news()
            sequences = waiting.box.sequences
            choices = [await self._choice(index) for index in range(len(sequences))]
            value = self._head("chat.completion") | {"choices": choices, "usage": usage(sequences)}
        await respond_json(send, value, headers=ignored_header(self.request))

    async def _choice(self, index: int) -> dict[str, Any]:
        sequence = self.waiting.box.sequences[index]
        end = checked(sequence.events[-1], sequence)
        text = "".join(each.text for each in sequence.events)
        reason: str | None = end.finish_reason
        if self.texts is not None:
            text = await self.texts[index].push(text, last=True)
            reason = "content_filter" if self.texts[index].refused else reason
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(sequence.events),
            "finish_reason": reason,
            "stop_reason": end.stop_reason,
        }

    async def stream(self, send: Send) -> None:
        """Server-sent events. An error behind the first one is an event, too."""
        out = EventStream(send)
        send.headers += ignored_header(self.request)
        try:
            async with self.waiting as waiting:
                box = waiting.box
                render = _Chunks(self) if self.texts is None else _CheckedChunks(self, self.texts)
                while not render.ended:
                    await waiting.news()
                    pieces = [piece for index in range(len(box.sequences)) if (piece := await render.take(index))]
                    if pieces:
                        await out.write(b"".join(pieces))
                    elif waiting.silent:
                        await out.write(waiting.ping())
                last = b""
                if self.body.stream_options is not None and self.body.stream_options.include_usage:
                    value = self._head("chat.completion.chunk") | {"choices": [], "usage": usage(box.sequences)}
                    last = event(value)
            await out.end(last + DONE)
        except ClientLeftError:
            raise
        except Exception as error:
            if not out.started:
                raise
            failure = api_error(error, request_id=self.request.id)
            self.request.notes["failure"] = failure
            await out.end(event(failure.body) + DONE)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.state.name,
            "system_fingerprint": self.state.fingerprint,
        }

    def _logprobs(self, events: Many[TokenEvent]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        tokenizer = self.gemma.tokenizer
        content = [logprob_entry(tokenizer, each.logprob) for each in events if each.logprob is not None]
        return {"content": content, "refusal": None}


class _Chunks:
    """Chunks of one stream, as bytes: what does not change from chunk to chunk is made once."""

    def __init__(self, answer: _Answer) -> None:
        self.answer, self.box = answer, answer.waiting.box
        body = answer.body
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        head = _json(answer._head("chat.completion.chunk"))[:-1]
        count = len(self.box.sequences)
        self._starts = [b"data: " + head + b',"choices":[{"index":%d,"delta":' % index for index in range(count)]
        self._end = b'}],"usage":null}\n\n' if with_usage else b"}]}\n\n"
        self._text_starts = [start + b'{"content":' for start in self._starts]
        self._text_end = b'},"logprobs":null,"finish_reason":null' + self._end
        self._opened = [False] * count
        self._left = count
        self._logprobs = bool(body.logprobs)

    @property
    def ended(self) -> bool:
        """Whether all answers have had their last chunk."""
        return not self._left

    async def take(self, index: int) -> bytes:
        """What is new of an answer, b"" if nothing is."""
        events = self.box.take(index)
        if not events:
            return b""
        last = events[-1]
        text = last.text if len(events) == 1 else "".join([each.text for each in events])
        if last.finish_reason is not None:
            checked(last, self.box.sequences[index])
        return self.chunks(index, events, text, last.finish_reason, last.stop_reason)

    def chunks(
        self, index: int, events: Many[TokenEvent], text: str, reason: str | None, stop: int | str | None
    ) -> bytes:
        """The chunks of new text, and the last one where there is a finish reason."""
        found = b""
        if not self._opened[index]:
            self._opened[index] = True
            found = self._starts[index] + b'{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
            found += self._end
        if self._logprobs and events:
            delta = self._starts[index] + _json({"content": text}) + b',"logprobs":'
            found += delta + _json(self.answer._logprobs(events)) + b',"finish_reason":null' + self._end
        elif text:
            found += self._text_starts[index] + _json(text) + self._text_end
        if reason is not None:
            self._left -= 1
            found += self._starts[index] + b'{},"logprobs":null,"finish_reason":' + _json(reason)
            found += b',"stop_reason":' + _json(stop) + self._end
        return found


class _CheckedChunks(_Chunks):
    """The same where guards look at the text first: it comes in whole sentences, and without log-probabilities of
    what was not let out."""

    def __init__(self, answer: _Answer, texts: list[CheckedText]) -> None:
        super().__init__(answer)
        self._texts = texts
        self._done = [False] * len(texts)

    async def take(self, index: int) -> bytes:
        events = self.box.take(index)
        if not events or self._done[index]:
            return b""
        last = events[-1]
        if last.finish_reason is not None and self._texts[index].refused is None:
            checked(last, self.box.sequences[index])
        text = "".join(each.text for each in events)
        text = await self._texts[index].push(text, last=last.finish_reason is not None)
        reason: str | None = last.finish_reason
        if self._texts[index].refused is not None:
            self.box.streams[index].cancel()
            reason = "content_filter"
        self._done[index] = reason is not None
        return self.chunks(index, events if text else (), text, reason, last.stop_reason)


def ignored_header(request: Request) -> list[tuple[bytes, bytes]]:
    """The header that names the fields which were left out."""
    names = request.notes.get("ignored")
    if not names:
        return []
    plain = ",".join(names).encode("ascii", "replace")[:1024]
    return [(b"x-gemcut-ignored", bytes(byte if 32 <= byte < 127 else 63 for byte in plain))]
