"""The folder of a run: run.toml, metrics.jsonl, checkpoints/ by orbax, and in the end model/, a checkpoint folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from gemcut.data.store import AtomicFile, write_json
from gemcut.errors import DataError
from gemcut.training.driver import Driver, wait_for_all
from gemcut.training.runfile import RunFile, read_run_file

STATE, FILE, TOKENIZER, MODEL = "run.json", "run.toml", "tokenizer.json", "model"


@contextlib.contextmanager
def begin(folder: Path, file: RunFile, driver: Driver | None = None, *, resume: bool = False) -> Iterator[None]:
    """Make ``folder`` the run of ``file``, for this run alone; with ``resume`` it may be one of this file already.

    Raises DataError where it is somebody else's.
    """
    if driver is not None and not driver.leads:
        wait_for_all(driver, "begun")
        yield
        return
    if resume and (folder / STATE).is_file():
        if run_file_of(folder).text != file.text:
            raise DataError(f"{folder} is the run of another file; choose another folder, or `gemcut train resume` it")
        with _lock(folder):
            if driver is not None:
                wait_for_all(driver, "begun")
            yield
        return
    if folder.is_dir() and any(path.name != ".lock" for path in folder.iterdir()):
        raise DataError(f"{folder} holds something already; `gemcut train resume {folder}` goes on with a run")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the folder {folder}: {error.strerror or error}") from None
    with _lock(folder):
        with AtomicFile(folder / FILE) as out:
            out.write(file.text.encode())
        write_json(folder / STATE, {"version": 1, "base": str(file.base)})
        if driver is not None:
            wait_for_all(driver, "begun")
        yield


@contextlib.contextmanager
def locked(folder: Path, driver: Driver | None = None) -> Iterator[None]:
    """Hold the folder for this run. Raises DataError where another one has it."""
    with _lock(folder) if driver is None or driver.leads else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    try:
        file = open(folder / ".lock", "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise DataError(f"cannot write into {folder}: {error.strerror or error}; choose another folder") from None
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process trains in {folder}; wait for it, or choose another folder") from None
        yield


def run_file_of(folder: Path) -> RunFile:
    """The run file of a run that was begun. Raises DataError and RecipeError."""
    try:
        state = json.loads((folder / STATE).read_bytes())
        base = Path(state["base"])
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{folder} is no run; expected a folder that `gemcut train run` made") from None
    return read_run_file(folder / FILE, base)


class Checkpoints:
    """The checkpoints of a run: weights, optimizer state, place in the data, step. Saved beside the next steps."""

    def __init__(self, folder: Path, keep: int) -> None:
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # errors reach us as exceptions
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._folder = folder
        self._manager = self._open(folder / "checkpoints", keep)
        self._best = self._open(folder / "best", 1)

    def _open(self, path: Path, keep: int) -> Any:
        options = self._ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        return self._ocp.CheckpointManager(path.resolve(), options=options)

    def save(self, step: int, state: Any, more: dict[str, Any], *, best: bool = False) -> None:
        """Save ``state`` and ``more`` (JSON) as of ``step``. Raises DataError where the disk is full.

        What is there already is kept until the new one is whole.
        """
        args = self._ocp.args
        manager = self._best if best else self._manager
        if step in manager.all_steps():
            return
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) // max(1, jax.process_count())
        free = shutil.disk_usage(self._folder).free
        if free < needed:  # said before anything is written, rather than by each thread that fails
            raise DataError(
                f"the checkpoint of step {step} cannot be written: it takes {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} "
                "are free; the one before it is whole: free some space, and resume"
            )
        more = {**more, "arrays": _arrays(state)}
        with self._said(step):
            manager.save(step, args=args.Composite(state=args.StandardSave(state), more=args.JsonSave(more)))

    def latest(self) -> int | None:
        """The last whole checkpoint's step."""
        found: int | None = self._manager.latest_step()
        return found

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """(state, more) of a step; ``like`` has shapes, dtypes and shardings. Raises DataError for another shape."""
        args = self._ocp.args
        try:
            more: dict[str, Any] = self._manager.restore(step, args=args.Composite(more=args.JsonRestore()))["more"]
            # Before orbax meets it: it would leave a failed task for each array.
            if more.pop("arrays") != _arrays(like):
                raise DataError(
                    "the checkpoint is of another network than run.toml says; put back what it said, or begin anew in "
                    "another folder"
                )
            state = self._manager.restore(step, args=args.Composite(state=args.StandardRestore(like)))["state"]
        except (ValueError, OSError, KeyError) as error:
            words = " ".join(str(error).split())
            raise DataError(f"the checkpoint of step {step} cannot be read: {words[:200]}") from None
        return state, more

    def finish(self) -> None:
        """Wait until what was saved is whole. Raises DataError where it could not be written."""
        for manager in (self._manager, self._best):
            with self._said(None):
                manager.wait_until_finished()

    def close(self) -> None:
        """Finish and let go. Raises DataError where something could not be written."""
        with contextlib.ExitStack() as stack:
            for manager in (self._manager, self._best):
                stack.enter_context(self._said(None))
                stack.callback(manager.close)

    @contextlib.contextmanager
    def _said(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            what = "a checkpoint" if step is None else f"the checkpoint of step {step}"
            words = " ".join(str(error).split())[:200]
            raise DataError(
                f"{what} cannot be written ({words}); the one before it is whole: free some space, and resume"
            ) from None


def _arrays(tree: Any) -> dict[str, list[Any]]:
    """The shape and dtype of each leaf by its path, as JSON has them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): [*leaf.shape, str(leaf.dtype)] for path, leaf in leaves}
