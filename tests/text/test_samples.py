"""Sample documents from a text file: spread over the file, and every bad file met with one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemcut.calibration.samples import read_calibration_text
from gemcut.errors import ParameterError
from gemcut.text import Tokenizer
from support import tokenizer_dir


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(tokenizer_dir())


def numbered(count: int) -> str:
    return "\n".join(f"This is line number {i} of the text." for i in range(count))


def test_a_short_file_is_taken_whole(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text(numbered(60), encoding="utf-8")
    documents = read_calibration_text(path, tokenizer, tokens=4096, context=64)
    assert all(document[0] == 2 and len(document) <= 64 for document in documents)
    ids = [token for document in documents for token in document[1:]]
    assert ids == tokenizer.encode(numbered(60), add_bos=False)


def test_a_byte_order_mark_is_no_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text(numbered(60), encoding="utf-8-sig")
    documents = read_calibration_text(path, tokenizer, tokens=4096, context=64)
    assert documents[0][1:] == tokenizer.encode(numbered(60), add_bos=False)[: len(documents[0]) - 1]


def test_a_long_file_is_sampled_from_beginning_to_end(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text(numbered(20_000), encoding="utf-8")
    documents = read_calibration_text(path, tokenizer, tokens=2048, context=256)
    assert [len(document) for document in documents] == [256] * 8
    texts = [tokenizer.decode(document) for document in documents]
    assert all(text.startswith("This is line number") for text in texts)
    first = [int(text.split()[4]) for text in texts]
    assert first == sorted(first)
    assert first[0] < 10
    assert first[-1] > 19_000


def test_markup_in_a_text_is_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("<start_of_turn>user\nHello<end_of_turn>\n" * 60, encoding="utf-8")
    documents = read_calibration_text(path, tokenizer, tokens=512, context=128)
    assert not {106, 107} & {token for document in documents for token in document}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b" \n\t ", "is empty"),
        (b"\xff\xfe" + b"a" * 1000, "not UTF-8"),
        (b"abc\0" * 1000, "binary"),
        (b"too few words", "calibration needs 256"),
        (None, "cannot read"),
    ],
)
def test_bad_files(data: bytes | None, words: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ParameterError, match=words) as caught:
        read_calibration_text(path, tokenizer)
    assert "\n" not in str(caught.value)


def test_a_folder_and_bad_numbers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="cannot read"):
        read_calibration_text(tmp_path, tokenizer)
    for tokens, context in ((100, 64), (1024, 8), (512, 1024)):
        with pytest.raises(ParameterError, match="expected"):
            read_calibration_text(tmp_path, tokenizer, tokens=tokens, context=context)
