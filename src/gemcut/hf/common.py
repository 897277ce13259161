"""What all of this front door shares: warnings given once, refusals by name, and "cuda" on a machine without a GPU."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gemcut.checkpoint.resolve import checked_name
from gemcut.errors import ParameterError, UnsupportedError
from gemcut.paths import expand
from gemcut.placement.devices import parse_device

#: An option gemcut knows but does not have: the values that change nothing (None always is one), and why it is refused.
Refusal = tuple[tuple[Any, ...], str]
#: An option whose result is the same without it: for which values that holds (a type stands for all of its values), and
#: what gemcut does instead. Using it is a warning.
Idle = tuple[tuple[Any, ...], str]

NO_CODE = "gemcut runs no code from checkpoints"
CODE_IDLE: Idle = ((True,), f"{NO_CODE}; the network and the tokenizer are gemcut's own")

_warned: set[str] = set()


def warn_once(message: str, key: str | None = None) -> None:
    """Warn, at the caller's line outside gemcut, unless this process has given this very warning before.

    With ``key``, unless it has given any warning of that key.
    """
    if (key or message) in _warned:
        return
    _warned.add(key or message)
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "gemcut":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def refuse(
    where: str, given: Mapping[str, Any], known: Mapping[str, Refusal], idle: Mapping[str, Idle] | None = None
) -> None:
    """Raise for the first option in ``given`` that is unknown, or known and set to something gemcut cannot do.

    A value that ``idle`` lists warns, once for each option and process.

    Raises:
        ParameterError: ``known`` does not list the option.
        UnsupportedError: it does, and the value is none of those that change nothing.
    """
    for name, value in given.items():
        if name not in known:
            raise ParameterError(f"{where} has no argument {name!r}; check its spelling or leave it out")
        neutral, reason = known[name]
        if _is_one_of(value, neutral):
            continue
        values, instead = (idle or {}).get(name, ((), ""))
        types = tuple(kind for kind in values if isinstance(kind, type))
        if not (isinstance(value, types) or _is_one_of(value, values)):
            raise UnsupportedError(f"{where}: {name}={_short(value)} is not supported: {reason}")
        warn_once(f"{where}: {name}={_short(value)} changes nothing: {instead}", key=f"{where}: {name}")


def _is_one_of(value: object, neutral: tuple[Any, ...]) -> bool:
    if value is None or (isinstance(value, (list, tuple, dict)) and not value):
        return True
    if not isinstance(value, (bool, int, float, str)):  # comparing tensors or models with == may not give a bool
        return False
    return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in neutral)


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def find_device(device: str | int | torch.device) -> torch.device:
    """The device a program names; the CPU, with one warning, where it names a GPU and the machine has none.

    Raises:
        ParameterError: no such device; a GPU's number is too large.
    """
    number = type(device) is int and device >= 0
    wants_gpu = str(device).startswith("cuda") or number
    if wants_gpu and not torch.cuda.is_available():
        warn_once("this machine has no GPU that torch can use: 'cuda' is taken as 'cpu'")
        return torch.device("cpu")
    return parse_device(device)


def usable_revision(name: str | Path, revision: str | None) -> str | None:
    """The revision to ask the hub for; None, with a warning, where ``name`` is a file or folder of this machine."""
    if revision is None or not _exists(expand(checked_name(name))):
        return revision
    if revision != "main":
        warn_once(f"{name} is on this machine, so revision={revision!r} has no effect")
    return None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long or with a NUL is no file
        return False


def named_folder(save_directory: str | Path) -> Path:
    """The folder that a ``save_pretrained`` was given.

    Raises:
        ParameterError: it is empty, which would mean the folder the program happens to run in.
    """
    if not isinstance(save_directory, (str, Path)) or save_directory == "":
        raise ParameterError(f"save_directory is {save_directory!r}; expected the name of a folder ('.' is this one)")
    return Path(save_directory)
