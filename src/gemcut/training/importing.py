"""Read a Hugging Face folder's weights as numpy arrays, one tensor at a time, without torch.

Every header is checked before a number is read, so a folder that does not hold exactly what its config.json needs is
refused at once, by the tensor's name.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemcut.checkpoint import names
from gemcut.checkpoint.safetensors_header import ITEM_BYTES, Place, read_header, weight_paths
from gemcut.config import GemmaConfig
from gemcut.errors import CheckpointError

Array = np.ndarray[Any, np.dtype[Any]]
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
#: Numbers looked at together where a tensor is checked or converted: 64 MB of fp32.
CHUNK = 1 << 24


class HuggingFaceFolder:
    """The whole weights of a checkpoint folder under Hugging Face names, whatever prefix its exporter chose.

    ``config`` is read from the folder unless one is given. Raises ConfigError or CheckpointError naming the file and
    the tensor that is missing, surplus, of a wrong shape, or packed.
    """

    def __init__(self, folder: str | Path, config: GemmaConfig | None = None) -> None:
        self.folder = Path(folder)
        self.config = config or GemmaConfig.from_file(self.folder / "config.json")
        self._places: dict[str, Place] = {}
        for path, wanted in weight_paths(self.folder):
            self._add(path, wanted)
        self._head = self._places.pop(names.LM_HEAD, None)
        shapes = {ours: place.shape for ours, place in self._places.items()}
        theirs = {ours: place.name for ours, place in self._places.items()}
        names.check_shapes(self.folder, shapes, self.config, theirs, "hf")
        self._by_name = {names.to_hf(ours): place for ours, place in self._places.items()}
        if self._head is not None and self._head.shape != self._embedding.shape:
            raise CheckpointError(
                f"{self.folder}: lm_head.weight has shape {list(self._head.shape)}, unlike the embedding"
            )

    @property
    def names(self) -> list[str]:
        """Hugging Face's name of every tensor the config asks for."""
        return list(self._by_name)

    @property
    def dtype(self) -> np.dtype[Any]:
        """What the embedding is stored in."""
        return DTYPES[self._embedding.dtype]

    def read(self, name: str) -> Array:
        """One tensor in the dtype it is stored in; its memory is the caller's alone.

        Raises CheckpointError: it cannot be read, holds NaN or infinity, or the head differs from the embedding.
        """
        place = self._by_name[name]
        tensor = read_place(place)
        check_finite(f"{place.file.path}: tensor {place.name}", tensor)
        if place is self._embedding and self._head is not None:
            self._require_tied(tensor, self._head)
        return tensor

    @property
    def _embedding(self) -> Place:
        return self._places["embed.weight"]

    def _add(self, path: Path, wanted: set[str] | None) -> None:
        places = read_header(path)
        lacking = (wanted or set()) - {place.name for place in places} - {names.LM_HEAD}
        if lacking:
            raise CheckpointError(f"{path} lacks the tensor {min(lacking)} that the index places there; copy it again")
        for place in places:
            try:
                ours = names.from_hf(place.name)
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {error}") from None
            if ours is None:
                continue
            if place.dtype not in DTYPES:
                raise CheckpointError(
                    f"{path}: tensor {place.name} has dtype {place.dtype}; training starts from whole weights "
                    f"({', '.join(DTYPES)}): take the folder they were quantized from"
                )
            if ours in self._places:
                raise CheckpointError(f"{path}: tensor {place.name} is there twice")
            self._places[ours] = place

    def _require_tied(self, table: Array, head: Place) -> None:
        rows = max(1, CHUNK // table.shape[1])
        for start in range(0, len(table), rows):
            part = read_place(head, start, min(start + rows, len(table)))
            if not np.array_equal(part.astype(np.float32), table[start : start + rows].astype(np.float32)):
                raise CheckpointError(
                    f"{head.file.path}: {head.name} differs from the embedding; every Gemma ties the two, so this "
                    "file is of another kind or damaged"
                )


def read_place(place: Place, start: int = 0, stop: int | None = None) -> Array:
    """A tensor's rows from ``start`` to ``stop`` (all of them), read from the file into memory of their own."""
    rows, *inner = place.shape
    stop = rows if stop is None else stop
    row = math.prod(inner)
    path, count = place.file.path, (stop - start) * row
    try:
        # A plain read: pages of a memory map would count as memory beside the tensor.
        found = np.fromfile(
            path, DTYPES[place.dtype], count, offset=place.offset + start * row * ITEM_BYTES[place.dtype]
        )
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    if found.size != count:
        raise CheckpointError(f"{path} was cut short while it was read; get the file again")
    return found.reshape(stop - start, *inner)


def check_finite(where: str, tensor: Array) -> None:
    """Raise CheckpointError where ``tensor`` holds NaN or infinity, looking at some of it at a time."""
    flat = tensor.reshape(-1)
    for start in range(0, flat.size, CHUNK):
        if not np.isfinite(flat[start : start + CHUNK]).all():
            raise CheckpointError(
                f"{where} holds NaN or infinity: the training that made it went wrong, or it is damaged"
            )
