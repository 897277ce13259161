"""gemcut config, and a default model from variables and file in every command that takes a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemcut import settings
from gemcut.cli.options import LoadOptions
from gemcut.errors import ParameterError

from .conftest import Cli, process


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path


def test_what_is_set_is_shown_with_its_origin(cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = home / "gemcut" / "config.toml"
    assert cli("config", "path").out == f"{file}\n"
    assert "(does not exist)" in cli("config").out
    run = cli("config", "set", "temperature", "0.3")
    assert (run.code, run.out, run.error) == (0, "", f"temperature = 0.3 in {file}")
    assert cli("config", "set", "presence-penalty", "-1").code == 0
    assert cli("config", "set", "stop", "a b", "-c").code == 0
    monkeypatch.setenv("GEMCUT_TOP_K", "40")
    lines = [" ".join(line.split()) for line in cli("config").out.splitlines()]
    for line in (
        f"temperature 0.3 {file}, line 1",
        f"presence_penalty -1.0 {file}, line 2",
        f"stop 'a b', '-c' {file}, line 3",
        "top_k 40 GEMCUT_TOP_K",
        "top_p 1.0 built-in",
        "model none built-in",
        f"file: {file}",
    ):
        assert line in lines
    report = json.loads(cli("config", "--json").out)
    assert report["file"] == str(file)
    assert report["file_exists"] is True
    assert list(report["settings"]) == list(settings.KEYS)
    assert report["settings"]["stop"]["value"] == ["a b", "-c"]
    assert report["settings"]["top_k"]["origin"] == report["settings"]["top_k"]["variable"] == "GEMCUT_TOP_K"
    assert report["settings"]["top_p"] == {
        "value": 1.0,
        "origin": "built-in",
        "variable": "GEMCUT_TOP_P",
        "expected": "a number above 0 up to 1",
        "help": "Keep the likeliest up to probability p.",
    }
    assert "comes before the file" in cli("config", "set", "top_k", "3").err
    assert cli("config", "unset", "top-k").code == 0
    assert cli("config", "unset", "stop").code == 0
    assert file.read_text() == "temperature = 0.3\npresence_penalty = -1.0\n"


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["set"], ["missing argument", "gemcut config set --help"]),
        (["set", "model"], ["missing argument"]),
        (["set", "modell", "x"], ["unknown key 'modell'", "did you mean model?"]),
        (["set", "--frob", "1"], ["unknown key '--frob'"]),
        (["set", "", "1"], ["unknown key ''", "expected one of model"]),
        (["set", "temperature", "warm"], ["temperature is 'warm'; expected a number from 0 to 100"]),
        (["set", "temperature", "-1"], ["temperature is '-1'"]),
        (["set", "temperature", "1", "2"], ["temperature takes one value, 2 were given"]),
        (["set", "model", "my", "folder"], ["model takes one value", "in quotes"]),
        (["set", "model", ""], ["model is ''"]),
        (["set", "top_k", "1e3"], ["top_k is '1e3'; expected a whole number"]),
        (["unset", "seed"], ["does not set seed"]),
        (["unset", "sead"], ["unknown key 'sead'", "did you mean seed?"]),
        (["frobnicate"], ["no such command"]),
        (["path", "x"], ["unexpected"]),
        (["--json", "path"], ["--json is for gemcut config alone"]),
    ],
)
def test_mistakes(cli: Cli, home: Path, args: list[str], parts: list[str]) -> None:
    run = cli("config", *args)
    assert (run.code, run.out) == (2, "")
    for part in parts:
        assert part in run.error
    assert not (home / "gemcut").exists()


def test_a_broken_file_stops_what_needs_it_and_nothing_else(cli: Cli, home: Path) -> None:
    file = home / "gemcut" / "config.toml"
    file.parent.mkdir()
    file.write_text("# mine\ntemprature = 0.3\n")
    for args in (["config"], ["generate", "hi"], ["chat"], ["plan"]):
        run = cli(*args)
        assert run.code == 2, args
        assert f"{file}, line 2: unknown key 'temprature'; did you mean temperature?" in run.error
    assert cli("config", "path").code == 0
    assert cli("plan", "2b", "--memory", "24GB").code == 0
    assert cli("config", "unset", "temprature").code == 0
    assert file.read_text() == "# mine\n"


def test_the_default_model(cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: LoadOptions, name: str, **_: object) -> None:
        raise ParameterError(f"loads {name}")

    monkeypatch.setattr(LoadOptions, "load", load)
    assert cli("config", "set", "model", "2b").code == 0
    for given, args in (
        ("-m", ["generate", "hi"]),
        (None, ["chat", "--once", "hi"]),
    ):
        assert cli(*args).error == "error: loads 2b"
        assert cli(*args, *([given] if given else []), "9b").error == "error: loads 9b"
    assert json.loads(cli("plan", "--memory", "24GB", "--json").out)["model"] == "gemma-2-2b"
    monkeypatch.setenv("GEMCUT_MODEL", "27b")
    assert cli("generate", "hi").error == "error: loads 27b"
    assert json.loads(cli("plan", "--memory", "24GB", "--json").out)["model"] == "gemma-2-27b"
    assert json.loads(cli("plan", "9b", "--memory", "24GB", "--json").out)["model"] == "gemma-2-9b"
    for args in (["generate", "-m", "", "hi"], ["chat", ""], ["plan", ""]):  # an empty name is a mistake, not "none"
        assert "no model given" in cli(*args).error


def test_no_home(tmp_path: Path) -> None:
    """Without a home folder there is no file; nothing else changes."""
    run = process("config", "path", HOME="", XDG_CONFIG_HOME="", GEMCUT_TOP_K="3")
    assert run.code in (0, 2)
    assert "Traceback" not in run.err
    run = process("plan", "2b", "--memory", "24GB", HOME="", XDG_CONFIG_HOME="")
    assert (run.code, run.err) == (0, "")
