"""The shapes of answers, for /openapi.json. A test reads real answers with them."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class ErrorDetail(msgspec.Struct, kw_only=True):
    """What went wrong: a sentence, its kind, the field that is wrong, and a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(msgspec.Struct, kw_only=True):
    """Every answer that is an error, also in the middle of a stream."""

    error: ErrorDetail


class Timings(msgspec.Struct, kw_only=True):
    """Where the time of the first answer went."""

    queue_ms: float
    prefill_ms: float
    decode_ms: float
    prompt_per_second: float
    predicted_per_second: float


class PromptTokensDetails(msgspec.Struct, kw_only=True):
    """Tokens of the prompt that were in the cache."""

    cached_tokens: int


class Usage(msgspec.Struct, kw_only=True):
    """Tokens and times."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    timings: Timings


class _Choice(msgspec.Struct, kw_only=True):
    """What one of the answers has, whatever it is."""

    index: int
    logprobs: dict[str, Any] | None
    finish_reason: str | None
    stop_reason: int | str | None


class _Answer(msgspec.Struct, kw_only=True):
    """What a whole answer has, whatever it is."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage
    moderation: dict[str, Any] | None = None
    personal_data: dict[str, Any] | None = None


class ChatAnswerMessage(msgspec.Struct, kw_only=True):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    tool_calls: list[dict[str, Any]] = []


class ChatChoice(_Choice, kw_only=True):
    """One of the answers that were asked for."""

    message: ChatAnswerMessage


class ChatAnswer(_Answer, kw_only=True):
    """The answer of /v1/chat/completions; as a stream it comes in events of ``chat.completion.chunk``."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class CompletionChoice(_Choice, kw_only=True):
    """One of the answers that were asked for."""

    text: str


class CompletionAnswer(_Answer, kw_only=True):
    """The answer of /v1/completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class Embedding(msgspec.Struct, kw_only=True):
    """One text's vector, as numbers or as base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(msgspec.Struct, kw_only=True):
    """Tokens of all texts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(msgspec.Struct, kw_only=True):
    """The answer of /v1/embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ModerationAnswer(msgspec.Struct, kw_only=True):
    """What the guard says of each text; a score is null where its judge failed, and ``failed`` says why."""

    id: str
    model: str
    results: list[dict[str, Any]]


class ModelAnswer(msgspec.Struct, kw_only=True):
    """A model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    sampling_defaults: dict[str, float]
    capabilities: list[str]
    instruction_tuned: bool | None


class ModelsAnswer(msgspec.Struct, kw_only=True):
    """All models."""

    object: Literal["list"]
    data: list[ModelAnswer]


class TokenizeAnswer(msgspec.Struct, kw_only=True):
    """Token ids."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(msgspec.Struct, kw_only=True):
    """A text."""

    prompt: str


class TokenizerInfo(msgspec.Struct, kw_only=True):
    """Names of special tokens."""

    tokenizer_class: str
    vocab_size: int
    bos_token: str
    eos_token: str
    pad_token: str
    unk_token: str
    chat_template: str | None


class Version(msgspec.Struct, kw_only=True):
    """The version of gemcut."""

    version: str


class Readiness(msgspec.Struct, kw_only=True):
    """Whether requests are answered: "ready", "loading" or "draining"."""

    status: str
    stage: str = ""
    done: int = 0
    total: int = 0


class ReportAnswer(msgspec.Struct, kw_only=True):
    """A report of misuse that was written down."""

    id: str
    object: Literal["report"]
    created: str
