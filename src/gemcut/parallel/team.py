"""Team: the leading process's view of the processes that hold the rest of its network.

The leader schedules, samples and talks to callers; of each step it tells the workers the batch, and they run the same
network on it. A thread watches the workers: when one is gone, whatever waits for it is ended, and everything that is
asked afterwards ends with the cause.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemcut import process
from gemcut.config import GemmaConfig
from gemcut.engine.cache import CacheShape, Tables
from gemcut.engine.loop import end_all
from gemcut.errors import CommunicationError, UnsupportedError
from gemcut.model.key_values import Span
from gemcut.parallel.communicator import GroupCommunicator, connect
from gemcut.parallel.messages import (
    CACHE,
    END,
    FAILED,
    HEAD,
    LOADED,
    LOST,
    READY,
    STEP,
    Job,
    Worker,
    batch_message,
    receive,
    send,
    start,
)
from gemcut.parallel.shape import Share
from gemcut.parallel.split import Split

_LOOK_AGAIN = 0.25  # seconds between two looks at processes that say nothing
_CAUSE_SECONDS = 1.0  # within which the reason of a lost connection is known
_END_SECONDS = 5.0  # that a worker has to end by itself
_AGAIN = "load the model again"


@dataclass(eq=False)
class _State:
    """What the watching thread works with. It does not hold the Team, so that dropping that one ends it."""

    workers: list[Worker]
    folder: tempfile.TemporaryDirectory[str]
    communicator: GroupCommunicator | None = None
    failure: str | None = None
    failed: threading.Event = field(default_factory=threading.Event)
    news: threading.Condition = field(default_factory=threading.Condition)
    #: Of each rank the last thing it said: READY, or LOADED with its free memory.
    said: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    closing: bool = False


class Team:
    """Ranks 1 to n - 1, as gemcut.engine.followers.Followers. ``Team.start`` makes one; ``close`` ends it."""

    def __init__(self, state: _State) -> None:
        self._state = state
        self._turn = threading.RLock()  # held while all ranks are amid one thing
        self._amid = False
        self.split: Split | None = None
        self._finalizer = weakref.finalize(self, _end, state)
        self._finalizer.atexit = False  # the workers end with this process by themselves

    @classmethod
    def start(cls, jobs: Sequence[Job], config: GemmaConfig, device: torch.device) -> Team:
        """Start the processes of ``jobs`` (ranks 1 and up) and meet them; they load their weights meanwhile.

        Args:
            jobs: one a rank; the folder that they name is filled in here.
            config: the whole network's.
            device: the leader's.

        Raises CommunicationError where one of them fails.
        """
        folder = tempfile.TemporaryDirectory(prefix="gemcut-", ignore_cleanup_errors=True)
        state = _State([], folder)
        team = cls(state)
        try:
            for job in jobs:
                state.workers.append(start(_replace(job, folder=folder.name)))
            _states.add(state)
            _watchers.start(_watch, state)
            team._await(READY)
            size = len(jobs) + 1
            communicator = team._patiently(lambda: connect(jobs[0].backend, Path(folder.name), 0, size, device))
            communicator.explain = team.explain
            state.communicator = communicator
            team._patiently(lambda: communicator.verify(device))
            communicator.check = team._check_amid
            team.split = Split(config, Share(0, size), communicator, team.head)
        except BaseException:
            team.close()
            raise
        return team

    @property
    def config(self) -> GemmaConfig:
        """The whole network's shape."""
        assert self.split is not None
        return self.split.config

    @property
    def pids(self) -> list[int]:
        """The workers' process ids, by rank from 1."""
        return [worker.process.pid for worker in self._state.workers]

    @property
    def devices(self) -> list[str]:
        """The workers' devices, by rank from 1."""
        return [worker.device for worker in self._state.workers]

    def loaded(self) -> int:
        """Wait until all have their weights; the least memory that one of them has left, in bytes."""
        self._await(LOADED)
        return min(int(said[1]) for said in self._state.said.values())

    def close(self) -> None:
        """End the workers."""
        self._finalizer()

    # ---- Followers -----------------------------------------------------------------------------------------------

    def open(self, shape: CacheShape) -> None:
        """See Followers."""
        with self._turn:
            self._send(CACHE, shape.block_size, shape.full_blocks, shape.sliding_blocks)

    @contextlib.contextmanager
    def step(
        self, ids: list[int], positions: list[int], spans: Sequence[Span], tables: Sequence[Tables], wanted: list[int]
    ) -> Iterator[None]:
        """See Followers."""
        with self._all_amid(STEP, *batch_message(ids, positions, spans, tables, wanted)):
            yield

    @contextlib.contextmanager
    def head(self, hidden: Tensor, best: bool) -> Iterator[None]:
        """Have the workers compute the head of ``hidden`` [n, hidden] too; within the context this process does."""
        with self._all_amid(HEAD, *hidden.shape, best):
            assert self.split is not None
            self.split.communicator.broadcast(hidden if hidden.is_contiguous() else hidden.contiguous())
            yield

    def explain(self, error: Exception) -> Exception:
        """See Followers."""
        if self._amid and not isinstance(error, CommunicationError):
            # A worker that died closed its connection first; its cause is known a moment later.
            lost = self._state.failed.wait(_CAUSE_SECONDS if isinstance(error, RuntimeError) else 0.0)
            if not lost or isinstance(error, torch.OutOfMemoryError | MemoryError):
                _fail(self._state, f"device 0 failed amid a step ({type(error).__name__}: {_line(error)}); {_AGAIN}")
        return error if self._state.failure is None else CommunicationError(self._state.failure)

    def forget(self) -> None:
        """See Followers."""
        if self._amid:
            _fail(self._state, f"a step was interrupted while several devices were amid it; {_AGAIN}")

    # ---- the rest ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _all_amid(self, *message: Any) -> Iterator[None]:
        with self._turn:
            self._check()
            self._send(*message)
            self._amid = True
            yield
            self._amid = False

    def _check(self) -> None:
        if self._state.closing:
            raise CommunicationError(f"this model was closed; {_AGAIN}")
        if self._amid:
            self.forget()
        if self._state.failure is not None:
            raise CommunicationError(self._state.failure)

    def _check_amid(self) -> None:
        if not self._amid:
            raise UnsupportedError("a network that is split over several devices runs through its engine alone")

    def _send(self, *message: Any) -> None:
        try:
            for worker in self._state.workers:
                send(worker.connection, *message)
        except OSError as error:
            self._state.failed.wait(_CAUSE_SECONDS)
            raise CommunicationError(self._state.failure or f"a worker is gone ({_line(error)}); {_AGAIN}") from None

    def _await(self, kind: str) -> None:
        """Wait until every worker has said so. Raises CommunicationError with the cause where one has failed."""
        state = self._state
        with state.news:
            while state.failure is None and not all(
                state.said.get(worker.rank, ("",))[0] == kind for worker in state.workers
            ):
                state.news.wait(_LOOK_AGAIN)
        if state.failure is not None:
            raise CommunicationError(state.failure)

    def _patiently(self, work: Callable[[], Any]) -> Any:
        """``work()``, which waits for the workers, in a thread of its own as long as none of them has failed."""
        found: list[Any] = []

        def run() -> None:
            try:
                found.append((True, work()))
            except BaseException as error:
                found.append((False, error))

        thread = _threads.start(run)
        while thread.is_alive():
            thread.join(0.02)
            if self._state.failure is not None:
                break
        thread.join(_CAUSE_SECONDS)
        if found and isinstance(found[0][1], RuntimeError):  # a connection was lost: the reason is known in a moment
            self._state.failed.wait(_CAUSE_SECONDS)
        if self._state.failure is not None or not found:
            raise CommunicationError(self._state.failure or f"the devices did not meet; {_AGAIN}")
        good, value = found[0]
        if not good:
            raise value
        return value


