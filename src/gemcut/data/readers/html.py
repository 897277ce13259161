"""HTML and XHTML pages, a file a document: the main content as text, code blocks and TeX kept."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from gemcut.data.document import Document
from gemcut.data.readers.base import File, Item, WholeFileReader, bad, checked
from gemcut.data.store import needs

#: Where a page keeps the TeX that a formula was made of.
_TEX = (
    re.compile(r'<annotation[^>]*encoding="application/x-tex"[^>]*>(?P<tex>.*?)</annotation>', re.DOTALL),
    re.compile(r'<script[^>]*type="math/tex(?P<display>[^"]*)"[^>]*>(?P<tex>.*?)</script>', re.DOTALL),
    re.compile(r'<img[^>]*class="[^"]*\b(?:math|tex)\b[^"]*"[^>]*alt="(?P<tex>[^"]+)"[^>]*>', re.DOTALL),
)
_MATH = re.compile(r"<math\b.*?</math>", re.DOTALL)


@dataclass(frozen=True)
class HtmlReader(WholeFileReader):
    """HTML and XHTML files. ``main_content = false`` takes menus and footers along; ``url`` goes before each name."""

    ENDINGS: ClassVar[tuple[str, ...]] = (".html", ".htm", ".xhtml", ".html.gz")

    main_content: bool = True
    url: str = ""

    def read(self, file: File, source: str, licence: str) -> Iterator[Item]:
        if self.refused(url := self._address(file)):  # the file is not even opened
            return iter([Document(file.name, source, "", licence=licence, url=url)])
        return super().read(file, source, licence)

    def items(self, data: bytes, file: File, source: str, licence: str) -> Iterator[Item]:
        text = extract(data, self.main_content)
        if text is None:
            yield bad(source, file.name, "not HTML")
            return
        yield checked(Document(file.name, source, text, licence=licence, url=self._address(file)))

    def _address(self, file: File) -> str:
        return f"{self.url.rstrip('/')}/{file.name}" if self.url else ""


def extract(data: bytes, main_content: bool = True, charset: str = "") -> str | None:
    """The text of a page, None where it cannot be parsed.

    Formulas that carry their TeX become ``$…$`` (``$$…$$`` where they stand alone). The encoding is
    ``charset`` where it fits, else the one the page declares, or that its bytes show.
    """
    parse = _resiliparse()
    page = _formulas(parse.decode(data, charset))
    try:
        tree = parse.tree.parse(page)
        text: str = parse.extract(tree, main_content=main_content, alt_texts=False, preserve_formatting=True)
    except (ValueError, RuntimeError):
        return None
    return re.sub(r"\n{3,}", "\n\n", text)


def _formulas(page: str) -> str:
    def one(found: re.Match[str]) -> str:
        tex = html.unescape(found["tex"]).strip()
        marks = "$$" if "display" in (found.groupdict().get("display") or "") else "$"
        return html.escape(f"{marks}{tex}{marks}", quote=False)

    if "<math" in page:

        def whole(found: re.Match[str]) -> str:
            inner = _TEX[0].search(found[0])
            if inner is None:
                return found[0]
            marks = "$$" if 'display="block"' in found[0][:200] else "$"
            return html.escape(f"{marks}{html.unescape(inner['tex']).strip()}{marks}", quote=False)

        page = _MATH.sub(whole, page)
    if "math/tex" in page:
        page = _TEX[1].sub(one, page)
    if "<img" in page and "alt=" in page and ("math" in page or "tex" in page):
        page = _TEX[2].sub(one, page)
    return page


class _Resiliparse:
    """What is used of the package."""

    def __init__(self) -> None:
        try:
            from resiliparse.extract.html2text import extract_plain_text
            from resiliparse.parse.encoding import bytes_to_str, detect_encoding
            from resiliparse.parse.html import HTMLTree
        except ImportError:
            raise needs("resiliparse") from None
        self.extract: Any = extract_plain_text
        self.tree: Any = HTMLTree
        self._to_str, self._detect = bytes_to_str, detect_encoding

    def decode(self, data: bytes, charset: str) -> str:
        declared = re.search(rb"""(?:charset|encoding)\s*=\s*["']?([\w.:-]+)""", data[:2048])
        for name in (charset, declared[1].decode("ascii", "replace") if declared is not None else ""):
            try:
                if name:
                    return data.decode(name)
            except (LookupError, UnicodeError):
                pass
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            found: str = self._to_str(data, self._detect(data) or "utf-8")
            return found


_FOUND: list[_Resiliparse] = []


def _resiliparse() -> _Resiliparse:
    if not _FOUND:
        _FOUND.append(_Resiliparse())
    return _FOUND[0]
