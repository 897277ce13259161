"""What a generation gives back: the finished Completion, and the TextStream while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field
from operator import length_hint
from typing import TYPE_CHECKING, Any, NoReturn

from gemcut import process
from gemcut.engine.request import FinishReason, PromptLogprob, Sequence, TokenEvent, TokenLogprob
from gemcut.errors import RequestError
from gemcut.prompts import refuse_pickle

if TYPE_CHECKING:
    from torch import Tensor

    from gemcut.engine.loop import EngineLoop


@dataclass(frozen=True)
class Stats:
    """Where the time of one request went. Seconds are wall time and include neighbours in the same batch."""

    prefill_tokens: int  # prompt tokens that were computed
    cached_tokens: int  # prompt tokens taken over from an earlier request
    generated_tokens: int
    queued_seconds: float  # from submission to the first step
    prefill_seconds: float  # from the first step to the first token
    decode_seconds: float  # from the first token to the last

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens computed a second."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens a second after the first one, whose time is part of the prefill."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0

    @classmethod
    def of(cls, sequence: Sequence) -> Stats:
        """Read a sequence that has ended."""
        end = sequence.ended if sequence.ended is not None else sequence.submitted
        started = sequence.started if sequence.started is not None else end
        first = sequence.first_token if sequence.first_token is not None else end
        computed = sequence.prompt_length if sequence.output_length else min(sequence.computed, sequence.prompt_length)
        return cls(
            prefill_tokens=max(0, computed - sequence.cached_tokens),
            cached_tokens=sequence.cached_tokens,
            generated_tokens=sequence.output_length,
            queued_seconds=started - sequence.submitted,
            prefill_seconds=first - started,
            decode_seconds=end - first,
        )


@dataclass(frozen=True)
class Completion:
    """A finished answer.

    Attributes:
        prompt_ids: the prompt's token ids.
        token_ids: every generated id, the stop token included.
        text: the answer without special tokens and without the stop text.
        finish_reason: "stop" (a stop token or text), "length" (max_new_tokens reached), "cancelled", "error" or
            "content_filter" (a guard refused the rest: ``token_ids`` and ``text`` are what it had let out).
        stop_reason: the stop token's id or the stop text that ended it.
        logprobs: one entry a token where they were asked for.
        prompt_scores: of each prompt token from the place asked for on its log-probability, its rank and the greedy
            token.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    stop_reason: int | str | None
    logprobs: tuple[TokenLogprob, ...] | None
    prompt_scores: tuple[PromptLogprob, ...] | None
    stats: Stats
    #: Mean of the prompt's hidden states where it was asked for: fp32 [d], on the CPU.
    embedding: Tensor | None = field(default=None, compare=False, repr=False)
    error: str | None = None  # with finish reason "error": what happened, in one line
    cause: BaseException | None = field(default=None, compare=False, repr=False)  # the exception behind it, if any
    refusal: str | None = None  # with finish reason "content_filter": what the guard file says instead
    moderation: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)  # a guard's scores, if any

    def checked(self) -> Completion:
        """This answer. Raises RequestError where it ended by an error and is not whole."""
        if self.error is not None:
            raise RequestError(self.error) from self.cause
        return self

    @classmethod
    def of(cls, sequence: Sequence) -> Completion:
        """The whole answer of a sequence that has ended."""
        if not sequence.finished:
            raise RuntimeError("the request is still running")
        request, events, end = sequence.request, sequence.events, sequence.events[-1]
        assert end.finish_reason is not None
        logprobs = tuple(event.logprob for event in events if event.logprob is not None)
        return cls(
            prompt_ids=request.prompt_ids,
            token_ids=tuple(sequence.output_ids),
            text="".join(event.text for event in events),
            finish_reason=end.finish_reason,
            stop_reason=end.stop_reason,
            logprobs=logprobs if request.params.logprobs is not None else None,
            prompt_scores=None if request.prompt_logprobs_from is None else tuple(sequence.prompt_scores),
            stats=Stats.of(sequence),
            embedding=_mean(sequence),
            error=end.error,
            cause=sequence.cause,
        )

    @property
    def prompt_logprobs(self) -> tuple[float, ...] | None:
        """The log-probabilities of ``prompt_scores`` alone."""
        return None if self.prompt_scores is None else tuple(score.logprob for score in self.prompt_scores)

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens in the prompt."""
        return len(self.prompt_ids)


def _mean(sequence: Sequence) -> Tensor | None:
    """The mean of the hidden states that were asked for; None where they are not all there."""
    total, count = sequence.embedded
    if sequence.request.embed_from is None or sequence.next_embedded is not None:
        return None
    mean: Tensor = total / count
    return mean.float()


class TextStream(Iterator[str]):
    """Pieces of an answer's text as they become certain; ``result`` has it all at the end.

    ``for piece in stream`` waits in its thread, ``async for piece in stream`` in its asyncio task (then
    ``await stream.finished()`` gives the result). The answer is computed whether it is read or not, until it ends: one
    that nobody reads holds an event for each of its ``max_new_tokens`` at most.

    Leaving the stream early (``close``, a ``with`` block, or dropping it) cancels the request and frees its memory.
    Where the request ends by an error of its own, reading on raises RequestError; ``result`` then has
    ``finish_reason == "error"``, ``error`` and what there was before.
    """

    def __init__(self, loop: EngineLoop, sequence: Sequence) -> None:
        self._loop, self._sequence = loop, sequence
        # A list's own iterator moves on in the same instant in which it gives an event: nothing can come between, and
        # an interrupted reader finds the next one where it was. It may only be asked where there is one.
        self._unread = iter(sequence.events)
        sequence.reader = weakref.ref(self)

    @property
    def sequence(self) -> Sequence:
        """The request's state in the engine."""
        return self._sequence

    def start(self) -> None:
        """Start the request."""
        self._loop.start([self._sequence])

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        """The next piece that is not empty. Raises RequestError where the request failed."""
        while (event := self._peek()) is not None:
            if event.text:
                return next(self._unread).text
            next(self._unread)
        raise StopIteration

    def __aiter__(self) -> TextStream:
        return self

    async def __anext__(self) -> str:
        """The same for a task of asyncio."""
        while (event := await self._peek_async()) is not None:
            if event.text:
                return next(self._unread).text
            next(self._unread)
        raise StopAsyncIteration

    def events(self) -> EventReader:
        """The events themselves, one a token, for callers that want ids and log-probabilities too."""
        return TokenEvents(self)

    def _look(self) -> tuple[bool, TokenEvent | None]:
        """(whether it is known what comes next, the next event, which is not taken yet, or None behind the last)."""
        process.check()  # what a fork took along unread is not read there either
        finished = self._sequence.finished  # before the look: the engine is at work
        if length_hint(self._unread):
            event: TokenEvent = next(copy(self._unread))
            if event.error is not None:
                raise RequestError(event.error) from self._sequence.cause
            return True, event
        return finished, None

    def _peek(self) -> TokenEvent | None:
        """The next event, which is not taken yet, or None behind the last one. Waits until it is there."""
        while True:
            seen = len(self._sequence.events)
            known, event = self._look()
            if known:
                return event
            self._loop.wait(self._sequence, seen)

    async def _peek_async(self) -> TokenEvent | None:
        """The same for a task of asyncio."""
        while True:
            seen = len(self._sequence.events)
            known, event = self._look()
            if known:
                return event
            await self._more(seen)

    @property
    def result(self) -> Completion:
        """The whole answer; waits for the rest of it. What was not read can still be read."""
        while not self._sequence.finished:
            self._loop.wait(self._sequence, len(self._sequence.events))
        return Completion.of(self._sequence)

    async def finished(self) -> Completion:
        """The same for a task of asyncio."""
        while not self._sequence.finished:
            await self._more(len(self._sequence.events))
        return Completion.of(self._sequence)

    async def _more(self, seen: int) -> None:
        """Let other tasks run until there are more than ``seen`` events, or the last."""
        here = asyncio.get_running_loop()
        more = here.create_future()

        def settle() -> None:
            if not more.done():  # the task was cancelled
                more.set_result(None)

        def wake() -> None:  # in the engine's thread
            with contextlib.suppress(RuntimeError):  # the event loop was closed meanwhile
                here.call_soon_threadsafe(settle)

        self._loop.check(self._sequence)
        self._sequence.when_more(seen, wake)
        await more

    def cancel(self) -> None:
        """Stop the answer now. ``result`` then holds what there was, with finish_reason "cancelled"."""
        self._loop.cancel(self._sequence)

    def close(self) -> None:
        """The same as ``cancel``."""
        self.cancel()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_pickle("a TextStream", "it belongs to the engine that runs it; pass on its result, or its pieces")

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cancel()

    async def __aenter__(self) -> TextStream:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        # One that is dropped must not hold cache blocks. (One that failed to be built has no loop.)
        if getattr(self, "_loop", None) is not None:
            self.cancel()


