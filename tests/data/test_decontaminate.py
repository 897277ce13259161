"""Planted questions and answers are found, with and without each other; the rest is left alone."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import random
import tarfile
from pathlib import Path

import pytest

import support
from gemcut.data.decontaminate import Decontaminate, Index, _records, benchmark_files
from gemcut.data.document import Document, Dropped
from gemcut.errors import ParameterError

from .corpus import WORDS, sentences

QUESTION = "Which of the seven lanterns above the old copper market went out before the winter letter arrived?"
ANSWER = "It was the fourth lantern since the harbour wind had taken its glass on the evening before."
LICENCE = "Everyone may do what they like with these files as long as the sun is shining."
MEADOW = b"The meadow behind the candle teacher was sold twice.\n"
PARTS = ["thunder basket", "velvet island stone", "garden paper journey bridge"]
SHORT = "How many silver windows has the quiet orchard?"


@pytest.fixture
def benchmarks(tmp_path: Path) -> Path:
    folder = tmp_path / "benchmarks"
    for name in ("jsonl", "csv", "tar", "plain"):
        (folder / name).mkdir(parents=True)
    (folder / "jsonl" / "a.jsonl.gz").write_bytes(
        gzip.compress(json.dumps({"q": QUESTION, "a": {"t": [ANSWER]}}).encode())
    )
    (folder / "jsonl" / "LICENSE").write_text(
        "Everyone may do what they like with these files as long as the sun is shining."
    )
    (folder / "csv" / "b.csv").write_text(f'question,answer\n"{SHORT}",nine\n')
    with tarfile.open(folder / "tar" / "c.tar.gz", "w:gz") as archive:
        data = json.dumps([{"parts": PARTS}]).encode()
        member = tarfile.TarInfo("c.json")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    (folder / "plain" / "d.txt.bz2").write_bytes(bz2.compress(MEADOW))
    return folder


def judge(step: Decontaminate, *texts: str) -> list[str | None]:
    found = step((Document(str(i), "s", text) for i, text in enumerate(texts)), 0, 1)
    return [item.reason if isinstance(item, Dropped) else None for item in found]


def test_what_is_found(benchmarks: Path) -> None:
    step = Decontaminate(benchmarks=str(benchmarks))
    plain = sentences(1)
    cases = {
        plain: None,
        f"{plain}\n{QUESTION}\n{plain}": "benchmark: jsonl",
        f"{plain} {ANSWER.upper().replace(' ', '  ')}": "benchmark: jsonl",
        " ".join(QUESTION.split()[2:15]): "benchmark: jsonl",  # 13 words
        " ".join(QUESTION.split()[2:14]): None,  # 12
        SHORT.replace("?", "!"): "benchmark: csv",
        " ".join(SHORT.split()[:7]): None,
        "thunder basket velvet island stone garden paper journey bridge": "benchmark: tar",
        "- the meadow, behind the candle: teacher was sold": "benchmark: plain",
        LICENCE: None,
        "": None,
    }
    assert judge(step, *cases) == list(cases.values())
    assert step.notes == {"jsonl": 3, "csv": 1, "tar": 1, "plain": 1}
    assert judge(Decontaminate(benchmarks=str(benchmarks), min_hits=3), SHORT, QUESTION) == [None, "benchmark: jsonl"]


def test_lines_are_cut(benchmarks: Path) -> None:
    step = Decontaminate(benchmarks=str(benchmarks), action="cut")
    before, after = sentences(1, 2), sentences(2, 2)
    half = QUESTION.replace(" above", "\nabove")
    items = list(step(iter([Document("1", "s", f"{before}\n{half}\n{after}"), Document("2", "s", SHORT)]), 0, 1))
    assert isinstance(items[0], Document)
    assert items[0].text == f"{before}\n{after}"
    assert isinstance(items[1], Dropped)
    assert step.notes["documents cut"] == 1


def test_errors(benchmarks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEMCUT_BENCHMARKS", raising=False)
    with pytest.raises(ParameterError, match="benchmarks is not given and GEMCUT_BENCHMARKS is not set"):
        Decontaminate()
    with pytest.raises(ParameterError, match="there is no folder /none"):
        Decontaminate(benchmarks="/none")
    (benchmarks / "csv" / "bad.jsonl").write_text('{"a": ')
    step = Decontaminate(benchmarks=str(benchmarks))
    with pytest.raises(ParameterError, match=r"cannot read the benchmark file .*bad.jsonl"):
        judge(step, "x")
    monkeypatch.setenv("GEMCUT_BENCHMARKS", str(benchmarks / "plain"))
    with pytest.raises(ParameterError, match="holds 0 benchmarks; expected 1 to 32"):
        judge(Decontaminate(), "x")


@pytest.mark.slow
def test_every_local_benchmark(tmp_path: Path) -> None:
    """All real sets go into an index of at most 16 MB; questions and answers planted from each are found."""
    folder = Path(os.environ.get("GEMCUT_BENCHMARKS") or support.ROOT.parent / "shared" / "data" / "benchmarks")
    if not folder.is_dir():
        pytest.skip("needs benchmark sets: set GEMCUT_BENCHMARKS to their folder")
    index = Index.build(folder)
    names = {name for name, _ in benchmark_files(folder)}
    assert set(index.names) == names
    assert index.nbytes <= 16 << 20
    assert len(index) > 100_000
    step = Decontaminate(benchmarks=str(folder))
    index.save(tmp_path / "index")
    step.use(tmp_path / "index")
    draw = random.Random(1)
    filler = " ".join(draw.choice(WORDS) for _ in range(200))
    assert judge(step, filler) == [None]
    for name in sorted(names - {"bad_words"}):
        texts = _texts_of(folder, name)
        # Found by 13 terms; BOLD's prompts are all shorter, and are found by 8. A text of 14 words between spaces may
        # be fewer than 13 terms long, but hardly ever.
        texts = [t for t in texts if len(t.split()) >= 14] or [t for t in texts if len(t.split()) >= 9]
        planted = [f"{filler} {text} {filler}" for text in draw.sample(texts, min(10, len(texts)))]
        assert planted, name
        found = judge(step, *planted)
        assert sum(reason is not None for reason in found) >= 0.9 * len(planted), name
        assert step.notes[name] >= 0.9 * len(planted)


def _texts_of(folder: Path, name: str) -> list[str]:
    """Some texts of one benchmark, or all."""
    texts: list[str] = []
    for path in [path for each, path in benchmark_files(folder) if each == name]:
        for record in _records(path):
            texts += record
            if len(texts) > 5000:
                break
    return texts
