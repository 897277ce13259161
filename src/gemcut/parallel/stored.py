"""Columns of a weight that is still in its file."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from gemcut.quantization.weights import StoredWeight

_VALUES = 1 << 20  # read in one go


class StoredColumns(StoredWeight):
    """Columns ``start`` to ``stop`` of ``whole`` [out, in]. Whole rows are read, a few at a time."""

    def __init__(self, whole: StoredWeight, start: int, stop: int) -> None:
        self._whole, self._start, self._stop = whole, start, stop
        self.shape, self.dtype = (whole.shape[0], stop - start), whole.dtype

    def rows(self, start: int, stop: int) -> StoredWeight:
        """The same columns of rows ``start`` to ``stop``."""
        return StoredColumns(self._whole.rows(start, stop), self._start, self._stop)

    def read(self, out: Tensor) -> None:
        """Fill ``out``, contiguous, on the CPU, of this shape."""
        flat, at = out.view(-1), 0
        for piece in self.pieces(_VALUES):
            flat[at : at + piece.numel()].copy_(piece)
            at += piece.numel()

    def pieces(self, values: int) -> Iterator[Tensor]:
        """The values in order, about ``values`` at a time (whole rows), each a flat tensor in ``dtype``."""
        columns, width = self._whole.shape[1], self._stop - self._start
        for piece in self._whole.pieces(max(1, values // width) * columns):
            yield piece.view(-1, columns)[:, self._start : self._stop].reshape(-1)
