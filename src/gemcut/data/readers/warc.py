"""WARC files of web crawls: pages as text, and the plain text of WET files.

Records are found here, so that one with a broken length costs itself alone; fastwarc takes the HTTP answer apart.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

from gemcut.data.document import Document
from gemcut.data.readers.base import (
    BLOCK,
    MAX_RECORD,
    DamagedFileError,
    File,
    Item,
    Reader,
    bad,
    checked,
    guard,
    open_plain,
)
from gemcut.data.readers.html import extract
from gemcut.data.store import needs

MAX_HEADER = 64 << 10
_MARK = b"\nWARC/1."
_HEADER = re.compile(rb"WARC/1\.[01]\r?\n(?P<fields>.*?)\r?\n\r?\n", re.DOTALL)
_HTML = ("text/html", "application/xhtml+xml")
_KINDS = ("response", "resource", "conversion")


@dataclass(frozen=True)
class WarcReader(Reader):
    """The answers of a crawl with status 200 that are HTML, XHTML or plain text; what WET files hold.

    Requests, metadata and the like are passed over. ``main_content = false`` takes menus and footers along.
    """

    ENDINGS: ClassVar[tuple[str, ...]] = (".warc", ".warc.gz", ".warc.zst", ".wet", ".wet.gz")

    main_content: bool = True

    def read(self, file: File, source: str, licence: str) -> Iterator[Item]:
        return guard(file, source, lambda: self._items(file, source, licence))

    def _items(self, file: File, source: str, licence: str) -> Iterator[Item]:
        iterator = _fastwarc()
        with open_plain(file.path) as opened:
            for number, found in enumerate(_records(opened), 1):
                place = f"{file.name}#{number}"
                if isinstance(found, str):
                    yield bad(source, place, found)
                    continue
                fields, whole = found
                if fields.get("warc-type") not in _KINDS:
                    continue
                url = fields.get("warc-target-uri", "").strip("<>")
                if self.refused(url):
                    yield Document(_id(fields, place), source, "", licence=licence, url=url)
                else:
                    yield self._document(fields, whole, place, iterator, source, licence)

    def _document(
        self, fields: dict[str, str], whole: bytes, place: str, iterator: Any, source: str, licence: str
    ) -> Item:
        answer = fields["warc-type"] == "response"
        kind, charset = _content_type(fields.get("content-type", ""))
        try:
            record = next(iter(iterator(io.BytesIO(whole), parse_http=answer, auto_decode="all")), None)
            if record is None:
                return bad(source, place, "broken WARC record")
            if answer:
                headers = record.http_headers
                if headers is None or headers.status_code is None:
                    return bad(source, place, "no HTTP answer")
                if headers.status_code != 200:
                    return bad(source, place, "HTTP status is not 200")
                kind, charset = _content_type(headers.get("Content-Type") or "")
            data = record.reader.read(MAX_RECORD + 1)
        except (OSError, ValueError, UnicodeError):
            return bad(source, place, "broken HTTP answer")
        if len(data) > MAX_RECORD:
            return bad(source, place, f"page larger than {MAX_RECORD >> 20} MB")
        if kind in _HTML or (kind in ("", "application/xml", "text/xml") and b"<html" in data[:2048].lower()):
            text = extract(data, self.main_content, charset)
        elif kind == "text/plain":
            try:
                text = data.decode(charset or "utf-8")
            except (UnicodeError, LookupError):
                return bad(source, place, "not UTF-8")
        else:
            return bad(source, place, "not HTML")
        if text is None:
            return bad(source, place, "not HTML")
        url = fields.get("warc-target-uri", "").strip("<>")
        return checked(Document(_id(fields, place), source, text, licence=licence, url=url))


def _id(fields: dict[str, str], place: str) -> str:
    return fields.get("warc-record-id", "").strip("<>") or place


def _content_type(value: str) -> tuple[str, str]:
    """(type, charset) of a Content-Type, "" where it does not say."""
    charset = re.search(r"""charset\s*=\s*["']?([\w.:-]+)""", value, re.IGNORECASE)
    return value.partition(";")[0].strip().lower(), charset[1] if charset else ""


