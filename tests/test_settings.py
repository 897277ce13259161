"""Settings: variables and the configuration file, what they refuse, and changes that leave the rest of a file alone."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemcut import settings
from gemcut.engine.sampling import SamplingParams
from gemcut.errors import ParameterError
from gemcut.settings_file import set_key, unset_key


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration file of a home that is empty, its folder made."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for key in settings.KEYS.values():
        monkeypatch.delenv(key.variable, raising=False)
    path = tmp_path / "gemcut" / "config.toml"
    path.parent.mkdir()
    return path


def values() -> dict[str, Any]:
    found = settings.read_settings()
    return {name: found.get(name).value for name in settings.KEYS if found.get(name) is not None}  # type: ignore[union-attr]


def test_a_variable_comes_before_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert values() == {}
    file.write_text('# mine\nmodel = "2b-it"\n\ntemperature = 1\nstop = "END"\nseed = 5\n')
    assert values() == {"model": "2b-it", "temperature": 1.0, "stop": ["END"], "seed": 5}
    monkeypatch.setenv("GEMCUT_TEMPERATURE", "0.25")
    monkeypatch.setenv("GEMCUT_MODEL", "")  # set to nothing: not set
    monkeypatch.setenv("GEMCUT_STOP", "[1]\n")
    found = settings.read_settings()
    assert found.get("temperature") == settings.Setting(0.25, "GEMCUT_TEMPERATURE")
    assert found.get("model") == settings.Setting("2b-it", f"{file}, line 2")
    assert found.get("seed") == settings.Setting(5, f"{file}, line 6")
    assert found.get("stop") == settings.Setting(["[1]\n"], "GEMCUT_STOP")
    assert found.get("top_k") is None


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("temprature = 0.3", ["line 1", "unknown key 'temprature'", "did you mean temperature?"]),
        ("\n\nzzz = 1", ["line 3", "unknown key 'zzz'", "expected one of model, max_new_tokens"]),
        ("[sampling]\ntemperature = 1", ["line 1", "unknown key 'sampling'"]),
        ("top_k = 1\nsampling.top_k = 1", ["line 2", "unknown key 'sampling'"]),
        ("model = 3", ["line 1", "model is 3", "expected a text"]),
        ('model = ""', ["model is ''"]),
        ('model = "a\\u0000b"', ["model is 'a\\x00b'"]),
        ('# c\ntemperature = "0.3"', ["line 2", "temperature is '0.3'", "expected a number from 0 to 100"]),
        ("temperature = -1", ["temperature is -1"]),
        ("temperature = nan", ["temperature is nan"]),
        ("temperature = true", ["temperature is True"]),
        (f"temperature = 1{'0' * 400}", ["temperature is 1000"]),
        ("top_k = 1.0", ["top_k is 1.0", "a whole number of at least 0"]),
        ("top_p = 0", ["top_p is 0", "above 0 up to 1"]),
        (f"seed = {2**64}", ["seed is 18446744073709551616", "18446744073709551615"]),
        ("seed = {a = 1}", ["seed is a table"]),
        ("stop = []", ["stop is []"]),
        ('stop = ["a", ""]', ["stop is ['a', '']"]),
        (f"stop = {['x'] * 65}", ["at most 64"]),
        ("temperature 0.3", ["line 1: ", "expected TOML such as: temperature = 0.3"]),
        ("seed = 1\nseed = 2", ["line 2: ", "expected TOML"]),
        ("seed = " + "[" * 5000, ["expected TOML"]),
        ("seed = " + "9" * 5000, ["expected TOML"]),
        ("#" * 70_000, ["70,000 bytes", "at most 65,536"]),
    ],
)
def test_a_bad_file_is_refused_by_line_and_key(file: Path, text: str, parts: list[str]) -> None:
    file.write_text(text)
    with pytest.raises(ParameterError) as caught:
        settings.read_settings()
    message = str(caught.value)
    assert message.startswith(str(file))
    assert "\n" not in message
    assert len(message) < 400
    for part in parts:
        assert part in message


def test_a_file_that_is_none(file: Path, tmp_path: Path) -> None:
    file.write_bytes(b"# \n# caf\xe9\n")
    with pytest.raises(ParameterError, match="line 2: not UTF-8"):
        settings.read_settings()
    file.unlink()
    file.mkdir()
    with pytest.raises(ParameterError, match="is not a file"):
        settings.read_settings()
    file.rmdir()
    os.mkfifo(file)
    with pytest.raises(ParameterError, match="is not a file"):
        settings.read_settings()
    file.unlink()
    file.write_bytes(b"\xef\xbb\xbfseed = 1\r\n")  # as some editors save it
    assert values() == {"seed": 1}


@pytest.mark.parametrize(
    ("variable", "text", "part"),
    [
        ("GEMCUT_TEMPERATURE", "warm", "GEMCUT_TEMPERATURE is 'warm'; expected a number from 0 to 100"),
        ("GEMCUT_TEMPERATURE", "inf", "GEMCUT_TEMPERATURE is 'inf'"),
        ("GEMCUT_TOP_K", "1.5", "GEMCUT_TOP_K is '1.5'; expected a whole number"),
        ("GEMCUT_TOP_K", "9" * 5000, "GEMCUT_TOP_K is '999"),
        ("GEMCUT_MODEL", " ", "GEMCUT_MODEL is ' '"),
        ("GEMCUT_STOP", os.fsdecode(b"\xff"), "GEMCUT_STOP is '\\udcff'"),
    ],
)
def test_a_bad_variable_is_refused_by_name(
    file: Path, monkeypatch: pytest.MonkeyPatch, variable: str, text: str, part: str
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(ParameterError) as caught:
        settings.read_settings()
    assert part in str(caught.value)


def test_a_misspelled_variable_brings_a_warning(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMCUT_TEMPRATURE", "1")
    monkeypatch.setenv("GEMCUT_SOMETHING_OF_MINE", "1")
    with pytest.warns(
        UserWarning, match="GEMCUT_TEMPRATURE is not read by gemcut; did you mean GEMCUT_TEMPERATURE?"
    ) as w:
        settings.read_settings()
    assert len(w) == 1


NUMBERS = [key for key in settings.KEYS.values() if key.kind in ("whole", "number") and key.part == "sampling"]


@pytest.mark.parametrize("key", NUMBERS)
def test_bounds_are_those_of_sampling_params(key: settings.Key) -> None:
    """A setting lets pass what SamplingParams takes, at each bound and on both sides of it."""
    if key.default is not None:
        assert getattr(SamplingParams(), key.name) == key.default
    step = 1 if key.kind == "whole" else 0.001
    taken = {}
    for value in (bound + side for bound in (key.low, key.high) for side in (-step, 0, step)):
        if abs(value) == math.inf:
            continue
        value = 10**30 if key.high == math.inf and value > 10**30 else value
        try:
            SamplingParams(**{key.name: value})
            taken[value] = True
        except ParameterError:
            taken[value] = False
        if taken[value]:
            assert key.check(value) == value
        else:
            with pytest.raises(ValueError):  # noqa: PT011
                key.check(value)
    assert set(taken.values()) == {True, False}


def test_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert settings.config_file() == tmp_path / "gemcut" / "config.toml"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")  # the XDG specification: to be ignored
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings.config_file() == tmp_path / ".config" / "gemcut" / "config.toml"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert settings.config_file() == tmp_path / ".config" / "gemcut" / "config.toml"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no HOME, and no such user
    assert settings.config_file() is None
    assert settings.read_settings().file == {}


def test_reading_is_fast_and_needs_no_torch(file: Path) -> None:
    file.write_text('model = "2b-it"\ntemperature = 0.3\n')
    code = (
        "import sys, time, re, typer; from gemcut import settings; t = time.process_time(); "
        "found = settings.read_settings(); print(time.process_time() - t, 'torch' in sys.modules, "
        "found.get('model').value)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    assert all(run.stdout.split()[1:] == ["False", "2b-it"] for run in runs)
    # 3 ms of a processor, the import of tomllib with it, however busy the machine is.
    assert min(float(run.stdout.split()[0]) for run in runs) < 0.05


# ---- changes ---------------------------------------------------------------------------------------------------------

MINE = """\
# what I like

