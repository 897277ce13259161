"""Metrics: what the server counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Many

from gemcut.engine.request import Sequence, TokenEvent


class Metrics:
    """Counters of what happened, called in the server's own thread."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.finished: Counter[str] = Counter()
        self.tokens = 0
        self.running = 0

    def request_started(self, endpoint: str) -> None:
        """A request's head is there."""
        self.running += 1

    def request_finished(self, endpoint: str, status: int, reason: str | None, sequence: Sequence | None) -> None:
        """A request has its whole answer (status 499: its client left first).

        Args:
            endpoint: the path of a route, or "other".
            status: the HTTP status.
            reason: the finish reason of its (first) sequence; None where it had none.
            sequence: that sequence.
        """
        self.running -= 1
        self.requests[endpoint, status] += 1
        if reason is not None:
            self.finished[reason] += 1

    def step(self, events: Many[TokenEvent]) -> None:
        """What one engine step gave."""
        self.tokens += len(events)
