"""The text of a file that a person names: plain text, Markdown, HTML, PDF."""

from __future__ import annotations

import io
from pathlib import Path

from gemcut import files
from gemcut.errors import ParameterError, UnsupportedError

#: A book has a megabyte; what is larger than this would be computed for days.
MAX_BYTES = 32 * 10**6


def read_document(path: Path) -> str:
    """A file's text. The end of its name says what it is: .pdf, .html, .htm; anything else is text in UTF-8.

    Raises:
        ParameterError: it cannot be read, is larger than 32 MB, or holds no text.
        UnsupportedError: the library that reads it is not installed.
    """
    try:
        if files.check_regular(path) > MAX_BYTES:
            raise ParameterError(f"{path} has more than {MAX_BYTES // 10**6} MB; cut it into parts first")
        data = files.read_bounded(path, MAX_BYTES)
    except files.UnreadableError as error:
        raise ParameterError(f"cannot read {path}: it {error}") from None
    except OSError as error:
        raise ParameterError(f"cannot read {path}: {error.strerror or error}") from None
    return document_text(data, str(path), path.suffix.lower())


def document_text(data: bytes, where: str, kind: str = "") -> str:
    """The text in bytes of a kind (".pdf", ".html", or text). Raises as `read_document`, naming ``where``."""
    if kind == ".pdf" or data[:5] == b"%PDF-":
        return _pdf(data, where)
    if kind in (".html", ".htm"):
        text = _html(data)
    else:
        if b"\0" in data:
            raise ParameterError(f"{where} is a binary file; expected text in UTF-8, HTML or PDF")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ParameterError(
                f"{where} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}; convert it first"
            ) from None
    text = text.replace("\r\n", "\n")
    if not text.strip():
        raise ParameterError(f"{where} holds no text")
    return text


def _html(data: bytes) -> str:
    try:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.encoding import bytes_to_str, detect_encoding
    except ImportError:
        raise UnsupportedError("HTML needs resiliparse: pip install 'gemcut[uses]'") from None
    found: str = extract_plain_text(
        bytes_to_str(data, detect_encoding(data) or "utf-8"), main_content=True, alt_texts=False
    )
    return found


def _pdf(data: bytes, where: str) -> str:
    try:
        import pypdf
    except ImportError:
        raise UnsupportedError("PDF needs pypdf: pip install 'gemcut[uses]'") from None
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise ParameterError(f"{where} is encrypted; save it without its password first")
        pages = [page.extract_text() for page in reader.pages]
    except ParameterError:
        raise
    except Exception as error:  # whatever a damaged file makes of the library
        raise ParameterError(f"{where} cannot be read as a PDF ({type(error).__name__}); it may be damaged") from None
    text = "\n\n".join(page.strip() for page in pages if page.strip())
    if not text:
        raise ParameterError(f"{where} holds no text in its {len(pages)} pages; a scan needs OCR first")
    return text
