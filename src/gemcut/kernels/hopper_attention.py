"""Attention of many queries with a soft-cap on Hopper GPUs, heads of 128: cuda/prefill_attention.cu.

`hopper_varlen` computes what `gemcut.kernels.prefill_attention.triton_varlen` does, for fewer cases and faster.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from gemcut.errors import ParameterError
from gemcut.kernels.nvrtc import CudaKernel, compile_kernel, read_sources, tensor_map
from gemcut.kernels.packed_gemm import unavailable_reason
from gemcut.kernels.prefill_attention import FIXED_CAP, LOG2E, Run, VarlenSpec, tile_table, triton_varlen
from gemcut.kernels.wgmma import wgmma_source

_DIM, _ROWS, _KEYS, _STAGES, _THREADS = 128, 128, 64, 4, 384  # as in the source
_SHARED_BYTES = _STAGES * 2 * _KEYS * _DIM * 2 + _ROWS * _DIM * 2 + _STAGES * 16  # keys and values, queries, barriers


class _Task(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "out", "tiles")),
        *((name, ctypes.c_longlong) for name in ("query_stride", "out_stride")),
        *((name, ctypes.c_int) for name in ("group", "window")),
        *((name, ctypes.c_float) for name in ("inverse_cap", "scale")),
    )


def supports(heads: int, kv_heads: int, head_dim: int, softcap: float | None, device: int) -> str | None:
    """None where the kernel serves bf16 heads of this shape, else one line that says why not."""
    if head_dim != _DIM:
        return f"takes heads of {_DIM}, not of {head_dim}"
    if _ROWS % (heads // kv_heads):
        return f"takes as many query heads a key head as divide {_ROWS}, not {heads // kv_heads}"
    if softcap is None or softcap > FIXED_CAP:
        return f"needs a soft-cap of up to {FIXED_CAP:g}, which keeps exp(score) in range"
    return unavailable_reason(device)


@functools.cache
def _kernel(device: int) -> CudaKernel:
    products = (
        wgmma_source("wgmma_scores", _KEYS, a_in_registers=True),
        wgmma_source("wgmma_values", _DIM, a_in_registers=True, b_by_rows=True),
    )
    source = "\n".join((read_sources("launch.cuh", "hopper.cuh"), *products, read_sources("prefill_attention.cu")))
    return compile_kernel(source, "prefill_attention", (), device)


def hopper_varlen(
    query: Tensor, keys: Tensor, values: Tensor, runs: Sequence[Run] | Tensor, spec: VarlenSpec
) -> Tensor:
    """Attention; arguments and result as those of ``triton_varlen``, to which tiles made for its kernel are left.

    ParameterError where ``supports`` gives a reason, or heads do not stand side by side.
    """
    if isinstance(runs, Tensor):
        return triton_varlen(query, keys, values, runs, spec)
    (rows, heads, head_dim), kv_heads, device = query.shape, keys.shape[1], query.device
    reason = supports(heads, kv_heads, head_dim, spec.softcap, device.index or 0)
    if reason is not None:
        raise ParameterError(f"this attention kernel {reason}")
    for name, part in ("query", query), ("keys", keys), ("values", values):
        row, head, value = part.stride()
        if part.dtype != torch.bfloat16 or value != 1 or head != head_dim or row % 8 or part.data_ptr() % 16:
            raise ParameterError(f"{name} must be bf16 heads side by side, in rows at multiples of 16 bytes")
    assert spec.softcap is not None
    group = heads // kv_heads
    tiles = tile_table(tuple(runs), _ROWS // group, device)
    out = torch.empty((rows, heads * head_dim), dtype=query.dtype, device=device)
    maps = (
        tensor_map(part.data_ptr(), len(part), kv_heads * head_dim, part.stride(0) * 2, _KEYS, 64)
        for part in (keys, values)
    )
    task = _Task(
        query.data_ptr(), out.data_ptr(), tiles.data_ptr(), query.stride(0), out.stride(0),
        group, spec.window or 0, 1 / spec.softcap, spec.softcap * LOG2E,
    )  # fmt: skip
    _kernel(device.index or 0).launch((kv_heads, len(tiles)), _THREADS, _SHARED_BYTES, (*maps, task))
    return out
