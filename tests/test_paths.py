"""Folders of the person who runs gemcut, also where there is no home."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import support
from gemcut.errors import CheckpointError
from gemcut.paths import cache_folder, expand, user_folder

NO_HOME = "import pwd, sys; pwd.getpwuid = lambda uid: {}['nobody']; from gemcut.cli.main import main; sys.exit(main())"


def test_user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert user_folder("XDG_CACHE_HOME", ".cache") == tmp_path / ".cache" / "gemcut"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert user_folder("XDG_CACHE_HOME", ".cache") == tmp_path / "elsewhere" / "gemcut"
    monkeypatch.setenv("HOME", "~")  # as where no home is known
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    with pytest.raises(CheckpointError, match="no home folder"):
        user_folder("XDG_CACHE_HOME", ".cache")
    assert expand("~/a") == Path("~/a")
    assert expand("~nobody-of-this-name/a") == Path("~nobody-of-this-name/a")


def test_one_variable_moves_every_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.delenv("GEMCUT_CACHE", raising=False)
    before = [cache_folder("models"), cache_folder("tokenizers"), cache_folder("kernels")]
    assert before == [tmp_path / "elsewhere" / "gemcut" / part for part in ("", "tokenizers", "kernels")]
    monkeypatch.setenv("GEMCUT_CACHE", str(tmp_path / "own"))
    assert {cache_folder("models"), cache_folder("tokenizers").parent, cache_folder("kernels").parent} == {
        tmp_path / "own"
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "code", "part"),
    [
        (["config"], 0, "no home folder"),
        (["config", "path"], 2, "set HOME or XDG_CONFIG_HOME"),
        (["config", "set", "seed", "1"], 2, "set HOME or XDG_CONFIG_HOME"),
        (["info"], 0, "no home folder: set HOME or GEMCUT_CACHE"),
        (["info", "~nobody-of-this-name/x"], 2, "does not exist"),
        (["plan", "2b", "--memory", "9GB"], 0, "gemma-2-2b"),
    ],
)
def test_commands_without_a_home(args: list[str], code: int, part: str) -> None:
    """A bare environment in the C locale: nothing but PATH, and a user that the system does not know."""
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(support.ROOT / "src"), "LC_ALL": "C", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", NO_HOME, *args], capture_output=True, env=env, check=False)
    shown = done.stdout.decode() + done.stderr.decode()  # UTF-8, whatever the locale
    assert done.returncode == code, shown
    assert part in shown
    assert "Traceback" not in shown