model = "2b-it" # small # and quick
top_p = 0.9   \t# keep
stop = [
  "a#b",
  "c",
]   # two
"seed" = 3
"""


def test_a_change_leaves_the_rest_alone(file: Path) -> None:
    file.write_text(MINE)
    file.chmod(0o640)
    set_key("model", '9b "it" # \x7f')
    set_key("seed", 4)
    set_key("stop", ["x#y"])
    set_key("temperature", 0.3)
    assert file.read_text() == (
        '# what I like\n\nmodel = "9b \\"it\\" # \\u007f" # small # and quick\ntop_p = 0.9   \t# keep\n'
        'stop = "x#y"   # two\nseed = 4\ntemperature = 0.3\n'
    )
    assert file.stat().st_mode & 0o777 == 0o640
    unset_key("stop")
    unset_key("model")
    assert file.read_text() == "# what I like\n\ntop_p = 0.9   \t# keep\nseed = 4\ntemperature = 0.3\n"
    assert unset_key("model") is None
    assert list(file.parent.iterdir()) == [file]


def test_a_change_of_no_file_makes_one(file: Path) -> None:
    file.parent.rmdir()
    set_key("max_new_tokens", 5)
    assert file.read_text() == "max_new_tokens = 5\n"
    file.write_text("seed = 1")  # no newline at its end
    set_key("top_k", 2)
    assert file.read_text() == "seed = 1\ntop_k = 2\n"


def test_a_link_stays_one(file: Path, tmp_path: Path) -> None:
    real = tmp_path / "dotfiles.toml"
    real.write_text("seed = 1\r\n")
    file.symlink_to(real)
    set_key("seed", 2)
    assert file.is_symlink()
    assert real.read_bytes() == b"seed = 2\r\n"


def test_a_change_mends_a_bad_value(file: Path) -> None:
    file.write_text('temperature = "warm"\nfrobnicate = 1\n')
    set_key("temperature", 0.5)
    unset_key("frobnicate")
    assert values() == {"temperature": 0.5}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[t]\n", "line 1: 't' is a table"),
        ("seed = ", "expected TOML"),
        ('stop = [\n "a", # one\n "b"]\n', "line 1: comments within the value would be lost"),
    ],
)
def test_a_file_that_cannot_be_changed_stays(file: Path, text: str, part: str) -> None:
    file.write_text(text)
    with pytest.raises(ParameterError, match=part):
        set_key("stop", ["x"])
    assert file.read_text() == text
    assert list(file.parent.iterdir()) == [file]


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "/proc")
    with pytest.raises(ParameterError, match=r"cannot write /proc/gemcut/config.toml: "):
        set_key("seed", 1)


LINE = st.one_of(
    st.sampled_from(["", "# a comment", "   ", "# x\u2028top_k = 9"]),
    st.builds(
        lambda key, value: f"{key} = {value}", st.just("{}"), st.sampled_from(["1", '"a # b"', "[1,\n 2]", "0.5 # c"])
    ),
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(
    lines=st.lists(LINE, max_size=8),
    stop=st.lists(TEXT, min_size=1, max_size=3),
    newline=st.sampled_from(["\n", "\r\n"]),
)
def test_any_file_keeps_its_other_keys_and_every_comment(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], stop: list[str], newline: str
) -> None:
    text = newline.join(line.replace("{}", f"k{i}") for i, line in enumerate(lines)).replace(newline, "\n")
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("XDG_CONFIG_HOME", str(folder))
        path = folder / "gemcut" / "config.toml"
        path.parent.mkdir()
        path.write_bytes(text.encode())
        before = tomllib.loads(text)
        set_key("stop", stop)
        assert tomllib.loads(path.read_bytes().decode()) == {**before, "stop": stop if len(stop) > 1 else stop[0]}
        assert path.read_bytes().decode().startswith(text)
        unset_key("stop")
        assert path.read_bytes().decode().rstrip("\n") == text.rstrip("\n")


def test_what_counts(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command's option, then a variable, then the file, then what is built in; the same checks for each."""
    assert settings.read_settings().value("port") == 8000
    assert settings.read_settings().value("api_key_file") is None
    set_key("port", 8001)
    assert settings.read_settings().value("port") == 8001
    monkeypatch.setenv("GEMCUT_PORT", "8002")
    assert settings.read_settings().value("port") == 8002
    assert settings.read_settings().value("port", 0) == 0
    with pytest.raises(ParameterError, match=r"--queue-timeout: queue_timeout is 0.0; expected a number above 0 up to"):
        settings.read_settings().value("queue_timeout", 0.0)
    monkeypatch.setenv("GEMCUT_PORT", "65536")
    with pytest.raises(ParameterError, match="GEMCUT_PORT is '65536'; expected a whole number from 0 to 65535"):
        settings.read_settings()
