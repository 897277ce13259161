"""Sample documents from a text file, to calibrate with or to measure on."""

from __future__ import annotations

from pathlib import Path

from gemcut.errors import ParameterError
from gemcut.text.tokenizer import Tokenizer

#: Bytes of a text file that are read at most; far more than any calibration uses.
_TEXT_BYTES = 64 << 20
#: A matrix rounded for fewer tokens than this would fit them, not the language.
_FEWEST = 256


def read_calibration_text(
    path: Path, tokenizer: Tokenizer, *, tokens: int = 16384, context: int = 512
) -> list[list[int]]:
    """Sample documents for ``calibrate`` from a UTF-8 text file.

    A file that holds more than is wanted is sampled evenly from its beginning to its end (of the first 64 MiB).

    Args:
        path: the text.
        tokenizer: the checkpoint's.
        tokens: how many tokens are wanted.
        context: tokens of each document, ``<bos>`` included.

    Raises:
        ParameterError: the file cannot be read, is empty, is not text, or is very short.
    """
    if tokens < _FEWEST or not 16 <= context <= tokens:
        raise ParameterError(
            f"{tokens} tokens in documents of {context}: expected at least {_FEWEST} in 16 or more each"
        )
    text = _read_text(path)
    documents = max(1, tokens // context)
    # Few tokens are longer than this in characters.
    piece = 8 * context
    if len(text) <= documents * piece:
        ids = tokenizer.encode(text, add_bos=False, parse_special=False)
        pieces = [ids[start : start + context - 1] for start in range(0, len(ids), context - 1)][:documents]
    else:
        starts = [(len(text) - piece) * i // max(1, documents - 1) for i in range(documents)]
        pieces = [
            tokenizer.encode(_from_line(text, s, piece), add_bos=False, parse_special=False)[: context - 1]
            for s in starts
        ]
    found = sum(map(len, pieces))
    if found < min(_FEWEST, tokens):
        raise ParameterError(f"{path} holds {found} tokens; calibration needs {_FEWEST} at least, {tokens} are better")
    bos = tokenizer.encode("", add_bos=True)
    return [bos + part for part in pieces if part]


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_TEXT_BYTES)
            cut_short = bool(file.read(1))
    except OSError as error:
        raise ParameterError(f"cannot read {path}: {error.strerror or error}; expected a UTF-8 text file") from None
    if cut_short:  # not within a character
        data = data[: data.rfind(b"\n") + 1] or data
    if not data.strip():
        raise ParameterError(f"{path} is empty; calibration needs a UTF-8 text file of some thousand words")
    try:
        text = data.decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise ParameterError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8 first") from None
    if "\0" in text:
        raise ParameterError(f"{path} is a binary file (it holds NUL); calibration needs a UTF-8 text file")
    return text


def _from_line(text: str, start: int, length: int) -> str:
    """About ``length`` characters from the line that begins at or after ``start``, or from ``start`` in a long line."""
    line = text.find("\n", start, start + length // 2) + 1
    begin = line or start
    return text[begin : begin + length]
