"""What every reader does: from one file, documents and the records that are none, each with a reason."""

from __future__ import annotations

import copy
import glob
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

from gemcut.data.document import Document, Dropped
from gemcut.data.store import load_zstandard, needs
from gemcut.errors import DataError
from gemcut.files import UnreadableError, check_regular

#: Longer records (a line, a file, a page) are counted and skipped without being in memory as a whole.
MAX_RECORD = 64 << 20
BLOCK = 1 << 20
Item = Document | Dropped


@dataclass(frozen=True)
class File:
    """One input file: a local path or an fsspec address, its size, and its name below what the recipe names."""

    path: str
    size: int
    name: str
    modified: int = 0  # nanoseconds, 0 where it is not known; tells a resumed run that its input changed


@dataclass(frozen=True)
class Reader:
    """Base of all readers; the fields of one are its keys in a recipe."""

    #: Where a path of the recipe is a folder, files with these endings are read.
    ENDINGS: ClassVar[tuple[str, ...]] = ()

    #: Whether a step drops documents of an address. No key of a recipe; see `skipping`.
    refused: Callable[[str], bool] = field(default_factory=lambda: _nothing, init=False, repr=False, compare=False)

    def read(self, file: File, source: str, licence: str) -> Iterator[Item]:
        """The documents of one file. What is no document is a Dropped whose document has no text."""
        raise NotImplementedError

    def skipping(self, refused: Callable[[str], bool]) -> Reader:
        """A reader that gives a document whose address is refused without its text, where getting that would take work.

        The step that refuses it drops it behind the reader, and counts it.
        """
        other = copy.copy(self)
        object.__setattr__(other, "refused", refused)
        return other

    def wants(self, name: str) -> bool:
        """Whether a file that lies in a folder of the recipe is read."""
        return name.lower().endswith(self.ENDINGS)


def _nothing(url: str) -> bool:
    return False


def bad(source: str, id: str, reason: str) -> Dropped:
    """A record that is no document: only its place is known."""
    return Dropped(Document(id, source, ""), reason)


