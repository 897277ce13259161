"""EngineLoop: the one thread that steps an engine, and the messages that everybody else sends it.

    start -> inbox -> [thread: take messages in -> engine.step] -> the sequence's events -> who waits for them

``start`` and ``cancel`` put a message into the inbox and return; no caller waits for a step. A caller that waits for
events is woken by its own sequence alone, and an error reaches the requests that it concerns and no others.
"""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
import weakref
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import torch

from gemcut import process
from gemcut.engine.engine import Engine
from gemcut.engine.request import Request, RowError, Sequence, TokenEvent
from gemcut.errors import GemcutError, ParameterError

# Seconds after which one who waits looks whether the thread still lives (and, on Windows, for Ctrl-C).
_LOOK_AGAIN = 0.25
# Seconds within which a thread has started, or was interrupted.
_START_SECONDS = 1.0


@dataclass(eq=False)
class _State:
    """What the thread works with. It does not hold the EngineLoop, so that dropping that one ends the thread."""

    engine: Engine
    #: Sequences to start together, one to cancel, or None: the thread shall end.
    inbox: queue.SimpleQueue[list[Sequence] | Sequence | None] = field(default_factory=queue.SimpleQueue)
    #: Every sequence that was sent and has not ended, by id.
    living: dict[int, Sequence] = field(default_factory=dict)
    thread: threading.Thread | None = None
    #: Held by the thread, so that there is one.
    at_work: threading.Lock = field(default_factory=threading.Lock)
    #: How many threads PyTorch uses in the thread that sent the last request. PyTorch keeps that number per thread.
    threads: int = 0
    #: Hears the events of each step.
    listener: Callable[[Many[TokenEvent]], None] | None = None


