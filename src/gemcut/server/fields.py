"""What requests say: their fields, with one table of bounds. What is out of bounds never reaches a tokenizer.

msgspec reads a body straight into these classes and stops at the first thing that is wrong; an unknown field is wrong.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from gemcut.server.errors import ApiError

# ---- the table of bounds -----------------------------------------------------------------------------------------

MAX_MESSAGES = 2048
MAX_PROMPTS = 256
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Count = Annotated[int, Meta(ge=1, le=16)]
MaxTokens = Annotated[int, Meta(ge=1, le=1_000_000_000)]
MaxTokensOrNone = Annotated[int, Meta(ge=0, le=1_000_000_000)]
MinTokens = Annotated[int, Meta(ge=0, le=1_000_000_000)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
TopP = Annotated[float, Meta(gt=0, le=1)]
TopK = Annotated[int, Meta(ge=-1, le=1_000_000)]
MinP = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, Meta(gt=0, le=10)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]
Stop = Annotated[str, Meta(min_length=1, max_length=256)]
Stops = Annotated[list[Stop], Meta(max_length=16)]
BIAS_KEY = "^[0-9]{1,10}$"
BiasKey = Annotated[str, Meta(pattern=BIAS_KEY)]
BiasValue = Annotated[float, Meta(ge=-100, le=100)]
Bias = Annotated[dict[BiasKey, BiasValue], Meta(max_length=1024)]
Label = Annotated[str, Meta(max_length=512)]
Labels = Annotated[dict[Annotated[str, Meta(max_length=64)], Label], Meta(max_length=16)]
Ids = list[int]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """``include_usage``: a last chunk with the tokens and times of the whole request."""

    include_usage: bool | None = None


class Moderation(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """How this request is guarded: "score" or "block". Never less than the server does anyway."""

    mode: Literal["off", "score", "block"]


class Sampling(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields that chat and completions share. None is the same as not given.

    ``user``, ``safety_identifier`` and ``metadata`` are informational: they change nothing.
    """

    model: Name | None = None
    n: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    seed: Seed | None = None
    stop: Stop | Stops | None = None
    min_tokens: MinTokens | None = None
    ignore_eos: bool | None = None
    logit_bias: Bias | None = None
    user: Label | None = None
    safety_identifier: Label | None = None
    metadata: Labels | None = None
    moderation: Moderation | None = None


class Part(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A piece of a message's content. Text alone is read; the others are refused by their type."""

    type: Annotated[str, Meta(max_length=64)]
    text: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    refusal: Any = None


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A message of a dialogue. ``name`` is informational; what an answer of ours had as null may come back as null."""

    role: Annotated[str, Meta(max_length=64)]
    content: str | list[Part] | None = None
    name: Label | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: Label | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: Any = None
    function_call: Any = None


class ChatRequest(Sampling, forbid_unknown_fields=True, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    continue_final_message: bool | None = None
    response_format: dict[str, Any] | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


class CompletionRequest(Sampling, forbid_unknown_fields=True, kw_only=True):
    """The body of /v1/completions."""

    prompt: str | list[Any]
    max_tokens: MaxTokensOrNone | None = None
    logprobs: TopLogprobs | None = None
    echo: bool | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None


# ---- reading -----------------------------------------------------------------------------------------------------

Body = TypeVar("Body", bound=msgspec.Struct)
_AT = re.compile(r" - at (?:`key` in )?`([^`]*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`$")
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+)\]")
_MOST_UNKNOWN = 64
_decoders: dict[type[msgspec.Struct], msgspec.json.Decoder[Any]] = {}


def decode(body: bytes, kind: type[Body], *, allow_unknown: bool = False) -> tuple[Body, list[str]]:
    """(the body as ``kind``, the fields that were left out because nobody knows them).

    Raises ApiError 400, which names the field.
    """
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    try:
        try:
            return decoder.decode(body), []
        except msgspec.ValidationError as error:
            if not allow_unknown:
                raise _wrong(error) from None
        return _without_unknown(body, kind)
    except RecursionError as error:
        raise _wrong(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not JSON: {_sentence(str(error))}", code="invalid_json") from None


def _without_unknown(body: bytes, kind: type[Body]) -> tuple[Body, list[str]]:
    value = msgspec.json.decode(body)
    ignored: list[str] = []
    while True:
        try:
            return msgspec.convert(value, kind), ignored
        except msgspec.ValidationError as error:
            path, text = _parted(str(error))
            found = _UNKNOWN.match(text)
            if found is None or len(ignored) >= _MOST_UNKNOWN:
                raise _wrong(error) from None
            owner = value
            try:
                for name, index in _STEP.findall(f".{path}"):
                    owner = owner[name] if name else owner[int(index)]
                del owner[found[1]]
            except (LookupError, TypeError):  # a name that looks like a part of msgspec's sentence
                raise _wrong(error) from None
            ignored.append(".".join(filter(None, (path, found[1]))))


def _wrong(error: Exception) -> ApiError:
    if isinstance(error, RecursionError):
        return ApiError(400, "the body is nested too deeply", code="invalid_json")
    path, text = _parted(str(error))
    if found := _UNKNOWN.match(text):
        name = f"{path}.{found[1]}" if path else found[1]
        return ApiError(
            400,
            f"unknown field {json.dumps(name[:128])}: this server would have to ignore it; leave it out",
            param=name[:128],
            code="unknown_field",
        )
    if found := _MISSING.match(text):
        name = f"{path}.{found[1]}" if path else found[1]
        return ApiError(400, f"{name} is missing", param=name, code="missing_field")
    message = f"{path}: {_sentence(text)}" if path else f"the body is wrong: {_sentence(text)}"
    return ApiError(400, message, param=path or None, code="invalid_value")


def _parted(text: str) -> tuple[str, str]:
    """(the path of the field, what is wrong with it) of msgspec's message."""
    found = _AT.search(text)
    if found is None:
        return "", text
    return found[1].removeprefix("$").removeprefix("."), text[: found.start()]


def _sentence(text: str) -> str:
    text = text.replace("`", "").replace(f"str matching regex {BIAS_KEY!r}", 'token ids such as "2" as its keys')
    return text[:1].lower() + text[1:]
