"""Attention of many queries with a soft-cap on Hopper GPUs, heads of 128 or 256: kernels/attention/varlen_hopper.cu.

Computes: the launch of varlen_hopper.cu: causal attention of packed prompts with a soft-cap of up to 60
Shapes: as `triton_varlen`: query [T, heads, D], keys and values [L, kv_heads, D] bf16, D 128 or 256 -> [T, heads · D]
Runs: model/attention.py chooses it on Hopper; `supports` says for which heads
Schedule: FlashAttention-3 (arXiv 2407.08608); one thread block for a key head and a tile of queries
Invariants: rows at multiples of 16 bytes, heads side by side: what a TMA tensor map describes

`hopper_varlen` computes what `gemcut.kernels.attention.varlen.triton_varlen` does, for fewer cases and faster.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from gemcut.errors import ParameterError
from gemcut.kernels.attention.case import AttentionCase
from gemcut.kernels.attention.varlen import FIXED_CAP, LOG2E, VarlenSegment, VarlenSpec, tile_table
from gemcut.kernels.gpu import NEEDS_GPU, Gpu, gpu_of
from gemcut.kernels.runtime.nvrtc import CudaKernel, compile_kernel, read_sources, tensor_map
from gemcut.kernels.runtime.wgmma import wgmma_source

_ROWS, _KEYS, _THREADS = 128, 64, 384  # as in the source
#: By the heads' size: slots of keys or values in shared memory; steps of 16 columns whose queries stay in registers.
_SHAPES = {128: (8, 8), 256: (5, 4)}


class _Task(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "out", "tiles")),
        *((name, ctypes.c_longlong) for name in ("query_stride", "out_stride")),
        *((name, ctypes.c_int) for name in ("group", "window")),
        *((name, ctypes.c_float) for name in ("inverse_cap", "scale")),
    )


def supports(case: AttentionCase, gpu: Gpu | None) -> str | None:
    """None where the kernel serves ``case``, else one line that says why not."""
    if gpu is None:
        return NEEDS_GPU
    if case.dtype != torch.bfloat16:
        return f"computes in bfloat16, not in {case.dtype}"
    if case.head_dim not in _SHAPES:
        return f"takes heads of {' or '.join(map(str, _SHAPES))}, not of {case.head_dim}"
    if _ROWS % case.group:
        return f"takes as many query heads a key head as divide {_ROWS}, not {case.group}"
    if case.softcap is None or case.softcap > FIXED_CAP:
        return f"needs a soft-cap of up to {FIXED_CAP:g}, which keeps exp(score) in range"
    return gpu.wgmma_refusal


def tile_queries(heads: int, kv_heads: int) -> int:
    """Queries of a tile."""
    return _ROWS // (heads // kv_heads)


@functools.cache
def _kernel(head_dim: int, device: int) -> CudaKernel:
    wgmma = (
        wgmma_source("wgmma_scores", _KEYS, a_in_registers=True),
        wgmma_source("wgmma_more_scores", _KEYS),
        wgmma_source("wgmma_values", head_dim, a_in_registers=True, b_by_rows=True),
    )
    source = "\n".join(
        (
            read_sources("runtime/launch.cuh", "runtime/hopper.cuh"),
            *wgmma,
            read_sources("attention/varlen_hopper.cu"),
        )
    )
    slots, held = _SHAPES[head_dim]
    defines = ("HEAD_DIM", head_dim), ("KEY_SLOTS", slots), ("HELD_STEPS", held)
    return compile_kernel(source, "prefill_attention", defines, device)


def _shared_bytes(head_dim: int) -> int:
    """Keys and values, queries, barriers."""
    slots, _ = _SHAPES[head_dim]
    return (slots * _KEYS + _ROWS) * head_dim * 2 + slots * 16


def hopper_varlen(
    query: Tensor, keys: Tensor, values: Tensor, segments: Sequence[VarlenSegment] | Tensor, spec: VarlenSpec
) -> Tensor:
    """Attention; arguments and result as those of ``triton_varlen``. Tiles hold up to ``tile_queries``.

    ParameterError where ``supports`` gives a reason, heads do not stand side by side, or tiles are not int32 at a
    multiple of 16 bytes.
    """
    (rows, heads, head_dim), kv_heads, device = query.shape, keys.shape[1], query.device
    case = AttentionCase(heads, kv_heads, head_dim, spec.softcap, torch.bfloat16)  # dtypes are looked at below
    reason = supports(case, gpu_of(device.index or 0))
    if reason is not None:
        raise ParameterError(f"this attention kernel {reason}")
    for name, part in ("query", query), ("keys", keys), ("values", values):
        row, head, value = part.stride()
        if part.dtype != torch.bfloat16 or value != 1 or head != head_dim or row % 8 or part.data_ptr() % 16:
            raise ParameterError(f"{name} must be bf16 heads side by side, in rows at multiples of 16 bytes")
    if isinstance(segments, Tensor) and (
        segments.dtype != torch.int32 or not segments.is_contiguous() or segments.data_ptr() % 16
    ):
        raise ParameterError("tiles must be int32 [n, 4] that begin at a multiple of 16 bytes")
    assert spec.softcap is not None
    group = heads // kv_heads
    tiles = (
        segments if isinstance(segments, Tensor) else tile_table(tuple(segments), tile_queries(heads, kv_heads), device)
    )
    out = torch.empty((rows, heads * head_dim), dtype=query.dtype, device=device)
    maps = (
        tensor_map(part.data_ptr(), len(part), kv_heads * head_dim, part.stride(0) * 2, _KEYS, 64)
        for part in (keys, values)
    )
    task = _Task(
        query.data_ptr(), out.data_ptr(), tiles.data_ptr(), query.stride(0), out.stride(0),
        group, spec.window or 0, 1 / spec.softcap, spec.softcap * LOG2E,
    )  # fmt: skip
    kernel = _kernel(head_dim, device.index or 0)
    kernel.launch((kv_heads, len(tiles)), _THREADS, _shared_bytes(head_dim), (*maps, task))
    return out
