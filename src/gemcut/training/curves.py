"""A run's curves as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemcut.errors import DataError
from gemcut.picture import pyplot, save_figure
from gemcut.training.metrics import read_metrics


def plot(folder: Path, path: Path) -> None:
    """Draw metrics.jsonl of ``folder`` into ``path``. Raises DataError where there is nothing to draw."""
    lines = read_metrics(folder)
    if not lines:
        raise DataError(f"{folder} has no metrics; expected the folder of a run with at least one logged step")
    figure, axes = pyplot().subplots(2, 2, figsize=(11, 7), layout="constrained", sharex=True)
    _curve(axes[0, 0], lines, "loss", "training")
    names = list(dict.fromkeys(name for line in lines for name in line.get("held_out", {})))
    for name in names:
        found = [(line["step"], line["held_out"][name]) for line in lines if name in line.get("held_out", {})]
        axes[0, 0].plot([step for step, _ in found], [loss for _, loss in found], "o-", label=f"held out: {name}")
    axes[0, 0].set_ylabel("loss, nats a token")
    axes[0, 0].legend()
    _curve(axes[0, 1], lines, "gradient_norm")
    axes[0, 1].set_ylabel("gradient norm, before clipping")
    axes[0, 1].set_yscale("log")
    _curve(axes[1, 0], lines, "rate")
    axes[1, 0].set_ylabel("learning rate")
    _curve(axes[1, 1], lines, "tokens_per_second")
    axes[1, 1].set_ylabel("tokens a second")
    axes[1, 1].set_ylim(bottom=0)
    for axis in axes[1]:
        axis.set_xlabel("step")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    save_figure(figure, path, 120)


def _curve(axis: Any, lines: list[dict[str, Any]], key: str, label: str | None = None) -> None:
    found = [(line["step"], line[key]) for line in lines if key in line]
    axis.plot([step for step, _ in found], [value for _, value in found], label=label, linewidth=1.2)
