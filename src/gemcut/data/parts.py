"""How the input is divided. A part is the unit of work and of restart: some files of one source, in order.

The division depends on the files and the recipe alone, never on the number of workers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from gemcut.data.readers.base import File, list_files
from gemcut.data.recipe import Recipe


@dataclass(frozen=True)
class Part:
    """Part ``number`` of a run: files of one source."""

    number: int
    source: str
    files: tuple[File, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its files as they are stored."""
        return sum(file.size for file in self.files)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def divide(recipe: Recipe) -> list[Part]:
    """Every part of a recipe's input. Raises DataError where a source names nothing that can be read."""
    limit = int(recipe.part_mb * 1e6)
    parts: list[Part] = []
    for source in recipe.sources:
        source.check(recipe.path)
        together: list[File] = []
        size = 0
        for file in list_files(source.reader, source.paths, source.name):
            if together and size + file.size > limit:
                parts.append(Part(len(parts), source.name, tuple(together)))
                together, size = [], 0
            together.append(file)
            size += file.size
        if together:
            parts.append(Part(len(parts), source.name, tuple(together)))
    return parts
