"""Compiled kernels on disk: found again, compiled again where the file is not what was written, never in the way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gemcut.kernels.runtime import cubin_cache
from gemcut.kernels.runtime.cubin_cache import cached


class Compiler:
    def __init__(self, result: bytes = b"machine code") -> None:
        self.result, self.runs = result, 0

    def __call__(self) -> bytes:
        self.runs += 1
        return self.result


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("GEMCUT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gemcut" / "kernels"


def test_compiled_once_for_each_key(place: Path) -> None:
    one, other = Compiler(), Compiler(b"other code")
    assert [cached("a", one), cached("a", one), cached("b", other)] == [b"machine code"] * 2 + [b"other code"]
    assert (one.runs, other.runs) == (1, 1)
    assert len(list(place.iterdir())) == 2


@pytest.mark.parametrize("damage", ["empty", "cut", "altered", "a folder"])
def test_damaged_files_are_compiled_again(place: Path, damage: str) -> None:
    compiler = Compiler()
    cached("a", compiler)
    (file,) = place.iterdir()
    data = file.read_bytes()
    if damage == "a folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes({"empty": b"", "cut": data[:-1], "altered": data[:-1] + b"?"}[damage])
    assert cached("a", compiler) == b"machine code"
    assert compiler.runs == 2
    if damage != "a folder":
        assert cached("a", compiler) == b"machine code"
        assert compiler.runs == 2
    assert all(not file.name.endswith(".part") for file in place.iterdir())


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX permissions")
def test_a_folder_that_others_can_write_to_is_not_used(place: Path) -> None:
    compiler = Compiler()
    cached("a", compiler)
    place.chmod(0o777)
    assert cached("a", compiler) == b"machine code"
    assert cached("b", compiler) == b"machine code"
    assert compiler.runs == 3
    assert len(list(place.iterdir())) == 1


def test_no_place_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compiler = Compiler()
    assert [cached("a", compiler), cached("a", compiler)] == [b"machine code"] * 2
    assert compiler.runs == 2


def test_a_read_only_disk_is_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler()
    cached("a", compiler)

    def refuse(*_: object) -> None:
        raise OSError("read-only file system")

    monkeypatch.setattr(cubin_cache.os, "utime", refuse)
    assert cached("a", compiler) == b"machine code"
    assert compiler.runs == 1


def test_errors_of_the_compiler_pass_and_leave_nothing(place: Path) -> None:
    def failing() -> bytes:
        raise RuntimeError("line 1: error")

    with pytest.raises(RuntimeError, match="line 1"):
        cached("a", failing)
    assert not place.exists()


def test_the_oldest_go_first(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cubin_cache, "MOST_FILES", 3)
    compiler = Compiler()
    for age, key in enumerate("abc"):
        before = set(place.iterdir()) if place.exists() else set()
        cached(key, compiler)
        (new,) = set(place.iterdir()) - before
        os.utime(new, (1000 + age, 1000 + age))
    cached("a", compiler)  # used again: now the youngest
    cached("d", compiler)
    assert compiler.runs == 4
    cached("a", compiler)
    assert compiler.runs == 4
    cached("b", compiler)
    assert compiler.runs == 5
