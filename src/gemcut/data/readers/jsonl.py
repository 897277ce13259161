"""JSON lines, plain, .gz or .zst: one object a line with the text under a key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from gemcut.data.document import Document
from gemcut.data.readers.base import (
    MAX_RECORD,
    File,
    Item,
    Reader,
    as_text,
    bad,
    checked,
    guard,
    open_plain,
    read_lines,
)


@dataclass(frozen=True)
class JsonlReader(Reader):
    """``text_key``, ``id_key``, ``url_key`` and ``licence_key`` name the keys; all but the text may be missing.

    A line without an id is called by its file and number.
    """

    ENDINGS: ClassVar[tuple[str, ...]] = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.zstd", ".json.gz", ".ndjson")

    text_key: str = "text"
    id_key: str = "id"
    url_key: str = "url"
    licence_key: str = "licence"

    def read(self, file: File, source: str, licence: str) -> Iterator[Item]:
        return guard(file, source, lambda: self._items(file, source, licence))

    def _items(self, file: File, source: str, licence: str) -> Iterator[Item]:
        with open_plain(file.path) as opened:
            for number, line in read_lines(opened):
                place = f"{file.name}#{number}"
                if line is None:
                    yield bad(source, place, f"line longer than {MAX_RECORD >> 20} MB")
                elif line.strip():
                    yield self._document(line, place, source, licence)

    def _document(self, line: bytes, place: str, source: str, licence: str) -> Item:
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError:
            return bad(source, place, "not UTF-8")
        except (ValueError, RecursionError):
            return bad(source, place, "not JSON")
        if not isinstance(record, dict):
            return bad(source, place, "not a JSON object")
        text = record.get(self.text_key)
        if not isinstance(text, str):
            return bad(source, place, f"no text under {self.text_key!r}")
        return checked(
            Document(
                as_text(record.get(self.id_key)) or place,
                source,
                text,
                licence=as_text(record.get(self.licence_key)) or licence,
                url=as_text(record.get(self.url_key)),
            )
        )
