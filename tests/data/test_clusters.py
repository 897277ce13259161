"""The same bytes by Ray's tasks and by Slurm's scripts as by the processes of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import support
from gemcut.data.recipe import read_recipe
from gemcut.data.run import close_stage, run_share
from gemcut.errors import DataError

from ..cli.conftest import Cli, cli  # noqa: F401
from .corpus import files, run, sentences, write_jsonl, write_recipe

RECIPE = """
part_mb = 0.002
[[source]]
name = "a"
reader = "jsonl"
paths = ["*.jsonl"]
[[step]]
use = "exact-duplicates"
[[step]]
use = "gopher-quality"
[tokens]
train = 420
"""
#: Stands for Slurm's: carries out each task of an array at once, and says its number as --parsable does.
SBATCH = """#!/bin/bash
echo "$@" >> "$SBATCH_LOG"
array=0-0; args=()
for a in "$@"; do case "$a" in
  --array=*) array=${a#--array=};;
  --output=*|--parsable|--dependency=*) ;;
  *) args+=("$a");;
esac; done
export SLURM_ARRAY_TASK_COUNT=$((${array#*-} + 1))
for i in $(seq 0 ${array#*-}); do SLURM_ARRAY_TASK_ID=$i bash "${args[@]}" >&2 || exit 1; done
echo "$(wc -l < "$SBATCH_LOG");cluster"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "with space"
    folder.mkdir()
    for i in range(4):
        texts = [sentences(3 * i + j) for j in range(3)]
        write_jsonl(folder / f"{i}.jsonl", [{"text": text} for text in (*texts, sentences(1), "short")])
    write_recipe(folder, RECIPE)
    return folder


def without_machine(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in found.items() if not name.startswith("slurm/")}


@pytest.mark.slow
def test_slurm(folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    recipe, out = folder / "recipe.toml", folder / "out"
    begun = cli("data", "run", recipe, out, "--executor", "slurm", "-w", "3")
    assert begun.code == 0, begun.err
    scripts = sorted((out / "slurm").glob("*.sh"))
    assert [path.name for path in scripts] == ["close.sh", "finish.sh", "stage.sh", "submit.sh"]
    for path in scripts:
        subprocess.run(["bash", "-n", path], check=True)
    if checker := shutil.which("shellcheck"):
        subprocess.run([checker, *scripts], check=True)
    (folder / "bin").mkdir()
    (folder / "bin" / "sbatch").write_text(SBATCH)
    (folder / "bin" / "sbatch").chmod(0o755)
    log = folder / "log"
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "SBATCH_LOG": str(log), "PYTHONPATH": str(support.ROOT / "src")}
    done = subprocess.run(["bash", out / "slurm" / "submit.sh"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the last job is 4\n"
    assert log.read_text().splitlines() == [
        "--parsable --array=0-2 --output=stage-1-%a.log stage.sh 1",
        "--parsable --dependency=afterok:1 --output=close-1.log close.sh 1",
        "--parsable --dependency=afterok:2 --array=0-2 --output=stage-2-%a.log stage.sh 2",
        "--parsable --dependency=afterok:3 --output=finish.log finish.sh",
    ]
    run(recipe, folder / "one")
    assert without_machine(files(out)) == files(folder / "one")


def test_tasks_out_of_their_order(folder: Path, cli: Cli) -> None:  # noqa: F811
    recipe, out = folder / "recipe.toml", folder / "out"
    read = read_recipe(recipe)
    with pytest.raises(DataError, match="is no run yet; `gemcut data run` with --executor slurm begins one"):
        run_share(read, out, 0, 0, 1)
    assert not out.exists()
    assert cli("data", "run", recipe, out, "--executor", "slurm").code == 0
    with pytest.raises(DataError, match=r"stage 1 of .* is not finished"):
        run_share(read, out, 1, 0, 2)
    assert run_share(read, out, 0, 1, 2) == 2
    with pytest.raises(DataError, match="2 of 4 parts of stage 1 are not done; carry out its tasks first"):
        close_stage(read, out, 0)
    assert run_share(read, out, 0, 1, 2) == 0
    assert run_share(read, out, 0, 0, 2) == 2
    with pytest.raises(DataError, match=r"stage 1 of .* is not finished"):
        run_share(read, out, 1, 0, 2)
    close_stage(read, out, 0)
    assert run_share(read, out, 1, 0, 1) == 4
    for arguments, line in {
        ("stage", recipe, out, "9"): "there is no stage 9; this recipe has stages 1 to 2",
        ("stage", recipe, out, "0"): "there is no stage 0; this recipe has stages 1 to 2",
        ("stage", recipe, out, "1", "--task", "3", "--of", "3"): "--task is 3 and --of is 3; expected a task from 0 on",
        ("stage", recipe, out, "1", "--close", "--of", "2"): "--close is for one task; leave out --task and --of",
        ("run", recipe, out, "--executor", "spark"): "--executor is 'spark'; expected one of local, ray, slurm",
    }.items():
        found = cli("data", *arguments)
        assert found.code == 2
        assert found.error.startswith(f"error: {line}")
    assert run(recipe, out)["totals"] == run(recipe, folder / "one")["totals"]


def test_ray_that_is_not_there(folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setitem(sys.modules, "ray", None)
    found = cli("data", "run", folder / "recipe.toml", folder / "out", "--executor", "ray")
    assert (found.code, found.error) == (2, "error: --executor ray needs Ray: pip install 'gemcut[ray]'")
    assert not (folder / "out").exists()


STEPS = """
import errno, os
def dies(documents, rank, world_size):
    for document in documents:
        if rank == 1:
            os.kill(os.getpid(), 9)
        yield document

def full(documents, rank, world_size):
    raise OSError(errno.ENOSPC, "No space left on device")
    yield
"""


@pytest.mark.slow
def test_ray(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real tasks: equal bytes; a worker that is killed is named, the others are done; a full disk ends the run."""
    pytest.importorskip("ray", reason="Ray is not installed; gemcut[ray] brings it")
    from gemcut.data.cluster_ray import ray_executor
    from gemcut.data.report import write_report
    from gemcut.data.run import run_recipe

    monkeypatch.setenv("PYTHONPATH", str(support.ROOT / "src"))
    recipe = folder / "recipe.toml"
    executor = ray_executor(2)
    read = read_recipe(recipe)
    run_recipe(read, folder / "out", executor=executor)
    write_report(read, folder / "out")
    run(recipe, folder / "one")
    assert files(folder / "out") == files(folder / "one")
    (folder / "steps.py").write_text(STEPS)
    before = RECIPE[: RECIPE.index("[[step]]")]
    bad = read_recipe(write_recipe(folder, before + '[[step]]\nfunction = "steps.py:dies"\n'))
    with pytest.raises(DataError, match=r"a worker died twice at part 1 of source a \(1.jsonl\)"):
        run_recipe(bad, folder / "dies", executor=executor)
    assert len(list((folder / "dies" / "work" / "stage-0").glob("*.json"))) == 3
    full = read_recipe(write_recipe(folder, before + '[[step]]\nfunction = "steps.py:full"\n'))
    with pytest.raises(OSError, match="No space left"):
        run_recipe(full, folder / "full", executor=executor)
    import ray

    ray.shutdown()
