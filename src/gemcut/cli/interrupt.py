"""Ctrl-C while an answer is written: asks it to stop, and nothing else."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from gemcut.cli.output import is_terminal

_GIVE_UP = 4


class StopRequest:
    """Counts Ctrl-C. The fourth raises KeyboardInterrupt, for when a step never comes to its end."""

    def __init__(self) -> None:
        self._presses = 0

    @property
    def pressed(self) -> bool:
        """Whether the answer should stop."""
        return self._presses > 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._presses += 1
        if self._presses >= _GIVE_UP:
            raise KeyboardInterrupt


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Ctrl-C sets ``pressed`` instead of raising in the middle of an engine step, whose books it would leave wrong."""
    request = StopRequest()
    before = signal.signal(signal.SIGINT, request._handle)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def cancelled_by_ctrl_c() -> Iterator[None]:
    """Within a task of asyncio: the first Ctrl-C cancels the task, so that it can end in order; the next one raises.

    asyncio would do so itself, were the handler of SIGINT not ours.
    """
    import asyncio

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None

    def cancel(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        loop.call_soon_threadsafe(task.cancel)

    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _noted() -> Iterator[list[int]]:
    """The list of the Ctrl-C that came inside the block; each of them raises KeyboardInterrupt as it would without."""
    presses: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        presses.append(number)
        assert callable(before)
        before(number, frame)  # Python's own, or that of a block around this one

    ours = threading.current_thread() is threading.main_thread() and callable(before)
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield presses
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def imports_interrupted() -> Iterator[None]:
    """Turn an ImportError that follows Ctrl-C into the interrupt it was.

    C code that imports a module may swallow the interrupt; what it then half imported fails later.
    """
    with _noted() as presses:
        try:
            yield
        except ImportError:
            if presses:
                raise KeyboardInterrupt from None
            raise


def import_torch() -> None:
    """Import torch, which every command that computes needs.

    While its C code starts, it may swallow an interrupt and go on, or turn it into an error of another kind. Either is
    raised here as the interrupt it was.
    """
    with _noted() as presses:
        try:
            import torch  # noqa: F401
        except Exception:
            if presses:
                raise KeyboardInterrupt from None
            raise
    if presses:
        raise KeyboardInterrupt


@contextlib.contextmanager
def quiet_keyboard() -> Iterator[None]:
    """Keys typed while an answer is written neither show in it nor are sent as the next message."""
    if not is_terminal(sys.stdin) or (termios := _termios()) is None:
        yield
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    silent = list(before)
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(keyboard, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcflush(keyboard, termios.TCIFLUSH)
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _termios() -> Any:
    """The module, or None where the system has no such terminals."""
    try:
        import termios
    except ImportError:
        return None
    return termios
