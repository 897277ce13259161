"""Folders of the person who runs gemcut: where caches and what outlives a session are kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from gemcut.errors import CheckpointError


def expand(path: str | Path) -> Path:
    """``path`` with a leading ``~`` or ``~name`` replaced, where such a home is known; never raises."""
    return Path(os.path.expanduser(path))


def cache_folder(kind: Literal["models", "tokenizers", "kernels", "packages"]) -> Path:
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
