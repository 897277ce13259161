"""A file's bytes as tensors without reading them first: a private memory map whose pages are given back after use."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gemcut.errors import CheckpointError
from gemcut.files import UnreadableError, check_regular

if TYPE_CHECKING:
    import torch

# Python names it from 3.13 on.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class MappedFile:
    """A read-only view of a file. Tensors made from it are copy-on-write: changing one never changes the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            check_regular(path)  # a device has no end, and opening a FIFO waits for a writer
            with open(path, "rb") as file:
                if hasattr(mmap, "MAP_PRIVATE"):
                    # No reservation: a private writable map of 54 GB must not count as 54 GB of promised memory.
                    flags = mmap.MAP_PRIVATE | _NO_RESERVE
                    self.map = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
                else:
                    self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except UnreadableError as error:
            raise CheckpointError(f"{path} {error}") from None
        except ValueError:
            raise CheckpointError(f"{path} is empty; download or copy it again") from None
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
        self.size = len(self.map)

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The tensor stored at ``offset``; no byte of it is read yet. The caller has checked that it lies inside."""
        import torch

        count = 1
        for size in shape:
            count *= size
        if offset % dtype.itemsize:  # legal in safetensors, but not for vector loads: copy it to an aligned place
            data = bytearray(self.map[offset : offset + count * dtype.itemsize])
            return torch.frombuffer(data, dtype=dtype).view(shape)
        return torch.frombuffer(self.map, dtype=dtype, count=count, offset=offset).view(shape)

    def release(self, offset: int, nbytes: int) -> None:
        """Give back the memory behind a range that has been used; touching it again reads the file again."""
        if hasattr(self.map, "madvise"):
            start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE  # leave a page that a neighbour shares
            if offset + nbytes > start:
                self.map.madvise(mmap.MADV_DONTNEED, start, offset + nbytes - start)
