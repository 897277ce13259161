"""What chat and completions share: from fields to sampling, waiting for answers, and the numbers at their end."""

from __future__ import annotations

import asyncio
import dataclasses
import math
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
from gemcut.server.delivery import Mailbox
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
)


def sampling_fields(body: Sampling) -> dict[str, Any]:
    """The fields of SamplingParams that a body names, under their names there."""
    fields = {name: value for name in _COPIED if (value := getattr(body, name)) is not None}
    if body.top_k is not None:
        fields["top_k"] = max(0, body.top_k)  # -1 says "all", as 0 does
    if body.stream_options is not None and not body.stream:
        raise ParameterError("stream_options is for streams; set stream to true, or leave it out")
    return fields


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
    """The answers of one request, from their start to their end, whichever it is. In an ``async with`` block.

    Attributes:
        box: their events.
        silent: whether the last `news` came because nothing else did, so that a stream may say that it lives.
    """

    def __init__(self, state: ServerState, request: Request, streams: list[TextStream], *, each: bool) -> None:
        self.state, self.request = state, request
        self.box = Mailbox(state.delivery, streams, each=each)
        self.silent = False
        self._leaving: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        now, settings = self._loop.time(), state.settings
        self._begun_by, self._whole_by = now + settings.queue_timeout, now + settings.request_timeout
        self._ping = settings.ping if each else math.inf
        self._begun = False

    async def __aenter__(self) -> Waiting:
        self.state.admit(len(self.box.streams))
        self.state.metrics.answers_started(self.box.sequences)
        try:
            self.box.__enter__()
        except BaseException:
            self.state.metrics.answers_ended(self.box.sequences)
            self.state.release(len(self.box.streams))
            raise
        self.request.sequences = self.box.sequences
        self._leaving = asyncio.ensure_future(self.request.disconnected())
        self._leaving.add_done_callback(self._left)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._leaving is not None:
            self._leaving.cancel()
        self.box.__exit__(None, None, None)
        self.state.release(len(self.box.streams))
        self.state.metrics.answers_ended(self.box.sequences)

    def _left(self, leaving: asyncio.Future[None]) -> None:
        if not leaving.cancelled():
            leaving.exception()  # whatever it was, the client cannot be answered
            self.box.leave()

    async def news(self) -> None:
        """Wait until there is something to take.

        Raises:
            ClientLeftError: the client has left.
            ApiError: 503, it takes too long.
        """
        box, now = self.box, self._loop.time()
        if not self._begun:
            self._begun = all(sequence.started is not None or sequence.events for sequence in box.sequences)
        limit = self._whole_by if self._begun else min(self._whole_by, self._begun_by)
        box.alarm = min(now + self._ping, limit)
        await box.wait()
        if box.gone:
            raise ClientLeftError
        self.silent = False
        if (now := self._loop.time()) >= box.alarm:
            self._rang(now)

    def _rang(self, now: float) -> None:
        started = all(sequence.started is not None or sequence.events for sequence in self.box.sequences)
        if now >= self._whole_by:
            raise unavailable(
                f"the answer was not whole after {self.state.settings.request_timeout:g} seconds; ask for less",
                retry_after=5,
                code="request_timeout",
            )
        if not started and now >= self._begun_by:
            raise unavailable(
                f"the request waited for {self.state.settings.queue_timeout:g} seconds and was not begun; try later",
                retry_after=5,
                code="queue_timeout",
            )
        self.silent = started

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
