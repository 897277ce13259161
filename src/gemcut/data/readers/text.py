"""Plain text, a file a document, or TeX and Markdown with their mathematics left as it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from gemcut.data.document import Document
from gemcut.data.readers.base import File, Item, WholeFileReader, bad, checked


@dataclass(frozen=True)
class TextReader(WholeFileReader):
    """Plain text in UTF-8, .gz and .zst too. With ``divide`` a file is several documents, apart at this line."""

    ENDINGS: ClassVar[tuple[str, ...]] = (".txt", ".txt.gz", ".txt.zst", ".text", ".rst")

    divide: str = ""

    def items(self, data: bytes, file: File, source: str, licence: str) -> Iterator[Item]:
        try:
            text = data.decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError:
            yield bad(source, file.name, "not UTF-8")
            return
        texts = re.split(rf"^{re.escape(self.divide)}$", text, flags=re.MULTILINE) if self.divide else [text]
        for number, part in enumerate(texts, 1):
            if part.strip() or len(texts) == 1:
                id = f"{file.name}#{number}" if self.divide else file.name
                yield checked(Document(id, source, part.strip("\n"), licence=licence))


_COMMENT = re.compile(r"(?<!\\)%.*?$\n?", re.MULTILINE)
_BODY = re.compile(r"\\begin\{document\}(.*?)(?:\\end\{document\}|\Z)", re.DOTALL)
_FRONT = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_HTML_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)


@dataclass(frozen=True)
class MathematicsReader(TextReader):
    """TeX and Markdown: the body without comments, preamble and front matter; formulas stay as they are written."""

    ENDINGS: ClassVar[tuple[str, ...]] = (".tex", ".md", ".markdown", ".tex.gz", ".md.gz")

    def read(self, file: File, source: str, licence: str) -> Iterator[Item]:
        tex = file.name.lower().removesuffix(".gz").endswith(".tex")
        for item in super().read(file, source, licence):
            if isinstance(item, Document):
                item.text = _tex(item.text) if tex else _markdown(item.text)
                yield checked(item)
            else:
                yield item


def _tex(text: str) -> str:
    body = _BODY.search(text)
    return re.sub(r"\n{3,}", "\n\n", _COMMENT.sub("", body[1] if body else text)).strip()


def _markdown(text: str) -> str:
    return re.sub(r"\n{3,}", "\n\n", _HTML_COMMENT.sub("", _FRONT.sub("", text))).strip()
