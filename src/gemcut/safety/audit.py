"""The audit log: a line for each guarded request and each report of misuse, chained so that any change is seen.

Each line is a JSON object whose ``hash`` is a keyed hash of the line and of the hash before it. The key lies beside the
log (``FILE.key``, readable by its owner alone), so a line cannot be forged without it; ``FILE.head`` says which line is
the last, so a log cannot be cut at its end either. No text of a request is written: only what a reporter included.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any

from gemcut.errors import ParameterError

#: Bytes of one line: the longest report has 64 KB of JSON.
LONGEST_LINE = 1 << 18
_START = "0" * 64
_KEY_BYTES = 32


@dataclass(frozen=True)
class Verified:
    """A log in which nothing was changed: its lines, how many of them are reports, and when the first was written."""

    lines: int
    reports: int
    first: str | None


class AuditLog:
    """An append-only log. Any thread may write; several processes may, too."""

    def __init__(self, path: str | Path) -> None:
        """Make the log and its key where they are missing. Raises ParameterError."""
        self.path = Path(path)
        self._lock = threading.Lock()
        fresh = not self.path.exists() or self.path.stat().st_size == 0
        self._key = read_key(self.path, make=fresh)
        with _explained(self.path):
            os.close(os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
        if fresh:
            write_head(self.path, self._key, 0, _START)
        else:
            with self._opened() as file:  # a log that was changed is not gone on with
                self._last(file)

    def user(self, name: str) -> str:
        """A person's name or address as the log has it: the same for the same person, in this log alone."""
        return hmac.new(self._key, b"user\0" + name.encode(), hashlib.sha256).hexdigest()[:32]

    def write(self, kind: str, fields: Mapping[str, Any], *, safe: bool = False) -> dict[str, Any]:
        """Append a line; ``safe`` waits until it is on the disk. Raises ParameterError, and OSError of a full disk."""
        with self._lock, self._opened() as file:
            number, before = self._last(file)
            line: dict[str, Any] = {"n": number + 1, "time": _now(), "kind": kind}
            line |= {name: value for name, value in fields.items() if value is not None}
            line["hash"] = chained(self._key, before, line)
            data = json.dumps(line, ensure_ascii=False).encode() + b"\n"
            if len(data) > LONGEST_LINE:
                raise ParameterError(f"a line of the log has {len(data):,} bytes; {LONGEST_LINE:,} is the most")
            file.seek(0, os.SEEK_END)
            file.write(data)
            file.flush()
            if safe:
                os.fsync(file.fileno())
            write_head(self.path, self._key, line["n"], line["hash"])
            return line

    def purge(self, older_than: timedelta) -> int:
        """Drop the lines older than that; how many. What is left can be verified still."""
        limit = (datetime.now(UTC) - older_than).isoformat(timespec="seconds")
        with self._lock, self._opened() as file:
            verify_file(file, self.path, self._key)
            file.seek(0)
            kept: list[bytes] = []
            dropped: dict[str, Any] | None = None
            count = 0
            for data in file:
                line = json.loads(data)
                if not kept and (line["kind"] == "purged" or line["time"] < limit):
                    dropped, count = line, count + (line["kind"] != "purged")
                else:
                    kept.append(data)
            if not count or dropped is None:
                return 0
            anchor = {"n": dropped["n"], "time": _now(), "kind": "purged", "hash": dropped["hash"]}
            anchor["seal"] = _sealed(self._key, anchor["n"], anchor["hash"], "purged")
            part = self.path.with_name(f"{self.path.name}.part")
            with open(os.open(part, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "wb") as new:
                new.writelines([json.dumps(anchor).encode() + b"\n", *kept])
                new.flush()
                os.fsync(new.fileno())
            os.replace(part, self.path)
        self.write("purge", {"lines": count, "before": limit})
        return count

    @contextlib.contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        """The log, locked against other processes; the one that stands there now, should it be replaced meanwhile."""
        with _explained(self.path):
            while True:
                with open(self.path, "r+b") as file:
                    _lock(file)
                    with contextlib.suppress(FileNotFoundError):
                        if os.fstat(file.fileno()).st_ino == os.stat(self.path).st_ino:
                            yield file
                            return
                if not self.path.exists():
                    raise ParameterError(f"the audit log {self.path} was taken away; start anew with another name")

    def _last(self, file: IO[bytes]) -> tuple[int, str]:
        """(the last line's number, its hash). Raises ParameterError where it is not the one the head names."""
        size = file.seek(0, os.SEEK_END)
        head = read_head(self.path, self._key)
        if size == 0:
            if head[0]:
                raise ParameterError(f"the audit log {self.path} is empty, but {head[0]:,} lines were written to it")
            return 0, _START
        file.seek(max(0, size - LONGEST_LINE - 1))
        data = file.read()
        if not data.endswith(b"\n"):
            raise ParameterError(f"the audit log {self.path} ends in the middle of a line; {_KEEP}")
        line = _parsed(data[:-1].rpartition(b"\n")[2], self.path, 0)
        found = line["n"], line["hash"]
        if line["n"] < head[0] or (line["n"] == head[0] and line["hash"] != head[1]):
            raise ParameterError(f"the audit log {self.path} does not end where it was last written; {_KEEP}")
        return found


_KEEP = "keep it as it is for whoever looks into that, and give a new file to --audit-log"


def chained(key: bytes, before: str, line: Mapping[str, Any]) -> str:
    """The hash of a line behind the one whose hash is ``before``."""
    body = {name: value for name, value in line.items() if name != "hash"}
    data = json.dumps(body, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
    return hmac.new(key, before.encode() + b"\0" + data, hashlib.sha256).hexdigest()


def verify(path: str | Path) -> Verified:
    """Look at every line. Raises ParameterError that names the first one that is not as it was written."""
    path = Path(path)
    key = read_key(path, make=False)
    with _explained(path), open(path, "rb") as file:
        return verify_file(file, path, key)


def verify_file(file: IO[bytes], path: Path, key: bytes) -> Verified:
    """The same of an open log."""
    head = read_head(path, key)
    number, before, reports, count = 0, _START, 0, 0
    first: str | None = None
    at_head = head[0] == 0
    file.seek(0)
    place = 0
    while data := file.readline(LONGEST_LINE + 1):
        place += 1
        if not data.endswith(b"\n"):
            raise ParameterError(f"{path}, line {place}: it is cut in the middle, or longer than any real one")
        line = _parsed(data, path, place)
        if line["kind"] == "purged" and place == 1:
            if not hmac.compare_digest(str(line.get("seal")), _sealed(key, line["n"], line["hash"], "purged")):
                raise ParameterError(f"{path}, line 1: it says that lines were purged, which this log's key did not do")
        else:
            if line["n"] != number + 1:
                raise ParameterError(f"{path}, line {place}: it is number {line['n']}, expected {number + 1}: cut here")
            if not hmac.compare_digest(line["hash"], chained(key, before, line)):
                raise ParameterError(f"{path}, line {place}: it is forged, or was changed, or the line before it was")
            count += 1
            reports += line["kind"] == "report"
            first = first or str(line.get("time"))
        number, before = line["n"], line["hash"]
        at_head = at_head or (number, before) == head
    if not at_head and (number, before) != head:
        raise ParameterError(f"{path}: it ends at number {number:,}, but {head[0]:,} were written: cut at the end")
    return Verified(count, reports, first)


def read_key(log: Path, *, make: bool) -> bytes:
    """The log's key; ``make`` one where there is none. Raises ParameterError."""
    path = log.with_name(f"{log.name}.key")
    with _explained(path):
        if make and not path.exists():
            with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="ascii") as file:
                file.write(secrets.token_hex(_KEY_BYTES) + "\n")
        try:
            key = bytes.fromhex(path.read_text(encoding="ascii").strip())
        except FileNotFoundError:
            raise ParameterError(f"{path} is missing, this log's key: without it nothing can be verified") from None
        except ValueError:
            key = b""
    if len(key) != _KEY_BYTES:
        raise ParameterError(f"{path} is no key of an audit log; expected {2 * _KEY_BYTES} hexadecimal digits")
    return key


def write_head(log: Path, key: bytes, number: int, last: str) -> None:
    """Say which line is the last."""
    path = log.with_name(f"{log.name}.head")
    part = path.with_name(f"{path.name}.part")
    with open(os.open(part, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w", encoding="ascii") as file:
        json.dump({"n": number, "hash": last, "seal": _sealed(key, number, last, "head")}, file)
    os.replace(part, path)


def read_head(log: Path, key: bytes) -> tuple[int, str]:
    """(the last line's number, its hash). Raises ParameterError where it is missing or forged."""
    path = log.with_name(f"{log.name}.head")
    try:
        found = json.loads(path.read_bytes()[:1000])
        number, last, seal = int(found["n"]), str(found["hash"]), str(found["seal"])
    except FileNotFoundError:
        if log.exists() and log.stat().st_size:
            raise ParameterError(f"{path} is missing, which says where the log ends") from None
        return 0, _START
    except (ValueError, KeyError, TypeError):
        raise ParameterError(f"{path} is damaged; expected what says where the log ends") from None
    if not hmac.compare_digest(seal, _sealed(key, number, last, "head")):
        raise ParameterError(f"{path} is forged: this log's key did not make it")
    return number, last


def _sealed(key: bytes, number: int, last: str, what: str) -> str:
    return hmac.new(key, f"{what}\0{number}\0{last}".encode(), hashlib.sha256).hexdigest()


def _parsed(data: bytes, path: Path, place: int) -> dict[str, Any]:
    try:
        line = json.loads(data)
        if type(line["n"]) is int and isinstance(line["hash"], str) and isinstance(line["kind"], str):
            return dict(line)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    where = f"line {place}" if place else "its last line"
    raise ParameterError(f"{path}, {where}: it is no line of an audit log; expected JSON with n, kind and hash")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _lock(file: IO[bytes]) -> None:
    try:
        import fcntl
    except ImportError:  # no other process may write there; ours has a lock of its own
        return
    fcntl.flock(file, fcntl.LOCK_EX)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ParameterError(f"cannot use the audit log's file {path}: {error.strerror or error}") from None
