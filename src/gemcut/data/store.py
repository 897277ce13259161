"""Documents in files between stages: JSON lines in zstandard, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from gemcut.data.document import Document
from gemcut.errors import DataError, ParameterError

LEVEL = 1  # of zstandard: several hundred MB/s, and the files are read again soon


def needs(package: str) -> ParameterError:
    """The error for a package of the extra that is not installed."""
    return ParameterError(f"this needs the package {package}: pip install 'gemcut[data]'")


class AtomicFile:
    """A file that appears under its name when everything is in it. Context manager; ``file`` takes the bytes."""

    def __init__(self, path: Path) -> None:
        self._path, self._temporary = path, path.with_name(f"{path.name}.{os.getpid()}.unfinished")
        self.file: BinaryIO

    def __enter__(self) -> BinaryIO:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self._temporary, "wb")
        return self.file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.file.close()
            if kind is None:
                os.replace(self._temporary, self._path)
        finally:
            self._temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """``data`` as one JSON file, keys in order, so that equal data are equal bytes."""
    with AtomicFile(path) as file:
        file.write(json.dumps(data, ensure_ascii=False, sort_keys=True, indent=1).encode() + b"\n")


def read_json(path: Path) -> Any:
    """What ``write_json`` wrote. Raises DataError where it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); remove it and run again") from None


class DocumentWriter:
    """Writes documents to one file of JSON lines in zstandard. Context manager; ``add`` takes a document."""

    def __init__(self, path: Path) -> None:
        self._whole = AtomicFile(path)
        self._lines: list[str] = []
        self._size = 0

    def __enter__(self) -> DocumentWriter:
        zstandard = load_zstandard()
        self._file = zstandard.ZstdCompressor(level=LEVEL).stream_writer(self._whole.__enter__(), closefd=False)
        return self

    def add(self, document: Document, **more: Any) -> None:
        """Write a document, with ``more`` keys beside its own."""
        line = json.dumps(document.as_dict() | more, ensure_ascii=False)
        self._lines.append(line)
        self._size += len(line)
        if self._size > 1 << 20:
            self._flush()

    def _flush(self) -> None:
        self._file.write("".join(f"{line}\n" for line in self._lines).encode())
        self._lines, self._size = [], 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
                self._file.close()
        except BaseException as failure:
            self._whole.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._whole.__exit__(kind, error, trace)


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of such a file. Raises DataError where it is damaged."""
    zstandard = load_zstandard()
    try:
        with open(path, "rb") as file:
            rest = b""
            reader = zstandard.ZstdDecompressor().stream_reader(file)
            while block := reader.read(1 << 20):
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    yield json.loads(line)
    except (zstandard.ZstdError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); remove it and run again") from None


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of such a file."""
    for record in read_records(path):
        yield Document.from_dict(record)


def load_zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise needs("zstandard") from None
    return zstandard