def _records(opened: BinaryIO) -> Iterator[tuple[dict[str, str], bytes] | str]:
    """(fields by name in lower case, the whole record) for each record; what is wrong with one that cannot be read.

    After a broken record reading goes on where the next one begins. Raises DamagedFileError at the end of a file whose
    compression is broken.
    """
    buffer = _Buffer(opened)
    buffer.skip_blank()
    while buffer.fill(1):
        if not buffer.starts(b"WARC/1."):
            yield "no WARC record"
            buffer.skip_to_next()
            continue
        header = buffer.header()
        if header is None:
            yield "broken WARC header"
            buffer.skip_to_next()
            continue
        fields = _fields(header["fields"])
        begin, length = header.end(), fields.get("content-length", "")
        if not length.isdecimal():
            yield "broken length of a WARC record"
            buffer.skip_to_next()
        elif len(length) > 18 or int(length) > MAX_RECORD:
            yield f"WARC record longer than {MAX_RECORD >> 20} MB"
            buffer.skip_to_next()
        elif not buffer.ends(begin + int(length)):
            yield "broken length of a WARC record"
            buffer.skip_to_next()
        else:
            yield fields, buffer.take(begin + int(length)) + b"\r\n\r\n"
        buffer.skip_blank()
    if buffer.damage is not None:
        raise buffer.damage


def _fields(data: bytes) -> dict[str, str]:
    out: dict[str, str] = {}
    for line in data.decode("utf-8", "replace").splitlines():
        name, colon, value = line.partition(":")
        if colon:
            out.setdefault(name.strip().lower(), value.strip())
    return out


class _Buffer:
    """What was read of a file and not yet used."""

    def __init__(self, opened: BinaryIO) -> None:
        self._opened, self._data, self._ended = opened, bytearray(), False
        self.damage: DamagedFileError | None = None

    def fill(self, size: int) -> bool:
        """Read until ``size`` bytes are there; False: the file ends before."""
        while len(self._data) < size and not self._ended:
            try:
                block = self._opened.read(max(BLOCK, min(size - len(self._data), MAX_RECORD)))
            except DamagedFileError as error:
                self.damage, block = error, b""
            self._ended = not block
            self._data += block
        return len(self._data) >= size

    def starts(self, mark: bytes) -> bool:
        self.fill(len(mark))
        return self._data.startswith(mark)

    def header(self) -> re.Match[bytes] | None:
        self.fill(MAX_HEADER)
        return _HEADER.match(bytes(self._data[:MAX_HEADER]))

    def ends(self, end: int) -> bool:
        """Whether a record that ends after ``end`` bytes is followed by another one, or by nothing."""
        if not self.fill(end):
            return False
        self.fill(end + 16)
        rest = bytes(self._data[end : end + 16])
        return not rest.strip() or rest.lstrip(b"\r\n").startswith(b"WARC/1.")

    def take(self, size: int) -> bytes:
        found = bytes(self._data[:size])
        del self._data[:size]
        return found

    def skip_blank(self) -> None:
        while self.fill(1) and self._data[0] in b"\r\n":
            blank = len(self._data) - len(self._data.lstrip(b"\r\n"))
            del self._data[:blank]

    def skip_to_next(self) -> None:
        """To the beginning of the next record after this one, or to the end."""
        at = 0
        while True:
            at = self._data.find(_MARK, at)
            if at >= 0:
                if self._data[max(0, at - 2) : at].endswith((b"\n", b"\n\r")):  # an empty line before it
                    del self._data[: at + 1]
                    return
                at += 1
                continue
            del self._data[: max(0, len(self._data) - 32)]
            if not self.fill(len(self._data) + 1):
                self._data.clear()
                return
            at = 0


def _fastwarc() -> Any:
    try:
        from fastwarc.warc import ArchiveIterator
    except ImportError:
        raise needs("fastwarc") from None
    return ArchiveIterator
