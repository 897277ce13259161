"""benchmarks/gpu_parallel.py: its arguments, and that it runs, on a CPU with a tiny shape."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from support import ROOT

PROGRAM = [sys.executable, str(ROOT / "benchmarks" / "gpu_parallel.py")]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
def test_it_runs_on_a_cpu() -> None:
    done = run(
        "--device", "cpu", "--size", "tiny", "--quick", "--weights", "nf4", "--users", "1,3", "--repetitions", "1"
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| decode", "| prefill", "| 8 requests"))]
    assert [row.split("|")[1].strip() for row in rows] == ["decode of 1", "decode of 3", "prefill of 64", "8 requests"]
    for row in rows:
        one, two, ratio = (float(cell.replace(",", "")) for cell in row.split("|")[2:5])
        assert ratio == pytest.approx(two / one, abs=0.02, rel=0.02)
    assert "| 37,748,736 |" in done.stdout


@pytest.mark.slow
def test_bad_arguments() -> None:
    done = run("--device", "cpu", "--gpus", "9")
    assert done.returncode == 2
    assert "--gpus takes 2 to 8" in done.stderr
