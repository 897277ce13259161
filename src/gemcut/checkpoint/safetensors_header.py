"""What a safetensors file's header says, checked against the file, without torch: where each tensor lies.

The format (https://github.com/huggingface/safetensors): 8 bytes of header length, a JSON header that gives each
tensor's dtype, shape and byte range, then the data without holes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemcut.checkpoint import foreign
from gemcut.checkpoint.mapped import MappedFile
from gemcut.errors import CheckpointError
from gemcut.files import read_json, shown

INDEX = "model.safetensors.index.json"
#: The dtypes of weights gemcut reads, whole and packed.
READ = ("F32", "F16", "BF16", "U8", "I8")
#: Bytes of one number of each dtype that a file may hold.
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "BOOL": 1}
ITEM_BYTES |= {"U64": 8, "U32": 4, "U16": 2, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1}
_MAX_HEADER = 100_000_000
#: Files of an adapter, which are no weights of a whole network.
_NOT_WEIGHTS = ("adapter_model.safetensors", "adapters.safetensors")


@dataclass(frozen=True)
class Place:
    """Where one tensor lies, and its dtype as the file writes it."""

    name: str
    file: MappedFile
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def weight_files(index: Path) -> dict[str, set[str]]:
    """File name -> tensor names, from a ``model.safetensors.index.json``. Only plain names inside the folder pass."""
    try:
        weight_map = read_json(index)["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{index} is damaged: expected a JSON object with a weight_map") from None
    files: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        # A name with a separator could read any file of the machine.
        if not isinstance(file, str) or not file.endswith(".safetensors") or any(c in file for c in '/\\:\0\n"'):
            raise CheckpointError(
                f"{index} places a tensor in {shown(file)}; expected the plain name of a .safetensors file"
            )
        files.setdefault(file, set()).add(tensor)
    return dict(sorted(files.items()))


def read_header(path: Path) -> list[Place]:
    """Check a safetensors file against its own header and return where its tensors lie, in file order."""
    file = MappedFile(path)
    length = int.from_bytes(file.map[:8], "little")
    if file.size < 8 or length > min(file.size - 8, _MAX_HEADER):
        raise CheckpointError(f"{path} is not a safetensors file or is cut short ({file.size:,} bytes); get it again")
    try:
        header = json.loads(file.map[8 : 8 + length], object_pairs_hook=_no_duplicates)
        if not isinstance(header, dict):
            raise ValueError("not an object")
        header.pop("__metadata__", None)
        entries = [_entry(name, value, file, 8 + length) for name, value in header.items()]
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} has a damaged safetensors header; get the file again") from None
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))  # an empty tensor lies before its neighbour
    end = 8 + length
    for entry in entries:
        if entry.offset != end:
            raise CheckpointError(f"{path} has a damaged safetensors header: holes or overlaps at tensor {entry.name}")
        end += entry.nbytes
    if file.size != end:
        state = "is cut short" if file.size < end else "has bytes too many"
        raise CheckpointError(f"{path} {state}: {file.size:,} bytes, its header says {end:,}; get the file again")
    return entries


def _entry(name: str, value: dict[str, Any], file: MappedFile, start: int) -> Place:
    dtype = value["dtype"]
    if dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{file.path}: tensor {name[:120]} has dtype {shown(dtype)}; gemcut reads {', '.join(READ)}"
        )
    shape, (begin, end) = value["shape"], value["data_offsets"]
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in shape) or not all(type(n) is int for n in (begin, end)):
        raise ValueError("a size is no whole number from 0 on")
    entry = Place(name, file, start + begin, tuple(shape), dtype)
    if begin < 0 or end - begin != entry.nbytes:
        raise ValueError("byte range and shape disagree")
    return entry


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("duplicate key")
    return dict(pairs)


def weight_paths(folder: Path) -> list[tuple[Path, set[str] | None]]:
    """The weight files of a folder, each with the tensors an index places in it (None without an index)."""
    if (folder / "model.safetensors").is_file():
        return [(folder / "model.safetensors", None)]
    if (folder / INDEX).is_file():
        files = [(folder / file, tensors) for file, tensors in weight_files(folder / INDEX).items()]
        for path, _ in files:
            if not path.is_file():
                raise CheckpointError(f"{folder} lacks the shard {path.name} that {INDEX} names; copy or download it")
        return [*files]
    found = sorted(path for path in folder.glob("*.safetensors") if path.name not in _NOT_WEIGHTS)
    if len(found) == 1:
        return [(found[0], None)]
    if found:
        raise CheckpointError(f"{folder} has {len(found)} .safetensors files but no {INDEX} to say what is where")
    raise CheckpointError(f"{folder} has no model.safetensors{foreign.hint(folder)}")
