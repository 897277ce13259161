"""What became of each source, as shares of its bytes: for the page of a report, and as a picture."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemcut.picture import check_plot, pyplot, save_figure

KEPT = "kept"
#: Kept, then steps in their order (Okabe and Ito's colours, which colour-blind people tell apart; then lighter ones).
COLOURS = (
    "#009e73", "#e69f00", "#56b4e9", "#d55e00", "#cc79a7", "#0072b2", "#f0e442", "#999999",
    "#7b4b00", "#b2e0d4", "#f5c98a", "#b9ddf5", "#eeb18f", "#e8c4d8", "#8fb9d9", "#444444",
)  # fmt: skip


def fates(report: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """For each source the bytes that each step took away, by the step's name, and those that were kept.

    They add up to the bytes read, but for steps that make texts longer, which count as 0.
    """
    out: dict[str, dict[str, int]] = {}
    for name, source in report["sources"].items():
        gone = {}
        for step in report["steps"]:
            flow = step["sources"].get(name)
            if flow is not None and (lost := flow["bytes_in"] - flow["bytes_out"]) > 0:
                gone[step["name"]] = lost
        out[name] = {KEPT: source["bytes_out"], **gone}
    return out


def colours(report: Mapping[str, Any]) -> dict[str, str]:
    """A colour for what was kept and for each step that took something away."""
    found = fates(report).values()
    names = [KEPT, *(s["name"] for s in report["steps"] if any(s["name"] in fate for fate in found))]
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def svg(report: Mapping[str, Any]) -> str:
    """A bar a source, as long as what was read of it, divided by what became of it; with a legend."""
    table, paint = fates(report), colours(report)
    most = max((sum(fate.values()) for fate in table.values()), default=0) or 1
    parts = []
    for i, (name, colour) in enumerate(paint.items()):
        column, row = 230 * (i % 4), 20 * (i // 4)
        parts.append(f"<rect x={column} y={row} width=12 height=12 fill='{colour}'/>")
        parts.append(f"<text x={column + 18} y={row + 11}>{html.escape(name)}</text>")
    top = 20 * ((len(paint) + 3) // 4) + 12
    for i, (source, fate) in enumerate(table.items()):
        y, x = top + 22 * i, 200.0
        parts.append(f"<text x=0 y={y + 14}>{html.escape(source)}</text>")
        for name, size in fate.items():
            width = 600 * size / most
            tip = html.escape(f"{name}: {size / 1e6:,.2f} MB")
            parts.append(
                f"<rect x={x:.1f} y={y} width={width:.1f} height=18 fill='{paint[name]}'><title>{tip}</title></rect>"
            )
            x += width
        whole = sum(fate.values())
        parts.append(f"<text x={x + 6:.1f} y={y + 14}>{fate[KEPT] / 1e6:,.1f} of {whole / 1e6:,.1f} MB kept</text>")
    height = top + 22 * len(table)
    return f"<svg width=960 height={height} role=img aria-label='MB kept of MB read'>{''.join(parts)}</svg>"


def write_plot(report: Mapping[str, Any], path: Path) -> None:
    """Write a picture of a report: MB of each source on the left, on the right the same as shares.

    Raises ParameterError for another kind of file or one that cannot be written, UnsupportedError without matplotlib.
    """
    check_plot(path)
    table, paint = fates(report), colours(report)
    names = list(table)
    figure, axes = pyplot().subplots(
        1, 2, figsize=(13, 1.9 + 0.27 * len(names)), sharey=True, layout="constrained", width_ratios=(1, 1)
    )
    wholes = [sum(table[source].values()) or 1 for source in names]
    for axis, unit in zip(axes, ([1e6] * len(names), [whole / 100 for whole in wholes]), strict=True):
        left = [0.0] * len(names)
        for name, colour in paint.items():
            widths = [table[source].get(name, 0) / one for source, one in zip(names, unit, strict=True)]
            axis.barh(names, widths, left=left, color=colour, label=name, height=0.78)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    axes[0].set_xlabel("MB of text")
    axes[1].set_xlabel("% of the source")
    axes[1].set_xlim(0, 100)
    totals = report["totals"]
    tokens = f", {report['tokens']['tokens'] / 1e6:,.1f} M tokens" if report["tokens"] else ""
    figure.suptitle(
        f"{report['name']}: {totals['bytes_out'] / 1e6:,.1f} of {totals['bytes_in'] / 1e6:,.1f} MB kept{tokens}"
    )
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    save_figure(figure, path, 120)
