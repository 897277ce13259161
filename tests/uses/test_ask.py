"""gemcut ask: BM25 against its formula, an index that follows its folder, quotes that stand where citations say."""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import support
from cli.conftest import Cli, cli, environment  # noqa: F401
from gemcut import Gemma, Grammar
from gemcut.cli.options import LoadOptions
from gemcut.errors import ContextLengthError, ParameterError
from gemcut.uses.ask import NOTHING, Asker, check, grammar, read_items
from gemcut.uses.bm25 import Ranking
from gemcut.uses.index import DocumentIndex, Passage, index_file, passages
from gemcut.uses.words import content_terms, scripts, terms
from server.host import NAME, new_gemma

STAFF = "# Staff\n\nEverybody starts at nine.\n\nThe notice period is three\nmonths for all. Holidays: 30 days.\n"
TOOLS = "The saw is sharpened on Mondays. Oil the drill before use!\n"


@pytest.fixture(scope="module")
def gemma() -> Gemma:
    return new_gemma(max_context=512)


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    (folder / "more").mkdir(parents=True)
    (folder / "staff.md").write_text(STAFF)
    (folder / "more" / "tools.txt").write_text(TOOLS)
    (folder / "page.html").write_text("<html><body><p>The canteen opens at noon.</p></body></html>")
    return folder


def test_scores_are_bm25() -> None:
    texts = ["the river is cold", "the river river bank", "a bank of sand and sand", "x", "the cold"]
    words = [text.split() for text in texts]
    ranking = Ranking.from_bytes(Ranking.build(words).to_bytes())
    mean = sum(map(len, words)) / len(words)
    for question in (["river"], ["cold", "bank"], ["sand", "absent"], ["absent"]):
        right = []
        for own in words:
            counts, score = Counter(own), 0.0
            for word in question:
                holding = sum(word in other for other in words)
                idf = math.log(1 + (len(words) - holding + 0.5) / (holding + 0.5))
                score += idf * counts[word] / (counts[word] + 1.5 * (1 - 0.75 + 0.75 * len(own) / mean))
            right.append(score)
        np.testing.assert_allclose(ranking.scores(question), right, rtol=1e-5)


def test_words() -> None:
    assert terms("Über ＡＢＣ-3, naïve!") == ["über", "abc", "3", "naïve"]
    assert terms("東京タワーは2つ x") == ["東京", "京タ", "タワ", "ワー", "ーは", "2", "つ", "x"]
    assert content_terms("What was the war about?") == ["war"]
    assert content_terms("Was ist der Krieg?") == ["krieg"]
    assert content_terms("who is it") == ["who", "is", "it"]
    assert scripts("Ωa 3!漢") == {"Greek", "Latin", "Han"}


@given(st.text(alphabet="ab .!?\n#。é", max_size=3000))
@settings(max_examples=100, deadline=None)
def test_passages_are_the_lines_they_say(text: str) -> None:
    lines = text.split("\n")
    for line, passage in passages(text):
        assert passage.split("\n")[0].rstrip() in lines[line - 1]
        assert text.find(passage) >= 0
    assert "".join("".join(own.split()) for _, own in passages(text)) == "".join(text.split())


def test_the_index_follows_the_folder(docs: Path, tmp_path: Path) -> None:
    where = tmp_path / "kept" / "a.sqlite"
    with DocumentIndex(docs, where) as index:
        first = index.update()
        assert (first.files, first.read, first.removed, first.passed, first.remade) == (3, 3, 0, {}, "")
        (found, *_) = index.search("How long is the notice period?")
        assert (found.path, found.line) == ("staff.md", 1)
        assert index.search("canteen")[0].path == "page.html"
    (docs / "more" / "tools.txt").write_text("The lathe is new.\n")
    os.utime(docs / "staff.md")  # touched, not changed
    (docs / "page.html").unlink()
    with DocumentIndex(docs, where) as index:
        later = index.update()
        assert (later.files, later.read, later.removed) == (2, 1, 1)
        assert [each.path for each in index.search("lathe saw canteen")] == ["more/tools.txt"]
        assert index.update().read == 0
    with DocumentIndex(docs, tmp_path / "new.sqlite") as new, DocumentIndex(docs, where) as old:
        new.update()
        assert new.search("notice lathe") == old.search("notice lathe")  # as if made at once


