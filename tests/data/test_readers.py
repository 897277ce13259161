"""Parquet, text, HTML, source trees, mathematics: what is read, and what is counted where it cannot be."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gemcut.data.document import Document, Dropped
from gemcut.data.readers.base import Reader, list_files
from gemcut.data.readers.html import HtmlReader, extract
from gemcut.data.readers.parquet import ParquetReader
from gemcut.data.readers.text import MathematicsReader, TextReader
from gemcut.data.readers.tree import TreeReader, code_language, licence_of
from gemcut.errors import ParameterError

from .corpus import sentences


def read(reader: Reader, path: Path, licence: str = "X") -> tuple[dict[str, Document], Counter[str]]:
    items = [i for file in list_files(reader, [str(path)], "s") for i in reader.read(file, "s", licence)]
    kept = {item.id: item for item in items if isinstance(item, Document)}
    dropped = [item for item in items if isinstance(item, Dropped)]
    assert len(kept) + len(dropped) == len(items)
    return kept, Counter(item.reason for item in dropped)


def test_parquet(tmp_path: Path) -> None:
    texts = [sentences(0), None, "\x00", sentences(3)]
    table = pa.table({"body": texts, "id": [10, 11, 12, None], "url": ["u", "v", "w", "http://x.example"]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    kept, dropped = read(ParquetReader(text_key="body"), tmp_path)
    assert {id: d.text for id, d in kept.items()} == {"10": sentences(0), "a.parquet#4": sentences(3)}
    assert kept["a.parquet#4"].url == "http://x.example"
    assert dropped == {"no text under 'body'": 1, "NUL characters": 1}
    assert read(ParquetReader(), tmp_path)[1] == {"no column 'text'": 1}
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    assert read(ParquetReader(), tmp_path)[1] == {"broken Parquet: the rest of the file is lost": 1}


def test_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffwith a mark\r\nof bytes\n".encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "d.txt").write_bytes(b"")
    kept, dropped = read(TextReader(), tmp_path)
    assert {id: d.text for id, d in kept.items()} == {"a.txt": "with a mark\nof bytes", "b.txt.gz": "packed"}
    assert dropped == {"not UTF-8": 1, "no text": 1}
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "e.txt").write_text("one\n%%\ntwo\n% %\n%%\n\n%%\nthree %%\n")
    kept, _ = read(TextReader(divide="%%"), tmp_path / "e")
    assert {id: d.text for id, d in kept.items()} == {"e.txt#1": "one", "e.txt#2": "two\n% %", "e.txt#4": "three %%"}


def test_a_file_that_is_too_large_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextReader, "LIMIT", 1 << 20)
    (tmp_path / "a.txt").write_text("a" * (1 << 20) + "a")
    (tmp_path / "b.txt").write_text("b" * (1 << 20))
    kept, dropped = read(TextReader(), tmp_path)
    assert (set(kept), dropped) == ({"b.txt"}, Counter({"file larger than 1 MB": 1}))


def test_mathematics(tmp_path: Path) -> None:
    (tmp_path / "a.tex").write_text(
        "\\documentclass{article}\n% secret\n\\begin{document}\nLet $x^2 = 5\\%$ % why\nand\n\\[ \\sum_i i \\]\n"
        "\\end{document}\nrest"
    )
    (tmp_path / "b.md").write_text("---\ntitle: x\n---\n# Roots\n\n<!-- hidden -->\n$$\\sqrt{2}$$\n")
    (tmp_path / "c.tex").write_text("% nothing\n")
    kept, dropped = read(MathematicsReader(), tmp_path)
    assert kept["a.tex"].text == "Let $x^2 = 5\\%$ and\n\\[ \\sum_i i \\]"
    assert kept["b.md"].text == "# Roots\n\n$$\\sqrt{2}$$"
    assert dropped == {"no text": 1}


PAGE = """<html><head><title>T</title><meta charset="{}"></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/x">Elsewhere</a></li></ul></nav>
<main><h1>Heading</h1><p>First paragraph with some length, so that it counts as content: café.</p>
<pre><code>def f(x):
    return x &lt; 2
