"""Engine: submit requests, step, take the tokens. Everything a person does goes through here.

    submit -> [step: schedule -> run -> sample -> detokenise and check stops] -> events

Calls may come from several threads; each step is one at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from gemcut.engine.cache import (
    CacheShape,
    PagedCache,
    bytes_per_block,
    ceil_div,
    shape_for_bytes,
    shape_for_tokens,
    sliding_blocks_needed,
)
from gemcut.engine.request import FinishReason, Request, RowError, Sequence, TokenEvent, TokenLogprob
from gemcut.engine.runner import Runner
from gemcut.engine.sampler import sample
from gemcut.engine.scheduler import Scheduled, Scheduler
from gemcut.errors import CapacityError, ContextLengthError, ParameterError
from gemcut.model import Model


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes of the engine.

    Attributes:
        max_context: most tokens a request may hold, prompt and answer together; the model's own limit if None.
        max_batch_size: most requests in one step.
        max_batch_tokens: most tokens in one step; a longer prompt is cut into chunks of this size.
        block_size: tokens a cache block holds.
        kv_memory: bytes for keys and values; None makes room for ``sequences`` whole contexts.
        sequences: how many requests of ``max_context`` the cache holds when ``kv_memory`` is None.
        cache_dtype: dtype of keys and values; the compute dtype if None.
    """

    max_context: int | None = None
    max_batch_size: int = 64
    max_batch_tokens: int = 512
    block_size: int = 16
    kv_memory: int | None = None
    sequences: int = 2
    cache_dtype: torch.dtype | None = None


