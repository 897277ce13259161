"""Reading of files that people bring: regular files only, of a size that is sane for what they are, JSON without traps.

A device, a FIFO or a file that never ends must not hang or fill the memory; 200,000 nested brackets must not be more
than one line of error.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

#: config.json, generation_config.json, tokenizer_config.json, an index: the largest real ones have some megabytes.
MAX_JSON_BYTES = 64 << 20
MAX_DEPTH = 64


class UnreadableError(ValueError):
    """What is wrong with a file, in words that go after its name."""


def check_regular(path: str | os.PathLike[str]) -> int:
    """The size of a regular file, in bytes; links are followed.

    Raises:
        OSError: it cannot be looked at.
        UnreadableError: it is a folder, a device, a FIFO or a socket.
    """
    found = os.stat(path)
    if stat.S_ISREG(found.st_mode):
        return found.st_size
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a FIFO", stat.S_ISSOCK: "a socket"}
    kind = next((name for test, name in kinds.items() if test(found.st_mode)), "a device")
    raise UnreadableError(f"is {kind}; expected a regular file")


def read_bounded(path: str | os.PathLike[str], limit: int) -> bytes:
    """A regular file's bytes, at most ``limit``.

    Raises:
        OSError: it cannot be read.
        UnreadableError: it is no regular file, or larger.
    """
    check_regular(path)
    with open(path, "rb") as file:
        data = file.read(limit + 1)  # not the size of stat: /proc files have none, and a file may grow
    if len(data) > limit:
        raise UnreadableError(f"is larger than {limit:,} bytes, more than any real one")
    return data


def parse_json(data: bytes | str) -> Any:
    """What a JSON text holds.

    Raises:
        UnreadableError: it is no JSON, no UTF-8, or nested deeper than any real one.
    """
    try:
        found = json.loads(data)
    except RecursionError:
        raise UnreadableError(f"is nested more than {MAX_DEPTH} levels deep") from None
    except UnicodeDecodeError as error:
        raise UnreadableError(f"is not UTF-8 ({error.reason} at byte {error.start})") from None
    except ValueError as error:
        raise UnreadableError(f"is not valid JSON ({str(error)[:120]})") from None
    layer = [found]
    for _ in range(MAX_DEPTH):
        layer = [child for value in layer if isinstance(value, (dict, list)) for child in _children(value)]
        if not layer:
            return found
    raise UnreadableError(f"is nested more than {MAX_DEPTH} levels deep")


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """What a JSON file holds. Raises OSError and UnreadableError."""
    return parse_json(read_bounded(path, limit))


def shown(value: object, length: int = 60) -> str:
    """``repr`` of a value from a file, short enough for one line of error."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more digits than Python prints
        return f"a {type(value).__name__}"
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _children(value: dict[str, Any] | list[Any]) -> list[Any]:
    return [c for c in (value.values() if isinstance(value, dict) else value) if isinstance(c, (dict, list))]
