"""Jobs on the processes of this machine. One that is killed gives its job to another; nothing else is lost."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from gemcut.errors import DataError

#: Hears how far a job is: (number of the job, bytes of text it has read so far, documents read, documents dropped).
Progress = Callable[[int, int, int, int], None]
Work = Callable[[Any, Progress], Any]
#: Carries out independent jobs, wherever: (work, jobs, done, progress), as ``run_jobs`` says.
Executor = Callable[[Work, Sequence[Any], Callable[[int, Any], None], Progress], None]
_EVERY = 0.2  # seconds between two reports of a worker
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TRIES = 2


def run_jobs(
    work: Work,
    jobs: Sequence[Any],
    workers: int,
    done: Callable[[int, Any], None],
    progress: Progress,
) -> None:
    """Call ``work(job, progress)`` for each job; ``done(number, result)`` in this process as each one ends.

    Jobs are independent: where one fails the others are finished before the error of the first is raised. A full disk
    ends everything at once. ``work`` and jobs must be picklable where ``workers`` is more than 1.

    Raises:
        DataError: a worker was killed twice with the same job.
        Exception: what the first failed job raised.
    """
    if workers == 1 or len(jobs) <= 1:
        failed: dict[int, BaseException] = {}
        for number, job in enumerate(jobs):
            try:
                done(number, work(job, lambda _, *how_far, at=number: progress(at, *how_far)))
            except Exception as error:
                if is_full(error):
                    raise
                failed[number] = error
        raise_first(failed, len(jobs))
        return
    _Pool(work, jobs, min(workers, len(jobs)), done, progress).run()


def local(workers: int) -> Executor:
    """The processes of this machine, ``workers`` of them."""

    def run(work: Work, jobs: Sequence[Any], done: Callable[[int, Any], None], progress: Progress) -> None:
        run_jobs(work, jobs, workers, done, progress)

    return run


class _Pool:
    def __init__(
        self,
        work: Work,
        jobs: Sequence[Any],
        workers: int,
        done: Callable[[int, Any], None],
        progress: Progress,
    ) -> None:
        self._work, self._jobs, self._done, self._progress = work, jobs, done, progress
        self._workers = workers
        self._context = multiprocessing.get_context("spawn")
        self._waiting = deque(range(len(jobs)))
        self._running: dict[Connection, tuple[Any, int]] = {}
        self._tries = [0] * len(jobs)
        self._failed: dict[int, BaseException] = {}

    def run(self) -> None:
        try:
            for _ in range(self._workers):
                self._start()
            while self._running:
                for ready in wait(list(self._running)):
                    assert isinstance(ready, Connection)
                    self._hear(ready)
        finally:
            for connection, (process, _) in self._running.items():
                process.terminate()
                connection.close()
            for process, _ in self._running.values():
                process.join()
        raise_first(self._failed, len(self._jobs))

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._work, os.getpid()), daemon=True)
        process.start()
        theirs.close()
        self._give(ours, process)

    def _give(self, connection: Connection, process: Any) -> None:
        """The next job for a worker, or its end."""
        if not self._waiting:
            self._running.pop(connection, None)
            connection.send(None)
            connection.close()
            process.join()
            return
        number = self._waiting.popleft()
        self._tries[number] += 1
        self._running[connection] = (process, number)
        with contextlib.suppress(OSError):  # it died: its end of the pipe tells
            connection.send((number, self._jobs[number]))

    def _hear(self, connection: Connection) -> None:
        process, number = self._running[connection]
        try:
            kind, value = connection.recv()
        except (EOFError, OSError):
            self._died(connection)
            return
        if kind == "progress":
            self._progress(number, *value)
            return
        if kind == "done":
            self._done(number, value)
        elif is_full(value):
            raise value
        else:
            self._failed[number] = value
        self._give(connection, process)

    def _died(self, connection: Connection) -> None:
        process, number = self._running.pop(connection)
        connection.close()
        process.join()
        if self._tries[number] < _TRIES:
            self._waiting.appendleft(number)
        else:
            code = process.exitcode or 0
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            self._failed[number] = DataError(
                f"a worker died twice ({how}) at {self._jobs[number]}; with fewer --workers there is more memory for "
                "each, and finished parts are kept"
            )
        if self._waiting:
            self._start()


def _serve(connection: Connection, work: Work, parent: int) -> None:
    """A worker: jobs in, results out, until there are none or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    last = time.monotonic()

    def progress(_: int, *how_far: int) -> None:
        nonlocal last
        if os.getppid() != parent:
            os._exit(1)
        if time.monotonic() - last > _EVERY:
            last = time.monotonic()
            connection.send(("progress", how_far))

    try:
        while (given := connection.recv()) is not None:
            try:
                connection.send(("done", work(given[1], progress)))
            except Exception as error:
                connection.send(("error", portable(error)))
    except (EOFError, OSError):
        return


def portable(error: Exception) -> Exception:
    """The error, or one that says the same where it cannot be sent to another process."""
    import pickle

    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return DataError(f"{type(error).__name__}: {error}")


def is_full(error: BaseException) -> bool:
    """Whether the disk is full: then nothing more is tried."""
    return isinstance(error, OSError) and error.errno in _FULL


def raise_first(failed: dict[int, BaseException], jobs: int) -> None:
    """Raise the error of the first of the jobs that failed, if any, and say how many did."""
    if not failed:
        return
    first = failed[min(failed)]
    if len(failed) > 1 and isinstance(first, DataError):
        raise DataError(f"{first} ({len(failed)} of {jobs} parts failed)") from first
    raise first