class EngineLoop:
    """Owns the thread that steps an engine. Any thread, and any asyncio task, may call its methods.

    The thread starts with the first request and ends with ``close``, or when nobody holds the loop any more.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._state = _State(engine)
        self._starting = threading.Lock()
        _states.add(self._state)
        weakref.finalize(self, self._state.inbox.put, None).atexit = False

    @property
    def busy(self) -> bool:
        """Whether a request has not ended."""
        return bool(self._state.living)

    def listen(self, listener: Callable[[Many[TokenEvent]], None] | None) -> None:
        """Have ``listener`` called with all events of each step, in the loop's thread; None: nobody any more.

        One call a step, for who serves many requests; `wait` and TextStream need it not. An event may come twice, and
        the last ones may come from another thread. It must neither raise nor wait.
        """
        self._state.listener = listener

    def prepare(self, request: Request) -> Sequence:
        """Check a request and give it its state, without starting it. Raises as `Engine.submit` does."""
        return self.engine.prepare(request)

    def submit(self, request: Request) -> Sequence:
        """Check a request and start it. Returns at once; raises as `Engine.submit` does."""
        sequence = self.prepare(request)
        self.start([sequence])
        return sequence

    def start(self, sequences: Many[Sequence]) -> None:
        """Start requests. They enter the engine together, so that their first step does not depend on timing.

        Raises ParameterError where the id of one is in use; then none of them starts.
        """
        process.check()
        state, sent = self._state, list(sequences)
        for place, sequence in enumerate(sent):
            if state.living.setdefault(sequence.id, sequence) is not sequence:
                for earlier in sent[:place]:
                    state.living.pop(earlier.id, None)
                raise ParameterError(f"request id {sequence.id} is already in use")
        state.threads = torch.get_num_threads()
        state.inbox.put(sent)
        self._run()

    def cancel(self, sequence: Sequence) -> bool:
        """Ask for the end of a request; its blocks come back behind the step that is under way.

        False if it has ended already.
        """
        if sequence.finished:
            return False
        sequence.unwanted = True
        if self._state.living.get(sequence.id) is sequence:
            self._state.inbox.put(sequence)
        return True

    def wait(self, sequence: Sequence, seen: int) -> None:
        """Sleep until ``sequence`` has more than ``seen`` events, or has ended.

        Raises:
            GemcutError: the caller is the loop's own thread (a text sink), for which nobody would do the steps.
            RuntimeError: the request was never started here.
        """
        process.check()
        if self._state.thread is threading.current_thread():
            raise GemcutError("an answer cannot be waited for within a step (by a text sink or a stop rule)")
        while len(sequence.events) <= seen and not sequence.finished:
            woken = threading.Lock()
            woken.acquire()
            sequence.when_more(seen, woken.release)
            if not woken.acquire(timeout=_LOOK_AGAIN):
                self.check(sequence)

    def check(self, sequence: Sequence) -> None:
        """See that somebody works for ``sequence``. A thread that was killed is replaced.

        Raises RuntimeError where the request was never started here.
        """
        if self._state.living.get(sequence.id) is sequence:
            self._run()
        elif not sequence.finished:
            raise RuntimeError(f"request {sequence.id} is not in this engine")

    def close(self) -> None:
        """End the thread; waits for the step that is under way. Requests that are not finished are cancelled.

        Raises GemcutError where the caller is that thread itself (a text sink).
        """
        if self._state.thread is threading.current_thread():
            raise GemcutError("the engine cannot be closed within a step (by a text sink or a stop rule)")
        for sequence in list(self._state.living.values()):
            self.cancel(sequence)
        _end(self._state)

    def _run(self) -> None:
        """See that the thread runs."""
        thread = self._state.thread
        if thread is None or not thread.is_alive():
            # Who is interrupted at a bad moment leaves it locked. So nobody waits for it without end, and who goes on
            # unlocks it for all; that two threads do not work at once is seen to by `at_work`.
            try:
                self._starting.acquire(timeout=_START_SECONDS)
                thread = self._state.thread
                if thread is None or not thread.is_alive():
                    _start_thread(self._state)
            finally:
                with contextlib.suppress(RuntimeError):  # it is not locked any more
                    self._starting.release()


def _start_thread(state: _State) -> None:
    state.thread = _threads.start(_work, state)


def _work(state: _State) -> None:
    """The thread: step while there is work, sleep while there is none."""
    engine, failed = state.engine, False
    if not state.at_work.acquire(timeout=_START_SECONDS):
        return  # Another thread works already: Ctrl-C came after its start, before it was seen to run.
    try:
        state.thread = threading.current_thread()
        engine.owner = threading.get_ident()
        if engine.device.type == "cuda":
            torch.cuda.set_device(engine.device)
        while _take_in(state):
            state.thread = threading.current_thread()  # in place of one started beside this one
            if torch.get_num_threads() != state.threads:
                torch.set_num_threads(state.threads)
            events = engine.step()
            for event in events:
                if event.finish_reason is not None:
                    state.living.pop(event.request_id, None)
            if events and state.listener is not None:
                state.listener(events)
    except BaseException as error:
        # The engine ends what fails on a request's own account, so this is a bug, or somebody killed the thread.
        failed = True
        if not _fail(state, error):
            raise
    finally:
        engine.owner = state.thread = None
        state.at_work.release()
        if failed and state.living:
            # A request that came while this thread was ending saw it alive, and so nobody started another.
            _start_thread(state)


def _take_in(state: _State) -> bool:
    """Take all messages in; sleeps until there is one where the engine has no work. False: the thread shall end."""
    with contextlib.suppress(queue.Empty):
        wait = not state.engine.has_work
        while (message := state.inbox.get() if wait else state.inbox.get_nowait()) is not None:
            wait = False
            if isinstance(message, Sequence):
                state.engine.drop(message)
                continue
            for sequence in message:
                if not sequence.finished:
                    state.engine.start(sequence)
        return False
    return True


def _fail(state: _State, error: BaseException) -> bool:
    """End every request with the reason why the thread cannot go on, and leave an empty engine to the next one.

    False where there was no request that could be told.
    """
    failure = RowError(f"the engine's thread ended: {RowError.of(error).message}", error)
    try:
        state.engine.reset()
    finally:
        told = _end_living(state, failure)
    return told


def _end_living(state: _State, failure: RowError) -> bool:
    """End every request that is left. One that is sent meanwhile stays in the inbox, for another thread."""
    living = list(state.living.items())
    for request_id, sequence in living:
        sequence.end_with(failure)
        state.living.pop(request_id, None)
    if living and state.listener is not None:
        state.listener([sequence.events[-1] for _, sequence in living])
    return bool(living)


def _end(state: _State) -> None:
    thread = state.thread
    if thread is not None and thread.is_alive():
        state.inbox.put(None)
        thread.join()
    _end_living(state, RowError("the engine was closed"))


_states: weakref.WeakSet[_State] = weakref.WeakSet()
_threads = process.Threads("gemcut-engine")


@atexit.register
def end_all() -> None:
    """End every loop of this process, and wait for its thread."""
    states = list(_states)
    # The second time for a thread that a waiting reader has started meanwhile.
    for _ in range(2):
        for state in states:
            state.inbox.put(None)
        _threads.join()
        for state in states:
            _end_living(state, RowError("the engine was closed"))
