"""A bar for a row that is asked: answers that are there, the time left. Silent where nobody looks."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

from gemcut.cli.output import is_terminal

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from gemcut.evaluation.row import Row


class RowProgress:
    """Context manager; called with (row, answers that are there, of how many)."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._row = ""

    def __enter__(self) -> RowProgress:
        if is_terminal(sys.stderr):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("left"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
        return self

    def __call__(self, row: Row, done: int, total: int) -> None:
        self.count(row.id, done, total)

    def count(self, name: str, done: int, total: int) -> None:
        """The same for anything with a name."""
        if self._bar is None:
            return
        if self._task is None or name != self._row:
            if self._task is not None:
                self._bar.remove_task(self._task)
            # What an earlier run had answered is no part of this one's speed.
            self._task, self._row = self._bar.add_task(name, total=total, completed=done), name
        self._bar.update(self._task, completed=done)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
