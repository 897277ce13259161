"""Changes of the configuration file: one key is set or taken out, everything else stays as a person wrote it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

from gemcut.errors import ParameterError
from gemcut.settings import config_file, lines_of, parse_toml, read_text, spans


def set_key(name: str, value: Any) -> Path:
    """Write ``name = value``, in the key's line where it has one and else at the end; gives the file.

    ``value`` is one that the key's check let pass. Comments and other keys stay. The new text is written under a
    temporary name and renamed; a link is followed.

    Raises:
        ParameterError: the file is no TOML or cannot be written.
    """
    path, text = _read()
    line = f"{name} = {_toml(value)}"
    before = spans(text)
    lines = lines_of(text)
    if name in before:
        first, behind = before[name]
        ending = "\r\n" if lines[behind - 1].endswith("\r\n") else "\n"
        statement = "".join(lines[first:behind])
        comment = _comment(statement)
        if _comments(statement) > bool(comment):
            raise ParameterError(f"{path}, line {first + 1}: comments within the value would be lost; edit it by hand")
        lines[first:behind] = [line + comment + ending]
    else:
        if lines and not lines[-1].endswith("\n"):
            lines[-1] += "\n"
        lines.append(line + "\n")
    _write(path, "".join(lines), {**parse_toml(text, path), name: value})
    return path


def unset_key(name: str) -> Path | None:
    """Take the lines of ``name`` out, which may be a key that gemcut does not know; None where there are none."""
    path, text = _read()
    before = spans(text)
    if name not in before:
        return None
    lines = lines_of(text)
    first, behind = before[name]
    del lines[first:behind]
    rest = parse_toml(text, path)
    del rest[name]
    _write(path, "".join(lines), rest)
    return path


def _read() -> tuple[Path, str]:
    path = config_file()
    if path is None:
        raise ParameterError("there is no home folder to keep a configuration in; set HOME or XDG_CONFIG_HOME")
    text = read_text(path) or ""
    for name, value in parse_toml(text, path).items():
        if isinstance(value, dict):  # a key behind a table's head would belong to the table
            line = spans(text)[name][0] + 1
            raise ParameterError(f"{path}, line {line}: {name!r} is a table, which gemcut does not have; take it out")
    return path, text


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]" if len(value) > 1 else _toml(value[0])
    # JSON's texts are TOML's but for one control character. Numbers are Python's.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else repr(value)


def _comment(statement: str) -> str:
    """The comment behind a value, with the space before it; "" for none."""
    last = statement.rstrip("\r\n").rpartition("\n")[2]
    for match in re.finditer(r"[ \t]*#", last):
        if _same(statement, statement.rstrip("\r\n").removesuffix(last[match.start() :])):
            return last[match.start() :]
    return ""


def _comments(statement: str) -> int:
    """How many lines of a statement end with a comment."""
    lines = lines_of(statement)
    found = 0
    for i, line in enumerate(lines):
        shorter = (line[: match.start()] + "\n" for match in re.finditer("#", line))
        found += any(_same(statement, "".join([*lines[:i], start, *lines[i + 1 :]])) for start in shorter)
    return found


def _same(one: str, other: str) -> bool:
    """Whether ``other`` is TOML, too, and says the same."""
    try:
        return tomllib.loads(one) == tomllib.loads(other)
    except ValueError:
        return False


def _write(path: Path, text: str, expected: dict[str, Any]) -> None:
    # What was written must say what was meant; whatever strange file this is, it is not made worse.
    meant = {key: value[0] if isinstance(value, list) and len(value) == 1 else value for key, value in expected.items()}
    read = parse_toml(text, path)
    got = {key: value[0] if isinstance(value, list) and len(value) == 1 else value for key, value in read.items()}
    if got != meant:
        raise ParameterError(f"{path} cannot be changed by gemcut without loss; edit it by hand")
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(text.encode())
        if target.exists():
            part.chmod(target.stat().st_mode & 0o777)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
    except OSError as error:
        raise ParameterError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
