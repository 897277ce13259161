"""The contract of a run: everything counted, the same bytes however many workers, taken up where it was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import support
from gemcut.data.document import Document, Dropped
from gemcut.data.recipe import read_recipe
from gemcut.data.run import run_recipe
from gemcut.data.steps import Flow, run_step
from gemcut.data.store import read_documents, read_records
from gemcut.errors import DataError

from .corpus import files, flow, run, sentences, write_jsonl, write_recipe

STEPS = """
from gemcut.data.document import Dropped

def short(document):
    return (False, "short") if len(document.text) < 40 else True

def no_sevens(documents, rank, world_size):
    for document in documents:
        if document.id.endswith("7"):
            yield Dropped(document, "a seven")
        else:
            document.text = document.text.upper()
            document.meta["part"] = [rank, world_size]
            yield document

def loses(documents, rank, world_size):
    for document in documents:
        if not document.id.endswith("3"):
            yield document

def breaks_at_five(documents, rank, world_size):
    for document in documents:
        if document.id == "a5":
            raise RuntimeError("five")
        yield document

def picky(document):
    if document.id == "a5":
        raise RuntimeError("five")
    return True

def confused(document):
    return "keep"

def slow(document):
    import time
    time.sleep(0.05)
    return True

def doubles(documents, rank, world_size):
    for document in documents:
        yield document
        yield document

def dies(documents, rank, world_size):
    import os, pathlib
    for document in documents:
        if document.id == "a5":
            os.kill(os.getpid(), 9)
        yield document
"""
RECIPE = """
part_mb = 0.002
[[source]]
name = "a"
reader = "jsonl"
paths = ["a/*.jsonl"]
licence = "CC0-1.0"
[[source]]
name = "b"
reader = "jsonl"
paths = ["b.jsonl"]
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "steps.py").write_text(STEPS)
    for i in range(5):
        texts = [{"id": f"a{3 * i + j}", "text": sentences(3 * i + j)} for j in range(3)]
        write_jsonl(tmp_path / "a" / f"{i}.jsonl", texts)
    write_jsonl(tmp_path / "b.jsonl", [{"text": "tiny"}, {"text": "small"}, {"text": sentences(90)}, {"text": 5}])
    return tmp_path


def with_steps(folder: Path, *steps: str) -> Path:
    return write_recipe(folder, RECIPE + "".join(f"[[step]]\n{step}\n" for step in steps))


BOTH = ('filter = "steps.py:short"', 'function = "steps.py:no_sevens"')


def test_everything_is_counted(corpus: Path) -> None:
    report = run(with_steps(corpus, *BOTH), corpus / "out")
    assert flow(report, "read", "b")["dropped"] == {"no text under 'text'": {"documents": 1, "bytes": 0}}
    short = flow(report, "short", "b")
    assert (short["documents_in"], short["documents_out"]) == (3, 1)
    assert short["dropped"] == {"short": {"documents": 2, "bytes": len("tiny" + "small")}}
    sevens = flow(report, "no_sevens", "a")
    assert (sevens["documents_in"], sevens["documents_out"]) == (15, 14)
    assert sevens["bytes_in"] == sum(len(sentences(i)) for i in range(15))
    kept = [d for path in sorted((corpus / "out" / "documents").iterdir()) for d in read_documents(path)]
    assert Counter(d.source for d in kept) == {"a": 14, "b": 1}
    assert all(d.text == sentences(int(d.id[1:])).upper() for d in kept if d.source == "a")
    assert {d.licence for d in kept if d.source == "a"} == {"CC0-1.0"}
    rejected = [r for path in sorted((corpus / "out" / "rejects").iterdir()) for r in read_records(path)]
    assert Counter((r["step"], r["reason"]) for r in rejected) == {
        ("read", "no text under 'text'"): 1, ("short", "short"): 2, ("no_sevens", "a seven"): 1
    }  # fmt: skip
    assert report["totals"]["documents_in"] == 19
    assert report["totals"]["documents_out"] == 15
    assert report["alarms"] == ["short dropped 2 of 3 documents of b (67%), most for: short"]


@pytest.mark.slow
def test_the_same_bytes_on_one_and_eight_workers(corpus: Path) -> None:
    recipe = with_steps(corpus, *BOTH)
    run(recipe, corpus / "one", 1)
    run(recipe, corpus / "eight", 8)
    one, eight = files(corpus / "one"), files(corpus / "eight")
    assert len([name for name in one if name.startswith("documents/")]) > 3
    assert one == eight


