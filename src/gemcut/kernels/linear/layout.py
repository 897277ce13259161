"""Rows of x in the layout that the fused GEMM reads (kernels/linear/gemm.py, Hopper only).

Computes: rows of x in the layout that the fused GEMM reads (linear/layout.cuh), and the launch that copies them there
Shapes: x bf16 [m, k] -> bf16 [blocks of 64 columns, groups of 8 rows, 8, 8, 8]
Runs: linear/gemm.py; rowwise/norm.py and rowwise/geglu.py write the layout themselves
Schedule: elementwise
Invariants: k is padded with zeros to a multiple of 256; rows from m on may hold anything

Norms and GeGLU can write their results so. `order_x` does it for rows that come from elsewhere.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from gemcut.kernels.runtime.nvrtc import CudaKernel, compile_kernel, read_sources

#: Columns of a block, and of a unit that work is split in: x is padded with zeros to a multiple of the latter.
BLOCK, UNIT = 64, 256


@dataclass(frozen=True, eq=False)
class Ordered:
    """x [m, k] in that layout, called "in order".

    ``values``: bf16 [blocks of 64 columns, groups of 8 rows, 8 cores along k, 8 rows, 8]; core 2 i + h of a block holds
    columns 16 q + 4 i + 2 h and the next, for q from 0 to 3. Rows from m on may hold anything.
    """

    values: Tensor
    m: int
    k: int

    @classmethod
    def empty(cls, m: int, k: int, groups: int, device: torch.device) -> Ordered:
        """Memory for ``m`` rows of ``k`` columns in ``groups`` groups."""
        blocks = -(-k // UNIT) * UNIT // BLOCK
        return cls(torch.empty((blocks, groups, 8, 8, 8), dtype=torch.bfloat16, device=device), m, k)

    @property
    def groups(self) -> int:
        """Of eight rows."""
        return self.values.shape[1]

    def rows(self) -> Tensor:
        """The same as plain rows, bf16 [m, k]."""
        blocks, groups = self.values.shape[:2]
        parts = self.values.view(blocks, groups, 4, 2, 8, 4, 2)  # block, group, i, h, row, q, pair
        return parts.permute(1, 4, 0, 5, 2, 3, 6).reshape(groups * 8, -1)[: self.m, : self.k]


class _Order(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("ordered", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("m", "k", "x_stride", "blocks", "groups")),
    )


@functools.cache
def _kernel(device: int) -> CudaKernel:
    return compile_kernel(
        read_sources("runtime/launch.cuh", "linear/layout.cuh", "linear/layout.cu"), "order_x", (), device
    )


def order_x(x: Tensor, groups: int) -> Ordered:
    """x bf16 [m, k], its rows contiguous and at multiples of 16 bytes, k a multiple of 16 -> the same in order."""
    m, k = x.shape
    ordered = Ordered.empty(m, k, groups, x.device)
    blocks = ordered.values.shape[0]
    task = _Order(x.data_ptr(), ordered.values.data_ptr(), m, k, x.stride(0) * 2, blocks, groups)
    _kernel(x.device.index or 0).launch((-(-blocks * groups // 8), 1), 256, 0, (task,))
    return ordered
