"""A run as scripts for Slurm: an array of tasks for each stage, one after the other, by files that all machines see."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from gemcut.data.recipe import Recipe
from gemcut.data.run import begin_run, stages

_HEAD = """#!/bin/bash
# Written by gemcut data run --executor slurm. {what}
{options}set -euo pipefail
"""


def write_slurm(recipe: Recipe, out: Path, tasks: int) -> Path:
    """Begin the run in ``out`` and write its scripts to ``out/slurm``; gives the one to start, ``submit.sh``.

    ``tasks`` is the size of each array; a task carries out every ``tasks``-th part of its stage. Where one fails,
    start ``submit.sh`` again: parts that are done are not done twice.
    """
    parts = begin_run(recipe, out)
    tasks = min(tasks, parts)
    folder = out.resolve() / "slurm"
    folder.mkdir(exist_ok=True)
    command = f"{shlex.quote(sys.executable)} -m gemcut data"
    where = f"{shlex.quote(str(recipe.path.resolve()))} {shlex.quote(str(out.resolve()))}"
    name = f"gemcut-{recipe.name}"
    one = f"#SBATCH --job-name={name}\n#SBATCH --ntasks=1\n#SBATCH --cpus-per-task=1\n"
    many = f"#SBATCH --job-name={name}\n#SBATCH --ntasks=1\n#SBATCH --cpus-per-task={tasks}\n"
    _write(
        folder / "stage.sh",
        _HEAD.format(what="One task of the array of stage $1.", options=one)
        + f'exec {command} stage {where} "$1" --task "$SLURM_ARRAY_TASK_ID" --of {tasks}\n',
    )
    _write(
        folder / "close.sh",
        _HEAD.format(what="What needs all parts of stage $1.", options=one)
        + f'exec {command} stage {where} "$1" --close\n',
    )
    _write(
        folder / "finish.sh",
        _HEAD.format(what="Shards and report.", options=many) + f"exec {command} run {where} --workers {tasks}\n",
    )
    lines = [
        _HEAD.format(
            what="Partition, account and time: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT.", options=""
        ),
        f"cd {shlex.quote(str(folder))}\n",
    ]
    after = ""
    for stage in stages(recipe):
        array = f"--array=0-{tasks - 1} --output=stage-{stage.number + 1}-%a.log"
        lines.append(f"job=$(sbatch --parsable {after}{array} stage.sh {stage.number + 1})\n")
        after = '--dependency="afterok:${job%%;*}" '
        if stage.closing is not None:
            log = f"--output=close-{stage.number + 1}.log"
            lines.append(f"job=$(sbatch --parsable {after}{log} close.sh {stage.number + 1})\n")
    lines.append(f"job=$(sbatch --parsable {after}--output=finish.log finish.sh)\n")
    lines.append('echo "the last job is ${job%%;*}"\n')
    _write(folder / "submit.sh", "".join(lines))
    return folder / "submit.sh"


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    os.chmod(path, 0o755)
