"""The operations in bf16 on an NVIDIA GPU: norms, rotation and cache, attention and GeGLU in few launches.

In plain PyTorch a layer has some thirty launches between its four GEMMs; here it has four. The residual stream stays
fp32, every kernel computes in fp32 and rounds once. The plain operations are the twin.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemcut.kernels.attention import decode as decode_attention
from gemcut.kernels.attention.varlen import VarlenAttention, VarlenSpec
from gemcut.kernels.gpu import NEEDS_GPU, Gpu, gpu_at
from gemcut.kernels.linear import gated as gated_gemm
from gemcut.kernels.linear.cuda import FewRows
from gemcut.kernels.linear.layout import Ordered
from gemcut.kernels.linear.plain import softcap_in_place
from gemcut.kernels.rowwise import geglu, rope_write
from gemcut.kernels.rowwise import norm as norms
from gemcut.kernels.runtime import nvrtc
from gemcut.model.key_values import DecodeBatch, KeyValues, PagedBatch
from gemcut.model.linear import Embedding, LinearLayer, TokenTable
from gemcut.model.norm import RMSNorm
from gemcut.model.ops.base import Activations, NetworkCase, Rotations
from gemcut.model.quantized import Int8Embedding
from gemcut.model.rope import RotaryTable, Rotation

if TYPE_CHECKING:
    from gemcut.model.gemma import MLP, Attention


def supports(case: NetworkCase, gpu: Gpu | None) -> str | None:
    """None, or why these operations cannot serve a network."""
    if gpu is None:
        return NEEDS_GPU
    if case.dtype != torch.bfloat16:
        return f"computes in bfloat16, not in {case.dtype}"
    kernels = norms.supports, geglu.supports, rope_write.supports
    return next((reason for kernel in kernels if (reason := kernel(case.rowwise, gpu)) is not None), None)


def refusal(case: NetworkCase, gpu: Gpu | None) -> str | None:
    """None, or why they cannot serve it on this machine."""
    return supports(case, gpu) or nvrtc.unavailable_reason()


class CudaOps:
    """gemcut.model.ops.base.Ops.

    Args:
        ropes: each layer's rotary table.
        varlen: computes attention of many queries; None leaves attention to the network's own implementation.
        decode: whether attention of one new token each may take the decode kernel.
    """

    def __init__(self, ropes: Sequence[RotaryTable], varlen: VarlenAttention | None, *, decode: bool = True) -> None:
        self.varlen, self._ropes, self._decode = varlen, ropes, decode

    def embed(
        self, ids: Tensor, table: TokenTable, scale: float, norm: RMSNorm, reader: LinearLayer
    ) -> tuple[Tensor, Activations]:
        if table.part is not None:  # each of several GPUs has some of the vectors
            residual: Tensor = table(ids.long()).float() * scale
            return residual, norm(residual).to(torch.bfloat16)
        rows, absmax = table_of(table)
        return norms.norm_embed(ids.int(), rows, absmax, scale, norm.scale, norm.eps, groups_of(reader, len(ids)))

    def add_norm(
        self, y: Tensor, residual: Tensor, post: RMSNorm, pre: RMSNorm | None, reader: LinearLayer | None
    ) -> tuple[Tensor, Activations | None]:
        if pre is None:
            norms.add_norm(y, residual, post.scale, post.eps)
            return residual, None
        groups = 0 if reader is None else groups_of(reader, len(y))
        return residual, norms.norm_add(y, residual, post.scale, pre.scale, post.eps, groups)

    def attend(
        self, attention: Attention, x: Activations, rotations: Rotations, kv: KeyValues, wanted: Tensor | None
    ) -> Tensor:
        qkv = apply_linear(attention.qkv_proj, x)
        if kv.decode is not None and self._takes(attention, kv.decode):
            mixed = self._attend_decode(attention, qkv, kv.decode)
        elif kv.paged is not None and self.varlen is not None:
            mixed = self._attend_paged(attention, qkv, rotations[attention.layer], kv, self.varlen)
        else:
            mixed = attention.mix(qkv, rotations[attention.layer], kv)
        return apply_linear(attention.o_proj, mixed if wanted is None else mixed[wanted])

    def mlp(self, mlp: MLP, x: Activations) -> Tensor:
        rows = x.m if isinstance(x, Ordered) else len(x)
        return apply_linear(mlp.down_proj, apply_gated(mlp.gate_up_proj, x, groups_of(mlp.down_proj, rows)))

    def softcap(self, values: Tensor, cap: float) -> Tensor:
        return softcap_in_place(values, cap)

    def _takes(self, attention: Attention, batch: DecodeBatch) -> bool:
        case = attention.decode_spec.case(torch.bfloat16, batch.block_size)
        return self._decode and decode_attention.supports(case, gpu_at(batch.positions.device)) is None

    def _attend_decode(self, attention: Attention, qkv: Tensor, batch: DecodeBatch) -> Tensor:
        """bf16 [B, heads · head_dim] of each sequence's one new token; the cache gets its key and value."""
        layer = attention.layer
        q_norm, k_norm = head_norms(attention)
        return decode_attention.decode_attention(
            qkv, batch.storage(layer), batch.block_table(layer), batch.positions, self._ropes[layer].table(qkv.device),
            attention.decode_spec, q_norm=q_norm, k_norm=k_norm,
        )  # fmt: skip

    def _attend_paged(
        self, attention: Attention, qkv: Tensor, rotation: Rotation, kv: KeyValues, varlen: VarlenAttention
    ) -> Tensor:
        """bf16 [T, heads · head_dim] of spans of any length.

        In a mixed step sequences with one new token, whose rows come first, take the decode kernel.
        """
        assert kv.paged is not None
        ones, longer = kv.parts or (None, None)
        batch = None if ones is None else ones.kv.decode
        if ones is None or longer is None or batch is None or not self._takes(attention, batch):
            return self._attend_varlen(attention, qkv, rotation, kv.paged, varlen)
        if not isinstance(ones.rows, slice) or ones.rows.start or not isinstance(longer.rows, slice):
            return self._attend_varlen(attention, qkv, rotation, kv.paged, varlen)
        done = self._attend_decode(attention, qkv[ones.rows], batch)
        rest = longer.kv.paged
        assert rest is not None
        others = self._attend_varlen(attention, qkv[longer.rows], longer.rotation(rotation), rest, varlen)
        return torch.cat((done, others))

    def _attend_varlen(
        self, attention: Attention, qkv: Tensor, rotation: Rotation, batch: PagedBatch, varlen: VarlenAttention
    ) -> Tensor:
        """bf16 [T, heads · head_dim] of spans of any length; the cache gets the new keys and values."""
        spec, decode_spec, layer = attention.spec, attention.decode_spec, attention.layer
        q_norm, k_norm = head_norms(attention)
        segments, pages = batch.fresh, batch.pages(layer)
        cos, _ = rotation  # a view of rows that hold cosines, then sines
        query, key = rope_write.rope_write(
            qkv, cos, pages.keys, pages.values, pages.slots, attention.scale,
            q_norm=q_norm, k_norm=k_norm, eps=decode_spec.eps, want_key=segments is not None,
        )  # fmt: skip
        if segments is not None and key is not None:  # nothing older: the batch itself has all keys and values
            before = (decode_spec.heads + decode_spec.kv_heads) * decode_spec.head_dim
            value = qkv[:, before:].view(len(qkv), decode_spec.kv_heads, decode_spec.head_dim)
            return varlen(query, key, value, segments, VarlenSpec(spec.softcap, spec.window))
        keys, values, segments = batch.gathered(layer)
        return varlen(query, keys, values, segments, VarlenSpec(spec.softcap, spec.window))


