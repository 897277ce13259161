"""Scheduler: which tokens of which requests go through the network in the next step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from gemcut.engine.blocks import BlockKey
from gemcut.engine.cache import PagedCache, Tables
from gemcut.engine.pace import Load, StepTimes
from gemcut.engine.request import Sequence, Status

# A sequence waits for a beginning that another one computes where that is so much of what it has to compute itself: a
# step later it starts, and a step is longer than a short beginning takes.
LEAST_SHARED = 0.25
# So many sequences that wait so are passed over in looking for one that does not.
MOST_LATER = 256


class Later(Enum):
    """Stands in the place of a sequence's part of a step where it had better start in a later one."""

    LATER = 0


LATER = Later.LATER


@dataclass(frozen=True)
class Scheduled:
    """A sequence's part of one step: its next ``length`` tokens that have no keys and values yet."""

    sequence: Sequence
    length: int

    @property
    def completes(self) -> bool:
        """Whether the next token can be sampled after this step."""
        return self.sequence.computed + self.length == len(self.sequence.tokens)

    @property
    def samples(self) -> bool:
        """Whether the next token is wanted, too."""
        return self.completes and self.sequence.request.params.max_new_tokens > 0

    @property
    def scored(self) -> range:
        """The places of the prompt tokens to be scored behind this step: each by the hidden state one place before."""
        first, start = self.sequence.next_scored, self.sequence.computed
        if first is None:
            return range(0)
        return range(max(first, start + 1), min(start + self.length + 1, self.sequence.prompt_length))

    @property
    def embedded(self) -> range:
        """The places of the prompt tokens whose hidden states are summed behind this step."""
        first, start = self.sequence.next_embedded, self.sequence.computed
        if first is None:
            return range(0)
        return range(max(first, start), min(start + self.length, self.sequence.prompt_length))


def load_of(batch: Iterable[Scheduled]) -> Load:
    """What a step computes, to be called before it is done."""
    prompt = answers = context = 0
    for scheduled in batch:
        if scheduled.length == 1:
            answers, context = answers + 1, context + scheduled.sequence.computed + 1
        else:
            prompt += scheduled.length
    return Load(prompt, answers, context)


