"""What gemcut and the hub keep on this machine: models, and what can be made again."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from gemcut.errors import CheckpointError, ParameterError
from gemcut.paths import Kept, cache_folder
from gemcut.settings import suggestion


@dataclass(frozen=True)
class Entry:
    """Something that is kept.

    Attributes:
        name: what `remove` takes: a hub id, gemma-3-270m, or a kind such as "summaries".
        kind: "hub model", "model", or "cache", which is made again where it is missed.
        size: bytes on the disk.
        used: when it was last read or written, in seconds since 1970; 0 where nobody knows.
        path: where it is.
    """

    name: str
    kind: str
    size: int
    used: float
    path: Path


def entries(hub: Path | None = None) -> list[Entry]:
    """What there is, largest first. ``hub`` is the hub's cache; huggingface_hub says where where it is None."""
    found = [*_hub_models(hub), *_own()]
    return sorted(found, key=lambda entry: (-entry.size, entry.name))


def find(name: str, among: Iterable[Entry]) -> Entry:
    """The entry of that name. Raises ParameterError where there is none, with the nearest one."""
    every = {entry.name: entry for entry in among}
    if name not in every:
        rest = suggestion(name, every) if every else "nothing is kept"
        raise ParameterError(f"nothing by the name {name!r} is kept; {rest} (gemcut list shows all)")
    return every[name]


def remove(entry: Entry) -> None:
    """Remove an entry: first renamed, so that nobody meets half of it. Raises CheckpointError where that fails.

    Files that a link leads to outside of it stay. A process that has it open goes on with what it has.
    """
    gone = entry.path.with_name(f".{entry.path.name}.{os.getpid()}.removed")
    try:
        os.replace(entry.path, gone)
        shutil.rmtree(gone)
    except OSError as error:
        raise CheckpointError(f"cannot remove {entry.path}: {error.strerror or error}") from None


def _hub_models(hub: Path | None) -> list[Entry]:
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        found = scan_cache_dir(hub or constants.HF_HUB_CACHE)
    except (CacheNotFound, ValueError):
        return []
    return [
        Entry(repo.repo_id, "hub model", repo.size_on_disk, repo.last_accessed or repo.last_modified, repo.repo_path)
        for repo in found.repos
        if repo.repo_type == "model"
    ]


def _own() -> list[Entry]:
    try:
        models = cache_folder("models")
    except CheckpointError:  # no home folder, so nothing is kept
        return []
    kinds = [kind for kind in get_args(Kept) if kind != "models"]
    found = [(kind, "cache", cache_folder(kind)) for kind in kinds]
    if models.is_dir():
        known = {path for _, _, path in found}
        found += [(path.name, "model", path) for path in models.iterdir() if path not in known and _holds_model(path)]
    return [Entry(name, kind, *_size(path), path) for name, kind, path in found if path.is_dir()]


def _holds_model(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and any(path.glob("*.gguf"))


def _size(path: Path) -> tuple[int, float]:
    """(bytes, last use) of a folder; links are not followed, and a file is counted once."""
    size, used, seen = 0, 0.0, set()
    for top, _, names in os.walk(path):
        for name in names:
            try:
                stat = os.lstat(Path(top, name))
            except OSError:  # gone meanwhile
                continue
            if (stat.st_dev, stat.st_ino) not in seen:
                seen.add((stat.st_dev, stat.st_ino))
                size += stat.st_size
                used = max(used, stat.st_mtime, min(stat.st_atime, time.time()))
    return size, used
