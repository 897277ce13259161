"""The folder of a run: whose it is, and who may write into it."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemcut.data.parts import Part
from gemcut.data.recipe import Recipe
from gemcut.data.store import read_json, write_json
from gemcut.errors import DataError

STATE = "run.json"
_VERSION = 1


@contextmanager
def run_folder(recipe: Recipe, parts: list[Part], out: Path, *, shared: bool = False) -> Iterator[None]:
    """``out`` for one run at a time, of this recipe and this input, with nothing half-written in it.

    ``shared``: for one of several tasks of a run that was begun.
    """
    state = {"version": _VERSION, "digest": recipe.digest, "parts": [part.as_dict() for part in parts]}
    state = json.loads(json.dumps(state))
    try:
        if out.exists() and not out.is_dir():
            raise DataError(f"{out} is a file; expected a folder, or a name that is not taken")
        found = out / STATE
        others = [path for path in out.iterdir() if path.name != ".lock"] if out.is_dir() else []
        if others and not found.exists():
            raise DataError(f"{out} holds something that is no run of gemcut data; choose another folder")
        if shared and not found.exists():
            raise DataError(f"{out} is no run yet; `gemcut data run` with --executor slurm begins one")
        out.mkdir(parents=True, exist_ok=True)
        with open(out / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"another run is writing {out}; wait for it, or choose another folder") from None
            if found.exists() and read_json(found) != state:
                what = "another recipe" if read_json(found).get("digest") != recipe.digest else "other input files"
                raise DataError(f"{out} holds a run with {what}; choose another folder, or remove it to begin anew")
            if shared:
                yield
                return
            write_json(found, state)
            for leftover in out.rglob("*.unfinished"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
            yield
    except NotADirectoryError:
        raise DataError(f"cannot make the folder {out}: a part of its path is a file") from None
