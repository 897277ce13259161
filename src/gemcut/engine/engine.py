"""Engine: submit requests, step, take the tokens. Everything a person does goes through here.

    submit -> [step: schedule -> run -> sample -> detokenise and check stops] -> the sequence's events

One thread steps an engine, that of its `EngineLoop`, or whoever made it. Every sequence owns its events. Exceptions may
strike at any line (Ctrl-C does): what was being changed is then made anew from the events (see ``_mend``).
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from dataclasses import dataclass, replace
from types import FrameType
from typing import Literal

import torch

from gemcut import process
from gemcut.cache_blocks import BLOCK_SIZE, ceil_div, sliding_blocks_needed
from gemcut.engine.cache import (
    CacheShape,
    PagedCache,
    Tables,
    bytes_per_block,
    shape_for_bytes,
    shape_for_tokens,
)
from gemcut.engine.edits import begin_next
from gemcut.engine.events import event_of, failure_of
from gemcut.engine.followers import Followers
from gemcut.engine.pace import step_budget
from gemcut.engine.request import Request, RowError, Sequence, Status, TokenEvent, TokenLogprob
from gemcut.engine.runner import Runner
from gemcut.engine.sampler import sample
from gemcut.engine.scheduler import Scheduled, Scheduler, load_of
from gemcut.errors import CapacityError, ContextLengthError, GemcutError, ParameterError
from gemcut.model import Model


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes of the engine.

    Attributes:
        max_context: most tokens a request may hold, prompt and answer together; the model's own limit if None.
        max_batch_size: most requests in one step; None: 256 on a GPU, 64 on a CPU.
        max_batch_tokens: most tokens in one step; a longer prompt is cut into chunks of this size.
        step_seconds: how long a step may take in which answers get their next tokens: prompts beside them are cut into
            smaller chunks, by what earlier steps took, but never below 32 tokens a step. It bounds the gap between an
            answer's tokens, and makes the prompts' first tokens come later. How prompts are cut then depends on the
            time, and with it an answer's last bits. "auto": 0.5 on a CPU, none on a GPU; None or 0: none.
        block_size: tokens a cache block holds.
        kv_memory: bytes for keys and values; None makes room for ``sequences`` whole contexts.
        sequences: how many requests of ``max_context`` the cache holds when ``kv_memory`` is None.
    """

    max_context: int | None = None
    max_batch_size: int | None = None
    max_batch_tokens: int = 512
    step_seconds: float | Literal["auto"] | None = None
    block_size: int = BLOCK_SIZE
    kv_memory: int | None = None
    sequences: int = 2