def _replace(job: Job, **changes: Any) -> Job:
    from dataclasses import replace

    return replace(job, **changes)


def _watch(state: _State) -> None:
    """The thread: hear what the workers say, until they are told to end or one is gone."""
    by_connection: dict[Any, Worker] = {worker.connection: worker for worker in state.workers}
    lost: list[str] = []
    lost_at: float | None = None
    while not state.closing and state.failure is None:
        for connection in wait(list(by_connection), _LOOK_AGAIN):
            worker = by_connection[connection]
            name = f"device {worker.rank} ({worker.device})"
            try:
                message = receive(worker.connection)
            except (EOFError, OSError):
                del by_connection[connection]
                if not state.closing:
                    lost.append(f"{name}: {_ended(worker)}")
                    if _ended_oddly(worker):
                        _fail(state, f"{lost[-1]}; {_AGAIN}")
                        return
                    lost_at = lost_at or time.monotonic()
                continue
            if message[0] == FAILED:
                _fail(state, f"{name}: {message[1]}")
                return
            if message[0] == LOST:  # another one is the cause, and will say so or be found dead
                lost_at = lost_at or time.monotonic()
                continue
            with state.news:
                state.said[worker.rank] = message
                state.news.notify_all()
        if lost_at is not None and time.monotonic() - lost_at > _CAUSE_SECONDS / 2:
            _fail(state, f"{(lost or ['a device lost its connection to another one'])[0]}; {_AGAIN}")


def _ended(worker: Worker) -> str:
    """How a worker's process ended, in words."""
    try:
        code = worker.process.wait(_CAUSE_SECONDS)
    except Exception:
        return "its process closed its connection"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with status {code}"


def _ended_oddly(worker: Worker) -> bool:
    """Whether the process ended otherwise than behind a message of its own."""
    return worker.process.poll() != 0


def _fail(state: _State, failure: str) -> None:
    """The team cannot go on: wake everybody who waits, and end the others' processes."""
    with state.news:
        if state.failure is None and not state.closing:
            state.failure = failure
        state.news.notify_all()
    state.failed.set()
    for worker in state.workers:
        with contextlib.suppress(OSError):
            worker.process.kill()
    if state.communicator is not None:
        state.communicator.abort()


def _end(state: _State) -> None:
    """Tell the workers to end; who does not, is ended."""
    state.closing = True
    for worker in state.workers:
        with contextlib.suppress(OSError):
            send(worker.connection, END)
        with contextlib.suppress(OSError):
            os.close(worker.life)
    deadline = time.monotonic() + _END_SECONDS
    for worker in state.workers:
        with contextlib.suppress(Exception):
            worker.process.wait(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(OSError):
            worker.process.kill()
        with contextlib.suppress(Exception):
            worker.process.wait(_END_SECONDS)
    state.folder.cleanup()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


_states: weakref.WeakSet[_State] = weakref.WeakSet()
_threads = process.Threads("gemcut-team")
_watchers = process.Threads("gemcut-watch")


@atexit.register
def _end_all() -> None:
    """Wait for the watchers: one may be ending a connection, in C++ that must not be unwound (see process.Threads)."""
    end_all()  # first: where a worker is gone, a loop that waits for it needs the watcher to be told
    for state in list(_states):
        state.closing = True
    _watchers.join()