class Engine:
    """Continuous batching of any number of requests over one model."""

    def __init__(self, model: Model, device: torch.device, config: EngineConfig | None = None) -> None:
        config = config or EngineConfig()
        self.model, self.device, self.config = model, device, config
        limit = model.config.max_position_embeddings
        self.max_context = min(config.max_context or limit, limit)
        if config.max_context is not None and not 1 < config.max_context <= limit:
            raise ParameterError(f"max_context is {config.max_context}; this model takes from 2 to {limit} tokens")
        for name in ("max_batch_size", "max_batch_tokens", "block_size", "sequences"):
            if getattr(config, name) < 1:
                raise ParameterError(f"{name} is {getattr(config, name)}; expected at least 1")
        dtype = config.cache_dtype or model.dtype
        if dtype != model.dtype:
            raise ParameterError(f"cache_dtype {dtype} differs from the compute dtype {model.dtype}; not supported yet")
        self.chunk = min(config.max_batch_tokens, self.max_context)
        self.cache = PagedCache(model.config, self._cache_shape(dtype), dtype, device)
        self.scheduler = Scheduler(
            self.cache, max_batch_size=config.max_batch_size, max_batch_tokens=config.max_batch_tokens
        )
        self.runner = Runner(model, self.cache, device)
        self._sequences: dict[int, Sequence] = {}
        self._events: list[TokenEvent] = []  # not handed over yet
        self._lock = threading.RLock()
        self._busy = False
        self._cancel_later: list[int] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self._sequences or self._events)

    def submit(self, request: Request) -> Sequence:
        """Queue a request; raises before anything starts if it can never be served.

        Raises:
            ParameterError: empty prompt, or a token id outside the vocabulary.
            ContextLengthError: prompt and answer do not fit the context.
            CapacityError: they do not fit the cache even alone.
        """
        self._check(request)
        sequence = Sequence(request)
        with self._exclusive():
            if request.request_id in self._sequences:
                raise ParameterError(f"request id {request.request_id} is already in use")
            with self._bookkeeping():
                self._sequences[request.request_id] = sequence
                self.scheduler.add(sequence)
        return sequence

    def cancel(self, request_id: int) -> bool:
        """Stop a request and give its blocks back at once. False if it has ended already."""
        with self._lock:
            if request_id not in self._sequences:
                return False
            if self._busy:  # a stream's destructor, run by the garbage collector in the middle of a step
                self._cancel_later.append(request_id)
                return True
            with self._exclusive():
                self._cancel(request_id)
            return True

    def step(self) -> list[TokenEvent]:
        """Do one step of work for all requests and return what happened, in batch order.

        Where the network fails (out of memory) or Ctrl-C comes, the error passes through; nothing is lost, and the
        next step goes on.
        """
        with self._exclusive():
            with self._bookkeeping():
                batch = self.scheduler.schedule()
            if batch:
                self._run(batch)
            events, self._events = self._events, []
            return events

    def _run(self, batch: list[Scheduled]) -> None:
        now = time.perf_counter()
        for scheduled in batch:
            scheduled.sequence.started = scheduled.sequence.started or now
        # These change nothing that matters: if one of them fails the step can be done again.
        tables = [self.scheduler.tables[s.sequence.id] for s in batch]
        ready = [s.sequence for s in batch if s.completes]
        wants = [i for i, sequence in enumerate(ready) if sequence.request.params.max_new_tokens > 0]
        logprobs: list[TokenLogprob | None] = [None] * len(wants)
        tokens: Many[int | RowError] | None = self.runner.tokens(batch, tables)
        if tokens is None:
            logits = self.runner.run(batch, tables)
            tokens, logprobs = sample(logits if len(wants) == len(ready) else logits[wants], [ready[i] for i in wants])
        with self._bookkeeping():
            for scheduled in batch:
                self.scheduler.computed(scheduled)
            chosen = dict(zip(wants, zip(tokens, logprobs, strict=True), strict=True))
            for sequence in [s.sequence for s in batch if s.sequence.failure is not None]:
                self._fail(sequence, sequence.failure or RowError(""))
            for index, sequence in enumerate(ready):
                if sequence.failure is not None:
                    continue
                if index in chosen:
                    self._take(sequence, *chosen[index])
                else:
                    self._end(sequence, TokenEvent(sequence.id, None, finish_reason="length"))

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One caller at a time; cancellations that come from within wait until the state is whole again."""
        with self._lock:
            self._busy = True
            try:
                yield
            finally:
                try:
                    while self._cancel_later:
                        self._cancel(self._cancel_later.pop())
                finally:
                    self._busy = False

    @contextmanager
    def _bookkeeping(self) -> Iterator[None]:
        """Changes of tables and blocks that must happen wholly. If they are interrupted (Ctrl-C comes anywhere), all
        living requests start again with an empty cache and the tokens they have; their random numbers stay the same.
        """
        try:
            yield
        except BaseException:
            self._sequences = {i: s for i, s in self._sequences.items() if s.ended is None}
            self.scheduler.restart(self._sequences.values())
            raise

    def _cancel(self, request_id: int) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            with self._bookkeeping():
                text = sequence.request.text.finish() if sequence.request.text is not None else ""
                self._end(sequence, TokenEvent(request_id, None, text=text, finish_reason="cancelled"))

    def _take(self, sequence: Sequence, token: int | RowError, logprob: TokenLogprob | None) -> None:
        """Add a sampled token to its sequence and see whether that ends it. Its own failures end it alone."""
        failure = token if isinstance(token, RowError) else None
        if not isinstance(token, RowError):
            try:
                self._add(sequence, token, logprob)
            except Exception as error:  # of its text sink, its stop rule or its parameters
                failure = RowError.of(error)
        if failure is not None:
            self._fail(sequence, failure)

    def _fail(self, sequence: Sequence, failure: RowError) -> None:
        self._end(sequence, TokenEvent(sequence.id, None, finish_reason="error", error=failure.message))

    def _add(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> None:
        request, sink = sequence.request, sequence.request.text
        sequence.first_token = sequence.first_token or time.perf_counter()
        sequence.append(token)
        reason: FinishReason | None = None
        stop: int | str | None = None
        text = ""
        if token in request.stop_ids and not request.params.ignore_eos:
            reason, stop = "stop", token
        else:
            text = sink.push(token) if sink is not None else ""
            if sink is not None and sink.stopped is not None:
                reason, stop = "stop", sink.stopped
            elif sequence.output_length >= request.params.max_new_tokens:
                reason = "length"
        if reason is not None and sink is not None and not isinstance(stop, str):
            text += sink.finish()
            if isinstance(sink.stopped, str):  # completed only by the text held back till now
                reason, stop = "stop", sink.stopped
        event = TokenEvent(sequence.id, token, text, logprob, reason, stop)
        if reason is None:
            self._events.append(event)
        else:
            self._end(sequence, event)

    def _end(self, sequence: Sequence, event: TokenEvent) -> None:
        """Take a sequence out for good, with its last event."""
        self._events.append(event)
        sequence.ended = time.perf_counter()
        self.scheduler.remove(sequence)
        del self._sequences[sequence.id]

    def _check(self, request: Request) -> None:
        prompt, new = len(request.prompt_ids), request.params.max_new_tokens
        if prompt == 0:
            raise ParameterError("the prompt is empty; expected at least one token (<bos> counts)")
        vocabulary = self.model.config.vocab_size
        for name, ids in (("prompt", request.prompt_ids), ("logit_bias", request.params.logit_bias)):
            bad = next((i for i in ids if type(i) is not int or not 0 <= i < vocabulary), None)
            if bad is not None:
                raise ParameterError(f"{name} has token id {bad!r}; this model's ids go from 0 to {vocabulary - 1}")
        if request.params.stop and request.text is None:
            raise ParameterError("stop texts are found in decoded text only; give the request a text (a Detokenizer)")
        if prompt + new > self.max_context:
            room = self.max_context - prompt
            advice = f"lower max_new_tokens to {room} or less" if room > 0 else "shorten the prompt"
            raise ContextLengthError(
                f"the prompt has {prompt} tokens and up to {new} new ones were asked for, {prompt + new} together; "
                f"the context holds {self.max_context}: {advice}"
            )
        size = self.cache.block_size
        needed = (
            ceil_div(prompt + new, size),
            sliding_blocks_needed(self.model.config, prompt + new, self.chunk, size),
        )
        for kind, need, have in zip(("full", "sliding"), needed, (self.cache.full, self.cache.sliding), strict=True):
            if need > have.count:
                raise CapacityError(
                    f"the request needs {need} {kind}-attention cache blocks of {size} tokens; {have.count} are "
                    f"available: give more kv_memory or ask for fewer tokens"
                )

    def _cache_shape(self, dtype: torch.dtype) -> CacheShape:
        config, size = self.model.config, self.config.block_size
        if self.config.kv_memory is None:
            return shape_for_tokens(
                config, sequences=self.config.sequences, context=self.max_context, chunk=self.chunk, block_size=size
            )
        shape = shape_for_bytes(
            config, self.config.kv_memory, dtype=dtype, context=self.max_context, chunk=self.chunk, block_size=size
        )
        if shape.full_blocks == 0:
            least = sum(bytes_per_block(config, dtype, size))
            raise CapacityError(
                f"kv_memory of {self.config.kv_memory} bytes holds no sequence; at least {least} bytes are needed"
            )
        return shape