class Engine:
    """Continuous batching of any number of requests over one model."""

    def __init__(
        self,
        model: Model,
        device: torch.device,
        config: EngineConfig | None = None,
        followers: Followers | None = None,
    ) -> None:
        """``followers``: the processes that hold the rest of a network of which ``model`` is a part."""
        process.enter()
        config = config or EngineConfig()
        most = config.max_batch_size
        if most is None:
            most = 256 if device.type == "cuda" else 64
            config = replace(config, max_batch_size=most)
        self.model, self.device, self.config = model, device, config
        limit = model.config.max_position_embeddings
        self.max_context = min(config.max_context or limit, limit)
        if config.max_context is not None and not 1 < config.max_context <= limit:
            raise ParameterError(f"max_context is {config.max_context}; this model takes from 2 to {limit} tokens")
        for name in ("max_batch_size", "max_batch_tokens", "block_size", "sequences"):
            if getattr(config, name) < 1:
                raise ParameterError(f"{name} is {getattr(config, name)}; expected at least 1")
        step_seconds = step_budget(config.step_seconds, device)
        self.chunk = min(config.max_batch_tokens, self.max_context)
        self.cache = PagedCache(model.config, self._cache_shape(model.dtype), model.dtype, device)
        self.scheduler = Scheduler(
            self.cache,
            max_batch_size=most,
            max_batch_tokens=config.max_batch_tokens,
            step_seconds=step_seconds,
        )
        #: What the steps' times are measured with, in seconds.
        self.clock = time.perf_counter
        self.runner = Runner(model, self.cache, device, followers)
        if self.runner.graph_refusal is None:
            self.scheduler.most_ahead = self.max_context
        # The living requests in order of submission.
        self._sequences: dict[int, Sequence] = {}
        self._new: dict[int, Sequence] = {}  # those of them that the scheduler does not know yet
        self._unwanted: list[Sequence] = []  # those that were asked to end since it was last looked for
        self._whole = True  # False while tables, blocks and sequences are being changed
        self._call: FrameType | None = None  # the step that is under way
        self._fresh: list[TokenEvent] = []  # events that no step has returned yet
        self._told: list[Sequence] = []  # sequences whose readers do not know of their new events yet
        #: The thread that alone may start, cancel and step; None: whoever calls.
        self.owner: int | None = None

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self._sequences or self._fresh)

    def submit(self, request: Request) -> Sequence:
        """Queue a request; raises before anything starts if it can never be served.

        Raises:
            ParameterError: empty prompt, or a token id outside the vocabulary.
            ContextLengthError: prompt and answer do not fit the context.
            CapacityError: they do not fit the cache even alone.
        """
        sequence = self.prepare(request)
        self.start(sequence)
        return sequence

    def prepare(self, request: Request) -> Sequence:
        """The first half of ``submit``, for any thread: check a request and give it its state. Raises as ``submit``."""
        process.check()
        self._check(request)
        return Sequence(request)

    def start(self, sequence: Sequence) -> None:
        """The second half of ``submit``.

        Raises ParameterError where its id is in use.
        """
        self._check_owner()
        if self._sequences.get(sequence.id, sequence) is not sequence:
            raise ParameterError(f"request id {sequence.id} is already in use")
        if sequence.status is Status.NEW:
            whole, self._whole = self._whole, False  # a sink may start a request amid a step
            self._sequences[sequence.id] = self._new[sequence.id] = sequence
            self._whole = whole

    def cancel(self, request_id: int) -> bool:
        """Stop a request and give its blocks back: at once, or at the end of the step that asks for it.

        False if it has ended already.
        """
        self._check_owner()
        sequence = self._sequences.get(request_id)
        return sequence is not None and self.drop(sequence)

    def drop(self, sequence: Sequence) -> bool:
        """The same for a sequence."""
        self._check_owner()
        if sequence.finished:
            return False
        sequence.unwanted = True
        self._unwanted.append(sequence)
        if not self._within_step():
            self.tend()
        return True

    def step(self) -> list[TokenEvent]:
        """Do one step of work for all requests and return what happened since the last one, in batch order.

        Where the network fails (out of memory), the requests that make it fail end with finish reason "error", alone.
        Where Ctrl-C comes it passes through; no token is lost, and the next step goes on.
        """
        process.check()
        self._check_owner()
        if self._within_step():
            raise GemcutError("a step cannot be taken from within a step (by a text sink or a stop rule)")
        try:
            self._call = sys._getframe()
            self._mend()
            self._step()
        except BaseException:
            self._mend()
            raise
        finally:
            self._call = None
            self._tell()
        events, self._fresh = self._fresh, []
        return events

    def tend(self) -> None:
        """Let new requests in and take out those that nobody wants any more."""
        try:
            self._mend()
            self._tend()
        except BaseException:
            self._mend()
            raise
        finally:
            self._tell()

    def reset(self) -> None:
        """Forget all requests and everything in the cache."""
        self._sequences.clear()
        self._fresh.clear()
        self._unwanted.clear()
        self._whole, self._call = False, None
        self._mend()

    # ---- one at a time -------------------------------------------------------------------------------------------

    def _check_owner(self) -> None:
        if self.owner is not None and self.owner != threading.get_ident():
            raise RuntimeError(
                "this engine belongs to the thread of its EngineLoop; submit and cancel there (Gemma.loop)"
            )

    def _within_step(self) -> bool:
        """Whether the caller is called by a step (by a text sink). A step that was struck is on no stack any more."""
        frame: FrameType | None = sys._getframe(1)
        while self._call is not None and frame is not None:
            if frame is self._call:
                return True
            frame = frame.f_back
        return False

    def _tell(self) -> None:
        """Wake the readers of sequences that have new events."""
        told, self._told = self._told, []
        for sequence in told:
            sequence.wake()

    def _mend(self) -> None:
        """Where an exception struck amid changes: start all living requests again, with an empty cache and the tokens
        they have; their random numbers stay the same. May itself be interrupted and done again."""
        if self._whole:
            return
        self.runner.forget()
        for sequence in list(self._sequences.values()):
            if sequence.finished:
                sequence.status = Status.FINISHED
                self._sequences.pop(sequence.id, None)
        self._new = {i: s for i, s in self._sequences.items() if s.status is Status.NEW}
        self.scheduler.restart([s for s in self._sequences.values() if s.status is not Status.NEW])
        self._whole = True

    def _tend(self) -> None:
        for sequence in list(self._new.values()):
            self._whole = False
            self.scheduler.add(sequence)
            del self._new[sequence.id]
            self._whole = True
        asked, self._unwanted = self._unwanted, []
        # A waiting request whose reader has gone without a word is found once it runs.
        for sequence in [*asked, *self.scheduler.running]:
            if sequence.abandoned and self._sequences.get(sequence.id) is sequence:
                self._whole = False
                self._cancel(sequence)
                self._whole = True

    # ---- a step --------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        self._tend()
        self._whole = False
        batch = self.scheduler.schedule()
        self._whole = True
        if batch:
            if self.scheduler.step_seconds is None:
                self._attempt(batch)
            else:
                load, started = load_of(batch), self.clock()
                self._attempt(batch)
                self.scheduler.times.learn(load, self.clock() - started)
        self._tend()  # somebody may have cancelled from within the step

    def _attempt(self, batch: list[Scheduled]) -> None:
        """Run a batch. Where that fails, its halves are tried, until the requests that make it fail are found."""
        try:
            self._run(batch)
        except Exception as error:
            if not self._whole:  # amid our own changes
                raise
            error = self.runner.cause(error)
            self.runner.forget()
            # The request keeps the error. The failed call's local variables must go: tensors are among them.
            traceback.clear_frames(error.__traceback__)
            if len(batch) > 1:
                for part in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                    self._attempt(part)
            else:
                self._whole = False
                self._fail(batch[0].sequence, failure_of(error, batch[0].length))
                self._whole = True

    def _run(self, batch: list[Scheduled]) -> None:
        now = time.perf_counter()
        for scheduled in batch:
            scheduled.sequence.started = scheduled.sequence.started or now
        # These change nothing that matters: if one of them fails the step can be done again.
        tables = [self.scheduler.tables[s.sequence.id] for s in batch]
        ready = [(i, s.sequence) for i, s in enumerate(batch) if s.completes]
        chosen = self._chosen(batch, tables)
        self._whole = False
        failed = [batch[i].sequence for i, (token, _) in chosen.items() if isinstance(token, RowError)]
        for scheduled in batch:
            # Blocks that hold NaN are not published: another request could begin with them.
            if scheduled.sequence.failure is None and scheduled.sequence not in failed:
                self.scheduler.computed(scheduled)
        for sequence in [s.sequence for s in batch if s.sequence.failure is not None]:
            self._fail(sequence, sequence.failure or RowError(""))
        for index, sequence in ready:
            if sequence.failure is not None:
                continue
            if index in chosen:
                self._take(sequence, *chosen[index])
            else:
                self._add(sequence, TokenEvent(sequence.id, None, finish_reason="length"))
        self._whole = True

    def _chosen(
        self, batch: list[Scheduled], tables: list[Tables]
    ) -> dict[int, tuple[int | RowError, TokenLogprob | None]]:
        """The next tokens of those that want one, by place in the batch."""
        tokens = self.runner.tokens(batch, tables)
        if tokens is not None:
            return {i: (token, None) for i, token in enumerate(tokens)}
        found: dict[int, tuple[int | RowError, TokenLogprob | None]]
        found = {i: (token, None) for i, token in self.runner.computed_ahead(batch, tables).items()}
        rest = [i for i in range(len(batch)) if i not in found]
        if rest:
            rows, own = [batch[i] for i in rest], [tables[i] for i in rest]
            wants = [i for i in rest if batch[i].samples]
            likeliest = self.runner.likeliest(rows, own)
            if likeliest is not None:
                return found | {i: (token, None) for i, token in zip(wants, likeliest, strict=True)}
            logits = self.runner.run(rows, own)
            if wants:
                chosen = sample(logits, [batch[i].sequence for i in wants], self.runner.explain)
                found |= zip(wants, zip(*chosen, strict=True), strict=True)
        return found

    def _take(self, sequence: Sequence, token: int | RowError, logprob: TokenLogprob | None) -> None:
        """Add a sampled token to its sequence and see whether that ends it. Its own failures end it alone."""
        sequence.first_token = sequence.first_token or time.perf_counter()
        if isinstance(token, RowError):
            self._fail(sequence, token)
            return
        try:
            event = event_of(sequence, token, logprob)
        except Exception as error:  # of its text sink, its stop rule or its parameters
            self._fail(sequence, RowError.of(error))
        else:
            self._add(sequence, event)
            if event.finish_reason is None:
                begin_next(sequence)

    def _cancel(self, sequence: Sequence) -> None:
        try:
            text = sink.finish() if (sink := sequence.sink) is not None else ""
        except Exception as error:
            self._fail(sequence, RowError.of(error))
        else:
            self._add(sequence, TokenEvent(sequence.id, None, text=text, finish_reason="cancelled"))

    def _fail(self, sequence: Sequence, failure: RowError) -> None:
        sequence.cause = failure.cause
        self._add(sequence, TokenEvent(sequence.id, None, finish_reason="error", error=failure.message))

    def _add(self, sequence: Sequence, event: TokenEvent) -> None:
        """Give a sequence its next event; after the last one it is taken out for good."""
        if event.finish_reason is not None:
            sequence.ended = time.perf_counter()
        sequence.add(event)
        self._fresh.append(event)
        self._told.append(sequence)
        if event.finish_reason is not None:
            self.scheduler.remove(sequence)
            self._sequences.pop(sequence.id, None)

    def _check(self, request: Request) -> None:
        prompt, new = len(request.prompt_ids), request.params.max_new_tokens
        if prompt == 0:
            raise ParameterError("the prompt is empty; expected at least one token (<bos> counts)")
        vocabulary = self.model.config.vocab_size
        named = {"prompt": request.prompt_ids, "logit_bias": request.params.logit_bias}
        for name, ids in (*named.items(), ("logprobs_of", request.logprobs_of)):
            bad = next((i for i in ids if type(i) is not int or not 0 <= i < vocabulary), None)
            if bad is not None:
                raise ParameterError(f"{name} has token id {bad!r}; this model's ids go from 0 to {vocabulary - 1}")
        start = request.prompt_logprobs_from
        if start is not None and (type(start) is not int or not 1 <= start <= prompt):
            raise ParameterError(
                f"prompt_logprobs_from is {start!r}; expected a place from 1 (the second token) to {prompt}, the "
                "prompt's length"
            )
        start = request.embed_from
        if start is not None and (type(start) is not int or not 0 <= start < prompt):
            raise ParameterError(
                f"embed_from is {start!r}; expected a place from 0 (the first token) to {prompt - 1}, the prompt's last"
            )
        if request.logprobs_of and request.params.logprobs is None:
            raise ParameterError("logprobs_of needs logprobs, a number of likeliest tokens (0 will do)")
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
