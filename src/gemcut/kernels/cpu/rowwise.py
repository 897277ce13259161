"""Norms, GeGLU and the soft-cap on a CPU (src/variant/rowwise.cpp), one C++ call each.

In PyTorch they cost more than a small network's GEMVs, and its threads, which spin between them, take the processors
from the GEMVs' own. The arithmetic is fp32 with one rounding where a result is stored as bf16.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from gemcut.kernels.cpu import library as cpu

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ADD_NORM = [_POINTER, _POINTER, _INT, _POINTER, _POINTER, _FLOAT, _INT, _INT, _POINTER, ctypes.c_int]
_GEGLU = [_POINTER, _POINTER, _INT, _INT, ctypes.c_int]
_SOFTCAP = [_POINTER, _INT, _FLOAT, ctypes.c_int]


class Rowwise:
    """The kernels of one variant of the library."""

    def __init__(self, library: cpu.Library) -> None:
        self._add_norm = library.function("add_norm", _ADD_NORM)
        self._geglu = library.function("geglu", _GEGLU)
        self._softcap = library.function("softcap", _SOFTCAP)

    def add_norm(
        self, residual: Tensor, added: Tensor, added_scale: Tensor, scale: Tensor | None, eps: float
    ) -> Tensor | None:
        """``residual`` fp32 [T, d] += norm(``added`` bf16 [T, d]) · ``added_scale``, in place.

        Returns its own norm times ``scale`` as bf16 [T, d], or None without a scale.
        """
        out = None if scale is None else torch.empty(residual.shape, dtype=torch.bfloat16)
        added = added if added.stride(1) == 1 else added.contiguous()
        self._add_norm(
            residual.data_ptr(), added.data_ptr(), added.stride(0), added_scale.data_ptr(),
            None if scale is None else scale.data_ptr(), eps, *residual.shape,
            None if out is None else out.data_ptr(), cpu.threads(),
        )  # fmt: skip
        return out

    def norm(self, residual: Tensor, scale: Tensor, eps: float) -> Tensor:
        """The norm of ``residual`` fp32 [T, d] times ``scale``, as bf16 [T, d]."""
        out = torch.empty(residual.shape, dtype=torch.bfloat16)
        self._add_norm(
            residual.data_ptr(), None, 0, None, scale.data_ptr(), eps, *residual.shape, out.data_ptr(), cpu.threads()
        )
        return out

    def geglu(self, gate_up: Tensor) -> Tensor:
        """``gelu(gate) · up`` of ``gate_up`` bf16 [T, 2 · width] -> bf16 [T, width]."""
        gate_up = gate_up.contiguous()
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty((rows, width), dtype=torch.bfloat16)
        self._geglu(gate_up.data_ptr(), out.data_ptr(), rows, width, cpu.threads())
        return out

    def softcap(self, values: Tensor, cap: float) -> Tensor:
        """``cap · tanh(values / cap)`` of contiguous fp32 ``values``, in place; NaN where one is infinite."""
        self._softcap(values.data_ptr(), values.numel(), cap, cpu.threads())
        return values
