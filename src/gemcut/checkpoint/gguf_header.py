"""The header of a GGUF file: metadata and where each tensor lies, every size checked against the file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. We parse it ourselves because ``gguf.GGUFReader``
makes a NumPy view for each of a vocabulary's 256,000 strings (11 s where this takes 0.05 s) and trusts the sizes that
a damaged or hostile file claims. Arrays are stepped over and read when somebody asks for them.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemcut.checkpoint.ggml_types import TYPES, GgmlType, refusal
from gemcut.checkpoint.mapped import MappedFile
from gemcut.errors import CheckpointError

_MAGIC = b"GGUF"
_STRING, _ARRAY, _FLOAT32 = 8, 9, 6
#: Metadata types by number: a name for messages and struct's letter.
_SCALARS = {
    0: ("uint8", "B"),
    1: ("int8", "b"),
    2: ("uint16", "H"),
    3: ("int16", "h"),
    4: ("uint32", "I"),
    5: ("int32", "i"),
    _FLOAT32: ("float32", "f"),
    7: ("bool", "?"),
    10: ("uint64", "Q"),
    11: ("int64", "q"),
    12: ("float64", "d"),
}
_LENGTH = struct.Struct("<Q")
_MAX_ENTRIES = 65_536  # of metadata, and of tensors: real files have some dozens and some hundreds
_MAX_NAME = 1024


class GgufArray:
    """An array of the metadata: checked to lie in the file, read by ``values``.

    Attributes:
        kind: what it holds: "string", "float32", "bool", ….
    """

    def __init__(self, file: MappedFile, kind: int, count: int, at: int) -> None:
        self.kind = "string" if kind == _STRING else _SCALARS[kind][0]
        self._file, self._number, self._count, self._at = file, kind, count, at

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"<{self._count} of {self.kind}>"

    def values(self) -> list[Any]:
        """The entries. Raises CheckpointError where a text is not UTF-8."""
        data, at = self._file.map, self._at
        if self._number != _STRING:
            return list(struct.unpack_from(f"<{self._count}{_SCALARS[self._number][1]}", data, at))
        found, length_at = [], _LENGTH.unpack_from
        try:
            for _ in range(self._count):
                end = at + 8 + length_at(data, at)[0]
                found.append(data[at + 8 : end].decode())
                at = end
        except UnicodeDecodeError:
            raise CheckpointError(
                f"{self._file.path} is a damaged GGUF file: a text in its header is not UTF-8; get it again"
            ) from None
        return found

    def texts(self, wanted: Collection[int], named: Collection[str], most: int) -> dict[int, str]:
        """Of the first ``most`` texts those with the numbers ``wanted``, and those that are one of ``named``.

        Raises CheckpointError where one of them is not UTF-8.
        """
        data, at, length_at = self._file.map, self._at, _LENGTH.unpack_from
        names = {name.encode() for name in named}
        lengths = {len(name) for name in names}
        found = {}
        for i in range(min(self._count, most)):
            length = length_at(data, at)[0]
            at += 8
            if i in wanted or (length in lengths and data[at : at + length] in names):
                found[i] = self._text(data[at : at + length])
            at += length
        return found

    def _text(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise CheckpointError(
                f"{self._file.path} is a damaged GGUF file: a text in its header is not UTF-8; get it again"
            ) from None


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies. ``shape`` is [rows, columns], as PyTorch counts; the file counts the other way."""

    name: str
    file: MappedFile
    type: GgmlType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata values by key (arrays as GgufArray), tensors in file order, and the file they are in."""

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


def is_header_whole(start: bytes, size: int, name: str) -> bool:
    """Whether the header of a file of ``size`` bytes ends within its first ones, ``start``.

    A damaged header counts as whole. Raises CheckpointError where it is no GGUF file.
    """
    reader = _Reader(_Start(Path(name), start, size))
    try:
        reader.header()
    except _DamagedError:
        return not reader.passed
    return reader.at <= len(start)


@dataclass(frozen=True)
class _Start:
    """The first bytes of a file, in place of a MappedFile."""

    path: Path
    map: bytes
    size: int


class _DamagedError(Exception):
    pass


class _Reader:
    """A cursor over the file's bytes that never goes past their end.

    ``passed``: whether it came to the end of a `_Start`.
    """

    def __init__(self, file: MappedFile | _Start) -> None:
        self.file: Any = file
        self.data, self.at, self.passed = file.map, 0, False

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
        if self.file.size < 24 or self.data[:4] != _MAGIC:
            raise CheckpointError(f"{path} is not a GGUF file")
        self.at = 4
        (version,) = self._unpack("<I")
        if version not in (2, 3):
            kind = "big-endian" if version and version & 0xFFFF == 0 else f"version {version}"
            raise CheckpointError(f"{path} is a {kind} GGUF file; gemcut reads little-endian versions 2 and 3")

    def _unpack(self, form: str) -> tuple[Any, ...]:
        size = struct.calcsize(form)
        if size > min(self.file.size, len(self.data)) - self.at:
            self.passed = size <= self.file.size - self.at
            raise _DamagedError("it ends in the middle of its header")
        values = struct.unpack_from(form, self.data, self.at)
        self.at += size
        return values

    def _string(self, limit: int | None = None) -> str:
        (length,) = self._unpack("<Q")
        if length > self.file.size - self.at or (limit and length > limit):
            raise _DamagedError(f"a text of {length} bytes in its header")
        if length > len(self.data) - self.at:
            self.passed = True
            raise _DamagedError("it ends in the middle of its header")
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise _DamagedError("a text in its header is not UTF-8") from None

    def _type(self) -> int:
        (number,) = self._unpack("<I")
        if number not in _SCALARS and number not in (_STRING, _ARRAY):
            raise _DamagedError(f"unknown metadata type {number}")
        return int(number)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        (value,) = self._unpack("<" + _SCALARS[kind][1])
        return _written(value) if kind == _FLOAT32 else value

    def _array(self) -> GgufArray:
        kind = self._type()
        (count,) = self._unpack("<Q")
        if kind == _ARRAY:
            raise _DamagedError("an array of arrays")
        size = 8 if kind == _STRING else struct.calcsize("<" + _SCALARS[kind][1])
        if count > (self.file.size - self.at) // size:
            raise _DamagedError(f"an array of {count} entries in its header")
        array = GgufArray(self.file, kind, count, self.at)
        if kind == _STRING:
            self._step_over_strings(count)
        else:
            self.at += count * size
        return array

    def _step_over_strings(self, count: int) -> None:
        # A vocabulary and its merges are 776,000 of these: nothing but the lengths is read.
        at, data, size, length_at = self.at, self.data, self.file.size, _LENGTH.unpack_from
        try:
            for _ in range(count):
                at += 8 + length_at(data, at)[0]
        except (struct.error, OverflowError):
            self.passed = at <= size
            raise _DamagedError("it ends in the middle of its header") from None
        if at > size:
            raise _DamagedError("it ends in the middle of its header")
        self.at = at

    def _tensor_info(self) -> tuple[str, GgmlType, tuple[int, ...], int]:
        name = self._string(_MAX_NAME)
        (dimensions,) = self._unpack("<I")
        if not 1 <= dimensions <= 4:
            raise _DamagedError(f"tensor {name!r} has {dimensions} dimensions")
        shape = self._unpack(f"<{dimensions}Q")
        number, offset = self._unpack("<IQ")
        kind = TYPES.get(number)
        if kind is None:
            raise CheckpointError(f"{self.file.path}: tensor {name!r} has type {refusal(number)}")
        return name, kind, tuple(reversed(shape)), offset

    def _placed(
        self, infos: list[tuple[str, GgmlType, tuple[int, ...], int]], alignment: int
    ) -> Iterator[tuple[str, GgufTensor]]:
        """Tensors with their place in the file. Writers lay them out one after the other, aligned; anything else is
        damage that would read one tensor's bytes as another's."""
        start = -(-self.at // alignment) * alignment
        expected = 0
        for name, kind, shape, offset in sorted(infos, key=lambda info: info[3]):
            if min(shape) < 1 or shape[-1] % kind.block:
                raise _DamagedError(f"tensor {name!r} of shape {list(shape)} does not divide into {kind.name} blocks")
            nbytes = math.prod(shape) // kind.block * kind.nbytes
            if offset != expected:
                raise _DamagedError(f"tensor {name!r} lies at {offset}, expected {expected}")
            expected = -(-(offset + nbytes) // alignment) * alignment
            if start + offset + nbytes > self.file.size:
                raise _DamagedError(
                    f"tensor {name!r} ends at byte {start + offset + nbytes:,}, the file at {self.file.size:,}"
                )
            yield name, GgufTensor(name, self.file, kind, shape, start + offset, nbytes)


def _written(value: float) -> float:
    """A float32 as written down: the one nearest to 1e-6 becomes 1e-6, not 9.99999997e-07."""
    if not math.isfinite(value):
        return value
    return next(
        short
        for digits in range(6, 10)
        if struct.pack("<f", short := float(f"{value:.{digits}g}")) == struct.pack("<f", value)
    )
