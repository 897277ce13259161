"""`gemcut bench serve` against our own server, as docs/server.md says it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import support
from gemcut.cli.main import main
from server.host import Served, new_gemma, serving

pytestmark = pytest.mark.slow
DOCUMENT = (support.ROOT / "docs" / "server.md").read_text("utf-8")
LINES = [line for line in DOCUMENT.splitlines() if line.startswith("gemcut bench serve")]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(new_gemma()) as server:
        yield server


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("desk")


@pytest.mark.parametrize("line", LINES)
def test_a_documented_command(
    served: Served, desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    """With small and quick requests; one command reads the trace that another wrote."""
    monkeypatch.chdir(desk)
    arguments = [*shlex.split(line)[1:], "--url", served.url]
    if "--trace" not in arguments:
        arguments += ["--requests", "3", "--prompt-tokens", "4-9", "--output-tokens", "2-4"]
        arguments[arguments.index("--rate") + 1] = "inf" if "inf" in line else "40"
    assert main(arguments) == 0
    out = capsys.readouterr().out
    if "--write-trace" in arguments:
        assert len((desk / "trace.jsonl").read_text().splitlines()) == 3
    else:
        assert "3 of 3" in out
    if "--json" in arguments:
        (found,) = json.loads((desk / "measured.json").read_text())["rounds"]
        for request in found["requests"]:
            assert 4 <= request["prompt_tokens"] <= 9
            assert 1 <= request["completion_tokens"] <= 4
    served.nothing_held()


def test_there_are_commands() -> None:
    assert len(LINES) >= 6
