"""Files that a person names in a chat: read whole, within bounds, or refused in one line."""

from __future__ import annotations

from pathlib import Path

from gemcut import files
from gemcut.errors import ParameterError

MAX_TEXT = 4 * 10**6  # far beyond any context: a token has at least a byte
MAX_CHAT = 64 * 10**6


def read_bounded(path: Path, limit: int) -> bytes:
    """A file's bytes. Raises ParameterError where it cannot be read, is no regular file, or has more than ``limit``."""
    try:
        if files.check_regular(path) > limit:
            raise ParameterError(f"{path} has more than {limit // 10**6} MB; expected a file that fits the context")
        return files.read_bounded(path, limit)
    except files.UnreadableError as error:
        raise ParameterError(f"{path} is not a file with text in it: it {error}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, ParameterError):
            raise
        raise ParameterError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def read_text_file(path: Path) -> str:
    """The text of a file, to be part of a message. Raises ParameterError where it is binary, empty or too large."""
    data = read_bounded(path, MAX_TEXT)
    if b"\0" in data:
        raise ParameterError(f"{path} is a binary file; expected text in UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ParameterError(
            f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}; convert it first"
        ) from None
    text = text.replace("\r\n", "\n").strip("\n")
    if not text.strip():
        raise ParameterError(f"{path} holds no text")
    return text
