"""A progress bar for loading: on a terminal a bar on standard error, elsewhere silence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

#: Hears how far something is: (done, in all), in bytes or in whatever the caller is told.
Report = Callable[[int, int], None]


class LoadProgress:
    """Context manager that gives a ``report(done, total)`` function.

    Args:
        progress: True for a bar if standard error is a terminal, False for none, or a function to call instead.
        label: what stands before the bar.
    """

    def __init__(self, progress: bool | Report, label: str) -> None:
        self._given = progress
        self._label = label
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Report | None:
        if callable(self._given):
            return self._given
        return self._report if self._given and sys.stderr.isatty() else None

    def _report(self, done: int, total: int) -> None:
        if self._bar is None or self._task is None:  # only now: where nothing is to be done no bar flashes up
            self._bar, self._task = self._start()
        self._bar.update(self._task, completed=done, total=total)

    def _start(self) -> tuple[Progress, TaskID]:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        bar = Progress(*columns, console=Console(stderr=True), transient=True)
        bar.start()
        return bar, bar.add_task(self._label, total=None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
