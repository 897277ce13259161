"""Reading and writing of a tokenizer's small files, with one-line errors and no half-written results."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from gemcut.errors import CheckpointError, TokenizerError
from gemcut.files import MAX_JSON_BYTES, UnreadableError, parse_json, read_bounded


def read_text(path: Path) -> str:
    """A UTF-8 file's text, or TokenizerError."""
    try:
        return read_bounded(path, MAX_JSON_BYTES).decode("utf-8")
    except OSError as error:
        raise TokenizerError(f"cannot read {path} ({error.strerror or error}); download it again") from error
    except UnreadableError as error:
        raise TokenizerError(f"cannot read {path}: it {error}") from None
    except UnicodeDecodeError as error:
        raise TokenizerError(f"cannot read {path}: it is not UTF-8 ({error.reason}); download it again") from None


def read_bytes(path: Path) -> bytes:
    """A file's bytes, or TokenizerError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"cannot be read ({error.strerror or error})") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty where the file does not exist; TokenizerError where it is damaged."""
    if not path.is_file():
        return {}
    try:
        data = parse_json(read_text(path))
    except UnreadableError as error:
        raise TokenizerError(f"{path} {error}; download it again") from None
    if not isinstance(data, dict):
        raise TokenizerError(f"{path} holds a {type(data).__name__}; expected a JSON object")
    return data


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: to a temporary name beside it, then renamed.

    Raises:
        CheckpointError: the folder cannot be made or written, or the disk is full.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide a shared checkpoint from its other readers
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
        raise
