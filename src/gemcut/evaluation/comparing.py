"""Runs side by side: a table of several models, and paired comparisons of two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemcut.errors import ParameterError
from gemcut.evaluation.figures import Comparison, compare
from gemcut.evaluation.log import RunLog
from gemcut.evaluation.results import RowResult
from gemcut.evaluation.tables import shown
from gemcut.picture import pyplot, save_figure

Run = tuple[RunLog, Mapping[str, RowResult]]


def common_rows(runs: Sequence[Run]) -> list[str]:
    """Rows that all runs have, in the first one's order. Raises ParameterError where there is none."""
    found = [name for name in runs[0][1] if all(name in results for _, results in runs)]
    if not found:
        lists = "; ".join(f"{log.folder}: {', '.join(results) or 'none'}" for log, results in runs)
        raise ParameterError(f"the runs have no row in common ({lists})")
    return found


def paired(first: RowResult, second: RowResult) -> Comparison | str:
    """Two results over common items, or why they cannot be compared."""
    if first.log.header["recipe"] != second.log.header["recipe"]:
        return f"other recipes: {first.log.header['recipe']} and {second.log.header['recipe']}"
    values = [_values(result) for result in (first, second)]
    if not values[0] or not values[1]:
        return "items were not kept"
    if not values[0].keys() & values[1].keys():
        return "no item in common (other samples)"
    return compare(*values)


def _values(result: RowResult) -> dict[str, float]:
    """The row's metric by item; where the metric is the whole row's, the first one that items have."""
    metric = result.row.metric
    if result.scores and metric not in result.scores[0].values:
        metric = next((name for name in result.scores[0].values if metric.startswith(name)), "")
    return {
        item.id: float(score.values[metric])
        for item, score in zip(result.items, result.scores, strict=True)
        if metric in score.values
    }


def notes(runs: Sequence[Run]) -> list[str]:
    """What a reader of the comparison must know: other seeds, limits, data."""
    found = []
    for name in ("seed", "limit"):
        values = [log.run[name] for log, _ in runs]
        if len(set(values)) > 1:
            what = "so sampled answers and samples of items differ" if name == "seed" else "so they have other items"
            found.append(f"the runs have other {name}s ({', '.join(map(str, values))}), {what}")
    for row in common_rows(runs):
        data = [{name: used["sha256"] for name, used in results[row].log.header["data"].items()} for _, results in runs]
        if any(each != data[0] for each in data):
            found.append(f"{row}: the runs read other data files")
    return found


def table(runs: Sequence[Run]) -> list[list[str]]:
    """A line a row, a column a model; the first line is the head."""
    names = common_rows(runs)
    head = ["row", *(log.name for log, _ in runs)]
    return [head, *([name, *(shown(results[name].figure) for _, results in runs)] for name in names)]


def comparison_lines(first: Run, second: Run) -> list[list[str]]:
    """The paired comparison of two runs, a line a row; the first line is the head."""
    rows = [
        ["row", "items", "first", "second", "difference", "95 % interval", "only first", "only second", "McNemar p"]
    ]
    for name in common_rows([first, second]):
        found = paired(first[1][name], second[1][name])
        scale = first[1][name].row.scale
        if isinstance(found, str):
            rows.append([name, "", "", "", found, "", "", "", ""])
            continue
        rows.append(
            [
                name,
                f"{found.count:,}",
                f"{found.first * scale:.2f}",
                f"{found.second * scale:.2f}",
                f"{(found.second - found.first) * scale:+.2f}",
                f"{found.low * scale:+.2f} to {found.high * scale:+.2f}",
                f"{found.only_first:,}",
                f"{found.only_second:,}",
                "" if found.p is None else f"{found.p:.3g}",
            ]
        )
    return rows


def as_json(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything of a comparison; pairs are those with the first run."""
    import dataclasses

    rows: dict[str, Any] = {}
    for name in common_rows(runs):
        pairs = [paired(runs[0][1][name], results[name]) for _, results in runs[1:]]
        rows[name] = {
            "figures": [dataclasses.asdict(f) if (f := results[name].figure) else None for _, results in runs],
            "with_first": [each if isinstance(each, str) else dataclasses.asdict(each) for each in pairs],
        }
    return {"models": [log.name for log, _ in runs], "notes": notes(runs), "rows": rows}


def plot(runs: Sequence[Run], path: Path) -> None:
    """A picture: a group of bars a row, a bar a model, with standard errors."""
    names = common_rows(runs)
    figure, axis = pyplot().subplots(figsize=(max(6, 1.2 * len(names) + 2), 4.5), layout="constrained")
    width = 0.8 / len(runs)
    for place, (log, results) in enumerate(runs):
        own = [results[name].figure for name in names]
        axis.bar(
            [i + (place - (len(runs) - 1) / 2) * width for i in range(len(names))],
            [each.value if each is not None else 0 for each in own],
            width,
            yerr=[(each.error or 0) if each is not None else 0 for each in own],
            capsize=2,
            label=log.name,
        )
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axis.set_ylabel("result (bars: one standard error)")
    axis.grid(axis="y", alpha=0.3)
    axis.legend()
    save_figure(figure, path, 150)