def test_what_is_in_folders(docs: Path, tmp_path: Path) -> None:
    (docs / "loop").symlink_to(docs)
    (docs / "more" / "up").symlink_to("..")
    (docs / "gone").symlink_to("nowhere")
    (docs / "again.md").symlink_to(docs / "staff.md")
    (docs / "image.png").write_bytes(b"\x89PNG\0\0" * 1000)
    (docs / "latin.txt").write_bytes(b"caf\xe9")
    (docs / "empty.md").touch()
    (docs / "broken.pdf").write_bytes(b"%PDF-1.7\0nonsense")
    (docs / ".hidden.md").write_text("notice")
    with (docs / "huge.txt").open("wb") as file:
        file.write(b"a")
        file.truncate(500 * 10**6)
    os.mkfifo(docs / "pipe.txt")
    with DocumentIndex(docs, tmp_path / "a.sqlite") as index:
        changes = index.update()
        assert changes.files == 3
        assert sorted(changes.passed) == ["broken.pdf", "empty.md", "huge.txt", "image.png", "latin.txt"]
        assert "binary" in changes.passed["image.png"]
        assert "not UTF-8" in changes.passed["latin.txt"]
        assert len(index.search("notice")) == 1
        again = index.update()
        assert (again.read, again.passed) == (0, changes.passed)


@pytest.mark.parametrize("damage", ["older", "newer", "bytes", "foreign", "cut", "ranking"])
def test_an_index_that_is_no_use_is_made_anew(docs: Path, tmp_path: Path, damage: str) -> None:
    where = tmp_path / "a.sqlite"
    with DocumentIndex(docs, where) as index:
        index.update()
        right = index.search("notice drill")
    if damage in ("older", "newer", "ranking"):
        base = sqlite3.connect(where)
        base.execute("UPDATE ranking SET tables = x'00'" if damage == "ranking" else "PRAGMA user_version = 77")
        base.commit()
        base.close()
    elif damage == "foreign":
        where.unlink()
        base = sqlite3.connect(where)
        base.execute("CREATE TABLE files (a)")
        base.commit()
        base.close()
    else:
        data = where.read_bytes()
        where.write_bytes(b"nonsense" * 1000 if damage == "bytes" else data[: len(data) // 2])
    with DocumentIndex(docs, where) as index:
        changes = index.update()
        assert bool(changes.remade) == (damage != "ranking")
        assert changes.read == (0 if damage == "ranking" else 3)
        assert index.search("notice drill") == right


KILLED = """
import sys, time
from pathlib import Path
from gemcut.uses import index
slow = index._content
def content(path, known):
    time.sleep(0.01)
    return slow(path, known)
index._content = content
with index.DocumentIndex(Path(sys.argv[1]), Path(sys.argv[2])) as own:
    own.update(lambda done, known: print(done, flush=True))
"""


def test_killed_in_the_middle(tmp_path: Path) -> None:
    folder, where = tmp_path / "docs", tmp_path / "a.sqlite"
    folder.mkdir()
    for number in range(200):
        (folder / f"{number:03}.txt").write_text(f"word{number} stands here\n")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, folder, where], stdout=subprocess.PIPE, env=environment(), text=True
    )
    assert process.stdout is not None
    for _ in range(2):
        process.stdout.readline()
    time.sleep(0.1)  # in a transaction
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with DocumentIndex(folder, where) as index:
        changes = index.update()
        assert changes.remade == ""
        assert 100 <= changes.read <= 200 - 64  # goes on where it was
        assert changes.files == 200
        assert all(index.search(f"word{number}")[0].path == f"{number:03}.txt" for number in range(0, 200, 17))


def test_what_can_be_no_index(docs: Path, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="no folder"):
        DocumentIndex(docs / "staff.md", tmp_path / "a.sqlite")
    with pytest.raises(ParameterError, match="cannot use the index"):
        DocumentIndex(docs, docs)
    with DocumentIndex(docs, tmp_path / "a.sqlite") as index, pytest.raises(ParameterError, match="no word"):
        index.search("?!")


def test_citations_are_checked() -> None:
    passages = [Passage("a.md", 5, "The notice\nperiod is  three\nmonths."), Passage("b.md", 1, "Oil the drill.")]
    assert check(1, "period is three months", "So.", passages).line == 6
    moved = check(1, "Oil the drill", "So.", passages)  # the model named the wrong passage
    assert (moved.file, moved.line) == ("b.md", 1)
    for number, quote in [(1, "period is four"), (1, "Oil"), (1, ""), (9, "never seen there"), (0, "nor there at all")]:
        assert check(number, quote, "So.", passages).file is None
    assert check(9, "Oil the drill", "So.", passages).file == "b.md"


