"""A request, its state while it lives in the engine, and the events it gives."""

from __future__ import annotations

import itertools
import secrets
import time
import weakref
from array import array
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from gemcut.engine.blocks import BlockKey, root_key
from gemcut.engine.sampling import SamplingParams
from gemcut.errors import GemcutError

if TYPE_CHECKING:
    from gemcut.engine.edits import LogitsEdit
    from gemcut.safety.watermark import Contexts

#: "content_filter" is a guard's, which ends what the engine would go on with.
FinishReason = Literal["stop", "length", "cancelled", "error", "content_filter"]
_ids = itertools.count()


class TextSink(Protocol):
    """Turns tokens into text as they come; the engine feeds it so that stop texts end a request at once."""

    @property
    def stopped(self) -> str | None:
        """The stop text that was found, if any."""

    def push(self, token_id: int) -> str:
        """Take one token; return the text that is now certain."""

    def finish(self) -> str:
        """Return what was still held back."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a caller asks of the engine.

    Attributes:
        prompt_ids: the prompt's token ids, ``<bos>`` included.
        params: how to sample.
        stop_ids: token ids that end the answer (they are not part of its text).
        text: makes what receives the tokens and watches for stop texts; None where only ids are wanted. It is called
            again where an exception struck inside a sink: the new one is fed with the same tokens.
        prompt_logprobs_from: also score the prompt's tokens from this place on, see `PromptLogprob`; 1 is the second
            token, the first one that has any before it. None: none of them.
        embed_from: also give the mean of the hidden states behind the final norm, of the prompt's tokens from this
            place on; 0 is the first token. None: not wanted.
        logprobs_of: token ids whose log-probabilities as each next token are wanted too (``TokenLogprob.asked``); needs
            ``params.logprobs``, which may be 0.
        cache_salt: requests share what they have in common with those of the same salt alone, b"" too.
        edit: asked before each choice what to change of the logits; None: nothing.
        request_id: unique while the request lives.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    stop_ids: frozenset[int] = frozenset()
    text: Callable[[], TextSink] | None = None
    prompt_logprobs_from: int | None = None
    embed_from: int | None = None
    logprobs_of: tuple[int, ...] = ()
    cache_salt: bytes = b""
    edit: LogitsEdit | None = None
    request_id: int = field(default_factory=lambda: next(_ids))


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a token under the model (before penalties and temperature), with the likeliest others.

    ``asked``: those of the tokens that the request names (``Request.logprobs_of``), in that order.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    asked: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptLogprob:
    """What the model makes of one token of a prompt, given those before it.

    Attributes:
        token_id: the token.
        logprob: its log-probability (natural logarithm).
        rank: 1 and the number of tokens that are likelier.
        greedy_id: the likeliest token.
        greedy_logprob: that one's log-probability.
    """

    token_id: int
    logprob: float
    rank: int
    greedy_id: int
    greedy_logprob: float


@dataclass(frozen=True)
class RowError:
    """Stands in the place of a row's token where the row can have none: the request of that row alone ends.

    Whoever chooses the tokens of a step (``sampler.sample``, ``Runner.tokens``) puts it there for the row that has
    something wrong with it: logits that are not finite, parameters that cannot be applied. The engine ends the request
    with finish reason "error" and this message, and gives its blocks back; the other rows go on. The message is one
    line: what happened, in which tensor where that is known, and what to do.
    """

    message: str
    cause: BaseException | None = field(default=None, compare=False)

    @classmethod
    def of(cls, error: BaseException) -> RowError:
        """What ``error`` says, in one line; errors that are not gemcut's own are named by their class."""
        text = " ".join(str(error).split())
        named = text if isinstance(error, GemcutError) and text else f"{type(error).__name__}: {text or 'no message'}"
        return cls(named, error)


@dataclass(frozen=True)
class TokenEvent:
    """One step of one request: a token, or its end, or both."""

    request_id: int
    token_id: int | None
    text: str = ""
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or the stop text
    error: str | None = None  # with finish reason "error": what happened, in one line


