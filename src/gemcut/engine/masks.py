"""GrammarEdit: a request's place in its grammar, and the thread that computes the masks of all requests.

The thread takes what jobs there are at once: the tokens of a step come together, and so do their masks.
"""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
import weakref
from collections.abc import Callable
from collections.abc import Sequence as Many
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from gemcut import process
from gemcut.engine.edits import Edit
from gemcut.engine.numbers import NumberLimits, NumberScan
from gemcut.errors import GemcutError

if TYPE_CHECKING:
    from gemcut.engine.closing import Array, Closer
    from gemcut.engine.constrain import Compiled

#: Where of all tokens that may stand in any string so many may come, any text may come.
_FREE = 0.9


@dataclass(eq=False)
class _Job:
    """The mask of one place of an answer.

    Attributes:
        base: tokens of the answer that were told before.
        tail: those that came since; ``place`` is the number of all.
    """

    edit: GrammarEdit
    base: int
    tail: list[int]
    done: threading.Event = field(default_factory=threading.Event)
    mask: torch.Tensor | None = None
    error: BaseException | None = None

    @property
    def place(self) -> int:
        return self.base + len(self.tail)

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.done.set()


class GrammarEdit:
    """The LogitsEdit of a request with a grammar.

    Attributes:
        shortened: whether the answer was closed because its tokens ran out; what it says could have been longer.
    """

    def __init__(
        self,
        masks: Masks,
        compiled: Compiled,
        ends: Many[int],
        max_new_tokens: int,
        forget: Callable[[], None],
    ) -> None:
        """``ends`` may come at the grammar's end; ``forget`` is called where the compiled grammar is of no more use."""
        self.shortened = False
        self.compiled, self.ends, self.max_new_tokens = compiled, np.array(ends, dtype=np.int64), max_new_tokens
        self.forget = forget
        # The mask's thread alone uses these: the matcher, the tokens that it has taken, the way to the end that was
        # found last, and whether text may come before it.
        self.matcher = compiled.matcher.deep_copy()
        self.taken: list[int] = []
        self.scan = self._new_scan()
        self.way: list[int] | None = None
        self.within_text = False
        self._masks = masks
        self._job = _Job(self, 0, [])
        masks.start(self._job)

    def begin(self, tokens: Many[int], prompt_length: int, /) -> None:
        """Have the mask for the token behind ``tokens`` computed."""
        self._job_for(tokens, prompt_length)

    def __call__(self, tokens: Many[int], prompt_length: int, /) -> Edit:
        """The mask for the token behind ``tokens``; waits until it is there.

        Raises GemcutError where the grammar cannot go on from there.
        """
        job = self._job_for(tokens, prompt_length)
        job.done.wait()
        if job.error is not None:
            raise job.error
        return Edit(allowed=job.mask)

    def _job_for(self, tokens: Many[int], prompt_length: int) -> _Job:
        place, job = len(tokens) - prompt_length, self._job
        if place == job.place:
            return job
        # Tokens never change, so what was told is still so; one that goes back is told all of them.
        base = job.place if job.place < place else 0
        job = _Job(self, base, list(tokens[prompt_length + base :]))
        self._masks.start(job)
        self._job = job
        return job

    def advance(self, job: _Job) -> None:
        """Bring the matcher to a job's place. Raises GemcutError where the grammar has no such place."""
        if job.base == 0 and self.taken:  # it starts again
            self.matcher, self.taken, self.way = self.compiled.matcher.deep_copy(), [], None
            self._scan_again()
        elif len(self.taken) != job.base:  # who told the last tokens was interrupted, and tells them again
            surplus = len(self.taken) - job.base
            if surplus < 0 or not self.matcher.rollback(surplus):
                raise self.refusal()
            del self.taken[job.base :]
            self.way = None
            self._scan_again()
        for token in job.tail:
            if self.way is not None:
                self._follow(token)
            if not self.matcher.consume_token(token):
                raise self.refusal()
            self.taken.append(token)
            if self.scan is not None:
                self.scan.feed(self._masks.text_of(token))

    def _scan_again(self) -> None:
        self.scan = self._new_scan()
        if self.scan is not None:
            for token in self.taken:
                self.scan.feed(self._masks.text_of(token))

    def _new_scan(self) -> NumberScan | None:
        return NumberScan(or_words=self.compiled.or_words) if self.compiled.json else None

    def _follow(self, token: int) -> None:
        """Keep the way to the end where ``token`` is its first step, or text within a string that it closes."""
        assert self.way is not None
        if self.way and self.way[0] == token:
            self.way, self.within_text = self.way[1:], False
        elif not (self.within_text and self._masks.ends_string(self.way[0]) and self._masks.is_plain(token)):
            self.way = None

    def refusal(self) -> GemcutError:
        """Why the matcher cannot go on, in one line."""
        self.forget()
        words = " ".join(self.matcher.get_error().split("<backtrace>")[0].split("<state>")[0].split())
        return GemcutError(f"the grammar cannot go on: {words[:300] or 'it allows no further token'}")


