"""Folders of the person who runs gemcut: where caches and what outlives a session are kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from gemcut.errors import CheckpointError


def expand(path: str | Path) -> Path:
    """``path`` with a leading ``~`` or ``~name`` replaced, where such a home is known; never raises."""
    return Path(os.path.expanduser(path))


#: Names the folder of benchmark data.
BENCHMARKS = "GEMCUT_BENCHMARKS"


def benchmark_folder(given: str | Path | None = None, *, beside_clone: bool = False) -> Path | None:
    """The folder of benchmark data, a folder a set: the one given, else the one that ``GEMCUT_BENCHMARKS`` names.

    ``beside_clone``: else shared/data/benchmarks beside a clone of gemcut, where that exists. None where there is none;
    whether the folder exists is for the caller to see.
    """
    if named := str(given or "") or os.environ.get(BENCHMARKS, ""):
        return expand(named)
    beside = Path(__file__).resolve().parents[3] / "shared" / "data" / "benchmarks"
    return beside if beside_clone and beside.is_dir() else None


#: What gemcut keeps that it can make again.
Kept = Literal["models", "tokenizers", "kernels", "packages", "summaries", "documents"]


def cache_folder(kind: Kept) -> Path:
    """Where gemcut keeps what it can make again: ``GEMCUT_CACHE``, else gemcut's folder in the user's cache.

    Raises CheckpointError where there is no home folder.
    """
    own = os.environ.get("GEMCUT_CACHE")
    base = expand(own) if own else user_folder("XDG_CACHE_HOME", ".cache")
    return base if kind == "models" else base / kind


def user_folder(variable: str, below_home: str) -> Path:
    """gemcut's folder in the one that an XDG ``variable`` names, or in ``below_home`` of the home folder.

    Raises CheckpointError where there is no home folder (no HOME, and no entry for this user).
    """
    base = os.environ.get(variable) or os.path.expanduser(f"~/{below_home}")
    if base.startswith("~"):
        raise CheckpointError(f"there is no home folder to keep files in; set HOME, or {variable} to a folder")
    return Path(os.path.expanduser(base)) / "gemcut"
