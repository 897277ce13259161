"""The model's own card: each number comes from a run, and what was not run says so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import support
from cli.conftest import Run
from gemcut import Gemma
from gemcut.cli.main import main
from gemcut.errors import DataError
from gemcut.evaluation import DataFolder, row
from gemcut.evaluation.card_text import check_metadata, usage
from gemcut.evaluation.model_card import NOT_MEASURED, training_estimates
from gemcut.evaluation.results import score_run
from gemcut.evaluation.row import ScoreOptions
from gemcut.evaluation.run import RunOptions, run_rows

DATA_REPORT: dict[str, Any] = {
    "version": 1,
    "name": "mine",
    "recipe_sha256": "ab" * 32,
    "seed": 0,
    "sources": {
        "web": {"licence": "CC0-1.0", "documents_in": 30, "documents_out": 21, "bytes_in": 9000, "bytes_out": 7000}
    },
    "steps": [
        {
            "name": "decontaminate",
            "sources": {"web": {"dropped": {"piqa": {"documents": 9, "bytes": 2000}}}},
            "notes": {"piqa questions hit": 4},
            "examples": {},
            "reason": "",
        }
    ],
    "totals": {"documents_in": 30, "bytes_in": 9000, "documents_out": 21, "bytes_out": 7000},
    "licences": {"CC0-1.0": 7000},
    "alarms": ["web | gave little"],
    "tokens": {"tokens": 1234},
}
TRAINING = {
    "version": 1, "hardware": "TPU v5p", "devices": 4, "watts": 500, "seconds": 7200, "tokens": 10**9,
    "parameters": 10**8, "software": {"jax": "0.10.2"},
}  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *args: str | Path) -> Run:
    capsys.readouterr()
    code = main([str(arg) for arg in args])
    return Run(code, *capsys.readouterr())


@pytest.fixture(scope="module")
def measured(narrow: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of the model, one of another model, and a report of memorization."""
    folder = tmp_path_factory.mktemp("measured")
    data = folder / "data"
    (data / "piqa").mkdir(parents=True)
    lines = [json.dumps({"goal": f"g{i}", "sol1": f"one {i}", "sol2": "two"}) for i in range(12)]
    (data / "piqa" / "valid.jsonl").write_text("\n".join(lines) + "\n")
    (data / "piqa" / "valid-labels.lst").write_text("".join(f"{i % 2}\n" for i in range(12)))
    gemma = Gemma.load(narrow, device="cpu", progress=False)
    runs = folder / "runs"
    run_rows(gemma, [row("piqa")], DataFolder(data), runs / "own", RunOptions())
    log = (runs / "own" / "log.jsonl").read_text().splitlines()
    head = json.loads(log[0])
    head["run"]["model"]["name"] = "somebody/other"
    (runs / "other").mkdir()
    (runs / "other" / "log.jsonl").write_text("\n".join([json.dumps(head), *log[1:]]) + "\n")
    share = {"hits": 3, "share": 0.03, "low": 0.0103, "high": 0.0845}
    data = {name: {"found": 0, "in_the_document": 0} for name in ("high", "medium", "low")}
    corpus = {"samples": 100, "exact": share, "approximate": share, "personal_data": data}
    memory = {"kind": "memorization", "model": {"name": narrow.name}, "corpus": corpus}
    (runs / "memory.json").write_text(json.dumps(memory))
    return folder


