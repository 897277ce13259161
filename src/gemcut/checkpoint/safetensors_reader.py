"""Read a Hugging Face folder of safetensors files: headers checked first, then tensors streamed from memory maps."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from gemcut.checkpoint import names
from gemcut.checkpoint.bnb import companion, stored_quantization
from gemcut.checkpoint.mapped import MappedFile
from gemcut.checkpoint.safetensors_header import INDEX, read_header, weight_paths
from gemcut.config import GemmaConfig
from gemcut.errors import CheckpointError
from gemcut.progress import Report
from gemcut.quantization.state import check_statistics, from_stored
from gemcut.quantization.weights import CheckpointWeight, FourBitWeight, Int8Weight

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PACKED_DTYPES = {"U8": torch.uint8, "I8": torch.int8}
# What else a safetensors file may hold: read where a tensor is to be skipped, refused where it is a weight.
_OTHER_DTYPES = {"F64": torch.float64, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "BOOL": torch.bool}
_OTHER_DTYPES |= {"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "C64": torch.complex64}
_OTHER_DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
_TORCH = _DTYPES | _PACKED_DTYPES | _OTHER_DTYPES
_NAME_OF = {dtype: name for name, dtype in _TORCH.items()}
_COMPARE_ROWS_BYTES = 64 << 20


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies."""

    name: str  # as the file calls it
    file: MappedFile
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def tensor(self) -> torch.Tensor:
        return self.file.tensor(self.offset, self.shape, self.dtype)

    def release(self) -> None:
        self.file.release(self.offset, self.nbytes)


class PackedEntry:
    """A packed weight and where its tensors lie. Raises CheckpointError when they do not fit together."""

    def __init__(self, codes: Entry, beside: dict[str, Entry], dtype: torch.dtype) -> None:
        self.name, self._entries = codes.name, {"weight": codes, **beside}
        self._dtype = dtype
        try:
            weight = self._weight()
        except CheckpointError as error:
            raise CheckpointError(f"{codes.file.path}: {error}") from None
        self.shape = tuple(weight.shape)
        self.format = weight.quant_type if isinstance(weight, FourBitWeight) else "int8"

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries.values())

    def weight(self) -> FourBitWeight | Int8Weight:
        """The weight, backed by the file."""
        weight = self._weight()
        check_statistics(self.name, weight)
        return weight

    def release(self) -> None:
        for entry in self._entries.values():
            entry.release()

    def _weight(self) -> FourBitWeight | Int8Weight:
        parts = {leaf: entry.tensor() for leaf, entry in self._entries.items()}
        return from_stored(self.name, parts, self._dtype)


def _dispensable(name: str) -> bool:
    """Whether a network can do without the tensor: the tied head, computed constants, what a text network lacks."""
    try:
        return names.from_hf(name) in (None, names.LM_HEAD)
    except CheckpointError:
        return False


def _cannot_read(entry: Entry) -> str:
    dtype = _NAME_OF[entry.dtype]
    if dtype.startswith("F8"):
        why = "it is quantized to fp8: take the original weights and choose a quantization while loading"
    elif dtype in ("I32", "U32"):
        why = "it is packed (as GPTQ, AWQ, EXL2 and MLX do): take the original weights, or a GGUF file"
    else:
        why = "convert it first"
    return f"tensor {entry.name} has dtype {dtype}; gemcut reads {', '.join(_DTYPES | _PACKED_DTYPES)}; {why}"


