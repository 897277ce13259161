"""The network between its matrix products on a CPU: norms, attention of one query, the gated product, the soft-cap.

A decode step has some twenty small operations a layer. In PyTorch they cost more than a small network's products, and
its threads, which spin between them, take the processors from the products' own. Here they are one C++ call each
(src/variant/step*.cpp), in fp32 with one rounding where a result is stored as bf16. The plain network in
gemcut.model.gemma is the twin.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from gemcut.kernels.cpu import library as cpu
from gemcut.kernels.cpu.stack import LayerStack

#: step_attention.cpp's limit.
MAX_HEAD_DIM = 512

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ADD_NORM = [_POINTER, _POINTER, _INT, _POINTER, _POINTER, _FLOAT, _INT, _INT, _POINTER, ctypes.c_int]
_GEGLU = [_POINTER, _POINTER, _INT, _INT, ctypes.c_int]
_SOFTCAP = [_POINTER, _INT, _FLOAT, ctypes.c_int]


class AttentionCall(ctypes.Structure):
    """step_attention.cpp's AttentionCall."""

    _fields_ = (
        *((name, _POINTER) for name in ("qkv", "cos", "sin", "q_norm", "k_norm", "keys", "values")),
        *((name, _POINTER) for name in ("slots", "blocks", "lengths", "out")),
        *((name, _INT) for name in ("sequences", "heads", "kv_heads", "head_dim")),
        *((name, _INT) for name in ("rotation_stride", "blocks_stride", "block_size", "window")),
        *((name, _FLOAT) for name in ("scale", "eps", "softcap")),
    )


def supports(dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
    """None, or why these kernels cannot serve a network of this compute dtype and head size on ``device``."""
    if device.type != "cpu":
        return f"runs on a CPU only, not on {device.type}"
    if dtype != torch.bfloat16:
        return f"computes in bfloat16, not in {dtype}"
    if head_dim > MAX_HEAD_DIM or head_dim % 2:
        return f"serves even head sizes up to {MAX_HEAD_DIM}, not {head_dim}"
    return cpu.unavailable()


class CpuStep:
    """The layers of a network, and its head, with everything but the matrix products in C++."""

    def __init__(self, variant: str | None = None) -> None:
        library = self._library = cpu.library(variant)
        self._add_norm = library.function("add_norm", _ADD_NORM)
        self._geglu = library.function("geglu", _GEGLU)
        self._stack: LayerStack | None = None
        self._softcap = library.function("softcap", _SOFTCAP)
        self._attend_one = library.function("attend_one", [ctypes.POINTER(AttentionCall), ctypes.c_int])

    def add_norm(
        self, residual: Tensor, added: Tensor | None, added_scale: Tensor | None, scale: Tensor | None, eps: float
    ) -> Tensor | None:
        """``residual`` fp32 [T, d] += norm(``added`` bf16 [T, d]) · ``added_scale``, in place (None: nothing is added).

        Returns its own norm times ``scale`` as bf16 [T, d], or None without a scale.
        """
        rows, d = residual.shape
        if added is not None and added.stride(1) != 1:
            added = added.contiguous()
        out = None if scale is None else torch.empty((rows, d), dtype=torch.bfloat16)
        self._add_norm(
            residual.data_ptr(), *((None, 0) if added is None else (added.data_ptr(), added.stride(0))),
            _address(added_scale), _address(scale), eps, rows, d, _address(out), cpu.threads(),
        )  # fmt: skip
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

    def attend_one(self, attention: Any, qkv: Tensor, rotation: tuple[Tensor, Tensor], kv: Any) -> Tensor:
        """Attention of one new token for each sequence of a paged cache, which gets the keys and values.

        Args:
            attention: the layer's gemcut.model.gemma.Attention.
            qkv: bf16 [B, (heads + 2 · kv_heads) · head_dim].
            rotation: cos and sin, fp32 [B, 1, head_dim / 2].
            kv: the batch's gemcut.engine.paged.PagedKeyValues.

        Returns:
            bf16 [B, heads · head_dim].
        """
        qkv = qkv.contiguous()
        pages, spec = kv.pages(attention.layer), attention.spec
        blocks, lengths = kv.padded_blocks(attention.layer)
        cos, sin = rotation
        head_dim = attention.head_dim
        out = torch.empty((qkv.shape[0], attention.sizes[0]), dtype=torch.bfloat16)
        q_norm, k_norm = (None if norm is None else norm.scale for norm in (attention.q_norm, attention.k_norm))
        call = AttentionCall(
            qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), _address(q_norm), _address(k_norm),
            pages.keys.data_ptr(), pages.values.data_ptr(), pages.slots.data_ptr(), blocks.data_ptr(),
            lengths.data_ptr(), out.data_ptr(),
            qkv.shape[0], attention.sizes[0] // head_dim, attention.sizes[1] // head_dim, head_dim,
            cos.stride(0), blocks.stride(0), pages.keys.shape[1], spec.window or 0,
            attention.scale, 0.0 if attention.q_norm is None else attention.q_norm.eps, spec.softcap or 0.0,
        )  # fmt: skip
        self._attend_one(ctypes.byref(call), cpu.threads())
        return out

    def layers(
        self,
        layers: Any,
        residual: Tensor,
        rotations: list[tuple[Tensor, Tensor]],
        kv: Any,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """All ``layers`` (gemcut.model.gemma.Layer), each with its rotation, on ``residual`` fp32 [T, d], in place.

        Returns it, or its ``wanted`` rows, int64 [n]: the only ones that the last layer computes behind its attention.
        """
        one_each = hasattr(kv, "pages") and all(span.length == 1 for span in kv.spans)
        if one_each:
            if self._stack is None:
                self._stack = LayerStack(layers, self._library)
            if self._stack.refusal is None and len(residual) <= self._stack.most_rows:
                self._stack(residual, rotations, kv)
                return residual if wanted is None else residual[wanted]
        x = self.add_norm(residual, None, None, layers[0].input_norm.scale, layers[0].input_norm.eps)
        for i, (layer, rotation) in enumerate(zip(layers, rotations, strict=True)):
            attention, norm = layer.attention, layer.pre_feedforward_norm
            qkv = attention.qkv_proj(x)
            mixed = self.attend_one(attention, qkv, rotation, kv) if one_each else attention.mix(qkv, rotation, kv)
            if wanted is not None and i + 1 == len(layers):
                mixed, residual = mixed[wanted], residual[wanted]
            attended = attention.o_proj(mixed)
            x = self.add_norm(residual, attended, layer.post_attention_norm.scale, norm.scale, norm.eps)
            transformed = layer.mlp.down_proj(self.geglu(layer.mlp.gate_up_proj(x)))
            following = layers[i + 1].input_norm.scale if i + 1 < len(layers) else None
            x = self.add_norm(residual, transformed, layer.post_feedforward_norm.scale, following, norm.eps)
        return residual


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
