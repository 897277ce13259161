"""Write a safetensors file tensor by tensor without holding it: the header's room is kept free and filled at last."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

_CODES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int8: "I8",
}
# What is written between two asks of the system to let go of the pages.
_STEP = 64 << 20


class ShardWriter:
    """A safetensors file in the making, under a temporary name until ``finish``.

    The header stands before the data but is known only after it: ``room`` bytes are kept for it and the rest of them
    filled with spaces, as the format allows. Tensors whose size would break the alignment of what follows wait, small
    as they are, for the end.
    """

    def __init__(self, path: Path, room: int) -> None:
        self.path, self._part = path, path.with_name(path.name + ".part")
        self._room = room + -room % 8
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._late: list[tuple[str, Tensor]] = []
        self._file = open(self._part, "wb")  # noqa: SIM115
        self._file.seek(8 + self._room)
        self.nbytes = 0

    @property
    def names(self) -> list[str]:
        """The tensors added so far."""
        return [*(name for name in self._header if name != "__metadata__"), *(name for name, _ in self._late)]

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor. Raises OSError."""
        if tensor.nbytes % 8:
            self._late.append((name, tensor.clone()))
        else:
            self._write(name, tensor)

    def finish(self) -> None:
        """Write the header, flush to the disk and give the file its name. Raises OSError."""
        for name, tensor in sorted(self._late, key=lambda item: -item[1].element_size()):
            self._write(name, tensor)
        self._late = []
        text = json.dumps(self._header, separators=(",", ":")).encode()
        if len(text) > self._room:
            raise ValueError(f"a header of {len(text)} bytes in a room of {self._room}")
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + text.ljust(self._room))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._part.replace(self.path)

    def _write(self, name: str, tensor: Tensor) -> None:
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(raw), _STEP):
            self._file.write(raw[start : start + _STEP])
        begin, self.nbytes = self.nbytes, self.nbytes + tensor.nbytes
        self._header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, self.nbytes],
        }

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove what is not finished."""
        if not self._file.closed:
            with contextlib.suppress(OSError):  # the disk that was full is full for the last bytes too
                self._file.close()
            self._part.unlink(missing_ok=True)