class Status(Enum):
    """Where a request is in its life."""

    NEW = "new"  # submitted; the scheduler does not know it yet
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """A request's state in the engine: its events, and what follows from them.

    ``events`` is the one truth. It only grows, by one atomic ``append`` a token; its last event has a finish reason,
    and every other one has a token. Everything else follows from it, so that ``restore`` can make it anew wherever an
    exception struck. Readers keep a place in the list and never take anything out of it.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.events: list[TokenEvent] = []
        self.tokens: list[int] = list(request.prompt_ids)
        self.computed = 0  # tokens whose keys and values are in the cache
        self.status = Status.NEW
        self.preemptions = 0
        # A fresh seed is drawn once, so that a preempted request goes on as it would have.
        self.seed = request.params.seed if request.params.seed is not None else secrets.randbits(63)
        self.output_counts: dict[int, int] = {}
        self.root_key = root_key(request.cache_salt)
        self.block_keys: list[BlockKey] = []  # names of its blocks, as far as they were needed; tokens never change
        self._seen: tuple[set[int], array[int]] | None = None
        self._sink = request.text() if request.text is not None else None
        #: Of the prompt's tokens from ``request.prompt_logprobs_from`` on, as far as they are computed.
        self.prompt_scores: list[PromptLogprob] = []
        #: (Sum of the hidden states from ``request.embed_from`` on, fp64 [d]; of how many tokens), as far as computed.
        self.embedded: tuple[Any, int] = (0.0, 0)
        #: Set while a step runs by whoever finds that this request cannot go on (prompt log-probabilities that are not
        #: finite); the engine ends it behind the step, as a RowError in the place of its token does.
        self.failure: RowError | None = None
        #: The exception behind finish reason "error", where there was one.
        self.cause: BaseException | None = None
        self._wakers: deque[Callable[[], None]] = deque()
        #: Set by whoever wants it cancelled, in any thread; the engine does it between two steps.
        self.unwanted = False
        #: Who reads the events. A request whose reader is gone is unwanted.
        self.reader: weakref.ref[object] | None = None
        self.contexts: Contexts | None = None  # of the answer, where its draws are marked
        self.cached_tokens = 0  # prompt tokens found in the cache at the first start
        self.submitted = time.perf_counter()
        self.started: float | None = None
        self.first_token: float | None = None
        self.ended: float | None = None

    @property
    def id(self) -> int:
        return self.request.request_id

    @property
    def finished(self) -> bool:
        """Whether its last event is there."""
        return bool(self.events) and self.events[-1].finish_reason is not None

    @property
    def abandoned(self) -> bool:
        """Whether nobody wants the rest of it."""
        return self.unwanted or (self.reader is not None and self.reader() is None)

    @property
    def output_ids(self) -> list[int]:
        """The tokens that were generated."""
        return [event.token_id for event in self.events if event.token_id is not None]

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def output_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def next_scored(self) -> int | None:
        """The place of the first prompt token that still has to be scored."""
        if self.request.prompt_logprobs_from is None:
            return None
        place = self.request.prompt_logprobs_from + len(self.prompt_scores)
        return place if place < self.prompt_length else None

    @property
    def next_embedded(self) -> int | None:
        """The place of the first prompt token whose hidden state is still to be summed."""
        if self.request.embed_from is None:
            return None
        place = self.request.embed_from + self.embedded[1]
        return place if place < self.prompt_length else None

    @property
    def cacheable(self) -> int | None:
        """One of so many first tokens must be computed, since its hidden state is wanted; None: any will do.

        A token is scored by the hidden state before it.
        """
        embedded = self.next_embedded
        wanted = [self.next_scored, None if embedded is None else embedded + 1]
        return min((place for place in wanted if place is not None), default=None)

    @property
    def pending(self) -> int:
        """Tokens that still have to go through the network before the next one can be sampled."""
        return len(self.tokens) - self.computed

    @property
    def seen(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The different tokens of prompt and output; kept from step to step once they were asked for."""
        if self._seen is None:
            self._seen = set(self.tokens), array("q", dict.fromkeys(self.tokens))
        return np.array(self._seen[1], dtype=np.int64)

    @property
    def sink(self) -> TextSink | None:
        """What its tokens go to, fed with all of them up to now."""
        if self._sink is None and self.request.text is not None:
            sink = self.request.text()
            for token in self.output_ids:
                sink.push(token)
            self._sink = sink
        return self._sink

    def append(self, token: int) -> None:
        """Add a token."""
        self.tokens.append(token)
        if self._seen is not None and token not in self._seen[0]:
            self._seen[1].append(token)
            self._seen[0].add(token)
        self.output_counts[token] = self.output_counts.get(token, 0) + 1

    def add(self, event: TokenEvent) -> None:
        """Add an event, and its token if it has one."""
        if event.token_id is not None:
            self.append(event.token_id)
        self.events.append(event)

    def end_with(self, failure: RowError) -> None:
        """End it with finish reason "error", unless it has ended, and wake who waits for it."""
        if not self.finished:
            self.cause, self.ended = failure.cause, time.perf_counter()
            self.add(TokenEvent(self.id, None, finish_reason="error", error=failure.message))
        self.status = Status.FINISHED
        self.wake()

    def when_more(self, seen: int, wake: Callable[[], None]) -> None:
        """Call ``wake`` once, from whatever thread, when there may be more than ``seen`` events, or it has ended.

        At once where that is so already. ``wake`` must neither raise nor wait.
        """
        self._wakers.append(wake)
        if len(self.events) > seen or self.finished:  # the event may have come before ``wake`` was there
            self.wake()

    def wake(self) -> None:
        """Wake who waits for its events. Each of them is called once; those that come meanwhile wait for the next."""
        for _ in range(len(self._wakers)):
            try:
                wake = self._wakers.popleft()  # one atomic operation: another thread may be at it, too
            except IndexError:
                return
            wake()

    def restore(self) -> None:
        """Make everything anew from the events, with nothing in the cache. It may be done again at any point."""
        ids = self.output_ids
        self.tokens = [*self.request.prompt_ids, *ids]
        self.output_counts = dict(Counter(ids))
        self.block_keys = []
        self._seen = self._sink = None
        self.prompt_scores = []
        self.embedded = (0.0, 0)
        self.failure = None
        self.status, self.computed = Status.WAITING, 0
