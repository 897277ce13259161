"""The operations in bf16 on a CPU: everything but the linear layers is one C++ call each.

A decode step has some twenty small operations a layer; see gemcut.kernels.cpu.rowwise for what they cost otherwise. The
plain operations are the twin. Steps of single tokens go through all layers in one call where that serves
(gemcut.model.ops.cpu_stack).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemcut.kernels.attention.varlen import VarlenAttention
from gemcut.kernels.cpu import attention, library
from gemcut.kernels.cpu.attention import DecodeAttention
from gemcut.kernels.cpu.rowwise import Rowwise
from gemcut.kernels.gpu import Gpu
from gemcut.model.key_values import KeyValues
from gemcut.model.linear import LinearLayer, TokenTable
from gemcut.model.norm import RMSNorm
from gemcut.model.ops.base import Activations, NetworkCase, Rotations
from gemcut.model.rope import Rotation

if TYPE_CHECKING:
    from gemcut.model.gemma import MLP, Attention


def supports(case: NetworkCase, gpu: Gpu | None) -> str | None:
    """None, or why these operations cannot serve a network."""
    return attention.supports(case.attention, gpu)


def refusal(case: NetworkCase, gpu: Gpu | None) -> str | None:
    """None, or why they cannot serve it on this machine."""
    return supports(case, gpu) or library.unavailable()


class CpuOps:
    """gemcut.model.ops.base.Ops; ``variant`` is the library's, None the best this CPU runs."""

    varlen: VarlenAttention | None = None

    def __init__(self, variant: str | None = None) -> None:
        self.library = library.library(variant)
        self._rowwise = Rowwise(self.library)
        self._decode = DecodeAttention(self.library)

    def embed(
        self, ids: Tensor, table: TokenTable, scale: float, norm: RMSNorm, reader: LinearLayer
    ) -> tuple[Tensor, Tensor]:
        residual: Tensor = table(ids).float() * scale
        return residual, self._rowwise.norm(residual, norm.scale, norm.eps)

    def add_norm(
        self, y: Tensor, residual: Tensor, post: RMSNorm, pre: RMSNorm | None, reader: LinearLayer | None
    ) -> tuple[Tensor, Tensor | None]:
        following = None if pre is None else pre.scale
        return residual, self._rowwise.add_norm(residual, y, post.scale, following, post.eps)

    def attend(
        self, attention: Attention, x: Activations, rotations: Rotations, kv: KeyValues, wanted: Tensor | None
    ) -> Tensor:
        qkv, rotation = attention.qkv_proj(x), rotations[attention.layer]
        parts = kv.parts
        if parts:
            # What one new token costs does not depend on the prompts beside it, nor on how many there are.
            mixed = torch.empty((len(qkv), attention.sizes[0]), dtype=qkv.dtype)
            for part in parts:
                mixed[part.rows] = self._mix(attention, qkv[part.rows], part.rotation(rotation), part.kv)
        else:
            mixed = self._mix(attention, qkv, rotation, kv)
        out: Tensor = attention.o_proj(mixed if wanted is None else mixed[wanted])
        return out

    def _mix(self, attention: Attention, qkv: Tensor, rotation: Rotation, kv: KeyValues) -> Tensor:
        """`Attention.mix`; in one call where every sequence has one new token."""
        batch = kv.host_decode
        if batch is None:
            return attention.mix(qkv, rotation, kv)
        layer = attention.layer
        q_norm, k_norm = (None if norm is None else norm.scale for norm in (attention.q_norm, attention.k_norm))
        return self._decode(
            qkv, batch.storage(layer), batch.pages(layer).slots, batch.live_blocks(layer), rotation,
            attention.decode_spec, q_norm=q_norm, k_norm=k_norm,
        )  # fmt: skip

    def mlp(self, mlp: MLP, x: Activations) -> Tensor:
        out: Tensor = mlp.down_proj(self._rowwise.geglu(mlp.gate_up_proj(x)))
        return out

    def softcap(self, values: Tensor, cap: float) -> Tensor:
        return self._rowwise.softcap(values, cap)
