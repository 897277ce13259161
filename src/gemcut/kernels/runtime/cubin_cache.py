"""Compiled GPU kernels kept on disk, so that only a machine's first run waits for the compiler (0.1 to 1 s a kernel).

A file holds the SHA-256 of its content before the content: what was cut off or altered is compiled again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from gemcut.errors import CheckpointError
from gemcut.paths import cache_folder

#: Files kept, of 20 to 110 KB; those that were not used for longest go first.
MOST_FILES = 400
_DIGEST = hashlib.sha256().digest_size


def cached(key: str, compile: Callable[[], bytes]) -> bytes:
    """What ``compile`` gave for this ``key`` before, else what it gives now.

    Args:
        key: everything the result depends on: source, options, version of the compiler.
        compile: makes it. Its errors pass through; a disk that cannot be read or written costs time, nothing else.
    """
    try:
        path = cache_folder("kernels") / f"{hashlib.sha256(key.encode()).hexdigest()}.cubin"
    except CheckpointError:  # no home folder
        return compile()
    found = _read(path)
    if found is not None:
        return found
    result = compile()
    with contextlib.suppress(OSError):
        _write(path, result)
    return result


def _read(path: Path) -> bytes | None:
    try:
        if not _only_ours(path.parent):
            return None
        data = path.read_bytes()
        if hashlib.sha256(data[_DIGEST:]).digest() != data[:_DIGEST]:
            return None
    except OSError:
        return None
    with contextlib.suppress(OSError):  # the age that counts is that of the last use; a read-only disk has none
        os.utime(path)
    return data[_DIGEST:]


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not _only_ours(path.parent):
        return
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    unfinished = Path(name)
    try:
        with open(handle, "wb") as file:
            file.write(hashlib.sha256(content).digest() + content)
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    files = sorted(path.parent.iterdir(), key=lambda file: file.stat().st_mtime, reverse=True)
    for old in files[MOST_FILES:]:
        old.unlink(missing_ok=True)


def _only_ours(place: Path) -> bool:
    """Whether nobody else can put code there that this GPU would run."""
    if not hasattr(os, "getuid"):  # Windows: the profile's own access rights
        return True
    status = place.stat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o022
