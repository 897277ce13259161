"""From outcomes to figures: throughput, latencies, errors by kind, goodput."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from gemcut.bench.client import Outcome
from gemcut.bench.load import Round

SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True)
class Limits:
    """What an answer must keep to be good: seconds to the first text, and a token after it. None: anything."""

    ttft: float | None = None
    tpot: float | None = None

    def kept(self, outcome: Outcome) -> bool:
        """Whether an answer that is whole kept them."""
        slow = self.ttft is not None and outcome.ttft > self.ttft
        tpot = outcome.tpot
        return not slow and not (self.tpot is not None and tpot is not None and tpot > self.tpot)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of them do not exceed; NaN of none."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def summary(found: Round, limits: Limits) -> dict[str, Any]:
    """The figures of a round. Times in milliseconds; NaN where nothing was measured.

    Throughput counts from the first moment something was due to the last answer's end.
    """
    good = [outcome for outcome in found.outcomes if not outcome.error]
    begin = min((outcome.due for outcome in found.outcomes), default=0.0)
    seconds = max((outcome.end for outcome in found.outcomes), default=0.0) - begin
    per_second = (lambda count: count / seconds) if seconds > 0 else (lambda count: math.nan)
    gaps = [later - earlier for outcome in good for earlier, later in pairwise(outcome.times)]
    latencies = {
        "ttft": [outcome.ttft for outcome in good],
        "tpot": [tpot for outcome in good if (tpot := outcome.tpot) is not None],
        "itl": gaps,
        "e2e": [outcome.e2e for outcome in good],
    }
    return {
        "rate": found.rate,
        "planned": found.planned,
        "ended": len(found.outcomes),
        "good": len(good),
        "errors": dict(Counter(outcome.error for outcome in found.outcomes if outcome.error)),
        "cut": found.cut,
        "seconds": seconds,
        "requests_per_second": per_second(len(good)),
        "output_tokens_per_second": per_second(sum(outcome.completion_tokens for outcome in good)),
        "prompt_tokens_per_second": per_second(sum(outcome.prompt_tokens for outcome in good)),
        "prompt_tokens": sum(outcome.prompt_tokens for outcome in good),
        "cached_tokens": sum(outcome.cached_tokens for outcome in good),
        "output_tokens": sum(outcome.completion_tokens for outcome in good),
        "goodput": per_second(sum(map(limits.kept, good))),
        "most_at_once": most_at_once(found.outcomes),
        "client_late_ms": 1000 * percentile([outcome.sent - outcome.due for outcome in found.outcomes], 0.99),
        **{f"{name}_ms": _spread(values) for name, values in latencies.items()},
    }


def most_at_once(outcomes: Sequence[Outcome]) -> int:
    """How many requests were under way at one time, at most."""
    changes = sorted([(o.sent, 1) for o in outcomes] + [(o.end, -1) for o in outcomes], key=lambda c: (c[0], c[1]))
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def as_json(outcome: Outcome) -> dict[str, Any]:
    """One request for a file."""
    whole = not outcome.error
    return {
        "due": outcome.due,
        "sent": outcome.sent,
        "ttft": outcome.ttft if whole else None,
        "tpot": outcome.tpot if whole else None,
        "e2e": outcome.e2e if whole else None,
        "prompt_tokens": outcome.prompt_tokens,
        "cached_tokens": outcome.cached_tokens,
        "completion_tokens": outcome.completion_tokens,
        "error": outcome.error or None,
        "message": outcome.message or None,
    }


def finite(value: Any) -> Any:
    """``value`` with None for each number that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _spread(values: list[float]) -> dict[str, float]:
    mean = sum(values) / len(values) if values else math.nan
    return {"mean": 1000 * mean, **{name: 1000 * percentile(values, share) for name, share in SHARES.items()}}
