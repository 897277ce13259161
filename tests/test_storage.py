"""gemcut list and rm: what is kept, its size, and that only what is named goes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cli.conftest import Cli, cli  # noqa: F401
from gemcut.cli import output
from gemcut.errors import ParameterError
from gemcut.storage import entries, find, remove

HUB_ID = "google/gemma-2-2b-it"


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache with one model and gemcut's own with three things."""
    monkeypatch.setenv("GEMCUT_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--google--gemma-2-2b-it"
    for name in ("blobs", "refs", "snapshots/abc"):
        (repo / name).mkdir(parents=True)
    (repo / "blobs" / "b1").write_bytes(b"x" * 5000)
    (repo / "refs" / "main").write_text("abc")
    (repo / "snapshots" / "abc" / "config.json").symlink_to("../../blobs/b1")
    for name, size in [("gemma-3-270m/a.gguf", 3000), ("summaries/s.json", 200), ("documents/d.sqlite", 100)]:
        path = tmp_path / "own" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * size)
    (tmp_path / "own" / "unknown").mkdir()
    (tmp_path / "outside").write_text("stays")
    (tmp_path / "own" / "summaries" / "link").symlink_to(tmp_path / "outside")
    return tmp_path


def test_what_there_is(kept: Path) -> None:
    found = entries()
    assert [(entry.name, entry.kind) for entry in found] == [
        (HUB_ID, "hub model"),
        ("gemma-3-270m", "model"),
        ("summaries", "cache"),
        ("documents", "cache"),
    ]
    assert [entry.size for entry in found[:2]] == [5000, 3000]
    assert found[3].size == 100
    with pytest.raises(ParameterError, match="did you mean summaries"):
        find("summary", found)


def test_only_what_is_named_goes(kept: Path) -> None:
    for name in ("summaries", HUB_ID):
        remove(find(name, entries()))
    assert [entry.name for entry in entries()] == ["gemma-3-270m", "documents"]
    assert (kept / "outside").read_text() == "stays"
    assert sorted(path.name for path in (kept / "own").iterdir()) == ["documents", "gemma-3-270m", "unknown"]
    assert list((kept / "hub").iterdir()) == []


def test_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:  # noqa: F811
    monkeypatch.setenv("GEMCUT_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "nowhere"))
    assert cli("list").out == "nothing is kept\n"
    assert "nothing is kept" in cli("rm", "x").error


def test_the_commands(cli: Cli, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    lines = cli("list").out.splitlines()
    assert lines[0].split()[:5] == [HUB_ID, "hub", "model", "5.0", "kB"]
    report = json.loads(cli("list", "--json").out)
    assert report["bytes"] == sum(entry["bytes"] for entry in report["entries"])
    assert "there is nobody to ask" in cli("rm", "documents").error
    monkeypatch.setattr(output, "is_terminal", lambda stream: stream is sys.stdin)
    for answer in (b"n\n", b"\n", b""):
        assert cli("rm", "documents", stdin=answer).out.endswith("kept\n")
    assert (kept / "own" / "documents").is_dir()
    assert "removed documents" in cli("rm", "documents", stdin=b"y\n").out
    assert not (kept / "own" / "documents").exists()
    assert "removed gemma-3-270m" in cli("rm", "gemma-3-270m", "--yes").out
    done = cli("rm", "../hub", "--yes")
    assert (done.code, "nothing by the name" in done.error) == (2, True)
