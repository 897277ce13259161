"""``gelu(gate) · up`` on an NVIDIA GPU in one launch, with the tanh approximation of GELU."""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcut.kernels.nvrtc import CudaKernel, compile_kernel, read_sources

_MOST_ROWS = 65535  # a grid's second dimension


class _Geglu(ctypes.Structure):
    _fields_ = (("gate_up", ctypes.c_void_p), ("out", ctypes.c_void_p), ("width", ctypes.c_int))


@functools.cache
def _kernel(device: int) -> CudaKernel:
    return compile_kernel(read_sources("launch.cuh", "geglu.cu"), "geglu", (), device)


def supports(width: int) -> str | None:
    """None where MLPs of ``width`` are served, else why not."""
    return None if width % 8 == 0 else f"the GeGLU kernel takes widths that are a multiple of 8, not {width}"


def geglu(gate_up: Tensor) -> Tensor:
    """bf16 [m, 2 · width], gate before up, contiguous -> bf16 [m, width]; fp32 inside."""
    m, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((m, width), dtype=gate_up.dtype, device=gate_up.device)
    kernel = _kernel(gate_up.device.index or 0)
    for start in range(0, m, _MOST_ROWS):
        task = _Geglu(gate_up[start:].data_ptr(), out[start:].data_ptr(), width)
        kernel.launch((-(-width // 2048), min(_MOST_ROWS, m - start)), 256, 0, (task,))
    return out


def geglu_plain(gate_up: Tensor) -> Tensor:
    """The same in plain torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)
