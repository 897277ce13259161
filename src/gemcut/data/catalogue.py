"""The names that recipes use, and where each reader and step is defined: nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

READERS: Mapping[str, str] = {
    "jsonl": "gemcut.data.readers.jsonl:JsonlReader",
}
STEPS: Mapping[str, str] = {
    "gopher-quality": "gemcut.data.filters.web:GopherQuality",
    "gopher-repetition": "gemcut.data.filters.web:GopherRepetition",
    "c4": "gemcut.data.filters.web:C4",
    "fineweb": "gemcut.data.filters.web:FineWeb",
}


def load(place: str) -> type[Any]:
    """The class at ``module:name``."""
    module, _, name = place.partition(":")
    found: type[Any] = getattr(importlib.import_module(module), name)
    return found
