"""Every gemcut command of docs/evaluation-safety.md and docs/model-cards.md is run, on a narrow random checkpoint."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

import support
from gemcut.cli.main import main

from .benchmarks import real_data
from .test_model_card import DATA_REPORT, TRAINING

PAGES = ("evaluation-safety.md", "model-cards.md")


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page(
    page: str, narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GEMCUT_BENCHMARKS", str(real_data().root))
    monkeypatch.chdir(tmp_path)
    for name in ("CORPUS", "UNSEEN"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(f"{name} holds a text that has some words in it. " * 8)
    for name, value in (("DATA/report.json", DATA_REPORT), ("TRAINING/training.json", TRAINING)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(value))
    text = (support.ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    assert len(lines) > 2
    if page == "model-cards.md":
        data = "eval run -m gemma-3-270m --rows crows_pairs --limit 3 --out RUNS/one"
        lines.insert(0, f"gemcut {data}")
    for line in lines:
        command, *args = shlex.split(line)
        assert command == "gemcut"
        code = main([str(narrow) if word == "gemma-3-270m" else word for word in args])
        said = capsys.readouterr()
        assert code == 0, f"{line}: {said.err}"
        assert said.out.strip()
