"""Rotation of many tokens' queries and keys and the write into the paged cache, on an NVIDIA GPU, in one launch.

Computes: the launch of rope_write.cu: rotation of many tokens' queries and keys, and the cache write
Shapes: qkv bf16 [T, (heads + 2 · kv_heads) · D] -> queries [T, heads, D], keys [T, kv_heads, D]; cache slots int64 [T]
Runs: model/ops/cuda.py in prefill
Schedule: elementwise, one block a token
Invariants: a negative slot is not written; D is a power of two from 16 to 256
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from gemcut.kernels.gpu import NEEDS_GPU, Gpu
from gemcut.kernels.rowwise.case import RowwiseCase
from gemcut.kernels.runtime.nvrtc import CudaKernel, compile_kernel, read_sources


class _RopeWrite(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qkv", "query", "key", "keys", "values", "slots", "rope")),
        *((name, ctypes.c_void_p) for name in ("q_norm", "k_norm")),
        *((name, ctypes.c_float) for name in ("scale", "eps")),
        *((name, ctypes.c_int) for name in ("heads", "kv_heads")),
    )


@functools.cache
def _kernel(head_dim: int, device: int) -> CudaKernel:
    sources = read_sources("runtime/launch.cuh", "rowwise/rope.cuh", "rowwise/rope_write.cu")
    return compile_kernel(sources, "rope_write", (("HEAD_DIM", head_dim),), device)


def supports(case: RowwiseCase, gpu: Gpu | None) -> str | None:
    """None where a network's heads are served, else why not."""
    if gpu is None:
        return NEEDS_GPU
    if case.head_dim in (16, 32, 64, 128, 256):
        return None
    return f"the rotation kernel takes heads of 16 to 256 values, a power of two, not {case.head_dim}"


def rope_write(
    qkv: Tensor,
    rope: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    scale: float,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    want_key: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(queries bf16 [T, heads, D] times ``scale``, keys bf16 [T, kv_heads, D] where wanted), rotated.

    Args:
        qkv: bf16 [T, (heads + 2 · kv_heads) · D], contiguous.
        rope: fp32 [T, D], contiguous: each token's cosines, then its sines.
        keys, values: a layer's storage, bf16 [blocks, block size, kv_heads, D], contiguous; gets the new ones.
        slots: int64 [T], each token's place in the storage, counted in tokens; a negative one: nothing is stored.
        scale: of the scores; it goes into the queries.
        q_norm, k_norm: fp32 [D], Gemma 3's norm of each head, with ``eps``. Normalised values are rounded to bf16.
        want_key: whether the keys are wanted in order of the rows, too.
    """
    rows, kv_heads, head_dim = len(qkv), keys.shape[2], keys.shape[3]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    query = torch.empty((rows, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    key = torch.empty((rows, kv_heads, head_dim), dtype=qkv.dtype, device=qkv.device) if want_key else None
    task = _RopeWrite(
        *(None if t is None else t.data_ptr() for t in (qkv, query, key, keys, values, slots, rope, q_norm, k_norm)),
        scale, eps, heads, kv_heads,
    )  # fmt: skip
    _kernel(head_dim, qkv.device.index or 0).launch((rows, 1), 256, 0, (task,))
    return query, key
