"""What a recipe will read and write, before anything is read."""

from __future__ import annotations

from typing import Any

from gemcut.data.parts import divide
from gemcut.data.recipe import Recipe
from gemcut.data.run import READ, stages

#: Files of compressed text hold about so many times their size; zstandard at its first level brings it back.
_EXPANSION = 3.5
#: Of a page the text that is its main content.
_OF_HTML = 0.18
#: MB of text a second, one core of a shared AMD EPYC: benchmarks/results/2026-11-30-zen-avx2-data.md.
SPEED = {
    "child-safety": 10.0, "url-block": 500.0, "language": 12.4, "gopher-quality": 17.1, "gopher-repetition": 10.3,
    "c4": 15.0, "fineweb": 20.2, "code-quality": 15.6, "mathematics-quality": 16.7, "pii": 14.4, "lexicon": 8.6,
    "linear": 8.6, "exact-duplicates": 63.6, "exact-paragraphs": 69.4, "near-duplicates": 14.1, "decontaminate": 11.5,
    "names": 0.02,
}  # fmt: skip
_HTML, _PLAIN = 11.5, 200.0  # MB of files a second
_BETWEEN = 42.0  # MB of text a second, written by one stage and read by the next
_TOKENIZE, _TRAIN = 4.0, 2.0
#: Seconds to index the benchmarks that lie beside the project's facts, 19 MB.
_INDEX = 9.0


def make_plan(recipe: Recipe) -> dict[str, Any]:
    """Files, bytes and parts of each source, the steps of each stage, the disk that is used at the worst, the time.

    The time is that of one core that nothing is dropped for, without steps that are a user's own.

    Raises DataError where a source names nothing that can be read.
    """
    parts = divide(recipe)
    sources: dict[str, dict[str, Any]] = {}
    text = seconds = 0.0
    own_steps = False
    chain = stages(recipe)
    for source in recipe.sources:
        own = [part for part in parts if part.source == source.name]
        files = [file for part in own for file in part.files]
        packed = sum(f.size for f in files if f.path.endswith((".gz", ".zst", ".zstd", ".parquet")))
        size = sum(part.nbytes for part in own)
        html = source.reader_name in ("html", "warc")
        expanded = size - packed + packed * _EXPANSION
        own_text = expanded * (_OF_HTML if html else 1)
        text += own_text
        seconds += expanded / 1e6 / (_HTML if html else _PLAIN) + own_text / 1e6 / _BETWEEN * len(chain)
        for spec in recipe.steps:
            speed = SPEED.get(spec.kind)
            own_steps = own_steps or speed is None
            if spec.sees(source.name) and speed is not None:
                seconds += own_text / 1e6 / speed
        sources[source.name] = {
            "reader": source.reader_name,
            "licence": source.licence,
            "files": len(files),
            "bytes": size,
            "parts": len(own),
        }
    names: list[list[str]] = []
    for stage in chain:
        first = [READ] if stage.number == 0 else [f"{stage.opening.name} (apply)"] if stage.opening else []
        last = [f"{stage.closing.name} (collect)"] if stage.closing else []
        names.append([*first, *(spec.name for spec in stage.steps), *last])
    seconds += _INDEX * sum(spec.kind == "decontaminate" for spec in recipe.steps)
    if recipe.tokens is not None:
        seconds += text / 1e6 / _TOKENIZE + (text / 1e6 / _TRAIN if recipe.tokens.train else 0)
    # At the worst two stages' documents and the rejects, each about as large as the text, compressed.
    copies = min(2, len(names)) + recipe.keep_rejects
    return {
        "sources": sources,
        "files": sum(source["files"] for source in sources.values()),
        "bytes": sum(source["bytes"] for source in sources.values()),
        "parts": len(parts),
        "stages": names,
        "seconds_one_core": round(seconds, 1),
        "own_code_not_counted": own_steps,
        "disk_bytes": int(copies * text / _EXPANSION),
    }