def test_a_whole_card(measured: Path, narrow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_text(json.dumps(DATA_REPORT))
    (tmp_path / "training.json").write_text(json.dumps(TRAINING))
    args = ["card", narrow, "--runs", measured / "runs", "--data", tmp_path / "report.json", "--training", tmp_path]
    out = run(capsys, *args, "--out", tmp_path / "README.md")
    assert out.code == 0, out.err
    text = (tmp_path / "README.md").read_text()
    figure = score_run_of(measured)
    line = next(line for line in text.splitlines() if line.startswith("| PIQA"))
    assert f"{figure.value:.2f} ± {figure.error:.2f}" in line
    assert f"{figure.value - 1.96 * figure.error:.2f} to" in line
    assert "| 81.7 | 83.2 |" in line
    assert row("piqa").recipe(RunOptions().setup) in line
    assert "not measured" in next(line for line in text.splitlines() if line.startswith("| MMLU"))
    # Data, hardware: 6 · 10^8 · 10^9 FLOPs; 4 devices · 500 W · 2 h = 4 kWh.
    assert "21 of 30 documents were kept. Tokens: 1,234." in text
    assert "| decontaminate | piqa | 9 |" in text
    assert "web \\| gave little" in text
    assert "6e+17 FLOPs" in text
    assert "4 kWh" in text
    assert "100 documents: 3.000 % given back word for word (95 %: 1.030 to 8.450)" in text
    assert "| somebody/other, float32 | 12 |" in text  # the same answers: no difference, and p = 1
    assert "+0.00 to +0.00 | 1 |" in text
    assert "privacy: memorization is measured above" in text.lower()
    assert "Stereotypes: not measured" in text
    check_metadata(text)
    as_json = json.loads(run(capsys, *args, "--json").out)
    assert as_json["training"]["estimates"]["flops"] == 6e17
    assert as_json["metadata"]["model-index"][0]["results"][0]["metrics"][0]["value"] == round(figure.value, 2)
    assert "license" not in as_json["metadata"]  # weights of one's own training


def score_run_of(folder: Path) -> Any:
    from gemcut.evaluation.log import read_log

    return score_run(read_log(folder / "runs" / "own"), ScoreOptions())["piqa"].figure


def test_without_runs_nothing_is_claimed(narrow: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "card", narrow).out
    table = [line for line in text.splitlines() if re.match(r"\| (?!---|benchmark)", line)]
    assert len(table) == 25
    assert all(NOT_MEASURED in line for line in table)
    for section in ("Model information", "Usage", "Citation", "Training data", "Ethics and safety", "Benefits"):
        assert f"## {section}" in text
    assert 'license: "gemma"' in text


@pytest.mark.parametrize("tuned", [False, True])
def test_the_usage_snippet_runs(narrow: Path, tuned: bool, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(usage(str(narrow), tuned=tuned), "<card>", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_arithmetic_of_what_is_known_alone() -> None:
    assert training_estimates({"tokens": 10}) == {}
    assert training_estimates({"devices": 2, "watts": 100, "seconds": 3600, "pue": 1.5}) == {"energy_kwh": 0.3}


def test_metadata_that_the_hub_s_library_refuses() -> None:
    good = '---\nlanguage: ["en"]\nlibrary_name: "transformers"\npipeline_tag: "text-generation"\n---\n# m\n'
    check_metadata(good)
    with pytest.raises(DataError, match="are not valid"):
        check_metadata(good.replace("---\n# m", 'model-index: [{"name": "m"}]\n---\n# m'))
    with pytest.raises(DataError, match="have no pipeline_tag"):
        check_metadata(good.replace('pipeline_tag: "text-generation"\n', ""))


def test_wrong_input_is_one_line(
    measured: Path, narrow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*args: str | Path) -> str:
        return run(capsys, "card", narrow, *args).error

    (tmp_path / "report.json").write_text(json.dumps({**DATA_REPORT, "version": 7}))
    assert "is no report of this version" in error("--data", tmp_path / "report.json")
    assert "there is no report at" in error("--data", tmp_path / "none")
    (tmp_path / "report.json").write_text('{"version": 1}')
    assert "the report of the data lacks 'steps'" in error("--data", tmp_path)
    assert "holds no run of gemcut eval" in error("--runs", tmp_path)
    assert "cannot read" in error("--training", tmp_path)
    (tmp_path / "training.json").write_text(json.dumps({**TRAINING, "tokens": "many"}))
    assert "tokens is 'many'; expected a number of at least 0" in error("--training", tmp_path)
    assert "ends in .md or .json" in error("--out", "card.pdf")
    other = tmp_path / "runs" / "own"
    other.mkdir(parents=True)
    log = (measured / "runs" / "own" / "log.jsonl").read_text()
    recipe = row("piqa").recipe(RunOptions().setup)
    (other / "log.jsonl").write_text(log.replace(recipe, "0123456789ab"))
    assert "are of recipe 0123456789ab" in error("--runs", tmp_path / "runs")


def test_cite(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "info", "--cite").out
    assert "@software{gemcut," in out
    google = (support.ROOT / "CITATION.cff").read_text()
    version = re.search(r"^version: (.*)$", google, re.M)
    assert version is not None
    assert f"version={{{version[1]}}}" in out
    assert "@article{gemma_2024," in out
    assert "stands alone" in run(capsys, "info", "--cite", "--kernels").error
