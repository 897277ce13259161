"""gemcut summarize: chunks cover a text once and fit exactly, quotes are checked, chunks are kept, files are read."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.conftest import Cli, cli  # noqa: F401
from gemcut import Gemma
from gemcut.cli.options import LoadOptions
from gemcut.engine import SamplingParams
from gemcut.errors import ContextLengthError, ParameterError
from gemcut.uses.chunks import split_text
from gemcut.uses.reading import document_text, read_document
from gemcut.uses.summarize import Summarizer, check_quotes
from gemcut.uses.templates import read_template
from server.host import NAME, new_gemma

WORDS = "The river rises in the hills. It is cold there! Is it deep? Nobody knows, but many ask.\n\n"
LONG = "".join(f"# Part {part}\n\n{WORDS * 3}Sentence number {part} ends here. " for part in range(9))


@pytest.fixture(scope="module")
def gemma() -> Gemma:
    return new_gemma()


@given(st.text(alphabet="ab .!?\n#。é🦜=", max_size=200), st.integers(1, 40))
@settings(max_examples=300, deadline=None)
def test_chunks_are_the_text_and_fit(text: str, limit: int) -> None:
    chunks = split_text(text, lambda part: len(part) <= limit)
    assert "".join(chunks) == text
    assert all(1 <= len(chunk) <= limit for chunk in chunks)


def test_no_sentence_is_cut_and_headings_begin_chunks() -> None:
    chunks = split_text(LONG, lambda part: len(part) <= 600)
    sentences = re.findall(r"Sentence number \d+ ends here\.|It is cold there!|Nobody knows, but many ask\.", LONG)
    assert sum(chunk.count(each) for each in set(sentences) for chunk in chunks) == len(sentences)
    assert all(chunk.startswith("# Part") for chunk in chunks)


def test_a_chunk_is_as_long_as_the_context_allows(gemma: Gemma) -> None:
    summarizer = Summarizer(gemma, max_new_tokens=8)
    room = gemma.engine.max_context - 8
    text = "word " * 2000
    chunks = split_text(text, summarizer._fits)
    lengths = [len(summarizer._ids(chunk)) for chunk in chunks]
    assert "".join(chunks) == text
    assert max(lengths) <= room
    assert min(lengths[:-1]) >= room - 2  # one more word would not fit


def _answer(gemma: Gemma, summarizer: Summarizer, text: str) -> str:
    """What the model says to one text, by the plain way."""
    content = summarizer.template.fill({**summarizer._values, "text": text})
    ids = gemma.encode_messages([{"role": "user", "content": content}])
    (done,) = gemma.complete([ids], SamplingParams(temperature=0, max_new_tokens=6))
    return done.text


def test_short_texts_are_one_chunk(gemma: Gemma) -> None:
    summarizer = Summarizer(gemma, max_new_tokens=6)
    first, second = summarizer([WORDS, "Der Himmel ist blau."])
    assert (first.chunks, first.rounds) == (1, 0)
    assert first.text == _answer(gemma, summarizer, WORDS).strip()
    assert second.text == _answer(gemma, summarizer, "Der Himmel ist blau.").strip()


def test_summaries_of_chunks_are_summarized(gemma: Gemma) -> None:
    summarizer = Summarizer(gemma, max_new_tokens=6)
    chunks = split_text(LONG, summarizer._fits)
    assert len(chunks) > 1
    joined = "\n\n".join(_answer(gemma, summarizer, chunk).strip() for chunk in chunks)
    (found,) = summarizer([LONG])
    assert (found.chunks, found.rounds) == (len(chunks), 1)
    assert found.text == _answer(gemma, summarizer, joined).strip()


def test_chunks_are_kept_and_a_damaged_one_made_again(
    gemma: Gemma, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Summarizer(gemma, cache=tmp_path, max_new_tokens=6)([LONG])
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == right[0].chunks + 1
    assert not [path for path in kept if path.suffix != ".json"]
    kept[0].write_text("[1")
    asked: list[Any] = []
    prepare = gemma.prepare_stream
    monkeypatch.setattr(gemma, "prepare_stream", lambda *given, **more: asked.append(given) or prepare(*given, **more))
    assert Summarizer(gemma, cache=tmp_path, max_new_tokens=6)([LONG]) == right
    assert len(asked) == 1
    Summarizer(gemma, cache=tmp_path, max_new_tokens=6, temperature=1.0)([WORDS])
    assert sorted(tmp_path.iterdir()) == kept  # drawn without a seed: not kept


def test_quotes_are_looked_for_word_for_word() -> None:
    source = "One.\nThe river\n  rises in the hills.\nIt said “no more”."
    summary = 'It "The river rises" and "the river rises", “no more” and «nothing».'
    assert [(quote.text, quote.line) for quote in check_quotes(summary, source)] == [
        ("The river rises", 2),
        ("the river rises", None),
        ("no more", 4),
        ("nothing", None),
    ]


def test_prompts_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("Say {style} of {text}.")
    assert (
        read_template("summarize", ("text", "style"), path).fill({"text": "{style}", "style": "x"})
        == "Say x of {style}."
    )
    for words, said in [("no place", "0 times"), ("{text} {text}", "2 times"), ("{text} {other}", "{other}")]:
        path.write_text(words)
        with pytest.raises(ParameterError, match=re.escape(said)):
            read_template("summarize", ("text", "style"), path)


def test_html() -> None:
    page = b"<html><head><title>T</title><script>no()</script></head><body><p>One &amp; two.</p></body></html>"
    text = document_text(page, "page", ".html")
    assert "One & two." in text
    assert "no()" not in text


@pytest.fixture
def pdf() -> Any:
    return pytest.importorskip("pypdf")


def _pdf_bytes(pypdf: Any, words: str | None) -> bytes:
    """A page with Helvetica's text, or nothing, as a scan has."""
    writer = pypdf.PdfWriter()
    page = writer.add_blank_page(200, 200)
    if words is not None:
        from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

        names = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
        font = DictionaryObject({NameObject(key): NameObject(value) for key, value in names.items()})
        fonts = DictionaryObject({NameObject("/F1"): writer._add_object(font)})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 20 100 Td ({words}) Tj ET".encode())
        page[NameObject("/Contents")] = writer._add_object(stream)
    file = io.BytesIO()
    writer.write(file)
    return file.getvalue()


