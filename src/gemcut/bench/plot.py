"""A picture of a measurement: latencies and throughput over the offered rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemcut.picture import pyplot, save_figure


def plot(path: Path, rounds: Sequence[dict[str, Any]], title: str) -> None:
    """Write the picture of some rounds' `summary`. One point a round; a trace has its own rate."""
    rates = [_rate(found) for found in rounds]
    figure, axes = pyplot().subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, key, name in ((axes[0], "ttft_ms", "time to first token, ms"), (axes[1], "tpot_ms", "time a token, ms")):
        for share, style in (("p50", "-o"), ("p95", "--s"), ("p99", ":^")):
            axis.plot(rates, [found[key][share] for found in rounds], style, label=share)
        axis.set_ylabel(name)
        axis.set_ylim(bottom=0)
        axis.legend()
    axes[2].plot(rates, [found["output_tokens_per_second"] for found in rounds], "-o", color="tab:green")
    axes[2].set_ylabel("output tokens a second")
    axes[2].set_ylim(bottom=0)
    for axis in axes:
        axis.set_xlabel("requests a second")
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    save_figure(figure, path, 150)


def _rate(found: dict[str, Any]) -> float:
    rate = found["rate"]
    return float(found["requests_per_second"] if rate is None or rate == math.inf else rate)
