"""Turns: one thread at a time, whatever strikes where.

An exception may strike between any two lines: Ctrl-C does, and tracers do. Where it strikes between the last line that
a lock guards and the lock's release, the lock stays taken and every other thread waits for ever. A turn belongs to a
running call instead: when that call is on no thread's stack any more, its turn is over.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from gemcut.errors import GemcutError

#: Seconds after which one who waits looks again whether the call it waits for still runs.
_LOOK_AGAIN = 0.05


@dataclass(eq=False)
class Claim:
    """A place in the queue.

    Attributes:
        call: the frame whose end ends the turn; None afterwards, since a frame keeps alive what its callers hold.
        long: False for what takes a moment, and gives up where it would have to wait longer than that.
    """

    call: FrameType | None
    long: bool


class Turns:
    """A queue of calls, of which the first may work. What changes the queue is one atomic operation on a dict."""

    def __init__(self) -> None:
        self._queue: dict[Claim, None] = {}  # in order of arrival
        # Held while somebody works, so that the others can sleep. It says nothing for sure: the queue does.
        self._working = threading.Lock()

    def take(self, claim: Claim, enough: Callable[[], bool]) -> bool:
        """Whether it is the turn of ``claim.call``, which ends with ``leave`` or with the call.

        Waits for the calls before it; gives up as soon as ``enough()``.

        Raises:
            GemcutError: it would wait for a call that itself waits for this one.
        """
        self._queue[claim] = None
        while (first := next(iter(list(self._queue)), claim)) is not claim:
            thread = _thread_of(first.call)
            if thread is None:
                self._queue.pop(first, None)
                continue
            within = thread == threading.get_ident()
            if enough() or (not claim.long and (first.long or within)):
                return False
            if within:
                raise GemcutError("a step cannot be taken from within a step (by a text sink or a stop rule)")
            if self._working.acquire(timeout=_LOOK_AGAIN):
                self._working.release()
        if enough():
            return False
        self._working.acquire(timeout=_LOOK_AGAIN)
        return True

    def leave(self, claim: Claim, *, worked: bool) -> None:
        """Let the next one work; also where there was no turn."""
        self._queue.pop(claim, None)
        claim.call = None
        if worked:
            with contextlib.suppress(RuntimeError):  # it was not held: somebody was struck
                self._working.release()


def _thread_of(call: FrameType | None) -> int | None:
    """The thread on whose stack ``call`` is, or None where it has ended."""
    if call is None:
        return None
    for thread, frame in sys._current_frames().items():
        above: FrameType | None = frame
        while above is not None:
            if above is call:
                return thread
            above = above.f_back
    return None