class Masks:
    """The thread that computes masks, and two workers for the ways to the end."""

    def __init__(self, tokens: Many[bytes], end_id: int, closer: Closer) -> None:
        """``tokens`` are the texts of the V tokens, ``end_id`` the one with which llguidance ends an answer."""
        self._state = _State(tokens, end_id, closer)
        self._starting = threading.Lock()
        _states.add(self._state)
        weakref.finalize(self, self._state.inbox.put, None).atexit = False

    def start(self, job: _Job) -> None:
        """Compute a job's mask."""
        self._state.inbox.put(job)
        thread = self._state.thread
        if thread is None or not thread.is_alive():
            with self._starting:
                thread = self._state.thread
                if thread is None or not thread.is_alive():
                    self._state.thread = _threads.start(_work, self._state)

    def is_plain(self, token: int) -> bool:
        """Whether a token may stand within any string."""
        return bool((int(self._state.closer.plain[token >> 5]) >> (token & 31)) & 1)

    def text_of(self, token: int) -> bytes:
        """A token's bytes."""
        return self._state.tokens[token]

    def ends_string(self, token: int) -> bool:
        """Whether a token begins with a quotation mark."""
        return token in self._state.closer.quotes


class _State:
    """What the thread works with; it does not hold the Masks, so that dropping that one ends the thread."""

    def __init__(self, tokens: Many[bytes], end_id: int, closer: Closer) -> None:
        from llguidance import LLExecutor

        self.tokens, self.words = tokens, -(-len(tokens) // 32)
        self.end_id, self.closer = end_id, closer
        self.numbers = NumberLimits(tokens)
        self.inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None
        self.executor = LLExecutor()
        self.closers = ThreadPoolExecutor(2, thread_name_prefix="gemcut-closing")


def _work(state: _State) -> None:
    while (job := state.inbox.get()) is not None:
        jobs, last = [job], False
        with contextlib.suppress(queue.Empty):
            while True:
                job = state.inbox.get_nowait()
                if job is None:
                    last = True
                    break
                jobs.append(job)
        while jobs:
            # One job of a request at a time: each is a place of its matcher.
            now = list({id(job.edit): job for job in reversed(jobs)}.values())[::-1]
            jobs = [job for job in jobs if job not in now]
            try:
                _compute(state, now)
            except BaseException as error:  # a bug; whoever waits is told
                for job in now:
                    if not job.done.is_set():
                        job.fail(error)
        del job
        if last:
            return


def _compute(state: _State, jobs: list[_Job]) -> None:
    ready: list[_Job] = []
    for job in jobs:
        try:
            job.edit.advance(job)
            ready.append(job)
        except BaseException as error:
            job.fail(error)
    if not ready:
        return
    masks = torch.empty((len(ready), state.words), dtype=torch.int32)
    rows = masks.numpy()
    if len(ready) == 1:
        ready[0].edit.matcher.unsafe_compute_mask_ptr(rows.ctypes.data, rows.nbytes)
    else:
        numbered = [(job.edit.matcher, index) for index, job in enumerate(ready)]
        state.executor.unsafe_compute_mask_ptr(numbered, rows.ctypes.data, state.words * 4, len(ready))
    for job, row, mask in zip(ready, rows, masks, strict=True):
        edit = job.edit
        if edit.matcher.is_error():
            job.fail(edit.refusal())
            continue
        job.mask = mask
        if edit.scan is not None:
            state.numbers.narrow(row, edit.scan)
        may_end = _end_bits(row, state.end_id, edit.ends)
        if edit.max_new_tokens - job.place <= edit.compiled.reserve:
            state.closers.submit(_close, state.closer, job, row, may_end)
        else:
            job.done.set()


def _end_bits(row: Array, end_id: int, ends: Array) -> bool:
    """Put the request's stop tokens in the place of the one that llguidance knows. Gives whether it may end."""
    word, bit = end_id >> 5, np.int32(np.uint32(1 << (end_id & 31)).view(np.int32))
    may_end = bool(row[word] & bit)
    row[word] &= ~bit
    if may_end:
        np.bitwise_or.at(row, ends >> 5, _bit_of(ends))
    return may_end


def _bit_of(ids: Array) -> Array:
    return (np.uint32(1) << (ids & 31).astype(np.uint32)).view(np.int32)


def _close(closer: Closer, job: _Job, row: Array, may_end: bool) -> None:
    """Leave of a mask only what the tokens that are left allow."""
    try:
        _narrow(closer, job, row, may_end)
    except BaseException as error:
        job.fail(error)
    finally:
        job.done.set()


def _narrow(closer: Closer, job: _Job, row: Array, may_end: bool) -> None:
    edit = job.edit
    if may_end:
        edit.way = []
    elif edit.way is None:
        edit.way, edit.within_text = closer.way(edit.matcher), False
    if edit.way is None:  # no end was found: the answer ends as it is, with finish reason "length"
        return
    slack = edit.max_new_tokens - job.place - len(edit.way)
    if slack > edit.compiled.growth:
        return
    before = row.copy()
    free = before & closer.plain
    any_text = int(np.unpackbits(free.view(np.uint8)).sum()) >= _FREE * closer.plain_count
    if may_end and any_text:  # words, which may end anywhere
        return
    edit.within_text = bool(edit.way) and slack > 1 and any_text
    row[:] = free if edit.within_text else 0
    only = edit.ends if may_end else np.array(edit.way[:1], dtype=np.int64)
    np.bitwise_or.at(row, only >> 5, _bit_of(only))
    edit.shortened = edit.shortened or bool((row != before).any())


_states: weakref.WeakSet[_State] = weakref.WeakSet()
_threads = process.Threads("gemcut-masks")


@atexit.register
def _end_all() -> None:
    for state in list(_states):
        state.inbox.put(None)
    _threads.join()