class Scheduler:
    """First come, first served. Running requests go on before waiting ones start; a long prompt is cut into chunks
    that share a step with the others' next tokens. When blocks run out the request that came last gives its own back
    and waits at the front; it computes its tokens again later (its random numbers stay the same).

    With ``step_seconds`` a step in which answers get their next tokens has as many prompt tokens beside them as will
    not make it longer, by what ``times`` has learned.
    """

    def __init__(
        self, cache: PagedCache, *, max_batch_size: int, max_batch_tokens: int, step_seconds: float | None = None
    ) -> None:
        self.cache = cache
        self.max_batch_size, self.max_batch_tokens = max_batch_size, max_batch_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.tables: dict[int, Tables] = {}  # of running sequences
        self.preemptions = 0
        self.step_seconds, self.times = step_seconds, StepTimes()
        #: Where steps are computed ahead: up to which length sequences get blocks for the step behind the next one.
        self.most_ahead = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)
        sequence.status = Status.WAITING

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out for good, wherever it is."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED

    def restart(self, sequences: Iterable[Sequence]) -> None:
        """Forget all tables and blocks and let ``sequences`` start again, in that order, keeping their tokens."""
        self.cache.forget()
        self.tables.clear()
        self.running.clear()
        self.waiting = deque(sequences)
        for sequence in self.waiting:
            sequence.restore()

    def schedule(self) -> list[Scheduled]:
        """Choose the next step's work and take the blocks it needs.

        Sequences with one token to compute come first: their rows are neighbours, as kernels want them.
        """
        batch: list[Scheduled] = []
        budget = self.max_batch_tokens
        prompt = self._prompt_allowance()
        preempted = False
        index = 0
        while index < len(self.running) and budget > 0:
            sequence = self.running[index]
            length = min(sequence.pending, budget)
            if prompt is not None and sequence.pending > 1:
                length = min(length, prompt)
                if length == 0:
                    index += 1
                    continue
            if not self.cache.holds(self.tables[sequence.id], sequence.computed + length):
                while (missing := self._shortfall(sequence, length)) and self.running[-1] is not sequence:
                    self._preempt(self.running[-1])
                    preempted = True
                if missing:  # it came last itself
                    self._preempt(sequence)
                    preempted = True
                    break
                self.cache.extend(self.tables[sequence.id], sequence.computed, length)
            batch.append(Scheduled(sequence, length))
            budget -= length
            if prompt is not None and sequence.pending > 1:
                prompt -= length
            index += 1
        if not preempted and self.waiting:
            self._start_waiting(batch, budget if prompt is None else min(budget, prompt))
        for scheduled in batch if self.most_ahead else ():
            behind = scheduled.sequence.computed + 2
            if scheduled.length == 1 and behind <= self.most_ahead:
                self.cache.reserve(self.tables[scheduled.sequence.id], behind)
        return sorted(batch, key=lambda scheduled: scheduled.length > 1)

    def _prompt_allowance(self) -> int | None:
        """The most prompt tokens of this step; None: as many as come, since no answer waits for its next token."""
        if self.step_seconds is None:
            return None
        answers = [sequence for sequence in self.running if sequence.pending == 1]
        if not answers:
            return None
        context = sum(len(sequence.tokens) for sequence in answers)
        most = max(0, self.max_batch_tokens - len(answers))  # answers first
        return self.times.prompt_tokens(len(answers), context, self.step_seconds, most)

    def _start_waiting(self, batch: list[Scheduled], budget: int) -> None:
        """Let waiting sequences into the batch, in their order, but for those whose beginning is just being computed
        for another one: they take it over when it is there."""
        coming: set[BlockKey] = set()
        for sequence in self.running:
            self._announce(sequence, coming)
        later = 0
        while budget > 0 and len(self.running) < self.max_batch_size and later < min(len(self.waiting), MOST_LATER):
            sequence = self.waiting[later]
            scheduled = self._start(sequence, budget, coming)
            if scheduled is LATER:
                later += 1
                continue
            if not isinstance(scheduled, Scheduled):
                return
            del self.waiting[later]
            self._announce(sequence, coming)
            batch.append(scheduled)
            budget -= scheduled.length

    def _announce(self, sequence: Sequence, coming: set[BlockKey]) -> None:
        """Add the blocks that ``sequence`` still has to compute to those that come."""
        if sequence.pending > 1:
            published = self.tables[sequence.id].published
            count = len(sequence.tokens) // self.cache.block_size
            keys = self.cache.keys(sequence.tokens, sequence.block_keys, count, sequence.root_key)
            coming.update(keys[published:])

    def _comes(self, sequence: Sequence, cached: int, coming: set[BlockKey]) -> bool:
        """Whether enough of what ``sequence`` lacks, behind its ``cached`` tokens, is computed for others now."""
        if not coming:
            return False
        size, end = self.cache.block_size, len(sequence.tokens)
        usable = (min(end, sequence.cacheable or end) - 1) // size
        keys = self.cache.keys(sequence.tokens, sequence.block_keys, usable, sequence.root_key)
        shared = cached // size
        while shared < usable and keys[shared] in coming:
            shared += 1
        return shared * size - cached >= LEAST_SHARED * (end - cached)

    def computed(self, scheduled: Scheduled) -> None:
        """Note that a step is done: its blocks may be shared and those out of the window given back."""
        sequence, tables = scheduled.sequence, self.tables[scheduled.sequence.id]
        sequence.computed += scheduled.length
        self.cache.publish(tables, sequence.tokens, sequence.block_keys, sequence.computed, sequence.root_key)
        self.cache.free_out_of_window(tables, sequence.computed)

    def _shortfall(self, sequence: Sequence, length: int) -> int:
        return self.cache.shortfall(self.tables[sequence.id], sequence.computed, length)

    def _start(self, sequence: Sequence, budget: int, coming: set[BlockKey]) -> Scheduled | Later | None:
        """Move a waiting sequence to the running ones if blocks for its whole prompt are there; None: they are not.

        Its place among the waiting is the caller's to clear.
        Where others run it must be so in both groups: it would lose what it had computed again and again otherwise.
        """
        tables, cached = self.cache.match_prefix(
            sequence.tokens, sequence.block_keys, sequence.cacheable, sequence.root_key
        )
        if self._comes(sequence, cached, coming):
            return LATER
        self.cache.adopt(tables)
        pending = len(sequence.tokens) - cached
        length = min(pending, budget)
        room = not self.running or self.cache.has_room(tables, len(sequence.tokens) + 1, self.max_batch_tokens)
        if not room or self.cache.shortfall(tables, cached, length):
            self.cache.release(tables)
            return None
        self.running.append(sequence)
        self.tables[sequence.id] = tables
        sequence.status, sequence.computed = Status.RUNNING, cached
        if sequence.preemptions == 0:
            sequence.cached_tokens = cached
        self.cache.extend(tables, cached, length)
        return Scheduled(sequence, length)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.status, sequence.computed = Status.WAITING, 0
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.cache.release(self.tables.pop(sequence.id))