class SafetensorsFolder:
    """The tensors of a checkpoint folder. Opening reads and checks every header; no data is read before ``tensors``.

    Weights that bitsandbytes' format packs come as FourBitWeight or Int8Weight.
    Raises CheckpointError when a file is missing, damaged, or does not hold exactly what ``config`` needs.
    """

    def __init__(self, folder: Path, config: GemmaConfig) -> None:
        self.folder = folder
        self.quantization = stored_quantization(folder / "config.json")
        self._entries: dict[str, Entry | PackedEntry] = {}
        self._companions: dict[str, dict[str, Entry]] = {}
        for path, wanted in weight_paths(folder):
            places = read_header(path)
            entries = [Entry(p.name, p.file, p.offset, p.shape, _TORCH[p.dtype]) for p in places]
            self._add(entries, wanted, path)
        self._pack()
        head = self._entries.pop(names.LM_HEAD, None)
        assert head is None or isinstance(head, Entry)
        self._head = head
        theirs = {ours: entry.name for ours, entry in self._entries.items()}
        names.check_shapes(folder, self.shapes, config, theirs, "hf")
        if self._head and self._head.shape != self._entries["embed.weight"].shape:
            raise CheckpointError(f"{folder}: lm_head.weight has shape {list(self._head.shape)}, unlike the embedding")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Our names and shapes, in file order."""
        return {name: entry.shape for name, entry in self._entries.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data that ``tensors`` goes through."""
        return sum(entry.nbytes for entry in self._all())

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in (the embedding's)."""
        return self._table.dtype

    @property
    def _table(self) -> Entry:
        table = self._entries["embed.weight"]
        assert isinstance(table, Entry)  # _pack refuses any other
        return table

    def tensors(
        self, progress: Report | None = None, only: Collection[str] | None = None
    ) -> Iterator[tuple[str, CheckpointWeight]]:
        """Stream (our name, tensor) in file order; norms come as ``1 + w`` in fp32, weights as stored.

        ``only`` names the tensors wanted; None: all.

        A tensor's memory belongs to the file's map and is given back when the next one is asked for; keeping the
        tensor is allowed (its pages are then read again on use).
        """
        done, total = 0, self.nbytes
        for name, entry in self._entries.items():
            if only is not None and name not in only:
                continue
            if isinstance(entry, PackedEntry):
                yield name, entry.weight()
            else:
                tensor = entry.tensor()
                yield name, tensor.float() + 1.0 if name.endswith(".scale") else tensor
                del tensor
            entry.release()
            done += entry.nbytes
            if progress:
                progress(done, total)
        if self._head and only is None:
            _require_tied(self._head, self._table)
            if progress:
                progress(total, total)

    def _all(self) -> list[Entry | PackedEntry]:
        return [*self._entries.values(), *([self._head] if self._head else [])]

    def _add(self, entries: list[Entry], wanted: set[str] | None, path: Path) -> None:
        present = {entry.name for entry in entries}
        for name in sorted((wanted or set()) - present):
            if not _dispensable(name):
                raise CheckpointError(
                    f"{path} lacks the tensor {name} that {INDEX} places there; copy the folder again"
                )
        for entry in entries:  # those that the index does not list too: transformers reads them as well
            try:
                base, leaf = companion(entry.name)
                ours = names.from_hf(base)
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {error}") from None
            if ours is None:
                continue
            if entry.dtype in _OTHER_DTYPES.values():
                raise CheckpointError(f"{path}: {_cannot_read(entry)}")
            there: Mapping[str, object] = self._companions.setdefault(ours, {}) if leaf else self._entries
            if (leaf or ours) in there:
                raise CheckpointError(f"{path}: tensor {entry.name} is there twice")
            if leaf:
                self._companions[ours][leaf] = entry
            else:
                self._entries[ours] = entry

    def _pack(self) -> None:
        """Join what stands for one packed weight. Raises CheckpointError where a piece is missing or odd."""
        whole = self._entries.get("embed.weight")
        dtype = whole.dtype if isinstance(whole, Entry) and whole.dtype.is_floating_point else torch.bfloat16
        for ours in list(self._entries):
            entry, beside = self._entries[ours], self._companions.pop(ours, {})
            assert isinstance(entry, Entry)
            if not beside and entry.dtype.is_floating_point:
                continue
            if self.quantization is None:
                raise CheckpointError(
                    f"{self.folder}: tensor {entry.name} is packed ({entry.dtype}), but config.json has no "
                    "quantization_config that says how; gemcut reads bitsandbytes' 4-bit and int8 checkpoints"
                )
            if ours in ("embed.weight", names.LM_HEAD):
                raise CheckpointError(
                    f"{entry.file.path}: {entry.name} is packed; gemcut reads whole tables and cuts them itself: "
                    "save the model again with lm_head among the skipped modules"
                )
            packed = self._entries[ours] = PackedEntry(entry, beside, dtype)
            if packed.format != self.quantization.format:
                raise CheckpointError(
                    f"{entry.file.path}: tensor {entry.name} is {packed.format}, but config.json says "
                    f"{self.quantization.format}: one of the two is of another checkpoint; copy both again"
                )
        for ours, beside in self._companions.items():
            stray = next(iter(beside.values()))
            raise CheckpointError(f"{stray.file.path}: tensor {stray.name} belongs to {ours}, which is missing")
        if self.quantization is not None and not any(isinstance(e, PackedEntry) for e in self._entries.values()):
            raise CheckpointError(
                f"{self.folder}: config.json says {self.quantization.format}, but every tensor is whole; if they are "
                "meant to be, remove quantization_config from config.json"
            )


def _require_tied(head: Entry, embedding: Entry) -> None:
    """Raise unless the head's values are the embedding's, comparing a few rows at a time."""
    rows = max(1, _COMPARE_ROWS_BYTES // (head.nbytes // head.shape[0]))
    for start in range(0, head.shape[0], rows):
        ours, theirs = embedding.tensor()[start : start + rows], head.tensor()[start : start + rows]
        same = torch.equal(ours, theirs) if ours.dtype == theirs.dtype else torch.equal(ours.float(), theirs.float())
        if not same:
            raise CheckpointError(
                f"{head.file.path}: {head.name} differs from the embedding; every Gemma ties the two, so this file "
                "is of another kind or damaged"
            )
        for entry in (head, embedding):
            row_bytes = entry.nbytes // entry.shape[0]
            entry.file.release(entry.offset + start * row_bytes, len(ours) * row_bytes)
