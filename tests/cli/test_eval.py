"""``gemcut eval`` on a tiny checkpoint and invented questions: every command, and what mistaken input gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.conftest import Cli


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "piqa"
    folder.mkdir(parents=True)
    lines = [json.dumps({"goal": f"goal {i}", "sol1": f"one {i}", "sol2": "two"}) for i in range(6)]
    (folder / "valid.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "valid-labels.lst").write_text("".join(f"{i % 2}\n" for i in range(6)))
    return folder.parent


@pytest.mark.slow
def test_a_run_from_end_to_end(cli: Cli, tiny: Path, data: Path, tmp_path: Path) -> None:
    asked = ("--data", data, "--limit", "4")
    found = cli("eval", "run", "-m", tiny, "--rows", "piqa", *asked, "--out", tmp_path / "a", "--json")
    assert found.code == 0, found.err
    report = json.loads(found.out)["piqa"]
    assert (report["asked"], report["of"]) == (4, 6)
    assert report["figures"]["acc"]["count"] == 4
    assert not report["comparable"]
    again = cli("eval", "score", tmp_path / "a")
    assert again.code == 0
    assert "piqa: A sample: 4 of 6 items." in again.out
    assert "The data at hand have 6 items; the whole set has 1,838." in again.out
    seen = cli("eval", "view", tmp_path / "a", "-n", "1", "--json")
    assert json.loads(seen.out)[0]["prompt"].startswith("Question: goal ")
    assert "  prompt" in cli("eval", "view", tmp_path / "a").out
    page = tmp_path / "page.html"
    assert cli("eval", "view", tmp_path / "a", "--html", page).code == 0
    assert page.read_text().count("<details") == 4
    other = cli("eval", "run", "-m", tiny, "--rows", "piqa", *asked, "--out", tmp_path / "b", "--seed", "3")
    assert other.code == 0, other.err
    compared = cli("eval", "compare", tmp_path / "a", tmp_path / "b", "--plot", tmp_path / "p.png")
    assert compared.code == 0, compared.err
    assert "the runs have other seeds (0, 3)" in compared.err
    assert (tmp_path / "p.png").stat().st_size > 1000
    table = tmp_path / "card.md"
    card = cli("eval", "card", "-m", tiny, *asked, "--out", tmp_path / "c", "--markdown", table)
    assert card.code == 0, card.err
    assert "mmlu_csv.tar.gz is missing" in card.err
    assert "| PIQA | 0-shot |" in table.read_text()
    assert "humaneval runs programs" in card.out
    assert cli("eval", "run", "-m", tiny, "--rows", "piqa", "--data", data, "--out", tmp_path / "a").error.startswith(
        "error: "
    )


def test_list_and_mistakes(cli: Cli, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMCUT_BENCHMARKS", str(data))
    listed = json.loads(cli("eval", "list", "--json").out)["rows"]
    assert {row["id"]: row["data"] for row in listed if row["id"] in ("piqa", "mmlu")} == {
        "piqa": "here",
        "mmlu": "missing",
    }
    assert "PIQA" in cli("eval", "list").out
    run = ("eval", "run", "-m", "gemma-3-270m")
    for args, said in (
        ((*run, "--rows", "nothing"), "there is no row 'nothing'"),
        (run, "no row is named"),
        ((*run, "--rows", "piqa", "--limit", "-1"), "--limit is -1"),
        ((*run, "--rows", "piqa", "--shots", "-1"), "--shots is -1"),
        ((*run, "--rows", "piqa", "--workers", "0"), "--workers is 0"),
        ((*run, "--rows", "piqa", "--data", tmp_path / "none"), "does not exist; pass --data DIR"),
        ((*run, "--rows", "boolq"), "dev.jsonl.gz is missing: get it by hand from github.com/"),
        ((*run, "--rows", "social_iqa"), "get it with gemcut eval fetch social_iqa --data"),
        ((*run, "--rows", "humaneval"), "say --allow-code"),
        (("eval", "score", tmp_path), "holds no run of gemcut eval"),
        (("eval", "view", tmp_path), "holds no run of gemcut eval"),
        (("eval", "compare", tmp_path), "one run is given; expected at least two"),
        (("eval", "compare", tmp_path, tmp_path, "--plot", "x.bmp"), "--plot is 'x.bmp'"),
        (("eval", "fetch", "nothing"), "there is no set 'nothing'"),
        (("eval", "fetch", "mmlu"), "mmlu has to be put there by hand"),
    ):
        found = cli(*args)
        assert found.code == 2, args
        assert said in found.error


def test_fetch_turns_the_hubs_files_into_json_lines(
    cli: Cli, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub that is played, with a Parquet file of the columns that the hub's data set has."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import huggingface_hub
    import pyarrow

    columns = ("context", "question", "answerA", "answerB", "answerC", "label")
    file = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({name: [f"{name} é", "2"] for name in columns}), file)
    names = ["data/train.parquet", "data/validation-0.parquet"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, repo_type: names)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, path, repo_type: str(file))
    found = cli("eval", "fetch", "social_iqa", "--data", data)
    assert found.code == 0, found.err
    assert found.out.strip().endswith("validation.jsonl: 2 records")
    lines = (data / "social_iqa" / "validation.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["answerA"] == "answerA é"

    def offline(self: object, name: str, repo_type: str) -> list[str]:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", offline)
    assert (
        "cannot fetch lighteval/siqa from the hub: no network"
        in cli("eval", "fetch", "social_iqa", "--data", data).error
    )


def test_texts_that_cannot_be_scored(cli: Cli, tmp_path: Path) -> None:
    score = ("score", "-m", "gemma-3-270m")
    assert "pass --perplexity FILE" in cli(*score).error
    assert "cannot read" in cli(*score, "--perplexity", tmp_path / "none").error
    (tmp_path / "bad").write_bytes(b"\xff")
    assert "is not UTF-8" in cli(*score, "--perplexity", tmp_path / "bad").error
    (tmp_path / "empty").write_bytes(b"")
    assert "is empty" in cli(*score, "--perplexity", tmp_path / "empty").error
    assert "is a folder" in cli(*score, "--perplexity", tmp_path).error
    needle = ("eval", "needle", "-m", "gemma-3-270m")
    assert "--lengths is 'a'" in cli(*needle, "--lengths", "a").error
    assert "--trials is 0" in cli(*needle, "--trials", "0").error


@pytest.mark.slow
def test_perplexity_and_needle_of_a_checkpoint(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Some words of a text. " * 20)
    found = cli("score", "-m", tiny, "--perplexity", tmp_path / "text", "--window", "64", "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["window"] == 64
    assert "bits a byte" in cli("score", "-m", tiny, "--perplexity", tmp_path / "text").out
    needle = ("eval", "needle", "-m", tiny, "--lengths", "160", "--depths", "0,1", "--trials", "1")
    found = cli(*needle, "--text", tmp_path / "text", "--plot", tmp_path / "n.png")
    assert found.code == 0, found.err
    assert found.out.split()[:2] == ["depth", "160"]
    assert (tmp_path / "n.png").stat().st_size > 1000
