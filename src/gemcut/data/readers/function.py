"""A user's own reader: a Python function that a recipe names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gemcut.data.document import Document
from gemcut.data.readers.base import File, Item, WholeFileReader, bad, checked
from gemcut.errors import DataError
from gemcut.files import shown

_KEYS = ("text", "id", "url", "licence", "meta")


@dataclass(frozen=True)
class FunctionReader(WholeFileReader):
    """``function(data, name)`` gets the bytes of a file, .gz and .zst expanded, and its name.

    It gives texts, or mappings with the key ``text`` and, where known, ``id``, ``url``, ``licence``, ``meta``. Where it
    raises, what it gave before is kept, and the rest of the file is one dropped record.
    """

    function: Callable[[bytes, str], Iterable[Any]]
    name: str

    def wants(self, name: str) -> bool:
        return True

    def items(self, data: bytes, file: File, source: str, licence: str) -> Iterator[Item]:
        number = 0
        try:
            for found in self.function(data, file.name):
                number += 1
                yield self._document(found, f"{file.name}#{number}", source, licence)
        except (DataError, MemoryError):
            raise
        except Exception as error:
            yield bad(
                source, f"{file.name}#{number + 1}", f"raised {type(error).__name__}: the rest of the file is lost"
            )

    def _document(self, found: Any, place: str, source: str, licence: str) -> Item:
        record = {"text": found} if isinstance(found, str) else found
        if not isinstance(record, Mapping) or not isinstance(record.get("text"), str) or not set(record) <= set(_KEYS):
            raise DataError(
                f"the reader {self.name} gave {shown(found)}; expected a text, or keys of {', '.join(_KEYS)}"
            )
        meta = record.get("meta")
        return checked(
            Document(
                str(record.get("id") or place),
                source,
                record["text"],
                licence=str(record.get("licence") or licence),
                url=str(record.get("url") or ""),
                meta=meta if isinstance(meta, Mapping) else None,
            )
        )
