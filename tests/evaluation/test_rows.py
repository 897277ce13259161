"""The Row protocol: recipes, the registry, the data folder."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemcut.errors import DataError, ParameterError
from gemcut.evaluation import CARD, Answer, Choices, DataFolder, Item, Records, Setup, find_rows, row
from gemcut.evaluation.registry import all_rows
from gemcut.evaluation.row import _code
from gemcut.evaluation.scoring import choice_score
from gemcut.paths import benchmark_folder


def test_rows_know_the_card() -> None:
    mmlu = row("mmlu")
    assert (mmlu.card.pt_9b, mmlu.card.pt_27b) == (71.3, 75.2)
    assert len(CARD) == 25
    assert next(iter(all_rows())) == "mmlu"
    assert find_rows(["mmlu", "card"])[0].id == "mmlu"
    with pytest.raises(ParameterError, match="there is no row 'mmmlu'"):
        find_rows(["mmmlu"])
    with pytest.raises(ParameterError, match="no row is named"):
        find_rows([" "])


def test_a_recipe_changes_with_code_and_setup_alone() -> None:
    def plain() -> Any:
        def build(records: Records, setup: Setup) -> list[Item]:
            return []

        return build

    def documented() -> Any:
        def build(records: Records, setup: Setup) -> list[Item]:
            """Documented."""
            return []  # and commented

        return build

    def other() -> Any:
        def build(records: Records, setup: Setup) -> list[Item]:
            return [][:1]

        return build

    mmlu = row("mmlu")
    recipe = mmlu.recipe(Setup())
    assert recipe == mmlu.recipe(Setup(shots=5, seed=7))
    assert len({recipe, mmlu.recipe(Setup(shots=4)), replace(mmlu, version=2).recipe(Setup())}) == 3
    one, two, three = (replace(mmlu, build=b()).recipe(Setup()) for b in (plain, documented, other))
    assert one == two != three
    assert "Choose from the following options" in _code(row("agieval").build)  # what it calls counts
    assert "re.compile('#### " in _code(row("gsm8k").score)


def test_data_folder_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = DataFolder(tmp_path)
    with pytest.raises(DataError, match=r"mmlu_csv\.tar\.gz is missing: get it .* from the dataset cais/mmlu"):
        folder.require(row("mmlu").data)
    (tmp_path / "x").mkdir()
    file = tmp_path / "x" / "a.jsonl"
    file.write_text('{"goal": "g", "sol1": "a"}\n')
    with pytest.raises(DataError, match='record 1, has no "sol2"; its columns are: goal, sol1'):
        folder.jsonl("x/a.jsonl", ("goal", "sol2"))
    assert folder.jsonl("x/a.jsonl", ("goal",)) == [{"goal": "g", "sol1": "a"}]
    assert folder.used["x/a.jsonl"].records == 1
    file.write_text('{"goal": "g"}\nnonsense\n')
    with pytest.raises(DataError, match="line 2: no JSON"):
        folder.jsonl("x/a.jsonl", ("goal",))
    file.write_text("")
    with pytest.raises(DataError, match="holds no records"):
        folder.jsonl("x/a.jsonl", ("goal",))
    file.write_text("[1]")
    with pytest.raises(DataError, match="record 1, is 1; expected an object"):
        folder.records("x/a.jsonl", ("goal",))
    file.write_bytes(b"\xff{}")
    with pytest.raises(DataError, match="is not UTF-8"):
        folder.text("x/a.jsonl")
    os.mkfifo(tmp_path / "x" / "pipe")
    with pytest.raises(DataError, match="is a FIFO"):
        folder.text("x/pipe")
    (tmp_path / "x" / "bad.json.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="cannot read"):
        folder.text("x/bad.json.gz")
    monkeypatch.delenv("GEMCUT_BENCHMARKS", raising=False)
    assert benchmark_folder() is None
    monkeypatch.setenv("GEMCUT_BENCHMARKS", str(tmp_path / "none"))
    with pytest.raises(DataError, match="does not exist; pass --data DIR or set GEMCUT_BENCHMARKS"):
        DataFolder.find()
    assert DataFolder.find(tmp_path).root == tmp_path


def test_choices_are_normalised() -> None:
    """By hand: sums -4 and -6; characters 2 and 4 (-2, -1.5); bytes 2 and 5; without the question -1 and -5."""
    item = Item(id="1", request=Choices(continuations=(" ab", " cdéf"), context="q"), target=1)
    answer = Answer(logprobs=(-4.0, -6.0), tokens=(1, 3), greedy=(False, False), unconditional=(-1.0, -5.0))
    score = choice_score(item, answer)
    assert score.values == {"acc": 0, "acc_norm": 1, "acc_bytes": 1, "acc_token": 1, "acc_uncond": 1}
    assert score.extracted == "ab"
    assert choice_score(replace(item, target=[0, 2]), answer).values["acc"] == 1
    assert json.dumps(dict(score.values))
