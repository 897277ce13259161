"""Look at what a run kept and dropped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemcut.data.store import read_records
from gemcut.errors import DataError


@dataclass(frozen=True)
class Seen:
    """A document of a run: ``step`` and ``reason`` are empty where it was kept."""

    source: str
    id: str
    text: str
    step: str = ""
    reason: str = ""


def look(out: Path, *, step: str = "", reason: str = "", source: str = "", kept: bool = False) -> Iterator[Seen]:
    """The documents that the run in ``out`` kept (``kept``) or dropped, those that fit what is asked for, in order.

    Raises DataError where ``out`` is no run, or no rejects were written.
    """
    folder = out / ("documents" if kept else "rejects")
    if not folder.is_dir():
        what = "no documents" if kept else "no rejects (was keep_rejects false in the recipe?)"
        raise DataError(f"there are {what} in {out}; expected the folder of a `gemcut data run`")
    for path in sorted(folder.glob("*.jsonl.zst")):
        for record in read_records(path):
            seen = _seen(record)
            if step in ("", seen.step) and source in ("", seen.source) and reason in seen.reason:
                yield seen


def _seen(record: dict[str, Any]) -> Seen:
    return Seen(*(str(record.get(key, "")) for key in ("source", "id", "text", "step", "reason")))
