"""Scoring the answers of a log, again at any time and without a model; the results stand beside the log."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemcut.errors import DataError, ParameterError
from gemcut.evaluation.figures import by_group, figures
from gemcut.evaluation.log import RowLog, RunLog
from gemcut.evaluation.registry import row as find_row
from gemcut.evaluation.row import Figure, Item, Row, Score, ScoreOptions, Setup

NAME = "scores.json"


@dataclass
class RowResult:
    """A row's figures from a log. ``items`` and ``scores`` are empty where none may be kept."""

    row: Row
    log: RowLog
    figures: dict[str, Figure]
    groups: dict[str, Figure]
    items: list[Item]
    scores: list[Score]

    @property
    def figure(self) -> Figure | None:
        """The one that stands beside the card's value."""
        return self.figures.get(self.row.metric)

    @property
    def failed(self) -> int:
        """Items of which no answer could be extracted."""
        return sum(score.failed for score in self.scores)

    @property
    def complete(self) -> bool:
        """Whether every item that was to be asked has its answer."""
        return self.log.done is not None

    def differences(self) -> list[str]:
        """Why this figure and the card's are not the same measurement, one sentence each."""
        header, found = self.log.header, []
        if not self.complete:
            found.append(f"The run was stopped: {len(self.items):,} of {header['asked']:,} items.")
        elif header["asked"] < header["items"]:
            found.append(f"A sample: {header['asked']:,} of {header['items']:,} items.")
        if header["expected"] and header["items"] != header["expected"]:
            found.append(f"The data at hand have {header['items']:,} items; the whole set has {header['expected']:,}.")
        if header["shots"] != self.row.shots:
            found.append(f"{header['shots']} shots instead of {self.row.shots}.")
        if header["chat"] != self.row.chat:
            found.append("Asked in the chat format." if header["chat"] else "Asked in plain text.")
        return [*found, *self.row.differs]

    @property
    def comparable(self) -> bool:
        """Whether the same items were asked with as many shots and in the same format as the card says."""
        header = self.log.header
        same = header["shots"] == self.row.shots and header["chat"] == self.row.chat
        whole = header["asked"] == header["items"] and header["items"] >= (header["expected"] or 0)
        return self.complete and same and whole


def check_recipe(row: Row, log: RowLog) -> None:
    """Raise DataError where a log's answers are of another recipe than this gemcut's."""
    header = log.header
    now = row.recipe(Setup(shots=header["shots"], chat=header["chat"]))
    if now != header["recipe"]:
        raise DataError(
            f"the log's answers to {row.id} are of recipe {header['recipe']}, this gemcut's is {now}: "
            "its prompts or rules have changed, so run the row again"
        )


def score_run(
    log: RunLog, options: ScoreOptions, names: Sequence[str] = (), *, again: bool = True
) -> dict[str, RowResult]:
    """Results of a log's rows (those of ``names``, or all), and ``scores.json`` beside the log.

    ``again``: score anew, else take over from ``scores.json`` what is there of the same answers.

    Raises:
        DataError: a row's answers are of another recipe.
        ParameterError: a row is not in the log, or its scoring is refused.
    """
    for name in names:
        if name not in log.rows:
            raise ParameterError(f"{log.folder} has no row {name!r}; it has {', '.join(log.rows) or 'none'}")
    known = {} if again else _stored(log.folder)
    found: dict[str, RowResult] = {}
    for name, own in log.rows.items():
        if names and name not in names:
            continue
        row = find_row(name)
        check_recipe(row, own)
        if own.figures is not None:
            kept = {metric: Figure(**values) for metric, values in own.figures.items()}
            found[name] = RowResult(row, own, kept, {}, [], [])
            continue
        if not own.items:
            continue
        stored = known.get(name, {}).get("items", {})
        if list(stored) == [item.id for item in own.items] and known[name].get("recipe") == own.header["recipe"]:
            scores = [Score(**values) for values in stored.values()]
        else:
            scores = row.score(own.items, own.answers, options)
        groups = by_group(row, own.items, scores)
        found[name] = RowResult(row, own, figures(row, own.items, scores), groups, own.items, scores)
    _write(log.folder, found)
    return found


def _stored(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / NAME).read_bytes())["rows"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(folder: Path, results: dict[str, RowResult]) -> None:
    rows = _stored(folder)
    for name, result in results.items():
        rows[name] = {
            **report(result),
            "items": {
                item.id: dataclasses.asdict(score) for item, score in zip(result.items, result.scores, strict=True)
            },
        }
    part = folder / f".{NAME}.unfinished"
    try:
        part.write_text(json.dumps({"rows": rows}, ensure_ascii=False, indent=1) + "\n", "utf-8")
        part.replace(folder / NAME)
    finally:
        part.unlink(missing_ok=True)


def report(result: RowResult) -> dict[str, Any]:
    """A row's result as JSON, without its items."""
    row, header = result.row, result.log.header
    return {
        "title": row.title,
        "setting": row.setting,
        "recipe": header["recipe"],
        "version": row.version,
        "shots": header["shots"],
        "metric": row.metric,
        "figures": {name: dataclasses.asdict(figure) for name, figure in result.figures.items()},
        "groups": {name: dataclasses.asdict(figure) for name, figure in result.groups.items()},
        "card": dataclasses.asdict(row.card),
        "asked": header["asked"],
        "of": header["items"],
        "answered": len(result.items) or header["asked"],
        "extraction_failed": result.failed,
        "comparable": result.comparable,
        "differs": result.differences(),
        "data": header["data"],
        "done": result.log.done,
    }
