"""The names that recipes use, and where each reader and step is defined: nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

READERS: Mapping[str, str] = {
    "jsonl": "gemcut.data.readers.jsonl:JsonlReader",
    "parquet": "gemcut.data.readers.parquet:ParquetReader",
    "text": "gemcut.data.readers.text:TextReader",
    "mathematics": "gemcut.data.readers.text:MathematicsReader",
    "html": "gemcut.data.readers.html:HtmlReader",
    "warc": "gemcut.data.readers.warc:WarcReader",
    "tree": "gemcut.data.readers.tree:TreeReader",
}
STEPS: Mapping[str, str] = {
    "child-safety": "gemcut.data.filters.safety:ChildSafetyStep",
    "url-block": "gemcut.data.filters.url:UrlBlock",
    "language": "gemcut.data.filters.language:Language",
    "gopher-quality": "gemcut.data.filters.web:GopherQuality",
    "gopher-repetition": "gemcut.data.filters.web:GopherRepetition",
    "c4": "gemcut.data.filters.web:C4",
    "fineweb": "gemcut.data.filters.web:FineWeb",
    "code-quality": "gemcut.data.filters.code:CodeQuality",
    "mathematics-quality": "gemcut.data.filters.mathematics:MathematicsQuality",
    "pii": "gemcut.data.filters.safety:Pii",
    "names": "gemcut.data.filters.names:Names",
    "lexicon": "gemcut.data.filters.safety:LexiconStep",
    "linear": "gemcut.data.filters.safety:LinearStep",
    "exact-duplicates": "gemcut.data.dedup.exact:ExactDuplicates",
    "exact-paragraphs": "gemcut.data.dedup.exact:ExactParagraphs",
    "near-duplicates": "gemcut.data.dedup.near:NearDuplicates",
    "decontaminate": "gemcut.data.decontaminate:Decontaminate",
}


def load(place: str) -> type[Any]:
    """The class at ``module:name``."""
    module, _, name = place.partition(":")
    found: type[Any] = getattr(importlib.import_module(module), name)
    return found
