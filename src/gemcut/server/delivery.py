"""Delivery: events from the engine's thread to the connections that wait for them, with one wake-up a step.

engine step -> Delivery.step [engine's thread] -> one call_soon_threadsafe -> each Mailbox with news -> its task
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many
from types import TracebackType

from gemcut.engine.request import Sequence, TokenEvent
from gemcut.engine.results import TextStream, start_together

#: Seconds between two looks for mailboxes that have been silent for too long.
TICK = 0.1


class Delivery:
    """One for each event loop. ``step`` alone may be called from another thread."""

    def __init__(self, heard: Callable[[Many[TokenEvent]], None] | None = None) -> None:
        """Must be made in the event loop. ``heard`` is called there with the events of every step."""
        self.loop = asyncio.get_running_loop()
        self._heard = heard
        self._steps: deque[Many[TokenEvent]] = deque()
        self._woken = False
        self._boxes: dict[int, Mailbox] = {}
        self._tick: asyncio.TimerHandle | None = None

    @property
    def open(self) -> int:
        """Sequences that somebody waits for."""
        return len(self._boxes)

    def cancel_all(self) -> None:
        """Cancel every sequence that somebody waits for; each gets its last event."""
        for box in set(self._boxes.values()):
            for stream in box.streams:
                stream.cancel()

    def step(self, events: Many[TokenEvent]) -> None:
        """Take what a step gave. Called in the engine's thread; neither waits nor raises."""
        self._steps.append(events)
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the event loop was closed meanwhile
                self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False  # before the look: what comes now wakes again
        boxes, steps = self._boxes, self._steps
        while steps:
            events = steps.popleft()
            for event in events:
                box = boxes.get(event.request_id)
                if box is not None and (box.each or event.finish_reason is not None):
                    box.wake()
            if self._heard is not None:
                self._heard(events)

    def _look(self) -> None:
        self._tick = None
        now = self.loop.time()
        for box in dict.fromkeys(self._boxes.values()):
            box.ticks += 1
            if box.ticks >= box.patience or now >= box.deadline:
                box.rang = True
                box.wake()
        self._arm()

    def _arm(self) -> None:
        if self._boxes and self._tick is None:
            self._tick = self.loop.call_later(TICK, self._look)


class Mailbox:
    """What one connection waits for: news of its sequences, or that its client has left.

    In a ``with`` block; behind it sequences that have not ended are cancelled, so that their blocks come back.
    """

    __slots__ = (
        "_delivery", "_news", "_places", "_waiter", "deadline", "each", "gone", "patience", "rang", "sequences",
        "streams", "ticks",
    )  # fmt: skip

    def __init__(self, delivery: Delivery, streams: Many[TextStream], *, each: bool = True) -> None:
        """``each``: every event is news, not only the last one of each sequence."""
        self.streams, self.each = list(streams), each
        self.sequences: list[Sequence] = [stream.sequence for stream in streams]
        self._delivery = delivery
        self._places = [0] * len(streams)
        self._waiter: asyncio.Future[None] | None = None
        self._news = False
        #: Whether the client has left.
        self.gone = False
        #: The event loop's time from which on ``wait`` returns though nothing came, and the ticks without news behind
        #: which it does.
        self.deadline = self.patience = math.inf
        self.ticks = 0
        #: Whether it did so.
        self.rang = False

    def __enter__(self) -> Mailbox:
        boxes = self._delivery._boxes
        for sequence in self.sequences:
            boxes[sequence.id] = self
        self._delivery._arm()
        try:
            start_together(self.streams)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        for stream, sequence in zip(self.streams, self.sequences, strict=True):
            self._delivery._boxes.pop(sequence.id, None)
            stream.cancel()

    @property
    def now(self) -> float:
        """The event loop's time."""
        return self._delivery.loop.time()

    @property
    def finished(self) -> bool:
        """Whether all sequences have ended."""
        return all(sequence.finished for sequence in self.sequences)

    def wake(self) -> None:
        """Let ``wait`` return."""
        self._news = True
        self.ticks = 0
        if (waiter := self._waiter) is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def leave(self) -> None:
        """The client has left."""
        self.gone = True
        self.wake()

    async def wait(self) -> None:
        """Return when there may be news, or the client has left, or it rang."""
        if not self._news:
            self._waiter = self._delivery.loop.create_future()
            await self._waiter
        self._news = False

    def take(self, index: int) -> Many[TokenEvent]:
        """The events of a sequence that have not been taken yet."""
        events = self.sequences[index].events
        place, count = self._places[index], len(events)
        self._places[index] = count
        return events[place:count]