def test_a_finished_run_is_not_run_again(corpus: Path) -> None:
    recipe = with_steps(corpus, *BOTH)
    run(recipe, corpus / "out")
    before = {path: path.stat().st_mtime_ns for path in (corpus / "out" / "documents").iterdir()}
    report = run(recipe, corpus / "out")
    assert before == {path: path.stat().st_mtime_ns for path in (corpus / "out" / "documents").iterdir()}
    assert report["totals"]["documents_out"] == 15


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_it_goes_on_after_kill_9(corpus: Path, workers: int) -> None:
    """Killed with some parts done and one in the middle; totals and bytes are those of a run that nobody killed."""
    recipe = with_steps(corpus, *BOTH, 'filter = "steps.py:slow"')
    out = corpus / "out"
    command = [sys.executable, "-m", "gemcut", "data", "run", str(recipe), str(out), "--workers", str(workers)]
    env = {**os.environ, "PYTHONPATH": str(support.ROOT / "src")}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    done = out / "work" / "stage-0"
    deadline = time.monotonic() + 60
    while len(list(done.glob("*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in done.glob("*.json")}
    assert 2 <= len(kept) < 6
    time.sleep(0.5 if workers > 1 else 0)  # the orphans notice
    run(recipe, out, workers)
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    run(recipe, corpus / "whole")
    assert files(out) == files(corpus / "whole")


def test_a_step_that_loses_documents_fails_the_run(corpus: Path) -> None:
    with pytest.raises(DataError, match=r"the step loses took 3 documents of a, gave 2 and dropped 0") as error:
        run(with_steps(corpus, 'function = "steps.py:loses"'), corpus / "out")
    assert "3 of 6 parts failed" in str(error.value)  # a3, a13 and line 3 of b; the other parts are done
    assert len(list((corpus / "out" / "work" / "stage-0").glob("*.json"))) == 3


def test_a_step_that_doubles_documents_fails_the_run(corpus: Path) -> None:
    with pytest.raises(DataError, match="the step doubles took 3 documents of a, gave 6"):
        run(with_steps(corpus, 'function = "steps.py:doubles"'), corpus / "out")


def test_a_filter_that_raises_drops_that_document(corpus: Path) -> None:
    report = run(with_steps(corpus, 'filter = "steps.py:picky"'), corpus / "out")
    assert list(flow(report, "picky", "a")["dropped"]) == ["raised RuntimeError"]
    assert flow(report, "picky", "a")["documents_out"] == 14
    assert next(s for s in report["steps"] if s["name"] == "picky")["examples"] == {"raised RuntimeError": ["a/a5"]}


def test_a_step_that_raises_names_the_document_and_the_rest_is_done(corpus: Path) -> None:
    with pytest.raises(DataError, match="the step breaks_at_five raised RuntimeError at a/a5: five; mend it"):
        run(with_steps(corpus, 'function = "steps.py:breaks_at_five"'), corpus / "out")
    assert len(list((corpus / "out" / "work" / "stage-0").glob("*.json"))) == 5


def test_a_verdict_that_is_none(corpus: Path) -> None:
    with pytest.raises(DataError, match=r"the filter confused gave 'keep' for a/a0; expected True"):
        run(with_steps(corpus, 'filter = "steps.py:confused"'), corpus / "out")


@pytest.mark.slow
def test_a_worker_that_is_killed(corpus: Path) -> None:
    """Its part is tried once more, then named; all others are done."""
    with pytest.raises(DataError, match=r"a worker died twice \(signal 9\) at part 1 of source a \(1\.jsonl\)"):
        run(with_steps(corpus, 'function = "steps.py:dies"'), corpus / "out", 2)
    assert len(list((corpus / "out" / "work" / "stage-0").glob("*.json"))) == 5
    assert not list((corpus / "out").rglob("00001.jsonl.zst"))


def test_another_recipe_or_input_is_refused(corpus: Path) -> None:
    recipe = with_steps(corpus, *BOTH)
    run(recipe, corpus / "out")
    write_jsonl(corpus / "b.jsonl", [{"text": "another"}])
    with pytest.raises(DataError, match="holds a run with other input files; choose another folder"):
        run(recipe, corpus / "out")
    with pytest.raises(DataError, match="holds a run with another recipe"):
        run(with_steps(corpus, BOTH[0]), corpus / "out")
    with pytest.raises(DataError, match="holds something that is no run"):
        run(recipe, corpus / "a")


def test_two_runs_into_one_folder(corpus: Path) -> None:
    recipe = with_steps(corpus, *BOTH)
    read, tried = read_recipe(recipe), []

    def watch(*_: object) -> None:
        with pytest.raises(DataError, match="another run is writing"):
            run_recipe(read, corpus / "out")
        tried.append(1)

    run_recipe(read, corpus / "out", watch=watch)
    assert tried


def test_a_users_code_is_part_of_the_recipe(corpus: Path) -> None:
    recipe = with_steps(corpus, *BOTH)
    before = read_recipe(recipe).digest
    (corpus / "steps.py").write_text(STEPS.replace("< 40", "< 41"))
    assert read_recipe(recipe).digest != before


def test_a_full_disk_ends_the_run(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    import gemcut.data.run as module

    calls = []

    def full(path: Path, data: object) -> None:
        calls.append(path)
        if "stage-0" in path.parts:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data))

    monkeypatch.setattr(module, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        run(with_steps(corpus, *BOTH), corpus / "out")
    assert sum("stage-0" in path.parts for path in calls) == 1  # the other parts were not tried
    monkeypatch.undo()
    assert run(with_steps(corpus, *BOTH), corpus / "out")["totals"]["documents_out"] == 15


def test_child_safety_rejects_are_not_written() -> None:
    seen = []

    class Quiet:
        KEEPS_REJECTS = False

        def __call__(self, documents, rank, world_size):  # type: ignore[no-untyped-def]
            for document in documents:
                yield Dropped(document, "match")

    flow = Flow()
    some = iter([Document("1", "a", "text")])
    assert list(run_step(Quiet(), "quiet", some, 0, 1, flow, lambda *given: seen.append(given[2]))) == []
    assert seen == [False]
    flow.check("quiet", "a")
