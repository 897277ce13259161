"""What the documents point at: links, files of the code, and the form of a page of docs/notes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import support

NOTES = sorted((support.ROOT / "docs" / "notes").glob("*.md"))
PAGES = [path for path in NOTES if path.name != "README.md"]
DOCUMENTS = [
    *(support.ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((support.ROOT / "docs").rglob("*.md")),
    *sorted((support.ROOT / "benchmarks" / "results").glob("*.md")),
]
#: Dated files tell of the code as it was; the others of the code as it is.
OF_TODAY = [path for path in DOCUMENTS if path.parent.name != "results"]
ROOMS = "src|tests|benchmarks|docs"


def name(path: Path) -> str:
    return str(path.relative_to(support.ROOT))


def named_paths(text: str) -> list[str]:
    """Paths of this repository in backticks: `src/gemcut/gemma.py`, also with `::name` behind a test's."""
    found = re.findall(rf"`((?:{ROOMS})/[\w./*-]+?)/?(?:::\w+)?`", text)
    return [path for path in found if "*" not in path]


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    missing = [target for target in targets if "://" not in target and not (path.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("path", OF_TODAY, ids=name)
def test_files_that_are_named_exist(path: Path) -> None:
    """Whoever moves a file of the code is told which documents name it."""
    missing = [named for named in named_paths(path.read_text("utf-8")) if not (support.ROOT / named).exists()]
    assert not missing, f"{name(path)} names files that are not there: {missing}"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_the_form_of_a_note(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == ["Limit", "Tried", "Why", "Next"]
    assert named_paths(text), "a page names its code"
    tried = text.split("## Tried")[1].split("## Why")[0]
    assert any("|" in line and "kept" in line for line in tried.splitlines()), "a table of what was tried and kept"
    assert not [line for line in text.splitlines() if len(line) > 120]
    assert f"({path.name})" in (path.parent / "README.md").read_text(encoding="utf-8")
