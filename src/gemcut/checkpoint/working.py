"""The folder beside OUT in which finished files wait until all are there: its state, its lock, and its end as OUT."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemcut.errors import CheckpointError

_STATE = "state.json"


def working_folder(out: Path) -> Path:
    """Where finished files wait until ``out`` is whole."""
    out = behind_link(out)
    return out.with_name(f".{out.name}.quantizing")


def can_go_on(out: Path) -> bool:
    """Whether a run into ``out`` that was stopped has left finished files."""
    return (working_folder(out) / _STATE).is_file()


def behind_link(out: Path) -> Path:
    """What ``out`` is a link to, if it is one: the link stays, and the folder appears where it leads."""
    return Path(os.path.realpath(out)) if out.is_symlink() else out


def check_out(out: Path) -> None:
    """Raise CheckpointError if ``out`` is taken, cannot be replaced by a finished folder, or nothing can be written
    beside it."""
    if not out.name or out.name == "..":
        raise CheckpointError(f"{out} is no name for a new folder; choose another")
    if os.path.ismount(behind_link(out)):
        raise CheckpointError(f"{out} is a mount point; name a new folder inside it, such as {out / 'model'}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} already exists and is not empty; choose another name or remove it")
    _check_writable(out)


def _check_writable(out: Path) -> None:
    """Make the working folder and take it away again: whatever stands against it is met before hours of work."""
    work = working_folder(out)
    made: list[Path] = []
    try:
        for folder in reversed([work, *work.parents]):
            if not folder.exists():
                folder.mkdir()
                made.append(folder)
        if not os.access(work, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise CheckpointError(
            f"cannot write {out}: {error.strerror or error}: choose a place where files can be written"
        ) from None
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # another run has begun there
                folder.rmdir()


class Lock:
    """No two runs may write one folder. The lock goes with the process, so a kill leaves none behind."""

    def __init__(self, work: Path) -> None:
        self._path = work / "lock"

    def __enter__(self) -> None:
        self._file = open(self._path, "w")
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise CheckpointError(f"another run is writing {self._path.parent}; wait for it or stop it") from None

    def __exit__(self, *_: object) -> None:
        self._file.close()


def resume(work: Path, key: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """The state of an earlier run of the same work, or of a new one."""
    state: dict[str, Any]
    fresh: dict[str, Any] = {"key": key, "shards": [], "weights": {}}
    try:
        state = json.loads((work / _STATE).read_bytes())
        shards = state["shards"]
        sound = state["key"] is not None and all((work / s["file"]).stat().st_size == s["size"] for s in shards)
        done = sum(len(shard["ours"]) for shard in shards)
    except FileNotFoundError:
        state, sound, done = fresh, True, 0
    except (ValueError, KeyError, TypeError, AttributeError):
        state, sound, done = fresh, False, 0
    if not sound or state["key"] != key:
        why = "the source or the options have changed since" if sound else "what it left is damaged"
        say(f"an earlier run was stopped, but {why}: starting anew")
        state = fresh
    elif done:
        say(f"going on where an earlier run was stopped: {len(state['shards'])} files ({done} tensors) are done")
    kept = {"lock", _STATE, state.get("kept", ""), *(shard["file"] for shard in state["shards"])}
    for path in work.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return state


def save_state(work: Path, state: dict[str, Any]) -> None:
    """Keep what a later run needs to go on."""
    write_json(work / _STATE, state)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write ``data`` so that ``path`` is whole or as it was."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def assemble(work: Path) -> Path:
    """Give the shards their names in a folder inside ``work`` that lacks nothing, and return it."""
    state = json.loads((work / _STATE).read_bytes())
    shards = [shard["file"] for shard in state["shards"]]
    final = work / "folder"  # built beside the state, so that what is called OUT never lacks a file
    final.mkdir()
    for i, shard in enumerate(shards):
        name = shard_name(i, len(shards))
        try:
            os.link(work / shard, final / name)
        except OSError:  # a file system without links: a kill between here and the end costs the run
            (work / shard).replace(final / name)
    stays = {"lock", _STATE, state.get("kept", ""), final.name, *shards}
    for path in list(work.iterdir()):
        if path.name not in stays and (path.is_file() or path.name == "additional_chat_templates"):
            path.replace(final / path.name)
    return final


def shard_name(index: int, count: int) -> str:
    """What transformers calls the file."""
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def publish(work: Path, out: Path) -> None:
    """Make the assembled folder ``out`` and remove the rest. A kill in between is made good by the next run."""
    if out.exists():
        out.rmdir()
    (work / "folder").rename(out)
    shutil.rmtree(work, ignore_errors=True)
