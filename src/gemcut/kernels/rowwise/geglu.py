"""``gelu(gate) · up`` on an NVIDIA GPU in one launch, with the tanh approximation of GELU.

Computes: the launch of geglu.cu: gelu(gate) · up
Shapes: bf16 [m, 2 · width], gate before up -> bf16 [m, width], or the same in the fused GEMM's layout
Runs: model/ops/cuda.py, between gate+up and down
Schedule: elementwise; at most 65535 rows a launch
Invariants: fp32 inside, rounded once; width is a multiple of 8
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from gemcut.kernels.gpu import NEEDS_GPU, Gpu
from gemcut.kernels.linear.layout import Ordered
from gemcut.kernels.rowwise.case import RowwiseCase
from gemcut.kernels.runtime.nvrtc import CudaKernel, compile_kernel, read_sources

_MOST_ROWS = 65535  # a grid's second dimension


class _Geglu(ctypes.Structure):
    _fields_ = (
        ("gate_up", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("width", "m", "groups")),
    )


@functools.cache
def _kernel(name: str, device: int) -> CudaKernel:
    return compile_kernel(read_sources("runtime/launch.cuh", "linear/layout.cuh", "rowwise/geglu.cu"), name, (), device)


def supports(case: RowwiseCase, gpu: Gpu | None) -> str | None:
    """None where a network's MLPs are served, else why not."""
    if gpu is None:
        return NEEDS_GPU
    return None if case.width % 8 == 0 else f"the GeGLU kernel takes widths that are a multiple of 8, not {case.width}"


def geglu(gate_up: Tensor, groups: int = 0) -> Tensor | Ordered:
    """bf16 [m, 2 · width], gate before up, contiguous -> bf16 [m, width]; fp32 inside.

    With ``groups`` the result is in order, in so many groups of eight rows.
    """
    m, width, device = gate_up.shape[0], gate_up.shape[1] // 2, gate_up.device
    if groups:
        ordered = Ordered.empty(m, width, groups, device)
        task = _Geglu(gate_up.data_ptr(), ordered.values.data_ptr(), width, m, groups)
        blocks = -(-ordered.values.shape[0] // 8) * groups  # eight warps with 64 columns of eight rows each
        _kernel("geglu_ordered", device.index or 0).launch((blocks, 1), 256, 0, (task,))
        return ordered
    out = torch.empty((m, width), dtype=gate_up.dtype, device=device)
    kernel = _kernel("geglu", device.index or 0)
    for start in range(0, m, _MOST_ROWS):
        task = _Geglu(gate_up[start:].data_ptr(), out[start:].data_ptr(), width, m - start, 0)
        kernel.launch((-(-width // 2048), min(_MOST_ROWS, m - start)), 256, 0, (task,))
    return out
