"""Small corpora and recipes for the tests of data; all texts are invented."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gemcut.data.recipe import read_recipe
from gemcut.data.report import write_report
from gemcut.data.run import run_recipe

WORDS = (  # noqa: SIM905
    "the of and that have with river stone garden winter letter morning window silver quiet teacher basket "
    "harbour mountain candle paper journey market bridge orchard lantern meadow thunder copper velvet island"
).split()


def sentences(seed: int, count: int = 12) -> str:
    """Some sentences of invented English."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        words = [draw.choice(WORDS) for _ in range(draw.randint(8, 16))]
        lines.append(" ".join(words).capitalize() + ".")
    return "\n".join(lines)


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def run(recipe: Path, out: Path, workers: int = 1) -> dict[str, Any]:
    """Carry a recipe out; the report."""
    read = read_recipe(recipe)
    run_recipe(read, out, workers=workers)
    return write_report(read, out)


def files(out: Path) -> dict[str, bytes]:
    """Every file of a finished run by its path, without what names the machine."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in ("run.json", ".lock")
    }


def flow(report: dict[str, Any], step: str, source: str) -> dict[str, Any]:
    """What a step did to a source."""
    found: dict[str, Any] = next(each for each in report["steps"] if each["name"] == step)["sources"][source]
    return found
