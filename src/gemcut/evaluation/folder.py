"""The folder of benchmark data: finds a set's files, reads them, counts and hashes what was read. Downloads nothing."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemcut.errors import DataError
from gemcut.files import UnreadableError, parse_json, read_bounded, shown
from gemcut.paths import BENCHMARKS, benchmark_folder

#: The largest set that a row reads (RealToxicityPrompts in full) has less, packed and unpacked.
MAX_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class SetOfData:
    """Files of one set, relative to the data folder, and where they come from.

    Attributes:
        name: its folder.
        files: those that must be there; "a|b": one of the two.
        source: repository and path, or another address where a person finds them.
        licence: as the source states it.
        count: how many items the row has in full; 0 where that is not fixed.
        fetch: (hub repository of kind dataset, its file, our file) for ``gemcut eval fetch``.
    """

    name: str
    files: tuple[str, ...]
    source: str
    licence: str
    count: int = 0
    fetch: tuple[tuple[str, str, str], ...] = ()


@dataclass
class Used:
    """A file that was read: its SHA-256, its bytes, and how many records it gave."""

    sha256: str
    bytes: int
    records: int


@dataclass
class DataFolder:
    """Reads files of the data folder. ``used`` says afterwards which, by path relative to ``root``."""

    root: Path
    used: dict[str, Used] = field(default_factory=dict)

    @classmethod
    def find(cls, given: str | Path | None = None) -> DataFolder:
        """The folder given, else the one that GEMCUT_BENCHMARKS names, else shared/data/benchmarks beside the clone.

        Raises DataError where there is none.
        """
        root = benchmark_folder(given, beside_clone=True)
        if root is None:
            raise DataError(f"no folder of benchmark data: pass --data DIR or set {BENCHMARKS}")
        if not root.is_dir():
            raise DataError(f"the benchmark data's folder {root} does not exist; pass --data DIR or set {BENCHMARKS}")
        return cls(root)

    def missing(self, wanted: SetOfData) -> list[str]:
        """Which of a set's files are not there."""
        here = self.root / wanted.name
        return [name for name in wanted.files if not any((here / one).exists() for one in name.split("|"))]

    def require(self, wanted: SetOfData) -> None:
        """Raise DataError where a file of a set is missing, with how to get it."""
        if missing := self.missing(wanted):
            how = f"with gemcut eval fetch {wanted.name} --data {self.root}, or " if wanted.fetch else ""
            path = self.root / wanted.name / missing[0].split("|")[0]
            raise DataError(f"{path} is missing: get it {how}by hand from {wanted.source} (licence: {wanted.licence})")

    def path(self, name: str) -> Path:
        """A file by its path below the folder ("piqa/valid.jsonl")."""
        return self.root / name

    def read(self, name: str) -> bytes:
        """A file's bytes, unpacked where its name ends in .gz or .bz2. Raises DataError."""
        path = self.root / name
        try:
            packed = read_bounded(path, MAX_BYTES)
            data = packed
            if name.endswith(".gz") and not name.endswith(".tar.gz"):
                with gzip.open(io.BytesIO(packed)) as file:
                    data = file.read(MAX_BYTES)
            elif name.endswith(".bz2"):
                with bz2.open(io.BytesIO(packed)) as file:
                    data = file.read(MAX_BYTES)
        except UnreadableError as error:
            raise DataError(f"{path} {error}") from None
        except FileNotFoundError:
            raise DataError(f"{path} is missing") from None
        except (OSError, EOFError) as error:
            raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
        self.used[name] = Used(hashlib.sha256(packed).hexdigest(), len(packed), 0)
        return data

    def text(self, name: str) -> str:
        """A file's text. Raises DataError where it is not UTF-8."""
        try:
            return self.read(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.root / name} is not UTF-8 (byte {error.start})") from None

    def lines(self, name: str) -> list[str]:
        """A file's lines; each counts as a record."""
        found = self.text(name).splitlines()
        self.used[name].records = len(found)
        return found

    def json(self, name: str) -> Any:
        """What a JSON file holds. Raises DataError."""
        try:
            return parse_json(self.read(name))
        except UnreadableError as error:
            raise DataError(f"{self.root / name} {error}") from None

    def jsonl(self, name: str, columns: Sequence[str]) -> list[dict[str, Any]]:
        """The records of a JSON lines file. Raises DataError where one is no object or lacks a column."""
        found = []
        for number, line in enumerate(self.text(name).split("\n"), 1):
            if line.strip():
                try:
                    found.append(json.loads(line))
                except (ValueError, RecursionError):
                    raise DataError(f"{self.root / name}, line {number}: no JSON; expected an object a line") from None
        return self.check(name, found, columns)

    def records(self, name: str, columns: Sequence[str], *, below: str = "") -> list[dict[str, Any]]:
        """The records of a JSON file that holds a list, or an object with the list under ``below``."""
        found = self.json(name)
        if below:
            found = found.get(below) if isinstance(found, dict) else None
        if not isinstance(found, list):
            what = f'an object with a list under "{below}"' if below else "a list"
            raise DataError(f"{self.root / name} holds {shown(found, 30)}; expected {what}")
        return self.check(name, found, columns)

    def csv(self, name: str, columns: Sequence[str], *, delimiter: str = ",") -> list[dict[str, Any]]:
        """The records of a CSV file whose first line names the columns. Raises DataError where one is missing."""
        return self.check(name, self._rows(name, self.text(name), delimiter), columns)

    def csv_archive(self, name: str, columns: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """The records of each CSV file in a tar archive, by its name in there, in the names' order."""
        found: dict[str, list[dict[str, Any]]] = {}
        data = self.read(name)
        try:
            with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                for member in archive:
                    if member.isfile() and (opened := archive.extractfile(member)) is not None:
                        text = opened.read(MAX_BYTES).decode("utf-8-sig")
                        found[member.name] = self._rows(f"{name}/{member.name}", text, ",")
        except (tarfile.TarError, EOFError, OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {self.root / name}: {error}") from None
        count = 0
        for member_name, records in found.items():
            self.check(name, records, columns, where=f"{name}/{member_name}")
            count += len(records)
        self.used[name].records = count
        return dict(sorted(found.items()))

    def _rows(self, name: str, text: str, delimiter: str) -> list[dict[str, Any]]:
        csv.field_size_limit(1 << 24)
        try:
            return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
        except csv.Error as error:
            raise DataError(f"{self.root / name} is no CSV file: {error}") from None

    def check(self, name: str, found: list[Any], columns: Sequence[str], where: str = "") -> list[dict[str, Any]]:
        """Note how many records a file has. Raises DataError where there is none, or one lacks a column."""
        path = self.root / (where or name)
        if not found:
            raise DataError(f"{path} holds no records")
        for number, record in enumerate(found, 1):
            if not isinstance(record, dict):
                raise DataError(f"{path}, record {number}, is {shown(record, 30)}; expected an object")
            for column in columns:
                if column not in record:
                    names = ", ".join(map(str, record)) or "none"
                    raise DataError(f'{path}, record {number}, has no "{column}"; its columns are: {names[:200]}')
        if name in self.used:
            self.used[name].records = len(found)
        return found
