"""All layers of a decode step on a CPU as one C++ call (src/variant/stack.cpp): no Python between two kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemcut.kernels.cpu import library as cpu
from gemcut.kernels.cpu.linear import MAX_M, CpuLinear
from gemcut.model.key_values import KeyValues
from gemcut.model.linear import LinearLayer
from gemcut.model.ops.base import Rotations

if TYPE_CHECKING:
    from gemcut.model.gemma import Layer

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Group(ctypes.Structure):
    """stack.cpp's Group."""

    _fields_ = (
        *((name, _POINTER) for name in ("cos", "sin", "slots", "blocks", "lengths")),
        *((name, _INT) for name in ("rotation_stride", "blocks_stride")),
    )


class _Layer(ctypes.Structure):
    """stack.cpp's Layer."""

    _fields_ = (
        *((name, _POINTER) for name in ("qkv", "o", "gate_up", "down")),
        *((name, _POINTER) for name in ("post_attention", "pre_feedforward", "post_feedforward", "following")),
        *((name, _POINTER) for name in ("q_norm", "k_norm", "keys", "values")),
        *((name, _INT) for name in ("group", "window")),
        *((name, _FLOAT) for name in ("scale", "softcap")),
    )


class _Stack(ctypes.Structure):
    """stack.cpp's Stack."""

    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        ("groups", _Group * 2),
        *((name, _POINTER) for name in ("first_norm", "few", "many")),
        *((name, _POINTER) for name in ("x", "qkv", "mixed", "gate_up", "activated")),
        *((name, _INT) for name in ("count", "few_rows", "d", "heads", "kv_heads", "head_dim", "block_size", "width")),
        ("eps", _FLOAT),
    )


class LayerStack:
    """The layers of one network (gemcut.model.gemma.Layer), their kernels bound, ready for decode steps.

    ``refusal`` says why these layers cannot run in one call, None if they can.
    """

    def __init__(self, layers: Sequence[Layer], library: cpu.Library) -> None:
        self.layers = list(layers)  # keeps alive what the structures point to
        self.refusal = _refusal(self.layers)
        if self.refusal is not None:
            return
        self._run = library.function("stack", [ctypes.POINTER(_Stack), _POINTER, _INT, ctypes.c_int])
        first = self.layers[0]
        qkv, _, gate_up, down = _kernels(first)
        head_dim, sizes = first.attention.head_dim, first.attention.sizes
        self.most_rows = MAX_M if qkv.many is None else 1 << 30
        self._widths = (max(down.columns, 1), sum(sizes), sizes[0])
        self._gate_up = gate_up.columns
        self._table = (_Layer * len(self.layers))(*(self._layer(i) for i in range(len(self.layers))))
        self._stack = _Stack(
            layers=self._table, first_norm=first.input_norm.scale.data_ptr(),
            few=ctypes.cast(qkv.run, _POINTER), many=None if qkv.many is None else ctypes.cast(qkv.many, _POINTER),
            count=len(self.layers), few_rows=qkv.few, d=self._widths[0], heads=sizes[0] // head_dim,
            kv_heads=sizes[1] // head_dim, head_dim=head_dim, width=self._gate_up // 2, eps=first.input_norm.eps,
        )  # fmt: skip

    def _layer(self, i: int) -> _Layer:
        layer = self.layers[i]
        attention = layer.attention
        following = self.layers[i + 1].input_norm.scale.data_ptr() if i + 1 < len(self.layers) else None
        q_norm, k_norm = (
            None if norm is None else norm.scale.data_ptr() for norm in (attention.q_norm, attention.k_norm)
        )
        return _Layer(
            *(kernel.plan_address for kernel in _kernels(layer)),
            layer.post_attention_norm.scale.data_ptr(), layer.pre_feedforward_norm.scale.data_ptr(),
            layer.post_feedforward_norm.scale.data_ptr(), following, q_norm, k_norm,
            group=int(attention.spec.window is not None), window=attention.spec.window or 0,
            scale=attention.scale, softcap=attention.spec.softcap or 0.0,
        )  # fmt: skip

    def serves(self, kv: KeyValues, rows: int) -> bool:
        """Whether it takes a batch of so many rows: one new token for each sequence of a paged cache."""
        return self.refusal is None and kv.host_decode is not None and rows <= self.most_rows

    def __call__(self, residual: Tensor, rotations: Rotations, kv: KeyValues) -> None:
        """``residual`` fp32 [B, d] of one new token for each sequence goes through all layers, in place.

        Args:
            residual: contiguous.
            rotations: each layer's cos and sin, fp32 [B, 1, head_dim / 2].
            kv: the batch's gemcut.engine.paged.PagedKeyValues, which gets the keys and values.
        """
        rows, stack, batch = residual.shape[0], self._stack, kv.host_decode
        assert batch is not None
        keep = []
        seen: set[int] = set()
        for i, entry in enumerate(self._table):
            storage = batch.storage(i)
            entry.keys = storage.data_ptr()
            entry.values = entry.keys + storage.nbytes // 2
            group = entry.group
            if group not in seen:
                seen.add(group)
                pages, (cos, sin) = batch.pages(i), rotations[i]
                blocks, lengths = batch.live_blocks(i)
                keep.append((pages, cos, sin, blocks, lengths))
                stack.groups[group] = _Group(
                    cos.data_ptr(), sin.data_ptr(), pages.slots.data_ptr(), blocks.data_ptr(),
                    lengths.data_ptr(), cos.stride(0), blocks.stride(0),
                )  # fmt: skip
                stack.block_size = pages.keys.shape[1]
        d, qkv, mixed = self._widths
        scratch = [
            torch.empty((rows, width), dtype=torch.bfloat16)
            for width in (d, qkv, mixed, self._gate_up, self._gate_up // 2)
        ]
        stack.x, stack.qkv, stack.mixed, stack.gate_up, stack.activated = (part.data_ptr() for part in scratch)
        self._run(ctypes.byref(stack), residual.data_ptr(), rows, cpu.threads())


def _linears(layer: Layer) -> tuple[LinearLayer, ...]:
    return layer.attention.qkv_proj, layer.attention.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj


def _kernels(layer: Layer) -> tuple[CpuLinear, ...]:
    return tuple(linear.kernel for linear in _linears(layer) if isinstance(linear.kernel, CpuLinear))


def _refusal(layers: Sequence[Layer]) -> str | None:
    """None, or why these layers cannot run in one call."""
    for layer in layers:
        kernels = _kernels(layer)
        if any(linear.communicator is not None for linear in _linears(layer)):
            return "a linear layer's result is summed over several processes"
        if len(kernels) != len(_linears(layer)):
            return "a linear layer has another kernel"
        if any({kernel.case.compute_dtype, kernel.case.out_dtype} != {torch.bfloat16} for kernel in kernels):
            return "a linear layer computes in another dtype than bfloat16"
    return None
