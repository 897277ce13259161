"""The network between its matrix products on an NVIDIA GPU: norms, rotation and cache, attention, the gated product.

In plain PyTorch a layer has some thirty launches between its four products; here it has four. The residual stream stays
fp32, every kernel computes in fp32 and rounds once. The plain network in gemcut.model.gemma is the twin.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemcut.config import FULL, GemmaConfig
from gemcut.kernels import decode_attention, geglu, norm, nvrtc, rope_write
from gemcut.kernels.cuda_linear import gated_product, order_groups, product
from gemcut.kernels.decode_attention import DecodeSpec
from gemcut.kernels.ordered import Ordered
from gemcut.kernels.plain import softcap_in_place
from gemcut.kernels.prefill_attention import VarlenAttention, VarlenSpec


def supports(config: GemmaConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """None, or why these kernels cannot serve a network of this shape and compute dtype on ``device``."""
    if device.type != "cuda":
        return f"runs on an NVIDIA GPU only, not on {device.type}"
    if dtype != torch.bfloat16:
        return f"computes in bfloat16, not in {dtype}"
    return (
        nvrtc.unavailable_reason()
        or norm.supports(config.hidden_size)
        or geglu.supports(config.intermediate_size)
        or rope_write.supports(config.head_dim)
    )


class CudaStep:
    """The layers of a network, and its head's soft-cap, with few launches between the matrix products.

    Args:
        model: the gemcut.model.gemma.Model; only its shape and rotary tables are kept.
        varlen: computes attention of many queries; None leaves attention to the network's own implementation.
    """

    def __init__(self, model: Any, varlen: VarlenAttention | None) -> None:
        config: GemmaConfig = model.config
        self._config, self.varlen = config, varlen
        self._tables = [(model.rope_full if kind == FULL else model.rope_sliding) for kind in config.layer_types]

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
        eps, m = self._config.rms_norm_eps, len(residual)
        positions = self._decode_positions(kv, residual.device)
        x = norm.norm(residual, layers[0].input_norm.scale, eps, order_groups(layers[0].attention.qkv_proj, m))
        for index, (layer, rotation) in enumerate(zip(layers, rotations, strict=True)):
            mlp = layer.mlp
            mixed = self._attend(layer.attention, x, rotation, kv, positions)
            if wanted is not None and index + 1 == len(layers):
                mixed, residual, m = mixed[wanted], residual[wanted], len(wanted)
            attended = layer.attention.o_proj(mixed)
            post, pre = layer.post_attention_norm.scale, layer.pre_feedforward_norm.scale
            x = norm.norm_add(attended, residual, post, pre, eps, order_groups(mlp.gate_up_proj, m))
            gated = gated_product(mlp.gate_up_proj, x, order_groups(mlp.down_proj, m))
            transformed, post = product(mlp.down_proj, gated), layer.post_feedforward_norm.scale
            if index + 1 < len(layers):
                after = layers[index + 1]
                groups = order_groups(after.attention.qkv_proj, m)
                x = norm.norm_add(transformed, residual, post, after.input_norm.scale, eps, groups)
            else:
                norm.add_norm(transformed, residual, post, eps)
        return residual

    def softcap(self, values: Tensor, cap: float) -> Tensor:
        """``cap · tanh(values / cap)`` of fp32 ``values``, in place; NaN where one is infinite."""
        return softcap_in_place(values, cap)

    def _decode_positions(self, kv: Any, device: torch.device) -> Tensor | None:
        """int32 [B]: each sequence's new position where all have one new token and the decode kernel serves them."""
        config = self._config
        if self.varlen is None or not hasattr(kv, "pages") or any(span.length != 1 for span in kv.spans):
            return None
        shape = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        if decode_attention.supports(*shape, kv.block_size) is not None:
            return None
        return torch.tensor([span.context_length - 1 for span in kv.spans], dtype=torch.int32, device=device)

    def _attend(
        self, attention: Any, x: Tensor | Ordered, rotation: tuple[Tensor, Tensor], kv: Any, positions: Tensor | None
    ) -> Tensor:
        """bf16 [T, heads · head_dim] of the layer's input; the cache gets the new keys and values."""
        qkv = product(attention.qkv_proj, x)
        if self.varlen is None or not hasattr(kv, "pages"):
            out: Tensor = attention.mix(qkv, rotation, kv)
            return out
        config, spec, layer = self._config, attention.spec, attention.layer
        q_norm, k_norm = (None if n is None else n.scale for n in (attention.q_norm, attention.k_norm))
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        if positions is not None:
            return decode_attention.decode_attention(
                qkv,
                kv.storage(layer),
                kv.block_table(layer),
                positions,
                self._tables[layer].table(qkv.device),
                DecodeSpec(heads, kv_heads, head_dim, attention.scale, spec.softcap, spec.window, config.rms_norm_eps),
                q_norm=q_norm,
                k_norm=k_norm,
            )
        runs, pages = kv.fresh, kv.pages(layer)
        cos, _ = rotation  # a view of rows that hold cosines, then sines
        query, key = rope_write.rope_write(
            qkv, cos, pages.keys, pages.values, pages.slots, attention.scale,
            q_norm=q_norm, k_norm=k_norm, eps=config.rms_norm_eps, want_key=runs is not None,
        )  # fmt: skip
        if runs is not None and key is not None:  # nothing older: the batch itself has all keys and values
            value = qkv[:, (heads + kv_heads) * head_dim :].view(len(qkv), kv_heads, head_dim)
            return self.varlen(query, key, value, runs, VarlenSpec(spec.softcap, spec.window))
        keys, values, runs = kv.gathered(layer)
        return self.varlen(query, keys, values, runs, VarlenSpec(spec.softcap, spec.window))
