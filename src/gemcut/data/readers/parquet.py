"""Parquet, a row a document, read a row group at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from gemcut.data.document import Document
from gemcut.data.readers.base import MAX_RECORD, File, Item, Reader, as_text, bad, checked, open_file
from gemcut.data.store import needs


@dataclass(frozen=True)
class ParquetReader(Reader):
    """``text_key``, ``id_key``, ``url_key`` and ``licence_key`` name columns; all but the text may be missing."""

    ENDINGS: ClassVar[tuple[str, ...]] = (".parquet",)

    text_key: str = "text"
    id_key: str = "id"
    url_key: str = "url"
    licence_key: str = "licence"

    def read(self, file: File, source: str, licence: str) -> Iterator[Item]:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise needs("pyarrow") from None
        number = 0
        try:
            with open_file(file.path) as raw, parquet.ParquetFile(raw) as table:
                wanted = (self.text_key, self.id_key, self.url_key, self.licence_key)
                columns = [name for name in wanted if name in table.schema_arrow.names]
                if self.text_key not in columns:
                    yield bad(source, file.name, f"no column {self.text_key!r}")
                    return
                for batch in table.iter_batches(batch_size=1024, columns=columns):
                    for row in batch.to_pylist():
                        number += 1
                        yield self._document(row, f"{file.name}#{number}", source, licence)
        except UnicodeDecodeError:
            yield bad(source, f"{file.name}#{number + 1}", "not UTF-8: the rest of the file is lost")
        except pyarrow.ArrowException:
            yield bad(source, f"{file.name}#{number + 1}", "broken Parquet: the rest of the file is lost")

    def _document(self, row: dict[str, Any], place: str, source: str, licence: str) -> Item:
        text = row[self.text_key]
        if not isinstance(text, str):
            return bad(source, place, f"no text under {self.text_key!r}")
        if len(text) > MAX_RECORD:
            return bad(source, place, f"text longer than {MAX_RECORD >> 20} MB")
        own = as_text(row.get(self.licence_key)) or licence
        url = as_text(row.get(self.url_key))
        return checked(Document(as_text(row.get(self.id_key)) or place, source, text, licence=own, url=url))
