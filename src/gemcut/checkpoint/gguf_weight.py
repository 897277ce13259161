"""A tensor of a GGUF file, dequantized as it is read: into the place where it is to be, or piece by piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from gemcut.checkpoint.ggml_types import WHOLE
from gemcut.checkpoint.gguf_header import GgufTensor
from gemcut.quantization.weights import StoredWeight

#: Fills a tensor with the values of blocks: (type's number, uint8 blocks, how many, out) -> False where it cannot.
Dequantize = Callable[[int, Tensor, int, Tensor], bool]

_CHUNK = 1 << 20  # weights dequantized in one go: small enough for the cache, large enough to hide NumPy's overhead
_STEP = 1 << 24  # weights after which the file's pages are given back
_KINDS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufWeight(StoredWeight):
    """``tensor`` in ``dtype`` (None: as stored, quantized ones in fp32).

    What is read no longer counts as this process's memory: the mapped pages are given back as it goes.
    ``dequantize`` is tried first, where it is given; then the gguf library, on the threads of ``pool``.
    """

    def __init__(
        self, tensor: GgufTensor, dtype: torch.dtype | None, pool: ThreadPoolExecutor, dequantize: Dequantize | None
    ) -> None:
        self._tensor, self._pool, self._dequantize = tensor, pool, dequantize
        self.shape = tensor.shape
        self.dtype = dtype or _KINDS.get(tensor.type.name, torch.float32)

    def whole(self) -> Tensor:
        """The weight as a tensor; one that is stored in ``dtype`` is backed by the file."""
        tensor = self._tensor
        if tensor.type.name in WHOLE:
            return tensor.file.tensor(tensor.offset, tensor.shape, _KINDS[tensor.type.name]).to(self.dtype)
        out = torch.empty(tensor.shape, dtype=self.dtype)
        self.read(out)
        return out

    def read(self, out: Tensor) -> None:
        """Fill ``out``, contiguous, on the CPU, of this shape; in another dtype its values are rounded once more."""
        flat = out.view(-1)
        if out.dtype == self.dtype:
            for start in range(0, flat.numel(), _STEP):
                self._fill(flat[start : start + _STEP], start)
            return
        start = 0
        for piece in self.pieces(_CHUNK):
            flat[start : start + piece.numel()].copy_(piece)
            start += piece.numel()

    def pieces(self, values: int) -> Iterator[Tensor]:
        """The values in order, ``values`` at a time (a whole number of rows, or of 256 values; fewer at the end), each
        a flat tensor in ``dtype`` of which only the last one is valid."""
        total = math.prod(self.shape)
        room = torch.empty(min(values, total), dtype=self.dtype)
        for start in range(0, total, values):
            piece = room[: min(values, total - start)]
            self._fill(piece, start)
            yield piece

    def rows(self, start: int, stop: int) -> GgufWeight:
        """Rows ``start`` to ``stop``, which begin and end with blocks; no other is read."""
        tensor = self._tensor
        offset = tensor.offset + start * tensor.shape[1] // tensor.type.block * tensor.type.nbytes
        nbytes = tensor.nbytes * (stop - start) // tensor.shape[0]
        part = replace(tensor, offset=offset, shape=(stop - start, tensor.shape[1]), nbytes=nbytes)
        return GgufWeight(part, self.dtype, self._pool, self._dequantize)

    def _fill(self, out: Tensor, start: int) -> None:
        """``out`` with the values from ``start`` on, both at borders of blocks."""
        tensor = self._tensor
        block, block_bytes = tensor.type.block, tensor.type.nbytes
        offset, count = tensor.offset + start // block * block_bytes, out.numel() // block
        nbytes = count * block_bytes
        if tensor.type.name in WHOLE:
            out.copy_(tensor.file.tensor(offset, (count,), _KINDS[tensor.type.name]))
        else:
            blocks = tensor.file.tensor(offset, (nbytes,), torch.uint8)
            if self._dequantize is None or not self._dequantize(tensor.type.number, blocks, count, out):
                self._fill_by_library(out, blocks)
        tensor.file.release(offset, nbytes)

    def _fill_by_library(self, out: Tensor, blocks: Tensor) -> None:
        import numpy as np
        from gguf import quants  # a quarter of a second, which most files need not wait for
        from gguf.constants import GGMLQuantizationType

        kind, block, block_bytes = self._tensor.type.number, self._tensor.type.block, self._tensor.type.nbytes
        step, data = max(1, _CHUNK // block), blocks.numpy()

        def convert(first: int) -> None:
            # One long row: blocks do not know of rows, and gguf works through few long rows fastest.
            raw = data[first * block_bytes : (first + step) * block_bytes]
            values = torch.from_numpy(quants.dequantize(raw.reshape(1, -1), GGMLQuantizationType(kind))).view(-1)
            out[first * block : first * block + len(values)].copy_(values)

        with np.errstate(all="ignore"):
            # A thread of the pool is not in the caller's inference mode, and may fill a tensor made there only in one
            # of its own; tensors made outside it may be filled in it, too.
            list(self._pool.map(torch.inference_mode()(convert), range(0, out.numel() // block, step)))
