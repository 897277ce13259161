"""What this process can compute with: a bounded number of threads, and not as the fork of one that has computed.

PyTorch's threads do not survive a fork: the child waits for ever for threads that it does not have. Whoever is about to
compute calls ``enter``; a child that does so after its parent had done it gets an error instead.

A thread that computes must not outlive the interpreter: see ``Threads``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from gemcut.errors import ParameterError, UnsupportedError

#: As many as the kernels' own pool takes. Tens of thousands end the process: the system cannot start them.
MOST_THREADS = max(256, os.cpu_count() or 1)

_entered = False
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = _entered


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def enter() -> None:
    """Say that this process computes from now on. Raises as ``check`` and ``check_threads`` do."""
    global _entered
    check()
    import torch

    check_threads(torch.get_num_threads(), "the number of PyTorch's threads (torch.set_num_threads)")
    _entered = True


def check() -> None:
    """Raise UnsupportedError in a child that was forked from a process that had computed."""
    if _forked:
        raise UnsupportedError(
            "this process was forked from one that had loaded a model, and PyTorch's threads do not survive a fork; "
            'start workers with multiprocessing.get_context("spawn") and load the model in each of them'
        )


def check_threads(count: int, name: str) -> None:
    """Raise ParameterError where ``count`` threads, called ``name``, are none or more than could be started."""
    if not 1 <= count <= MOST_THREADS:
        raise ParameterError(f"{name} is {count}; expected from 1 to {MOST_THREADS}")


class Threads:
    """Threads of one kind, which the interpreter's end can wait for (`join`).

    Once the interpreter goes away, Python unwinds the stack of a daemon thread that wants its lock. In the C++ of
    PyTorch, which does not expect that, the process then ends with "terminate called without an active exception". It
    is not enough to wait for a thread's work: what the work held is freed behind it, and a model is freed by PyTorch.
    A thread that is no daemon would be waited for before it could be told to end.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._started: set[threading.Thread] = set()
        self._lock = threading.Lock()

    def start(self, work: Callable[..., object], *args: object) -> threading.Thread:
        """Start a thread that calls ``work(*args)``."""
        thread = threading.Thread(target=work, args=args, name=self._name, daemon=True)
        with self._lock:
            self._started = {other for other in self._started if other.is_alive()} | {thread}
            thread.start()
        return thread

    def join(self) -> None:
        """Wait until every thread is gone, but for the caller's own. They must have been told to end."""
        for thread in list(self._started):
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join()
