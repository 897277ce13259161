"""Named arrays in a folder, each a .npy file that is mapped when it is read; written whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def save(folder: Path, **arrays: NDArray[Any]) -> None:
    """Write ``arrays`` into ``folder``, replacing what is there."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(temporary / f"{name}.npy", array, allow_pickle=False)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def load(folder: Path, name: str) -> NDArray[Any]:
    """One array of a folder, mapped where it is not empty."""
    path = folder / f"{name}.npy"
    try:
        found: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:  # an empty array cannot be mapped
        found = np.load(path, allow_pickle=False)
    return found