class EventReader(Iterator[TokenEvent]):
    """Events of an answer, for a thread (``for``) or a task of asyncio (``async for``)."""

    def __aiter__(self) -> EventReader:
        return self

    async def __anext__(self) -> TokenEvent:
        raise NotImplementedError


class TokenEvents(EventReader):
    """A stream's events, for a thread or a task of asyncio. Not a generator: that would be at its end after an
    exception."""

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream

    def __next__(self) -> TokenEvent:
        if self._stream._peek() is None:
            raise StopIteration
        return next(self._stream._unread)

    async def __anext__(self) -> TokenEvent:
        if await self._stream._peek_async() is None:
            raise StopAsyncIteration
        return next(self._stream._unread)


def start_together(streams: list[TextStream]) -> None:
    """Start streams of one loop: their first step has all of them, whatever the timing."""
    for stream in streams[:1]:
        stream._loop.start([each._sequence for each in streams])


def run_together(streams: list[TextStream]) -> list[Completion]:
    """Start streams together and wait for all. After an error or Ctrl-C none of them keeps running."""
    try:
        start_together(streams)
        return [stream.result for stream in streams]
    finally:
        _cancel(streams)


async def run_together_async(streams: list[TextStream]) -> list[Completion]:
    """The same for a task of asyncio; where it is cancelled the requests are, too."""
    try:
        start_together(streams)
        return [await stream.finished() for stream in streams]
    finally:
        _cancel(streams)


def _cancel(streams: list[TextStream]) -> None:
    for stream in streams:
        stream.cancel()


def texts_of(results: list[Completion], n: int | None, *, one: bool) -> Any:
    """The answers' texts: an entry a prompt (or that of the only one), which with ``n`` is a list of n texts."""
    texts: list[Any] = [_shown(result.checked()) for result in results]
    if n is not None:
        texts = [texts[start : start + n] for start in range(0, len(texts), n)]
    return texts[0] if one else texts


def _shown(result: Completion) -> str:
    """The text of an answer, or what a guard has it say instead."""
    return result.text if result.refusal is None else result.refusal
