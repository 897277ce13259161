"""A tiny checkpoint with the real tokenizer, and ways to run the command line on it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import forked
import support
from gemcut.cli.main import main


@dataclass(frozen=True)
class Run:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on standard error; fails where there are more, or a traceback."""
        lines = self.err.splitlines()
        assert len(lines) == 1, f"expected one line on standard error, got: {self.err!r}"
        assert "Traceback" not in self.err
        return lines[0]


class _Input(io.TextIOWrapper):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")


Cli = Callable[..., Run]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run the command line in this process; ``stdin`` is what is piped in."""

    def run(*args: str | Path, stdin: bytes = b"") -> Run:
        monkeypatch.setattr(sys, "stdin", _Input(stdin))
        monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # main() sets its own
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return Run(code, out, err)

    return run


def environment(**more: str) -> dict[str, str]:
    """Environment in which ``python -m gemcut`` runs this checkout, offline."""
    path = os.pathsep.join([str(support.ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}


def process(*args: str | Path, stdin: bytes | None = None, **env: str) -> Run:
    """Run the command line as a process of its own."""
    if stdin is None:
        forked_run = forked.run([*map(str, args)], env=environment(**env), module="gemcut")
        return Run(forked_run.returncode, forked_run.stdout, forked_run.stderr)
    done = subprocess.run(
        [sys.executable, "-m", "gemcut", *map(str, args)],
        input=stdin,
        capture_output=True,
        env=environment(**env),
        timeout=120,
        check=False,
    )
    return Run(done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture(scope="session")
def real_forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The real Gemma 3 270M by the form it is in: "gguf", a file, and "folder"."""
    from .real_forms import as_folder

    gguf = support.gguf_path()
    return {"gguf": gguf, "folder": as_folder(gguf, tmp_path_factory.mktemp("real") / "gemma-3-270m")}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny Gemma 2 with the real tokenizer and the real context of 8192."""
    support.tokenizer_dir()  # skips where the real tokenizer is missing
    config = support.tiny_config(vocab_size=256_000, hidden_size=16, max_position_embeddings=8192)
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    return support.save_checkpoint(folder, support.hf_model(config), tokenizer=True)
