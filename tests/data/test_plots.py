"""Pictures of a report and the estimate of a plan, beside arithmetic by hand."""

from __future__ import annotations

import json
import re
import struct
import sys
from pathlib import Path

import pytest

from gemcut.data.catalogue import STEPS
from gemcut.data.plan import SPEED, make_plan
from gemcut.data.plots import KEPT, colours, fates, svg
from gemcut.data.recipe import read_recipe

from ..cli.conftest import Cli, cli  # noqa: F401
from .corpus import run, sentences, write_jsonl, write_recipe

RECIPE = """
[[source]]
name = "a"
reader = "jsonl"
paths = ["a.jsonl"]
[[source]]
name = "b"
reader = "jsonl"
paths = ["b.jsonl"]
[[step]]
filter = "steps.py:short"
sources = ["b"]
[[step]]
use = "exact-duplicates"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "steps.py").write_text("def short(d):\n    return (len(d.text) > 9, 'short')\n")
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in (sentences(1), sentences(1), sentences(2))])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "tiny"}, {"text": sentences(2)}, {"text": sentences(3)}])
    write_recipe(tmp_path, RECIPE)
    return tmp_path


def test_what_became_of_each_source(folder: Path) -> None:
    report = run(folder / "recipe.toml", folder / "out")
    one, two, three = (len(sentences(i)) for i in (1, 2, 3))
    assert fates(report) == {
        "a": {KEPT: one + two, "exact-duplicates": one},
        "b": {KEPT: three, "short": 4, "exact-duplicates": two},
    }
    assert list(colours(report)) == [KEPT, "short", "exact-duplicates"]
    widths = [float(w) for w in re.findall(r"<rect x=[\d.]+ y=\d+ width=([\d.]+) height=18", svg(report))]
    scale = 600 / (one + two + one)
    assert widths == pytest.approx([s * scale for s in (one + two, one, three, 4, two)], abs=0.06)
    assert svg(report) in (folder / "out" / "report.html").read_text()


def test_a_picture(folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    run(folder / "recipe.toml", folder / "out")
    wrong = cli("data", "report", folder / "out", "--plot", folder / "a.txt")
    assert (wrong.code, wrong.error) == (
        2,
        f"error: --plot is '{folder}/a.txt'; expected a name that ends in .png, .svg, .pdf",
    )
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        found = cli("data", "report", folder / "out", "--plot", folder / "a.png")
        assert found.code == 2
        assert "--plot needs matplotlib: pip install 'gemcut[plot]'" in found.error
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert cli("data", "report", folder / "out", "--plot", folder / "a.png").code == 0
    data = (folder / "a.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24])[0] > 1200
    away = cli("data", "report", folder / "out", "--plot", folder / "none" / "a.png")
    assert away.error == f"error: cannot write {folder}/none/a.png: No such file or directory"


def test_the_time_of_a_plan(folder: Path, cli: Cli) -> None:  # noqa: F811
    """10 MB of plain JSON lines: read at 200 MB/s, written at 42, judged at 17.1; a plan reads none of it."""
    assert set(SPEED) == set(STEPS)
    with open(folder / "a.jsonl", "wb") as file:
        file.truncate(10_000_000)
    source = RECIPE[: RECIPE.index('[[source]]\nname = "b"')]
    recipe = write_recipe(folder, source + '[[step]]\nuse = "gopher-quality"\n')
    found = make_plan(read_recipe(recipe))
    assert found["seconds_one_core"] == round(10 / 200 + 10 / 42 + 10 / 17.1, 1) == 0.9
    assert not found["own_code_not_counted"]
    assert "time: at most about 1 s on one core" in cli("data", "plan", recipe).out
    planned = json.loads(cli("data", "plan", write_recipe(folder, RECIPE), "--json").out)
    assert planned["own_code_not_counted"]
