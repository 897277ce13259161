"""The recipes that start a training run on many chips, as far as a machine without them can tell."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from support import ROOT

FOLDER = ROOT / "deploy" / "training"
SCRIPTS = sorted(FOLDER.glob("*.sh"))


def test_the_pod_of_the_manifest_has_the_runs_chips() -> None:
    job = yaml.safe_load((FOLDER / "pathways-27b.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("pathways-job.pathways.domain/v1", "PathwaysJob")
    (workers,) = job["spec"]["workers"]
    chips = workers["numSlices"]
    for side in workers["topology"].split("x"):
        chips *= int(side)
    assert chips == 6144
    (container,) = job["spec"]["controller"]["template"]["spec"]["containers"]
    assert container["command"][0] == "gemcut"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script: Path) -> None:
    bash, shellcheck = shutil.which("bash"), shutil.which("shellcheck")
    assert bash
    assert os.access(script, os.X_OK)
    done = subprocess.run([bash, "-n", str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    if shellcheck:
        done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(("script", "program"), [("xpk.sh", "xpk"), ("slurm.sh", "srun")])
def test_scripts_start_the_run(script: str, program: str, tmp_path: Path) -> None:
    """The launcher is replaced by one that shows its arguments, one a line."""
    fake = tmp_path / program
    fake.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CLUSTER": "c", "IMAGE": "i"}
    run = [str(FOLDER / script), "/runs/my run.toml", "/runs/out"]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    given = done.stdout.splitlines()
    if program == "xpk":
        assert given[:2] == ["workload", "create-pathways"]
        assert given[given.index("--tpu-type") + 1] == "v5p-12288"  # two cores a chip
        assert given[given.index("--command") + 1] == r"gemcut train run /runs/my\ run.toml /runs/out --resume"
    else:
        assert given[-6:] == ["gemcut", "train", "run", "/runs/my run.toml", "/runs/out", "--resume"]
    for missing in ([run[0]], run[:2], *([run] if program == "xpk" else [])):
        plain = {"PATH": environment["PATH"]}
        done = subprocess.run(missing, env=plain, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode != 0
        assert any(words in done.stderr for words in ("usage:", "name the folder", "set CLUSTER"))


def _ray_train() -> Any:
    spec = importlib.util.spec_from_file_location("ray_train", FOLDER / "ray_train.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rays_processes_know_who_they_are() -> None:
    module = _ray_train()
    each = [module.environment("10.0.0.1:7000", i, 3) for i in range(3)]
    assert [e["GEMCUT_PROCESS"] for e in each] == ["0", "1", "2"]
    assert {(e["GEMCUT_COORDINATOR"], e["GEMCUT_PROCESSES"]) for e in each} == {("10.0.0.1:7000", "3")}
    assert module.command("a.toml", "out")[1:] == ["-m", "gemcut", "train", "run", "a.toml", "out", "--resume"]


def test_a_nodes_failure_is_its_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    module = _ray_train()
    monkeypatch.setattr(module, "command", lambda run, out: ["sh", "-c", f"exit $GEMCUT_PROCESS{run}{out}"])
    assert module.Node().run("", "", module.environment("h:1", 3, 4)) == 3
