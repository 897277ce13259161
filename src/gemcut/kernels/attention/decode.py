"""Attention of one new token of each sequence over the paged cache, on an NVIDIA GPU, in one launch.

Computes: the launch of decode.cu: one new token of each sequence over the paged cache
Shapes: qkv bf16 [m, (heads + 2 · kv_heads) · D], cache bf16 [2, blocks, block size, kv_heads, D] -> [m, heads · D]
Runs: model/ops/cuda.py in every decode step of several sequences, or of one where no megakernel serves
Schedule: flash-decoding; `splits_of` chooses the number of splits so that waves of blocks are full
Invariants: arrivals are zero between launches; no host synchronization, so that CUDA graphs can capture it

Rotation, norms of queries and keys (Gemma 3) and the write of the new key and value are inside.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from gemcut.kernels.attention.case import AttentionCase
from gemcut.kernels.gpu import NEEDS_GPU, Gpu, gpu_of
from gemcut.kernels.runtime.nvrtc import CudaKernel, compile_kernel, read_sources

WARPS = 4
MAX_SPLITS = 64


class _Attention(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("qkv", "out", "keys", "values", "table", "positions", "rope", "q_norm", "k_norm", "partial")
        ),
        ("arrivals", ctypes.c_void_p),
        *((name, ctypes.c_float) for name in ("scale", "softcap", "eps")),
        *((name, ctypes.c_int) for name in ("kv_heads", "table_stride", "block_shift", "window")),
    )


@dataclass(frozen=True)
class DecodeSpec:
    """What one layer's attention computes. ``window`` None: the whole context."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None
    window: int | None
    eps: float = 1e-6

    def case(self, dtype: torch.dtype, block_size: int) -> AttentionCase:
        """What a kernel must serve, over a cache of such blocks."""
        return AttentionCase(self.heads, self.kv_heads, self.head_dim, self.softcap, dtype, block_size)


def supports(case: AttentionCase, gpu: Gpu | None) -> str | None:
    """None where the kernel serves ``case``, whose block size is given; else why not."""
    if gpu is None:
        return NEEDS_GPU
    if case.dtype != torch.bfloat16:
        return f"decode attention computes in bfloat16, not in {case.dtype}"
    if case.head_dim not in (16, 32, 64, 128, 256):
        return f"decode attention takes heads of 16 to 256 values, a power of two, not {case.head_dim}"
    if case.group not in (1, 2, 4):
        return f"decode attention takes 1, 2 or 4 query heads a key head, not {case.heads / case.kv_heads:g}"
    if case.block_size is None or case.block_size & (case.block_size - 1):
        return f"decode attention needs cache blocks of a power of two tokens, not {case.block_size}"
    return None


def _loads(group: int) -> int:
    """Groups of tokens that a warp has registers for: fewer leave room for more blocks, and split tokens evenly."""
    return 4 if group <= 2 else 8


def _resident(group: int) -> int:
    """Blocks that an SM's registers hold."""
    return 4 if group <= 2 else 2


@functools.cache
def splits_of(heads: int, resident: int) -> int:
    """Splits of each of ``heads`` cached heads (of all sequences) where ``resident`` blocks run at once.

    Blocks take equally long, so what counts is waves of blocks: two heads of three in a second wave cost as much
    as all. A wave has a cost of its own, so few splits are better.
    """
    cost = {splits: -(-heads * splits // resident) * (1 / splits + 0.08) for splits in range(1, MAX_SPLITS + 1)}
    return min(cost, key=cost.__getitem__)


@functools.cache
def _kernel(head_dim: int, group: int, device: int) -> CudaKernel:
    sources = read_sources("runtime/launch.cuh", "rowwise/rope.cuh", "attention/attention.cuh", "attention/decode.cu")
    defines = (
        ("HEAD_DIM", head_dim),
        ("GROUP", group),
        ("LOADS", _loads(group)),
        ("WARPS", WARPS),
        ("RESIDENT", _resident(group)),
    )
    return compile_kernel(sources, "decode_attention", defines, device)


@functools.cache
def _arrivals(device: torch.device) -> Tensor:
    return torch.zeros(1 << 14, dtype=torch.int32, device=device)


def decode_attention(
    qkv: Tensor,
    storage: Tensor,
    table: Tensor,
    positions: Tensor,
    rope: Tensor,
    spec: DecodeSpec,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
) -> Tensor:
    """bf16 [m, heads · head_dim].

    Args:
        qkv: bf16 [m, (heads + 2 · kv_heads) · head_dim], contiguous.
        storage: this layer's keys and values, bf16 [2, blocks, block size, kv_heads, head_dim]; gets the new ones.
        table: int32 [m, most blocks]: the block table, a cache block for each block-size tokens; those before
            the window are never read.
        positions: int32 [m], the new token's; a negative one marks a row without a sequence, left unwritten.
        rope: fp32 [positions, head_dim], cosines then sines.
        spec: the layer's.
        q_norm: fp32 [head_dim], Gemma 3's norm of each query head; ``k_norm`` of each key head.
    """
    m, device = qkv.shape[0], qkv.device
    group, index = spec.heads // spec.kv_heads, device.index or 0
    splits = splits_of(m * spec.kv_heads, _resident(group) * gpu_of(index).sms)
    out = torch.empty((m, spec.heads * spec.head_dim), dtype=qkv.dtype, device=device)
    partial = torch.empty(m * spec.heads * splits * (spec.head_dim + 2), dtype=torch.float32, device=device)
    task = _Attention(
        qkv.data_ptr(), out.data_ptr(), storage[0].data_ptr(), storage[1].data_ptr(), table.data_ptr(),
        positions.data_ptr(), rope.data_ptr(), q_norm.data_ptr() if q_norm is not None else None,
        k_norm.data_ptr() if k_norm is not None else None, partial.data_ptr(), _arrivals(device).data_ptr(),
        spec.scale, spec.softcap or 0.0, spec.eps, spec.kv_heads, table.stride(0), storage.shape[2].bit_length() - 1,
        spec.window or 0,
    )  # fmt: skip
    kernel = _kernel(spec.head_dim, group, index)
    kernel.launch((splits, spec.kv_heads, m), WARPS * 32, 0, (task,))
    return out
