"""``--schema``: answers that follow a JSON schema from a file, on the real Gemma 3 270M, and files that are none."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema_rs
import pytest

from support import gguf_path

from . import real_forms as real
from .conftest import Cli

CITY = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 30}, "inhabitants": {"type": "integer"}},
    "required": ["name", "inhabitants"],
    "additionalProperties": False,
}


@pytest.mark.slow
def test_an_answer_of_the_real_model_follows_its_schema(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vocabulary is a GGUF file's. Greedy and drawn, whole and closed, as text and as JSON; a chat's too."""
    real.share_loads(monkeypatch)
    file = tmp_path / "city.json"
    file.write_text(json.dumps(CITY))
    prompt = "A large city, as JSON: "
    for more in (("-t", "0", "-n", "60"), ("--seed", "2", "-n", "24")):
        run = cli("generate", "-m", gguf_path(), "--schema", file, *more, prompt)
        assert run.code == 0, run.err
        assert jsonschema_rs.is_valid(CITY, json.loads(run.out)), run.out
    run = cli("generate", "-m", gguf_path(), "--schema", file, "--json", "--seed", "3", "-n", "40", prompt)
    report = json.loads(run.out)
    assert jsonschema_rs.is_valid(CITY, json.loads(report["text"]))
    assert report["sampling"]["grammar"]["value"].startswith("json_schema of ")
    run = cli("chat", gguf_path(), "--schema", file, "--seed", "1", "-n", "40", "--once", prompt)
    assert jsonschema_rs.is_valid(CITY, json.loads(run.out)), run.out


def test_files_that_are_no_schema(cli: Cli, tmp_path: Path) -> None:
    bad = {
        "list.json": "[1]",
        "half.json": '{"type": ',
        "latin.json": b"\xff{}",
        "large.json": "{" + " " * 70_000 + "}",
        "deep.json": '{"a":' * 40 + "1" + "}" * 40,
    }
    for name, content in bad.items():
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        for command in (("generate", "-m", "gemma-3-270m", "x"), ("chat", "gemma-3-270m", "--once", "x")):
            run = cli(*command, "--schema", file)
            assert run.code == 2
            assert name in run.err
            assert len(run.err.strip().splitlines()) == 1
    run = cli("generate", "-m", "gemma-3-270m", "--schema", tmp_path / "none.json", "x")
    assert run.code == 2
    assert "No such file" in run.err