def table_of(table: TokenTable) -> tuple[Tensor, Tensor | None]:
    """The embedding's table, and its rows' largest magnitudes where it is int8."""
    if isinstance(table, Int8Embedding):
        weight = table.table
        return weight.codes, weight.absmax
    assert isinstance(table, Embedding)
    return table.weight, None


def head_norms(attention: Attention) -> tuple[Tensor | None, Tensor | None]:
    """fp32 [head_dim] scales of Gemma 3's norms of each query head and key head; None in Gemma 2."""
    if attention.q_norm is None or attention.k_norm is None:
        return None, None
    return attention.q_norm.scale, attention.k_norm.scale


def groups_of(linear: LinearLayer, m: int) -> int:
    """Groups in which a linear layer wants ``m`` rows of x in order (gemcut.kernels.linear.layout); 0: as they are."""
    return linear.kernel.groups(m) if isinstance(linear.kernel, FewRows) else 0


def apply_linear(linear: LinearLayer, x: Activations) -> Tensor:
    """A linear layer's result, also of rows in order where ``groups_of`` asked for them."""
    if isinstance(x, Ordered):
        assert isinstance(linear.kernel, FewRows)
        return linear.finish(linear.kernel(x))
    out: Tensor = linear(x)
    return out


def apply_gated(linear: LinearLayer, x: Activations, groups: int) -> Activations:
    """bf16 ``gelu(gate) · up`` [m, rows / 2] of a linear layer whose rows are gate, then up.

    With ``groups`` the result is in order (gemcut.kernels.linear.layout), in so many groups of eight rows.
    """
    gated = linear.kernel.gated if isinstance(linear.kernel, FewRows) else None
    if gated is not None and not groups and isinstance(x, Tensor) and gated_gemm.pays(len(x)):
        return gated(x)
    return geglu.geglu(apply_linear(linear, x), groups)
