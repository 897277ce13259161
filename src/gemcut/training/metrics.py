"""metrics.jsonl of a run."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, TextIO

from gemcut.data.store import AtomicFile

METRICS = "metrics.jsonl"


class Metrics:
    """metrics.jsonl: a line for each logged step. After a restart the lines behind the checkpoint are dropped."""

    def __init__(self, folder: Path, step: int, *, writes: bool = True) -> None:
        """``writes`` is False in a process that does not lead; its lines go nowhere."""
        self._path = folder / METRICS
        self._file: TextIO | None = None
        if not writes:
            return
        kept = [line for line in read_metrics(folder) if line["step"] <= step]
        with AtomicFile(self._path) as out:
            out.write("".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (close() closes it)

    def add(self, line: dict[str, Any]) -> None:
        """Write a line at once."""
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last one that was cut off is left out."""
    try:
        lines = (folder / METRICS).read_text("utf-8").split("\n")
    except OSError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict) and isinstance(value.get("step"), int):
                found.append(value)
    return found