def test_a_grammar_lets_only_the_passages_be_quoted(gemma: Gemma) -> None:
    texts = ['He said "no" [2] \\ {x} to 3 % | & ~.', "東京は 大きい です。 Καλημέρα κόσμε", "One."]
    messages = [{"role": "user", "content": "x"}]
    seen = 0
    for seed in range(12):
        more = {"temperature": 1.0, "seed": seed, "max_new_tokens": 120, "grammar": grammar(texts)}
        answer = gemma.chat(messages, **more)
        if answer.strip() == NOTHING:
            continue
        items = read_items(answer)
        assert items
        for number, quote, sentence in items:
            assert quote in texts[number - 1]
            assert sentence
            seen += 1
    assert seen


def test_the_prompt_has_as_many_passages_as_fit(gemma: Gemma, tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"river {number} " + "and so on it goes " * 20)
    with DocumentIndex(folder, tmp_path / "a.sqlite") as index:
        index.update()
        asker = Asker(gemma, index, max_new_tokens=40)
        answer = asker("river?")
        assert 1 <= len(answer.passages) < 6
        ids = asker._fitting("river?", index.search("river?"))[1]
        assert len(ids) <= 512 - 40
        assert all(claim.file is not None for claim in answer.claims)
        with pytest.raises(ContextLengthError, match="no room"):
            Asker(gemma, index, max_new_tokens=400)("river?")
        with pytest.raises(ParameterError, match="grammar of its own"):
            Asker(gemma, index, grammar=Grammar.json_object())


def test_the_command(
    cli: Cli,  # noqa: F811
    gemma: Gemma,
    docs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loads: list[str] = []
    monkeypatch.setattr(LoadOptions, "load", lambda self, name, **_: loads.append(name) or gemma)
    monkeypatch.setenv("GEMCUT_CACHE", str(tmp_path / "cache"))
    more = ("--docs", docs, "-m", NAME, "-n", "60", "--passages", "1")
    found = json.loads(cli("ask", "How long is the notice period?", *more, "-t", "1", "--seed", "3", "--json").out)
    assert [each["path"] for each in found["passages"]] == ["staff.md"]
    lines = STAFF.split("\n")
    for claim in found["claims"]:
        assert claim["quote"].split()[0] in lines[claim["line"] - 1]
    assert found["text"] == ("\n".join(f"{c['text']} [{c['file']}:{c['line']}]" for c in found["claims"]) or NOTHING)
    assert index_file(docs, tmp_path / "cache" / "documents").is_file()
    loads.clear()
    done = cli("ask", "Was kostet der Apfel?", *more)
    assert (done.code, done.out, loads) == (0, f"{NOTHING}\n", [])  # no model is loaded for it
    assert "no passage has the question's words" in done.error
    done = cli("ask", "通知期間はどのくらいですか", *more)
    assert (done.out, loads) == (f"{NOTHING}\n", [])
    assert "written in Han, Hiragana, the documents in Latin" in done.error
    assert "no word in it" in cli("ask", "?!", *more).error
    (tmp_path / "empty").mkdir()
    done = cli("ask", "Who?", "--docs", tmp_path / "empty", "-m", NAME)
    assert (done.out, done.error) == (f"{NOTHING}\n", "the folder has no documents with text")
    assert "no folder" in cli("ask", "Who?", "--docs", tmp_path / "absent", "-m", NAME).error
    assert "expected 1 to 100" in cli("ask", "Who?", "--docs", docs, "-m", NAME, "--passages", "0").error
    (docs / "image.png").write_bytes(b"\0\1")
    done = cli("ask", "apple?", *more)
    assert "1 files without readable text were passed over, such as image.png" in done.err


@pytest.mark.slow
def test_the_real_model_quotes_what_is_there(docs: Path, tmp_path: Path) -> None:
    gemma = Gemma.load(support.gguf_path(), progress=False)
    with DocumentIndex(docs, tmp_path / "a.sqlite") as index:
        index.update()
        asker = Asker(gemma, index, max_new_tokens=96)
        for question in ("How long is the notice period?", "When is the saw sharpened?"):
            answer = asker(question)
            assert not answer.unsupported or answer.claims or not answer.found
            for claim in answer.claims:
                text = (docs / str(claim.file)).read_text()
                assert " ".join(claim.quote.split()) in " ".join(text.split())