</code></pre>
<p>Einstein: <math display="block"><semantics><mrow><mi>E</mi></mrow>
<annotation encoding="application/x-tex">E = m c^2 &lt; 1</annotation></semantics></math> and
<script type="math/tex; mode=display">\\int_0^1 x</script> or <img class="math" alt="\\alpha" src="a.png">.</p></main>
<footer>Copyright nobody</footer></body></html>"""
XHTML = '<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE html>\n' + PAGE.replace(
    "<html>", '<html xmlns="http://www.w3.org/1999/xhtml">'
)


@pytest.mark.parametrize("encoding", ["utf-8", "iso-8859-1"])
@pytest.mark.parametrize("page", [PAGE, XHTML], ids=["html", "xhtml"])
def test_html(page: str, encoding: str) -> None:
    text = extract(page.format(encoding).replace('"UTF-8"', f'"{encoding}"').encode(encoding))
    assert text is not None
    assert "café" in text
    assert "def f(x):\n    return x < 2" in text
    assert "$$E = m c^2 < 1$$" in text
    assert "$$\\int_0^1 x$$" in text
    assert "$\\alpha$" in text
    assert "Home" not in text
    assert "Copyright nobody" not in text
    assert "Home" in (extract(page.format(encoding).encode(encoding), main_content=False) or "")


def test_html_files(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.html").write_text(PAGE.format("utf-8"), encoding="utf-8")
    (tmp_path / "x" / "b.xhtml").write_bytes(b"\xff\x00\x01")
    (tmp_path / "x" / "c.htm").write_text("<p></p>")
    (tmp_path / "x" / "d.html").write_text("<p>" + "<div>" * 5000 + "deep")
    kept, dropped = read(HtmlReader(url="https://a.example/"), tmp_path)
    assert kept["x/a.html"].url == "https://a.example/x/a.html"
    assert dropped["no text"] == 1
    assert dropped["NUL characters"] + dropped["no text"] + dropped["not HTML"] + len(kept) == 4


MIT = "Permission is hereby granted, free of charge, to any person obtaining a copy"
BSD = "Redistribution and use in source\n# and binary forms, with or without. Neither the name of"


def test_tree(tmp_path: Path) -> None:
    files = {
        "LICENSE": MIT,
        "a.py": "print(1)\n",
        "b.py": f"# {MIT}\nprint(2)\n".replace(MIT, "SPDX-License-Identifier: Apache-2.0"),
        "sub/COPYING.txt": "GNU GENERAL PUBLIC LICENSE",
        "sub/c.c": "int x;\n",
        "sub/d.h": "namespace a { class B; }\n",
        "sub/deep/e.c": f"/* {BSD.replace('#', ' ')} */\nint y;\n".replace("source\n  and", "source and"),
        "tool": "#!/usr/bin/env python3\nprint(3)\n",
        "notes": "just words\n",
        "data.json": "{}",
        "bad.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.py").write_bytes(b"x = '\xe9'\n")
    kept, dropped = read(TreeReader(), tmp_path)
    assert {id: (d.licence, d.meta["code"]) for id, d in kept.items()} == {
        "a.py": ("MIT", "python"),
        "b.py": ("Apache-2.0", "python"),
        "sub/c.c": ("GPL", "c"),
        "sub/d.h": ("GPL", "c++"),
        "sub/deep/e.c": ("BSD-3-Clause", "c"),
        "tool": ("MIT", "python"),
    }
    assert dropped == {"no known programming language": 1, "not UTF-8": 1, "no text": 1}
    kept, dropped = read(TreeReader(languages=("c++",)), tmp_path / "sub")
    assert set(kept) == {"d.h"}
    assert dropped == {"another programming language": 2}
    with pytest.raises(ParameterError, match="languages names 'pyton'; did you mean python"):
        TreeReader(languages=("pyton",))


def test_licences_of_real_texts() -> None:
    """The licence files of installed packages, by what their metadata say they are."""
    import importlib.metadata

    expected = {"numpy": "BSD-3-Clause", "sympy": "BSD-3-Clause", "pytest": "MIT", "requests": "Apache-2.0"}
    checked = 0
    for package, name in expected.items():
        try:
            found = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        texts = [f for f in found if f.name in ("LICENSE", "LICENSE.txt", "LICENSE.md")]
        for file in texts[:1]:
            assert licence_of(file.locate().read_text()) == name, package
            checked += 1
    assert checked
    assert licence_of("All rights reserved.") == ""


def test_code_languages() -> None:
    assert code_language("x.h", "int f(void);\n") == "c"
    assert code_language("x", "#! /bin/sh\n") == "shell"
    assert code_language("x", "#!/usr/bin/perl -w\n") == "perl"
    assert code_language("x", "words") is None
