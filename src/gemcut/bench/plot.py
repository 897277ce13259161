"""A picture of a measurement: latencies and throughput over the offered rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemcut.errors import ParameterError, UnsupportedError

KINDS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Raise, before anything is measured, what would keep a plot from being written."""
    if path.suffix.lower() not in KINDS:
        raise ParameterError(f"--plot is {str(path)!r}; expected a name that ends in {', '.join(KINDS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UnsupportedError(
            "--plot needs matplotlib: pip install 'gemcut[plot]' (in the clone: pip install -e '.[plot]')"
        ) from None


def plot(path: Path, rounds: Sequence[dict[str, Any]], title: str) -> None:
    """Write the picture of some rounds' `summary`. One point a round; a trace has its own rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates = [_rate(found) for found in rounds]
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
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
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ParameterError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        pyplot.close(figure)


def _rate(found: dict[str, Any]) -> float:
    rate = found["rate"]
    return float(found["requests_per_second"] if rate is None or rate == math.inf else rate)
