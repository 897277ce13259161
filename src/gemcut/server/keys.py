"""API keys: the file that names them, and what each may do."""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemcut.errors import ParameterError

MAX_BYTES = 1 << 20  # of the file
MAX_KEYS = 1000
#: Shorter ones could be guessed; `openssl rand -hex 24` gives 48 characters.
SHORTEST, LONGEST = 16, 512
_KEY = re.compile(r"[!-~]+")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_EXAMPLE = 'expected TOML such as: alice = "…" with a key of at least 16 characters'


@dataclass(frozen=True)
class Limits:
    """What a key may use; None: no limit.

    Attributes:
        requests_per_minute: requests that may begin in a minute, which may come at once.
        tokens_per_minute: tokens of prompts and answers in a minute. They are counted when an answer is there, so the
            last one may go beyond; then nothing begins until as many minutes have passed as that took.
        concurrent: requests at one time.
    """

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    concurrent: int | None = None


@dataclass(frozen=True)
class ApiKey:
    """A key by its name. The key itself is not kept: ``digest`` is its SHA-256."""

    name: str
    digest: bytes
    limits: Limits = Limits()


class Keys:
    """The keys of a server."""

    def __init__(self, keys: list[ApiKey]) -> None:
        self.keys = list(keys)

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, key: str) -> ApiKey | None:
        """The key that ``key`` is. Takes as long for a wrong one as for a right one."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        found = None
        for each in self.keys:  # all of them, whichever it is
            if hmac.compare_digest(each.digest, digest):
                found = each
        return found


def read_keys(path: str | Path) -> Keys:
    """Read a file of keys: TOML, in which a name is a key, or a table of it.

    ::

        alice = "a key of at least 16 characters"

        [bob]
        sha256 = "hexadecimal SHA-256 of his key"   # or key = "…"
        requests_per_minute = 60
        tokens_per_minute = 100000
        concurrent = 4

    Raises:
        ParameterError: it cannot be read, others can read or change it, it holds no key, or something in it is wrong.
            The message never shows a key.
    """
    path = Path(path)
    try:
        text = _read(path).decode()
        data = tomllib.loads(text)
    except UnicodeDecodeError:
        raise ParameterError(f"{path} is not UTF-8; {_EXAMPLE}") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        place = re.search(r"line \d+", str(error))  # what else the error says may show a key
        line = place[0] if place else f"line {len(text.splitlines())}"
        raise ParameterError(f"{path}, {line}: this is not TOML; {_EXAMPLE}") from None
    if not 0 < len(data) <= MAX_KEYS:
        raise ParameterError(f"{path} holds {len(data)} keys; expected from 1 to {MAX_KEYS}")
    keys = [_key(path, name, value) for name, value in data.items()]
    names: dict[bytes, str] = {}
    for key in keys:
        if (other := names.setdefault(key.digest, key.name)) != key.name:
            raise ParameterError(f"{path}: {other} and {key.name} have the same key; give each its own")
    return Keys(keys)


def _read(path: Path) -> bytes:
    try:
        # Not a pipe: opening one would wait for who writes it.
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(file, "rb") as opened:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode):
                raise ParameterError(f"{path} is not a file; expected one that names API keys")
            _check_mode(path, found)
            data = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise ParameterError(f"cannot read the API keys in {path}: {error.strerror or error}") from None
    if len(data) > MAX_BYTES:
        raise ParameterError(f"{path} has more than {MAX_BYTES:,} bytes; a file of API keys is smaller")
    return data


def _check_mode(path: Path, found: os.stat_result) -> None:
    if os.name != "posix":
        return
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o027:
        who = "others can read" if mode & 0o004 else "others can change"
        raise ParameterError(f"{path} has mode {mode:04o}, so that {who} the API keys in it: run chmod 600 {path}")
    if found.st_uid not in (0, os.geteuid()):
        raise ParameterError(
            f"{path} belongs to another user (uid {found.st_uid}), who could change the API keys in it"
        )


def _key(path: Path, name: str, value: Any) -> ApiKey:
    if not _NAME.fullmatch(name):
        raise ParameterError(f"{path}: a key is named {name[:80]!r}; expected letters, digits and any of _ . -")
    at = f"{path}, {name}"
    if isinstance(value, str):
        return ApiKey(name, _digest(at, {"key": value}))
    if not isinstance(value, Mapping):
        raise ParameterError(f"{at}: expected a key, or a table with one")
    known = ("key", "sha256", "requests_per_minute", "tokens_per_minute", "concurrent")
    for unknown in value:
        if unknown not in known:
            raise ParameterError(f"{at}: unknown setting {unknown[:80]!r}; expected one of {', '.join(known)}")
    concurrent = _number(at, value, "concurrent")
    if concurrent is not None and concurrent != int(concurrent):
        raise ParameterError(f"{at}: concurrent is {concurrent}; expected a whole number")
    limits = Limits(
        _number(at, value, "requests_per_minute"),
        _number(at, value, "tokens_per_minute"),
        None if concurrent is None else int(concurrent),
    )
    return ApiKey(name, _digest(at, value), limits)


def _digest(at: str, value: Mapping[str, Any]) -> bytes:
    if ("key" in value) == ("sha256" in value):
        raise ParameterError(f"{at}: expected either key or sha256")
    if "sha256" in value:
        digest = value["sha256"]
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
            raise ParameterError(f"{at}: sha256 is not one; expected 64 hexadecimal digits")
        return bytes.fromhex(digest)
    key = value["key"]
    if not isinstance(key, str) or not _KEY.fullmatch(key) or not SHORTEST <= len(key) <= LONGEST:
        raise ParameterError(
            f"{at}: the key is none; expected {SHORTEST} to {LONGEST} printable ASCII characters without spaces"
        )
    return hashlib.sha256(key.encode()).digest()


def _number(at: str, value: Mapping[str, Any], name: str) -> float | None:
    number = value.get(name)
    if number is None:
        return None
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 1 <= number < math.inf:
        raise ParameterError(f"{at}: {name} is not a number of at least 1")
    return float(number)
