"""Sends a trace, open loop: each request when it is due, however many are still under way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gemcut.bench.client import Asker, Outcome, timer
from gemcut.bench.traffic import Row


@dataclass
class Round:
    """One trace and what came of it.

    Attributes:
        rate: requests a second that were offered; None for a trace that was read.
        planned: requests of the trace.
        outcomes: of those that ended, in the order in which they ended.
        cut: Ctrl-C ended it before all were done.
    """

    rate: float | None
    planned: int
    outcomes: list[Outcome] = field(default_factory=list)
    cut: bool = False


async def send_round(
    asker: Asker, rows: Sequence[Row], rate: float | None, ended: Callable[[Outcome], None] = lambda outcome: None
) -> Round:
    """Send ``rows`` and wait for all answers. ``ended`` is called with each outcome.

    Cancelled (Ctrl-C), it gives what has ended by then, with ``cut``.
    """
    result = Round(rate, len(rows))
    clock = timer()

    async def one(row: Row) -> None:
        outcome = await asker.ask(row, clock)
        result.outcomes.append(outcome)
        ended(outcome)

    tasks: set[asyncio.Task[None]] = set()
    try:
        for row in rows:
            if (wait := row.at - clock()) > 0:
                await asyncio.sleep(wait)
            task = asyncio.create_task(one(row))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        while tasks:
            await asyncio.wait(tasks)
    except asyncio.CancelledError:
        result.cut = True
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return result