def test_pdf(pdf: Any) -> None:
    assert document_text(_pdf_bytes(pdf, "The sky is blue."), "a.pdf", ".pdf").strip() == "The sky is blue."
    with pytest.raises(ParameterError, match="holds no text in its 1 pages; a scan needs OCR"):
        document_text(_pdf_bytes(pdf, None), "a.pdf", ".pdf")
    with pytest.raises(ParameterError, match="cannot be read as a PDF"):
        document_text(b"%PDF-1.7 nonsense", "a.pdf", ".pdf")


@pytest.mark.parametrize(
    ("data", "said"), [(b"", "holds no text"), (b" \n", "holds no text"), (b"a\0b", "binary"), (b"\xff", "not UTF-8")]
)
def test_what_is_no_text(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(ParameterError, match=said):
        read_document(tmp_path / "a.txt")


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(500 * 10**6)
    with pytest.raises(ParameterError, match="more than 32 MB"):
        read_document(tmp_path / "a.txt")


def test_no_room(gemma: Gemma) -> None:
    with pytest.raises(ContextLengthError, match="no room"):
        Summarizer(gemma, max_new_tokens=500)


def test_the_command(cli: Cli, gemma: Gemma, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(LoadOptions, "load", lambda self, name, **_: gemma)
    monkeypatch.setenv("GEMCUT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.md").write_text(WORDS)
    (right,) = Summarizer(gemma, max_new_tokens=6, style="bullets", length="short")([WORDS])
    more = ("-m", NAME, "-n", "6", "--style", "bullets", "--length", "short")
    done = cli("summarize", tmp_path / "a.md", *more)
    assert (done.code, done.out) == (0, f"{right.text}\n")
    assert list((tmp_path / "cache" / "summaries").iterdir())
    found = json.loads(cli("summarize", "--json", "--no-cache", *more, stdin=WORDS.encode()).out)
    assert (found["file"], found["text"], found["chunks"]) == ("-", right.text, 1)
    assert "no text" in cli("summarize", *more).error
    assert "--style is 'x'; expected one of" in cli("summarize", tmp_path / "a.md", "-m", NAME, "--style", "x").error
    assert cli("summarize", tmp_path, *more).error.endswith("it is a folder; expected a regular file")
