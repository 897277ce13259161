"""Runs: what is logged, resumed, refused, scored again; invented questions, a tiny random network."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evaluation.test_asking import asker
from gemcut.errors import ContextLengthError, DataError, GemcutError, ParameterError
from gemcut.evaluation import DataFolder, Row, Setup, registry, row
from gemcut.evaluation.comparing import common_rows, comparison_lines, notes, paired, table
from gemcut.evaluation.log import NAME, read_log
from gemcut.evaluation.results import report, score_run
from gemcut.evaluation.row import ScoreOptions
from gemcut.evaluation.run import RunOptions, choose, run_rows
from gemcut.evaluation.tables import card_rows
from gemcut.evaluation.view import page, samples
from gemcut.gemma import Gemma


@pytest.fixture
def gemma() -> Gemma:
    return asker().gemma


@pytest.fixture
def data(tmp_path: Path) -> DataFolder:
    """PIQA and GSM8K in their own forms, twelve invented questions each."""
    folder = tmp_path / "data"
    (folder / "piqa").mkdir(parents=True)
    lines = [json.dumps({"goal": f"g{i}", "sol1": f"one {i}", "sol2": "two"}) for i in range(12)]
    (folder / "piqa" / "valid.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "piqa" / "valid-labels.lst").write_text("".join(f"{i % 2}\n" for i in range(12)))
    (folder / "gsm8k").mkdir()
    for name in ("test", "train"):
        lines = [json.dumps({"question": f"{name}{i}?", "answer": f"#### {i}"}) for i in range(3)]
        (folder / "gsm8k" / f"{name}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return DataFolder(folder)


def short(name: str, tokens: int = 4) -> Row:
    """A row of generated answers, cut short."""
    known = row(name)

    def build(records: Any, setup: Setup) -> Any:
        return [
            replace(item, request=replace(item.request, max_new_tokens=tokens))  # type: ignore[type-var]
            for item in known.build(records, setup)
        ]

    return replace(known, build=build)


def test_a_run_is_logged_scored_and_seen(gemma: Gemma, data: DataFolder, tmp_path: Path) -> None:
    out = tmp_path / "run"
    seen: list[tuple[int, int]] = []
    log = run_rows(
        gemma, [row("piqa")], data, out, RunOptions(), progress=lambda row, done, total: seen.append((done, total))
    )
    assert seen == [(i, 12) for i in range(13)]
    header = log.rows["piqa"].header
    assert header["recipe"] == row("piqa").recipe(Setup())
    assert (header["items"], header["asked"], header["expected"]) == (12, 12, 1838)
    digest = hashlib.sha256((data.root / "piqa" / "valid.jsonl").read_bytes()).hexdigest()
    size = (data.root / "piqa" / "valid.jsonl").stat().st_size
    assert header["data"]["piqa/valid.jsonl"] == {"sha256": digest, "bytes": size, "records": 12}
    assert log.run["model"]["dtype"] == "float32"
    done = log.rows["piqa"].done
    assert done is not None
    assert 0 < done["computed"] < done["alone"]
    item, answer = log.rows["piqa"].items[3], log.rows["piqa"].answers[3]
    assert item.request.continuations == (" one 3", " two")  # type: ignore[union-attr]
    assert len(answer.logprobs) == 2
    results = score_run(log, ScoreOptions())
    own = log.rows["piqa"]
    right = [a.logprobs.index(max(a.logprobs)) == i.target for i, a in zip(own.items, own.answers, strict=True)]
    figure = results["piqa"].figure
    assert figure is not None
    assert figure.value == pytest.approx(100 * sum(right) / 12)
    share = sum(right) / 12
    assert figure.error == pytest.approx(100 * (share * (1 - share) / 11) ** 0.5)
    said = " ".join(results["piqa"].differences())
    assert "The data at hand have 12 items; the whole set has 1,838." in said
    assert not results["piqa"].comparable
    stored = json.loads((out / "scores.json").read_text())["rows"]["piqa"]
    assert len(stored["items"]) == 12
    assert stored["extraction_failed"] == 0
    assert score_run(log, ScoreOptions(), again=False)["piqa"].figures == results["piqa"].figures
    wrong = list(samples(results, "wrong"))
    assert len(wrong) == 12 - sum(right)
    html = page("<title>", results, "all", 5)
    assert html.count("<details") == 5
    assert "piqa: 7." in html
    assert "&lt;title&gt;" in html
    with pytest.raises(ParameterError, match="expected one of all, right, wrong, failed"):
        list(samples(results, "bad"))
    cells = card_rows(results, {"boolq": "no data"})
    by_name = {cell["benchmark"]: cell for cell in cells}
    assert by_name["PIQA"]["27B"] == "83.2"
    assert by_name["BoolQ"]["why"] == "not run: no data"
    assert by_name["PIQA"]["comparable"] == "no"
    assert report(results["piqa"])["card"]["pt_9b"] == 81.7


def test_a_stopped_run_goes_on(gemma: Gemma, data: DataFolder, tmp_path: Path) -> None:
    """The answers afterwards are those of a run that was not stopped."""
    count = 0

    def told(row: Row, done: int, total: int) -> None:
        nonlocal count
        count = done

    with pytest.raises(KeyboardInterrupt):
        run_rows(gemma, [row("piqa")], data, tmp_path / "a", RunOptions(), progress=told, stopped=lambda: count >= 5)
    log = read_log(tmp_path / "a")
    assert len(log.rows["piqa"].items) == 5
    partly = score_run(log, ScoreOptions())["piqa"]
    assert partly.differences()[0] == "The run was stopped: 5 of 12 items."
    assert not partly.comparable
    with open(tmp_path / "a" / NAME, "ab") as file:
        file.write(b'{"row": "piqa", "id": "hal')  # a process that was killed amid a line
    again = run_rows(gemma, [row("piqa")], data, tmp_path / "a", RunOptions())
    whole = run_rows(gemma, [row("piqa")], data, tmp_path / "b", RunOptions())
    assert [item.id for item in again.rows["piqa"].items] == [item.id for item in whole.rows["piqa"].items]
    for one, other in zip(again.rows["piqa"].answers, whole.rows["piqa"].answers, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    size = (tmp_path / "a" / NAME).stat().st_size
    run_rows(gemma, [row("piqa")], data, tmp_path / "a", RunOptions())
    assert (tmp_path / "a" / NAME).stat().st_size == size


def test_another_run_in_the_folder_is_refused(gemma: Gemma, data: DataFolder, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_rows(gemma, [row("piqa")], data, out, RunOptions(limit=3))
    with pytest.raises(DataError, match="holds a run with another limit; choose another --out"):
        run_rows(gemma, [row("piqa")], data, out, RunOptions(limit=4))
    with pytest.raises(DataError, match="another seed"):
        run_rows(gemma, [row("piqa")], data, out, RunOptions(limit=3, setup=Setup(seed=1)))
    with pytest.raises(DataError, match="another model's context"):
        run_rows(asker(max_context=200).gemma, [row("piqa")], data, out, RunOptions(limit=3))
    with pytest.raises(DataError, match="holds piqa with another recipe"):
        run_rows(gemma, [row("piqa")], data, out, RunOptions(limit=3, setup=Setup(shots=1)))
    (data.root / "piqa" / "valid-labels.lst").write_text("0\n" * 12)
    with pytest.raises(DataError, match="holds piqa with another data"):
        run_rows(gemma, [row("piqa")], data, out, RunOptions(limit=3))


def test_answers_of_another_recipe_are_not_scored(
    gemma: Gemma, data: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = run_rows(gemma, [row("piqa")], data, tmp_path / "run", RunOptions(limit=2))
    known = registry.all_rows()
    monkeypatch.setattr(registry, "all_rows", lambda: {**known, "piqa": replace(known["piqa"], version=99)})
    with pytest.raises(DataError, match=r"are of recipe .*, this gemcut's is .*run the row again"):
        score_run(log, ScoreOptions())


def test_generated_answers_and_comparisons(
    gemma: Gemma, data: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {**registry.all_rows(), "gsm8k": short("gsm8k")}
    monkeypatch.setattr(registry, "all_rows", lambda: rows)
    asked = [row("piqa"), row("gsm8k")]
    few = RunOptions(setup=Setup(shots=1))
    first = run_rows(gemma, asked, data, tmp_path / "a", few)
    second = run_rows(gemma, asked, data, tmp_path / "b", replace(few, setup=Setup(shots=1, seed=5)))
    runs = [(log, score_run(log, ScoreOptions())) for log in (first, second)]
    assert common_rows(runs) == ["piqa", "gsm8k"]
    assert "the runs have other seeds (0, 5), so sampled answers and samples of items differ" in notes(runs)
    assert [line[0] for line in table(runs)] == ["row", "piqa", "gsm8k"]
    lines = comparison_lines(*runs)
    assert lines[1][:5] == ["piqa", "11", lines[1][2], lines[1][2], "+0.00"]
    assert lines[1][-1] == "1"  # no item differs
    found = runs[0][1]["gsm8k"]
    assert found.failed == 3  # a random network writes no ####
    other = score_run(run_rows(gemma, [row("piqa")], data, tmp_path / "c", RunOptions()), ScoreOptions())
    assert str(paired(runs[0][1]["piqa"], other["piqa"])).startswith("other recipes: ")
    with pytest.raises(ParameterError, match="no row in common"):
        common_rows([(first, {"gsm8k": found}), (second, other)])


def test_what_does_not_fit_is_refused_or_given_fewer_shots(data: DataFolder, tmp_path: Path) -> None:
    wanted = [short("gsm8k")]
    options = RunOptions(setup=Setup(shots=3))
    longest = r"gsm8k: 3 of 3 prompts need more tokens than the context of 64 holds, 2 the most with \d+: raise "
    with pytest.raises(ContextLengthError, match=longest + "--max-context, or --fewer-shots to take fewer than 3"):
        run_rows(asker(max_context=64).gemma, wanted, data, tmp_path / "a", options)
    assert not (tmp_path / "a").exists()
    log = run_rows(asker(max_context=64).gemma, wanted, data, tmp_path / "b", replace(options, fewer_shots=True))
    assert log.rows["gsm8k"].header["shots"] == 2  # 21 tokens each, 15 of the question, 4 of the answer
    with pytest.raises(ContextLengthError, match=r"raise --max-context$"):
        run_rows(asker(max_context=16).gemma, wanted, data, tmp_path / "c", replace(options, fewer_shots=True))


def test_rows_that_cannot_be_run(gemma: Gemma, data: DataFolder, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"humaneval runs programs that the model wrote.*--allow-code"):
        run_rows(gemma, [row("humaneval")], data, tmp_path / "a", RunOptions())
    told: dict[str, str] = {}

    def refused(row: Row, error: GemcutError) -> None:
        told[row.id] = str(error)

    asked = [row("humaneval"), row("boolq"), row("piqa")]
    log = run_rows(gemma, asked, data, tmp_path / "a", RunOptions(limit=1), refused=refused)
    assert list(log.rows) == ["piqa"]
    assert "boolq/dev.jsonl.gz is missing" in told["boolq"].replace(os.sep, "/")
    (data.root / "piqa" / "valid-labels.lst").write_text("0\n" * 11)
    with pytest.raises(DataError, match="12 questions and 11 labels"):
        run_rows(gemma, [row("piqa")], data, tmp_path / "b", RunOptions())


def test_nothing_of_a_harmful_row_is_kept(gemma: Gemma, data: DataFolder, tmp_path: Path) -> None:
    log = run_rows(gemma, [replace(row("piqa"), harmful=True)], data, tmp_path / "run", RunOptions())
    assert not log.rows["piqa"].items
    text = (tmp_path / "run" / NAME).read_text()
    assert "Question:" not in text
    assert "logprobs" not in text
    result = score_run(log, ScoreOptions())["piqa"]
    assert result.figure is not None
    assert result.figure.count == 12


def test_a_full_disk(gemma: Gemma, data: DataFolder, tmp_path: Path) -> None:
    """A limit on the size of files plays the full disk: what was written stays whole, and the run goes on later."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, hard))
    try:
        with pytest.raises(OSError, match=r"log\.jsonl"):
            run_rows(gemma, [row("piqa")], data, tmp_path / "run", RunOptions())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert (tmp_path / "run" / NAME).read_bytes().endswith(b"\n")
    partly = len(read_log(tmp_path / "run").rows["piqa"].items)
    assert 0 < partly < 12
    assert len(run_rows(gemma, [row("piqa")], data, tmp_path / "run", RunOptions()).rows["piqa"].items) == 12


def test_damaged_logs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no run of gemcut eval"):
        read_log(tmp_path)
    for text, said in (
        ("", "is empty"),
        ("{\n", "line 1, is damaged"),
        ('{"run": {"format": 9}}\n', "is of format 9; this gemcut reads 1"),
        ('{"run": {"format": 1}}\n{"row": "x", "id": "1"}\n', "line 2, is damaged"),
    ):
        (tmp_path / NAME).write_text(text)
        with pytest.raises(DataError, match=said):
            read_log(tmp_path)


def test_a_sample_is_drawn_evenly_and_grows(data: DataFolder) -> None:
    items = row("piqa").build(row("piqa").load(data), Setup())
    small, large = choose(items, 4, 0), choose(items, 8, 0)
    assert {item.id for item in small} < {item.id for item in large}
    assert [int(item.id) for item in large] == sorted(int(item.id) for item in large)
    assert choose(items, 4, 1) != small
    assert choose(items, 0, 0) == choose(items, 99, 0) == items
