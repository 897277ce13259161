"""Attention of one new token of each sequence over the paged cache, on a CPU (src/variant/decode_attention.cpp).

Rotation, norms of queries and keys (Gemma 3) and the write of the new key and value are inside; the arithmetic is fp32.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from gemcut.kernels.attention.case import AttentionCase
from gemcut.kernels.attention.decode import DecodeSpec
from gemcut.kernels.cpu import library as cpu
from gemcut.kernels.gpu import NEEDS_CPU, Gpu

#: decode_attention.cpp's limit.
MAX_HEAD_DIM = 512

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class AttentionCall(ctypes.Structure):
    """decode_attention.cpp's AttentionCall."""

    _fields_ = (
        *((name, _POINTER) for name in ("qkv", "cos", "sin", "q_norm", "k_norm", "keys", "values")),
        *((name, _POINTER) for name in ("slots", "blocks", "lengths", "out")),
        *((name, _INT) for name in ("sequences", "heads", "kv_heads", "head_dim")),
        *((name, _INT) for name in ("rotation_stride", "blocks_stride", "block_size", "window")),
        *((name, _FLOAT) for name in ("scale", "eps", "softcap")),
    )


def supports(case: AttentionCase, gpu: Gpu | None) -> str | None:
    """None where the kernel serves ``case``, which it does on a CPU alone; else why not."""
    if gpu is not None:
        return NEEDS_CPU
    if case.dtype != torch.bfloat16:
        return f"computes in bfloat16, not in {case.dtype}"
    if case.head_dim > MAX_HEAD_DIM or case.head_dim % 2:
        return f"serves even head sizes up to {MAX_HEAD_DIM}, not {case.head_dim}"
    return None


class DecodeAttention:
    """The kernel of one variant of the library."""

    def __init__(self, library: cpu.Library) -> None:
        self._run = library.function("attend_one", [ctypes.POINTER(AttentionCall), ctypes.c_int])

    def __call__(
        self,
        qkv: Tensor,
        storage: Tensor,
        slots: Tensor,
        blocks: tuple[Tensor, Tensor],
        rotation: tuple[Tensor, Tensor],
        spec: DecodeSpec,
        *,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
    ) -> Tensor:
        """bf16 [B, heads · head_dim].

        Args:
            qkv: bf16 [B, (heads + 2 · kv_heads) · head_dim].
            storage: this layer's keys and values, bf16 [2, blocks, block size, kv_heads, head_dim]; gets the new ones.
            slots: int64 [B], each new token's place in the storage, counted in tokens.
            blocks: each sequence's live blocks, int64 [B, longest], and the tokens in them, int64 [B].
            rotation: cos and sin, fp32 [B, 1, head_dim / 2].
            spec: the layer's.
            q_norm: fp32 [head_dim], Gemma 3's norm of each query head; ``k_norm`` of each key head.
        """
        qkv = qkv.contiguous()
        (cos, sin), (live, lengths) = rotation, blocks
        out = torch.empty((qkv.shape[0], spec.heads * spec.head_dim), dtype=torch.bfloat16)
        keys = storage.data_ptr()
        call = AttentionCall(
            qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), _address(q_norm), _address(k_norm),
            keys, keys + storage.nbytes // 2, slots.data_ptr(), live.data_ptr(), lengths.data_ptr(), out.data_ptr(),
            qkv.shape[0], spec.heads, spec.kv_heads, spec.head_dim,
            cos.stride(0), live.stride(0), storage.shape[2], spec.window or 0,
            spec.scale, 0.0 if q_norm is None else spec.eps, spec.softcap or 0.0,
        )  # fmt: skip
        self._run(ctypes.byref(call), cpu.threads())
        return out


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
