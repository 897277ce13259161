"""Other processes that compute parts of the network beside this one, as the engine sees them.

The engine's process leads: it alone schedules, chooses tokens and talks to callers, and tells the others of each batch
what to compute. See docs/tensor-parallel.md for why.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from gemcut.engine.cache import CacheShape, Tables
from gemcut.model.key_values import Span


class Followers(Protocol):
    """The processes that follow this one."""

    def open(self, shape: CacheShape) -> None:
        """Have them make a cache of this shape."""

    def step(
        self, ids: list[int], positions: list[int], spans: Sequence[Span], tables: Sequence[Tables], wanted: list[int]
    ) -> AbstractContextManager[None]:
        """Have them run a batch; within the context this process runs the same one.

        Raises CommunicationError where one of them is gone.
        """

    def explain(self, error: Exception) -> Exception:
        """What to say of an exception of a step: the cause, where another process is it."""

    def forget(self) -> None:
        """After a step that failed or was interrupted: where they wait amid it they cannot go on, and are ended."""
