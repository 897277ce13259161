"""What a recipe will read and write, before anything is read."""

from __future__ import annotations

from typing import Any

from gemcut.data.parts import divide
from gemcut.data.recipe import Recipe
from gemcut.data.run import READ, stages

#: Files of compressed text hold about so many times their size; zstandard at its first level brings it back.
_EXPANSION = 3.5


def make_plan(recipe: Recipe) -> dict[str, Any]:
    """Files, bytes and parts of each source, the steps of each stage, and the disk that is used at the worst.

    Raises DataError where a source names nothing that can be read.
    """
    parts = divide(recipe)
    sources: dict[str, dict[str, Any]] = {}
    text = 0.0
    for source in recipe.sources:
        own = [part for part in parts if part.source == source.name]
        files = [file for part in own for file in part.files]
        packed = sum(f.size for f in files if f.path.endswith((".gz", ".zst", ".zstd", ".parquet")))
        size = sum(part.nbytes for part in own)
        text += size - packed + packed * _EXPANSION
        sources[source.name] = {
            "reader": source.reader_name,
            "licence": source.licence,
            "files": len(files),
            "bytes": size,
            "parts": len(own),
        }
    names: list[list[str]] = []
    for stage in stages(recipe):
        first = [READ] if stage.number == 0 else [f"{stage.opening.name} (apply)"] if stage.opening else []
        last = [f"{stage.closing.name} (collect)"] if stage.closing else []
        names.append([*first, *(spec.name for spec in stage.steps), *last])
    # At the worst two stages' documents and the rejects, each about as large as the text, compressed.
    copies = min(2, len(names)) + recipe.keep_rejects
    return {
        "sources": sources,
        "files": sum(source["files"] for source in sources.values()),
        "bytes": sum(source["bytes"] for source in sources.values()),
        "parts": len(parts),
        "stages": names,
        "disk_bytes": int(copies * text / _EXPANSION),
    }
