"""The header of a GGUF file: metadata and where each tensor lies, every size checked against the file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. We parse it ourselves because ``gguf.GGUFReader``
makes a NumPy view for each of a vocabulary's 256,000 strings (11 s where this takes 0.2 s) and trusts the sizes that
a damaged or hostile file claims. Block sizes and dequantization come from the ``gguf`` library.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGUF_MAGIC, GGMLQuantizationType, GGUFValueType

from gemcut.checkpoint.mapped import MappedFile
from gemcut.errors import CheckpointError

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_MAX_ENTRIES = 65_536  # of metadata, and of tensors: real files have some dozens and some hundreds
_MAX_NAME = 1024


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies. ``shape`` is [rows, columns], as PyTorch counts; the file counts the other way."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata values by key, tensors in file order, and the file they are in."""

    file: MappedFile
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    digest: str  # SHA-256 of everything before the tensor data


def read_header(path: Path) -> GgufHeader:
    """Parse and check a GGUF file's header. Raises CheckpointError, whatever the bytes are."""
    file = MappedFile(path)
    reader = _Reader(file)
    try:
        return reader.header()
    except _DamagedError as error:
        raise CheckpointError(f"{path} is a damaged GGUF file: {error}; get it again") from None


class _DamagedError(Exception):
    pass


class _Reader:
    """A cursor over the file's bytes that never goes past their end."""

    def __init__(self, file: MappedFile) -> None:
        self.file, self.data, self.at = file, file.map, 0

    def header(self) -> GgufHeader:
        self._version()
        tensor_count, pair_count = self._unpack("<QQ")
        if tensor_count > _MAX_ENTRIES or pair_count > _MAX_ENTRIES:
            raise _DamagedError(f"it claims {tensor_count} tensors and {pair_count} metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self._string(_MAX_NAME)
            if key in metadata:
                raise _DamagedError(f"metadata key {key!r} is there twice")
            metadata[key] = self._value(self._type())
        infos = [self._tensor_info() for _ in range(tensor_count)]
        digest = hashlib.sha256(self.data[: self.at]).hexdigest()
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise _DamagedError(f"alignment is {alignment!r}, expected a power of two")
        tensors = dict(self._placed(infos, alignment))
        if len(tensors) != len(infos):
            raise _DamagedError("two tensors have one name")
        return GgufHeader(self.file, metadata, tensors, digest)

    def _version(self) -> None:
        path = self.file.path
        if self.file.size < 24 or int.from_bytes(self.data[:4], "little") != GGUF_MAGIC:
            raise CheckpointError(f"{path} is not a GGUF file")
        self.at = 4
        (version,) = self._unpack("<I")
        if version not in (2, 3):
            kind = "big-endian" if version and version & 0xFFFF == 0 else f"version {version}"
            raise CheckpointError(f"{path} is a {kind} GGUF file; gemcut reads little-endian versions 2 and 3")

    def _unpack(self, form: str) -> tuple[Any, ...]:
        size = struct.calcsize(form)
        if size > self.file.size - self.at:
            raise _DamagedError("it ends in the middle of its header")
        values = struct.unpack_from(form, self.data, self.at)
        self.at += size
        return values

    def _string(self, limit: int | None = None) -> str:
        (length,) = self._unpack("<Q")
        if length > self.file.size - self.at or (limit and length > limit):
            raise _DamagedError(f"a text of {length} bytes in its header")
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise _DamagedError("a text in its header is not UTF-8") from None

    def _type(self) -> GGUFValueType:
        (number,) = self._unpack("<I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise _DamagedError(f"unknown metadata type {number}") from None

    def _value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self._string()
        if kind == GGUFValueType.ARRAY:
            return self._array()
        return _plain(kind, self._unpack("<" + _SCALARS[kind])[0])

    def _array(self) -> list[Any]:
        kind = self._type()
        (count,) = self._unpack("<Q")
        if kind == GGUFValueType.ARRAY:
            raise _DamagedError("an array of arrays")
        smallest = 8 if kind == GGUFValueType.STRING else struct.calcsize("<" + _SCALARS[kind])
        if count > (self.file.size - self.at) // smallest:
            raise _DamagedError(f"an array of {count} entries in its header")
        if kind == GGUFValueType.STRING:
            return [self._string() for _ in range(count)]
        return list(self._unpack(f"<{count}{_SCALARS[kind]}"))

    def _tensor_info(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        name = self._string(_MAX_NAME)
        (dimensions,) = self._unpack("<I")
        if not 1 <= dimensions <= 4:
            raise _DamagedError(f"tensor {name!r} has {dimensions} dimensions")
        shape = self._unpack(f"<{dimensions}Q")
        number, offset = self._unpack("<IQ")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise _DamagedError(f"tensor {name!r} has the unknown type {number}") from None
        return name, kind, tuple(reversed(shape)), offset

    def _placed(
        self, infos: list[tuple[str, GGMLQuantizationType, tuple[int, ...], int]], alignment: int
    ) -> Iterator[tuple[str, GgufTensor]]:
        """Tensors with their place in the file. Writers lay them out one after the other, aligned; anything else is
        damage that would read one tensor's bytes as another's."""
        start = -(-self.at // alignment) * alignment
        expected = 0
        for name, kind, shape, offset in sorted(infos, key=lambda info: info[3]):
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if min(shape) < 1 or shape[-1] % block:
                raise _DamagedError(f"tensor {name!r} of shape {list(shape)} does not divide into {kind.name} blocks")
            nbytes = math.prod(shape) // block * block_bytes
            if offset != expected:
                raise _DamagedError(f"tensor {name!r} lies at {offset}, expected {expected}")
            expected = -(-(offset + nbytes) // alignment) * alignment
            if start + offset + nbytes > self.file.size:
                raise _DamagedError(
                    f"tensor {name!r} ends at byte {start + offset + nbytes:,}, the file at {self.file.size:,}"
                )
            yield name, GgufTensor(name, kind, shape, start + offset, nbytes)


def _plain(kind: GGUFValueType, value: Any) -> Any:
    """A scalar as written down: the float32 nearest to 1e-6 becomes 1e-6, not 9.99999997e-07."""
    if kind == GGUFValueType.FLOAT32 and math.isfinite(value):
        return next(
            short
            for digits in range(6, 10)
            if struct.pack("<f", short := float(f"{value:.{digits}g}")) == struct.pack("<f", value)
        )
    return value
