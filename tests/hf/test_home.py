"""A home folder that does not exist, in every name that may begin with ~: one line, and no traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemcut import Gemma, hf
from gemcut.cli.main import main
from gemcut.errors import CheckpointNotFoundError, ParameterError

NAME = "~no.such.user/x"


@pytest.mark.parametrize(
    "load",
    [
        hf.AutoModelForCausalLM.from_pretrained,
        hf.AutoTokenizer.from_pretrained,
        hf.GenerationConfig.from_pretrained,
        Gemma.load,
    ],
)
@pytest.mark.parametrize("name", [NAME, Path(NAME)])
def test_in_python(load: Callable[[Any], Any], name: Any) -> None:
    with pytest.raises(CheckpointNotFoundError, match=f"{NAME} does not exist"):
        load(name)


@pytest.mark.parametrize("name", [3, None, b"x", ["x"]])
def test_names_that_are_none(name: Any) -> None:
    for load in (
        hf.AutoModelForCausalLM.from_pretrained,
        hf.AutoTokenizer.from_pretrained,
        hf.GenerationConfig.from_pretrained,
        Gemma.load,
    ):
        for more in ({}, {"revision": "main"}):
            if not more or load != hf.GenerationConfig.from_pretrained:
                with pytest.raises(ParameterError, match=f"of type {type(name).__name__}; expected a text or a path"):
                    load(name, **more)


@pytest.mark.parametrize(
    "line",
    [
        ("generate", "-m", NAME, "Hello"),
        ("generate", "-m", "gemma-3-270m", "--file", NAME),
        ("chat", NAME, "--once", "Hello"),
        ("chat", "x/y", "--load", NAME),
        ("chat", "x/y", "--load", NAME, "--once", "Hello"),
        ("info", NAME),
        ("plan", NAME),
        ("quantize", NAME, "out", "--to", "nf4"),
        ("quantize", "gemma-3-270m", "out", "--to", "nf4", "--calibrate", NAME),
        ("generate", "-m", "x/y", "--local-files-only", "--cache-dir", NAME, "Hello"),
    ],
    ids=" ".join,
)
def test_on_the_command_line(
    line: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(list(line)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert "bug" not in err
    assert "no.such.user" in err or "x/y" in err
    assert list(tmp_path.iterdir()) == []