def checked(document: Document) -> Item:
    """The document, or why its text is none."""
    text = document.text
    if "\x00" in text:
        return Dropped(document, "NUL characters")
    if not text.strip():
        return Dropped(document, "no text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # a JSON escape of half a character
            document.text = text.encode("utf-8", "replace").decode()
            return Dropped(document, "lone surrogates")
    return document


def as_text(value: Any) -> str:
    """A text or a whole number as a text, "" for anything else."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return ""
    return str(value).encode("utf-8", "replace").decode()


def list_files(reader: Reader, paths: Sequence[str], source: str) -> list[File]:
    """Every file that the paths of a source name, in the order of their names, each once.

    Raises DataError where a path names nothing, or something that is no regular file.
    """
    found: dict[str, File] = {}
    for path in paths:
        some = _remote(path) if "://" in path else _local(reader, path, source)
        if not some:
            raise DataError(f"source {source}: nothing to read at {path}; check the path in the recipe")
        for file in some:
            found.setdefault(file.path, file)
    return sorted(found.values(), key=lambda file: file.path)


def _local(reader: Reader, pattern: str, source: str) -> list[File]:
    matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    out: list[File] = []
    for match in matches:
        if os.path.isdir(match):
            base = Path(match)
            for folder, folders, names in os.walk(match):
                folders.sort()
                for name in sorted(names):
                    path = Path(folder) / name
                    if reader.wants(name) and path.is_file():
                        found = path.stat()
                        relative = path.relative_to(base).as_posix()
                        out.append(File(str(path), found.st_size, relative, found.st_mtime_ns))
            continue
        try:
            size = check_regular(match)
        except UnreadableError as error:
            raise DataError(f"source {source}: {match} {error}") from None
        except OSError as error:
            raise DataError(f"source {source}: cannot read {match}: {error.strerror or error}") from None
        out.append(File(match, size, os.path.basename(match), os.stat(match).st_mtime_ns))
    return out


def _remote(path: str) -> list[File]:
    try:
        import fsspec
    except ImportError:
        raise needs("fsspec") from None
    try:
        system, place = fsspec.core.url_to_fs(path)
        names = system.glob(place) if any(c in place for c in "*?[") else [place]
        return [
            File(system.unstrip_protocol(name), int(system.info(name)["size"] or 0), name.rpartition("/")[2])
            for name in sorted(names)
        ]
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"cannot list {path}: {error}") from None


def open_file(path: str) -> BinaryIO:
    """The bytes of a local file or an fsspec address, as they are stored."""
    if "://" in path:
        import fsspec

        return cast(BinaryIO, fsspec.open(path, "rb").open())
    return open(path, "rb")


class DamagedFileError(Exception):
    """A file whose rest cannot be read; what came before it was."""


def open_plain(path: str) -> BinaryIO:
    """The bytes of a file, .gz and .zst expanded. Reading raises DamagedFileError where the compression is broken."""
    raw = open_file(path)
    if path.endswith(".gz"):
        return cast(BinaryIO, _Expanded(raw, lambda: zlib.decompressobj(31), zlib.error, "gzip"))
    if path.endswith((".zst", ".zstd")):
        zstandard = load_zstandard()
        open_frame = zstandard.ZstdDecompressor().decompressobj
        return cast(BinaryIO, _Expanded(raw, open_frame, zstandard.ZstdError, "zstandard"))
    return raw


class _Expanded:
    """Compressed members one after another, read to the last byte that can be had: what is lost comes as an error."""

    #: Of the compressed file at a time: 4 kB can become 128 MB at the most.
    PIECE = 1 << 12

    def __init__(self, raw: BinaryIO, member: Callable[[], Any], error: type[Exception], what: str) -> None:
        self._raw, self._member, self._error, self._what = raw, member, error, what
        self._current: Any = None
        self._rest = b""
        self._ready = bytearray()
        self._broken = self._ended = False

    def read(self, size: int) -> bytes:
        while len(self._ready) < size and not self._broken and not self._ended:
            self._more()
        if not self._ready and self._broken:
            raise DamagedFileError(f"broken {self._what}")
        block = bytes(self._ready[:size])
        del self._ready[:size]
        return block

    def _more(self) -> None:
        data = self._rest or self._raw.read(self.PIECE)
        self._rest = b""
        if not data:
            self._ended, self._broken = True, self._current is not None
            return
        if self._current is None:
            data = data.lstrip(b"\0")  # padding between members
            if not data:
                return
            self._current = self._member()
        try:
            self._ready += self._current.decompress(data)
        except self._error:
            self._broken = True
            return
        if self._current.eof:
            self._rest = self._current.unused_data
            self._current = None

    def close(self) -> None:
        self._raw.close()

    def __enter__(self) -> _Expanded:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_lines(file: BinaryIO, limit: int = MAX_RECORD) -> Iterator[tuple[int, bytes | None]]:
    """(number, line without its end) for each line; None for one longer than ``limit``, which is passed over.

    Raises DamagedFileError after the last whole line where the file's compression is broken.
    """
    number, rest, skipping = 0, b"", False
    damage: DamagedFileError | None = None
    while True:
        try:
            block = file.read(BLOCK)
        except DamagedFileError as error:
            damage, block = error, b""
        if not block:
            break
        *lines, rest_of_block = block.split(b"\n")
        for line in lines:
            number += 1
            whole = rest + line
            rest = b""
            yield number, None if skipping or len(whole) > limit else whole
            skipping = False
        rest = b"" if skipping else rest + rest_of_block
        if len(rest) > limit:
            rest, skipping = b"", True
    if damage is not None:
        raise damage
    if rest or skipping:
        yield number + 1, None if skipping else rest


def read_whole(file: File, limit: int = MAX_RECORD) -> bytes | None:
    """All bytes of a file, None where they are more than ``limit``. Raises DamagedFileError and OSError."""
    with open_plain(file.path) as opened:
        data = bytearray()
        while block := opened.read(BLOCK):
            data += block
            if len(data) > limit:
                return None
    return bytes(data)


def guard(file: File, source: str, items: Callable[[], Iterator[Item]]) -> Iterator[Item]:
    """The items of one file; a file that cannot be read on is one more dropped record with the reason."""
    try:
        yield from items()
    except DamagedFileError as error:
        yield bad(source, f"{file.name}#end", f"{error}: the rest of the file is lost")


@dataclass(frozen=True)
class WholeFileReader(Reader):
    """Base of readers that need all bytes of a file at once."""

    LIMIT: ClassVar[int] = MAX_RECORD

    def read(self, file: File, source: str, licence: str) -> Iterator[Item]:
        return guard(file, source, lambda: self._items(file, source, licence))

    def items(self, data: bytes, file: File, source: str, licence: str) -> Iterator[Item]:
        """The documents of a file that holds ``data``."""
        raise NotImplementedError

    def _items(self, file: File, source: str, licence: str) -> Iterator[Item]:
        data = read_whole(file, self.LIMIT)
        if data is None:
            yield bad(source, file.name, f"file larger than {self.LIMIT >> 20} MB")
        else:
            yield from self.items(data, file, source, licence)
