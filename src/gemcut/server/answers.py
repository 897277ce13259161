"""What chat and completions share: from fields to sampling, waiting for answers, and the numbers at their end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from types import TracebackType
from typing import Any

from gemcut.engine.request import Sequence, TokenEvent
from gemcut.engine.results import Stats, TextStream
from gemcut.engine.sampling import SamplingParams
from gemcut.errors import ParameterError, RequestError
from gemcut.gemma import Gemma
from gemcut.prompts import derived_seed
from gemcut.server.asgi import ClientLeftError, Request
from gemcut.server.delivery import TICK, Mailbox
from gemcut.server.errors import unavailable
from gemcut.server.fields import Sampling
from gemcut.server.state import ServerState

_COPIED = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "logit_bias",
    "stop",
    "ignore_eos",
)


def sampling_fields(body: Sampling) -> dict[str, Any]:
    """The fields of SamplingParams that a body names, under their names there."""
    fields = {name: value for name in _COPIED if (value := getattr(body, name)) is not None}
    if body.top_k is not None:
        fields["top_k"] = max(0, body.top_k)  # -1 says "all", as 0 does
    if body.min_tokens is not None:
        fields["min_new_tokens"] = body.min_tokens
    if body.stream_options is not None and not body.stream:
        raise ParameterError("stream_options is for streams; set stream to true, or leave it out")
    return fields


def resolve(
    state: ServerState, gemma: Gemma, prompt_tokens: int, fields: Mapping[str, Any], *, chat: bool = False
) -> SamplingParams:
    """What a request samples with: `Gemma.resolve_sampling`, which is asked once for requests that say the same.

    Raises ParameterError.
    """
    seed = fields.get("seed")
    same = {name: value for name, value in fields.items() if name != "seed"}
    fixed = "max_new_tokens" in same and not any("length" in name for _, own in gemma.sampling_levels for name in own)
    # Where a default decides the length, that depends on the prompt's.
    key = (chat, 0 if fixed else prompt_tokens, repr(same))
    params = state.resolved.get(key)
    if params is None:
        params = gemma.resolve_sampling(prompt_tokens, same, chat=chat).params
        if state.watermark is not None and not params.greedy:
            params = dataclasses.replace(params, watermark=state.watermark)
        if len(state.resolved) >= _KEPT:
            state.resolved.clear()
        if len(key[2]) <= _SHORT:
            state.resolved[key] = params
    return params if seed is None else dataclasses.replace(params, seed=seed)


#: Different samplings that are kept, each said in so many characters at most.
_KEPT, _SHORT = 1024, 1000


def copies(params: SamplingParams, n: int) -> list[SamplingParams]:
    """Parameters of ``n`` answers to one prompt: the first has the seed that was given, the others derived ones."""
    if n == 1:
        return [params]
    if params.seed is None or params.greedy:
        return [params] * n
    return [dataclasses.replace(params, seed=derived_seed(params.seed, k)) for k in range(n)]


def check_length(gemma: Gemma, characters: int, what: str) -> None:
    """Refuse a text that no tokenizer could make short enough. Raises ParameterError."""
    most = _LONGEST_TOKEN * gemma.engine.max_context
    if characters > most:
        raise ParameterError(
            f"{what} has {characters:,} characters; the context of {gemma.engine.max_context:,} tokens holds "
            f"{most:,} at the very most: shorten it"
        )


#: The longest token of Gemma 2 and 3 has so many characters.
_LONGEST_TOKEN = 48


class Waiting:
    """The answers of one request, from their start to their end, whichever it is. In a ``with`` block.

    Attributes:
        box: their events.
        silent: whether the last `news` came because nothing else did, so that a stream may say that it lives.
    """

    def __init__(self, state: ServerState, request: Request, streams: list[TextStream], *, each: bool) -> None:
        self.state, self.request = state, request
        self.box = Mailbox(state.delivery, streams, each=each)
        self.silent = False
        self._forget: Callable[[], object] | None = None
        settings = state.settings
        now = self.box.now
        self._begun_by, self._whole_by = now + settings.queue_timeout, now + settings.request_timeout
        self.box.deadline = min(self._begun_by, self._whole_by)
        if each:
            self.box.patience = settings.ping / TICK

    def __enter__(self) -> Waiting:
        self.state.admit(len(self.box.streams))
        self.state.metrics.answers_started(self.box.sequences)
        try:
            self.box.__enter__()
        except BaseException:
            self.state.release(len(self.box.streams))
            self.state.metrics.answers_ended(self.box.sequences)
            raise
        self.request.sequences = self.box.sequences
        self._forget = self.request.when_left(self.box.leave)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._forget is not None:
            self._forget()
        self.box.__exit__(None, None, None)
        self.state.release(len(self.box.streams))
        self.state.metrics.answers_ended(self.box.sequences)

    async def news(self) -> None:
        """Wait until there is something to take.

        Raises:
            ClientLeftError: the client has left.
            ApiError: 503, it takes too long.
        """
        box = self.box
        await box.wait()
        if box.gone:
            raise ClientLeftError
        if box.rang or self.silent:
            self.silent = box.rang and self._rang()
            box.rang = False

    def _rang(self) -> bool:
        """Whether the answers have begun. Raises ApiError where it has taken too long."""
        now = self.box.now
        if now >= self._whole_by:
            raise unavailable(
                f"the answer was not whole after {self.state.settings.request_timeout:g} seconds; ask for less",
                retry_after=5,
                code="request_timeout",
            )
        begun = all(sequence.started is not None or sequence.events for sequence in self.box.sequences)
        if begun:
            self.box.deadline = self._whole_by
        elif now >= self._begun_by:
            raise unavailable(
                f"the request waited for {self.state.settings.queue_timeout:g} seconds and was not begun; try later",
                retry_after=5,
                code="queue_timeout",
            )
        return begun

    def ping(self) -> bytes:
        """A comment for a stream in which nothing happens: how much of the prompts is computed."""
        done = sum(min(each.computed, each.prompt_length) for each in self.box.sequences)
        return b": prefill %d/%d\n\n" % (done, sum(each.prompt_length for each in self.box.sequences))


def checked(event: TokenEvent, sequence: Sequence) -> TokenEvent:
    """An event that is no failure. Raises what the failure is to the client."""
    if event.finish_reason == "error":
        raise RequestError(event.error or "the request failed") from sequence.cause
    if event.finish_reason == "cancelled":
        raise unavailable("the server ended the answer before it was whole", retry_after=5, code="cancelled")
    return event


def usage(sequences: Many[Sequence], *, prompts: int = 1) -> dict[str, Any]:
    """Tokens and times of answers that have ended: of ``prompts`` prompts, each with as many answers as the others."""
    each = len(sequences) // prompts
    stats = [Stats.of(sequence) for sequence in sequences]
    prompt_tokens = sum(sequence.prompt_length for sequence in sequences[::each])
    new_tokens = sum(own.generated_tokens for own in stats)
    first = stats[0]
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(own.cached_tokens for own in stats[::each])},
        "timings": {
            "queue_ms": round(first.queued_seconds * 1e3, 3),
            "prefill_ms": round(first.prefill_seconds * 1e3, 3),
            "decode_ms": round(first.decode_seconds * 1e3, 3),
            "prompt_per_second": round(first.prefill_tokens_per_second, 1),
            "predicted_per_second": round(first.decode_tokens_per_second, 1),
        },
    }
