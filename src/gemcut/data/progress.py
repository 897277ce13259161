"""A bar for a run: MB of text a second, the share that was dropped, and the time left."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from gemcut.data.recipe import Recipe
from gemcut.data.run import Watch

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class RunProgress:
    """Context manager that gives what ``run_recipe`` tells of itself to a bar on a terminal, else to nobody.

    The bar counts parts; the time left is that of the parts left at the speed of those done.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._label = recipe.name
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._stage = -1
        self._began = 0.0
        self._now: dict[int, tuple[int, int, int]] = {}
        self._done = 0

    def __enter__(self) -> Watch | None:
        if not sys.stderr.isatty():
            return None
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._bar.start()
        self._task = self._bar.add_task(self._label, total=None, figures="")
        return self._heard

    def _heard(
        self, stage: int, stages: int, part: int, waiting: int, read: int, documents: int, dropped: int, done: bool
    ) -> None:
        assert self._bar is not None
        assert self._task is not None
        if stage != self._stage:
            self._stage, self._began, self._now, self._done = stage, time.monotonic(), {}, 0
        self._now[part] = (read, documents, dropped)
        self._done += done
        seconds = max(time.monotonic() - self._began, 1e-3)
        text, seen, gone = (sum(column) for column in zip(*self._now.values(), strict=True))
        figures = f"{text / 1e6 / seconds:.1f} MB/s, {gone / max(1, seen):.0%} dropped"
        self._bar.update(
            self._task,
            description=f"{self._label} {stage + 1}/{stages}",
            completed=self._done,
            total=waiting,
            figures=figures,
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
