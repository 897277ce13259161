"""What a generation gives back: the finished Completion, and the TextStream while it runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

from gemcut.engine.request import FinishReason, Sequence, TokenEvent, TokenLogprob
from gemcut.errors import RequestError
from gemcut.prompts import refuse_pickle


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
        finish_reason: "stop" (a stop token or text), "length" (max_new_tokens reached), "cancelled" or "error".
        stop_reason: the stop token's id or the stop text that ended it.
        logprobs: one entry a token where they were asked for.
        prompt_logprobs: log-probability of each prompt token after the first, where asked for.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    stop_reason: int | str | None
    logprobs: tuple[TokenLogprob, ...] | None
    prompt_logprobs: tuple[float, ...] | None
    stats: Stats
    error: str | None = None  # with finish reason "error": what happened, in one line

    def checked(self) -> Completion:
        """This answer. Raises RequestError where it ended by an error and is not whole."""
        if self.error is not None:
            raise RequestError(self.error)
        return self

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens in the prompt."""
        return len(self.prompt_ids)


class Collector:
    """Gathers one request's events into a Completion."""

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._end: TokenEvent | None = None

    @property
    def done(self) -> bool:
        """Whether the request's last event has come."""
        return self._end is not None

    def add(self, event: TokenEvent) -> None:
        """Take the next event."""
        self._text.append(event.text)
        if event.logprob is not None:
            self._logprobs.append(event.logprob)
        if event.finish_reason is not None:
            self._end = event

    def completion(self) -> Completion:
        """The whole answer. Only after the last event."""
        if self._end is None or self._end.finish_reason is None:
            raise RuntimeError("the request is still running")
        request = self.sequence.request
        return Completion(
            prompt_ids=request.prompt_ids,
            token_ids=tuple(self.sequence.tokens[self.sequence.prompt_length :]),
            text="".join(self._text),
            finish_reason=self._end.finish_reason,
            stop_reason=self._end.stop_reason,
            logprobs=tuple(self._logprobs) if request.params.logprobs is not None else None,
            prompt_logprobs=tuple(self.sequence.prompt_logprobs) if request.prompt_logprobs else None,
            stats=Stats.of(self.sequence),
            error=self._end.error,
        )


class TextStream(Iterator[str]):
    """Pieces of an answer's text as they become certain. Iterating does the work; ``result`` has it all at the end.

    Leaving the stream early (``close``, a ``with`` block, or dropping it) cancels the request and frees its memory.
    """

    def __init__(
        self, collector: Collector, events: Callable[[], list[TokenEvent]], cancel: Callable[[], None]
    ) -> None:
        self._collector, self._events, self._cancel = collector, events, cancel
        self._arrived: deque[TokenEvent] = deque()  # several come at once while another thread does the steps

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        """The next piece that is not empty."""
        for event in self.events():
            if event.text:
                return event.text
        raise StopIteration

    def events(self) -> Iterator[TokenEvent]:
        """The events themselves, one a token, for callers that want ids and log-probabilities too."""
        while not self._collector.done:
            if not self._arrived:
                self._arrived.extend(self._events())
                continue
            event = self._arrived.popleft()
            self._collector.add(event)
            yield event

    @property
    def result(self) -> Completion:
        """The whole answer; runs the rest of it if it has not ended yet."""
        for _ in self.events():
            pass
        return self._collector.completion()

    def cancel(self) -> None:
        """Stop the answer now. ``result`` then holds what there was, with finish_reason "cancelled"."""
        if not self._collector.done:
            self._cancel()

    def close(self) -> None:
        """The same as ``cancel``."""
        self.cancel()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_pickle("a TextStream", "it belongs to the engine that runs it; pass on its result, or its pieces")

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        # A stream that failed to be built has no collector; one that is dropped must not hold cache blocks.
        if getattr(self, "_collector", None) is not None:
            self.cancel()
