"""A teacher's answers, stored: the likeliest words after each token of a source's windows, with their probabilities.

A folder holds ids.npy (windows, length, k; int32), probabilities.npy (the same shape; float16) and teacher.json, which
names the windows they belong to.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemcut.data.store import write_json
from gemcut.errors import DataError
from gemcut.training.data import Windows
from gemcut.training.network import Network
from gemcut.training.parameters import Tree

IDS, PROBABILITIES, INDEX = "ids.npy", "probabilities.npy", "teacher.json"


def fingerprint(windows: Windows) -> str:
    """A hash of the tokens of all windows, which tells whether stored answers belong to them."""
    digest = hashlib.sha256()
    for number in range(len(windows)):
        digest.update(windows[number]["tokens"].tobytes())
    return digest.hexdigest()


class StoredTeacher:
    """Answers of a folder for ``windows``: item i has ``top_ids`` and ``top_probabilities`` of (length, k).

    Raises DataError where the folder is none, or belongs to other windows.
    """

    def __init__(self, folder: Path, windows: Windows) -> None:
        self._name = str(folder)
        try:
            index = json.loads((folder / INDEX).read_bytes())
            self._ids = np.load(folder / IDS, mmap_mode="r", allow_pickle=False)
            self._probabilities = np.load(folder / PROBABILITIES, mmap_mode="r", allow_pickle=False)
            wanted = (index["windows"], index["length"], index["top"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            words = " ".join(str(error).split())[:200]
            raise DataError(
                f"{folder} holds no teacher's answers ({words}); expected a folder of `gemcut train teacher-logits`"
            ) from None
        if self._ids.shape != wanted or self._probabilities.shape != wanted:
            raise DataError(f"{folder} is damaged: its arrays have not the shape that {INDEX} says; make it anew")
        length = len(windows[0]["tokens"])
        if (len(windows), length) != wanted[:2] or index["sha256"] != fingerprint(windows):
            raise DataError(
                f"{folder} belongs to other text or another length ({wanted[0]:,} windows of {wanted[1]:,} tokens); "
                "write the teacher's answers anew"
            )

    def __repr__(self) -> str:
        return f"StoredTeacher({self._name!r})"

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {
            "top_ids": np.asarray(self._ids[number], np.int32),
            "top_probabilities": np.asarray(self._probabilities[number], np.float16),
        }


def write_answers(
    folder: Path,
    windows: Windows,
    network: Network,
    weights: Tree,
    *,
    top: int,
    batch: int = 1,
    rows: int = 512,
    watch: Callable[[int], None] = lambda done: None,
) -> None:
    """Write ``network``'s ``top`` likeliest words for every window; ``folder`` is whole or not there.

    ``batch`` windows go through the network at once, ``rows`` positions through the head. ``watch`` hears how many
    windows are done. Raises DataError where ``folder`` is taken or cannot be written.
    """
    if folder.exists():
        raise DataError(f"{folder} already exists; choose another name or remove it")
    length = len(windows[0]["tokens"])
    shape = (len(windows), length, top)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")

    @jax.jit
    def answer(weights: Tree, rows_of: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden = network.hidden(weights, rows_of["tokens"], rows_of["segments"], rows_of["positions"])
        flat = hidden.reshape(-1, hidden.shape[-1])
        padded = jnp.pad(flat, ((0, -len(flat) % rows), (0, 0))).reshape(-1, rows, flat.shape[-1])

        def piece(part: jax.Array) -> tuple[jax.Array, jax.Array]:
            chances, ids = jax.lax.top_k(jax.nn.softmax(network.logits(weights, part)), top)
            return ids.astype(jnp.int32), chances.astype(jnp.float16)

        ids, chances = jax.lax.map(piece, padded)
        return (ids.reshape(-1, top)[: len(flat)].reshape(-1, length, top),
                chances.reshape(-1, top)[: len(flat)].reshape(-1, length, top))  # fmt: skip

    try:
        part.mkdir(parents=True)
        ids = np.lib.format.open_memmap(part / IDS, "w+", np.int32, shape)
        chances = np.lib.format.open_memmap(part / PROBABILITIES, "w+", np.float16, shape)
        for at in range(0, len(windows), batch):
            numbers = range(at, min(at + batch, len(windows)))
            found = [windows[i] for i in numbers] + [windows[at]] * (batch - len(numbers))
            rows_of = {key: np.stack([row[key] for row in found]) for key in ("tokens", "segments", "positions")}
            got_ids, got_chances = answer(weights, rows_of)
            ids[at : at + len(numbers)] = np.asarray(got_ids)[: len(numbers)]
            chances[at : at + len(numbers)] = np.asarray(got_chances)[: len(numbers)]
            watch(at + len(numbers))
        ids.flush()
        chances.flush()
        index = {"version": 1, "windows": shape[0], "length": length, "top": top, "sha256": fingerprint(windows)}
        write_json(part / INDEX, index)
        part.rename(folder)
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}; free some space and try again") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
