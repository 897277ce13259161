"""The whole forward pass of Gemma 2, and of Gemma 3's text models, on one page.

Shapes: T rows (tokens of all sequences of a batch, one after another), d hidden size, V vocabulary.
Sources: Gemma 2 report (arXiv 2408.00118), Gemma 3 report (arXiv 2503.19786).

The residual stream and every norm are fp32 whatever the compute dtype is: it costs next to nothing, makes bf16 more
exact, and keeps fp16 finite, where sums of post-norm outputs pass 65504.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from gemcut import process
from gemcut.config import SLIDING, GemmaConfig
from gemcut.kernels.attention.decode import DecodeSpec
from gemcut.model.attention import AttentionFunction, AttentionSpec, choose_attention
from gemcut.model.geglu import choose_geglu
from gemcut.model.key_values import KeyValues
from gemcut.model.linear import EmbeddingFactory, LinearFactory, LinearLayer, dense_embedding, dense_linear
from gemcut.model.norm import RMSNorm
from gemcut.model.ops.base import Activations, FusedLayers, Ops, Rotations
from gemcut.model.ops.plain import PlainOps
from gemcut.model.rope import BatchRotations, RotaryTable, Rotation, rotate
from gemcut.quantization.spec import Quantization


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; queries and keys are normalised per head in Gemma 3."""

    def __init__(self, config: GemmaConfig, layer: int, linear: LinearFactory, attend: AttentionFunction) -> None:
        super().__init__()
        self.layer, self.attend = layer, attend
        self.sizes = (config.query_size, config.key_value_size, config.key_value_size)
        self.head_dim = config.head_dim
        name = f"layers.{layer}.attention"
        self.qkv_proj = linear(f"{name}.qkv_proj", config.hidden_size, self.sizes)  # rows: all of q, then k, then v
        self.o_proj = linear(f"{name}.o_proj", config.query_size, (config.hidden_size,))
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.scale = config.attention_scale
        window = config.sliding_window if config.layer_types[layer] == SLIDING else None
        self.spec = AttentionSpec(softcap=config.attn_logit_softcapping, window=window)
        heads = config.num_attention_heads, config.num_key_value_heads
        self.decode_spec = DecodeSpec(
            *heads, config.head_dim, self.scale, self.spec.softcap, window, config.rms_norm_eps
        )

    def forward(self, x: Tensor, rotation: Rotation, kv: KeyValues, wanted: Tensor | None = None) -> Tensor:
        """``x`` [T, d] -> [T, d], or its ``wanted`` rows, int64 [n]; the cache gets keys and values of all."""
        mixed = self.mix(self.qkv_proj(x), rotation, kv)
        out: Tensor = self.o_proj(mixed if wanted is None else mixed[wanted])
        return out

    def mix(self, qkv: Tensor, rotation: Rotation, kv: KeyValues) -> Tensor:
        """From q, k, v side by side, [T, sum of ``sizes``], to the heads' results [T, heads · head_dim]."""
        parts = torch.split(qkv, list(self.sizes), -1)
        query, key, value = (part.view(len(qkv), -1, self.head_dim) for part in parts)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query).to(qkv.dtype), self.k_norm(key).to(qkv.dtype)
        cos, sin = rotation
        # The score's scale goes into the fp32 rotation: no rounding of its own, and fp16 products stay small.
        query, key = rotate(query, cos * self.scale, sin * self.scale), rotate(key, cos, sin)
        return self.attend(query, key, value, self.layer, kv, self.spec)


class MLP(nn.Module):
    """``down(gelu(gate(x)) · up(x))`` with the tanh approximation of GELU."""

    def __init__(self, config: GemmaConfig, layer: int, linear: LinearFactory, dtype: torch.dtype) -> None:
        super().__init__()
        name, width = f"layers.{layer}.mlp", config.intermediate_size
        self.gate_up_proj = linear(f"{name}.gate_up_proj", config.hidden_size, (width, width))  # rows: gate, then up
        self.down_proj = linear(f"{name}.down_proj", width, (config.hidden_size,))
        self.geglu = choose_geglu(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [T, d] -> [T, d]."""
        out: Tensor = self.geglu(self.gate_up_proj(x), self.down_proj)
        return out


class Layer(nn.Module):
    """Attention and MLP, each between a norm before and a norm after; the residual is added after the second."""

    def __init__(
        self, config: GemmaConfig, index: int, dtype: torch.dtype, linear: LinearFactory, attend: AttentionFunction
    ) -> None:
        super().__init__()
        norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps)
        self.input_norm, self.post_attention_norm = norm(), norm()
        self.pre_feedforward_norm, self.post_feedforward_norm = norm(), norm()
        self.attention = Attention(config, index, linear, attend)
        self.mlp = MLP(config, index, linear, dtype)
        self.dtype = dtype

    def forward(
        self,
        ops: Ops,
        residual: Tensor,
        x: Activations,
        rotations: Rotations,
        kv: KeyValues,
        after: tuple[RMSNorm | None, LinearLayer | None],
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, Activations | None]:
        """One layer's part of the stream.

        Args:
            ops: what computes it.
            residual: fp32 [T, d]; may be changed in place.
            x: ``input_norm`` of it.
            rotations: each layer's.
            kv: the batch's keys and values.
            after: the norm that follows the layer, and the linear layer that reads its rows; None, None: nothing.
            wanted: the rows wanted behind attention, int64 [n]; None: all.

        Returns:
            (the residual stream behind the layer, ``after``'s norm of it).
        """
        attended = ops.attend(self.attention, x, rotations, kv, wanted)
        if wanted is not None:
            residual = residual[wanted]
        before_mlp = self.pre_feedforward_norm, self.mlp.gate_up_proj
        residual, normed = ops.add_norm(attended, residual, self.post_attention_norm, *before_mlp)
        assert normed is not None
        return ops.add_norm(ops.mlp(self.mlp, normed), residual, self.post_feedforward_norm, *after)

    def alone(self, residual: Tensor, rotation: Rotation, kv: KeyValues) -> Tensor:
        """``residual`` fp32 [T, d] -> fp32 [T, d] through this layer in plain PyTorch, whatever stands beside it."""
        ops, rotations = PlainOps(self.dtype), {self.attention.layer: rotation}
        out, _ = self(ops, residual, ops.norm(residual, self.input_norm), rotations, kv, (None, None))
        return out  # type: ignore[no-any-return]


class Model(nn.Module):
    """A Gemma network. Build it on the meta device, then stream weights in (``gemcut.checkpoint.load``).

    Args:
        config: the network's shape.
        dtype: compute dtype: bfloat16, float16 or float32. Norms and the residual stream are fp32 in each.
        attention: "auto", or the name of an attention implementation.
        device: where it will run; only used to choose the attention implementation.
        linear: makes linear layers; unquantized ones in ``dtype`` by default.
        embedding: makes the embedding; an unquantized one in ``dtype`` by default.
        quantization: what those factories quantize to; kept for who asks, nothing here depends on it.
    """

    def __init__(
        self,
        config: GemmaConfig,
        *,
        dtype: torch.dtype = torch.bfloat16,
        attention: str = "auto",
        device: torch.device | None = None,
        linear: LinearFactory | None = None,
        embedding: EmbeddingFactory | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        super().__init__()
        make_linear = linear if linear is not None else dense_linear(dtype)
        make_embedding = embedding if embedding is not None else dense_embedding(dtype)
        self.attention_implementation = choose_attention(attention, config, dtype, device or torch.device("cpu"))
        self.config, self.dtype, self.quantization = config, dtype, quantization
        #: What the caller asked for: the attention implementation here, kernels in gemcut.model.bind.
        self.asked_attention, self.kernels = attention, "auto"
        self.embed = make_embedding("embed", config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Layer(config, i, dtype, make_linear, self.attention_implementation.function)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        #: What computes the layers' operations, and all layers of a step in one call; see gemcut.model.bind.
        self.ops: Ops = PlainOps(dtype)
        self.fused: FusedLayers | None = None
        # √d is rounded to the compute dtype, as in training: 67.88 becomes 68 at 27B in bf16.
        self.embed_scale = torch.tensor(math.sqrt(config.hidden_size), dtype=dtype, device="cpu").item()
        positions = config.max_position_embeddings
        self.rope_full = RotaryTable(config.head_dim, config.rope_theta, positions, config.rope_scaling_factor)
        self.rope_sliding = RotaryTable(config.head_dim, config.rope_local_theta, positions)
        kinds = config.layer_types
        #: Each layer's rotary table.
        self.ropes = [self.rope_sliding if kind == SLIDING else self.rope_full for kind in kinds]

    @property
    def layer_list(self) -> list[Layer]:
        """The layers, by their type."""
        return list(self.layers)  # type: ignore[arg-type]

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        kv: KeyValues,
        wanted: Tensor | None = None,
        watch: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Hidden states before the final norm.

        Args:
            ids: token ids, int64 [T].
            positions: each token's position in its sequence, int64 [T].
            kv: keys and values of the batch; says which rows form which sequence.
            wanted: the rows whose hidden states are wanted, int64 [n] with n > 0; None: all. Behind the last layer's
                attention the others serve nobody, and are not computed.
            watch: hears the residual stream, fp32 [T, d], before each layer; what it keeps it must copy.

        Returns:
            fp32 [T, d], or [n, d].
        """
        process.check()
        if self.fused is not None and watch is None and self.fused.serves(kv, len(ids)):
            residual: Tensor = self.embed(ids).float() * self.embed_scale
            self.fused(residual, BatchRotations(self.ropes, positions), kv)
            return residual if wanted is None else residual[wanted]
        residual, _ = self._through_layers(ids, positions, kv, None, wanted, watch)
        return residual

    def next_logits(self, ids: Tensor, positions: Tensor, kv: KeyValues) -> Tensor:
        """fp32 [T, V] of all rows, before the final soft-cap; arguments as in ``forward``, integers of any width."""
        _, x = self._through_layers(ids, positions, kv, self.norm)
        assert isinstance(x, Tensor)  # the head asks for no order of its own
        return self.embed.logits(x)

    def _through_layers(
        self,
        ids: Tensor,
        positions: Tensor,
        kv: KeyValues,
        end: RMSNorm | None,
        wanted: Tensor | None = None,
        watch: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, Activations | None]:
        """(hidden states before the final norm, ``end`` of them)."""
        layers = self.layer_list
        rotations = BatchRotations(self.ropes, positions)
        afters: list[tuple[RMSNorm | None, LinearLayer | None]] = [
            (layer.input_norm, layer.attention.qkv_proj) for layer in layers[1:]
        ]
        first, last = layers[0], len(layers) - 1
        x: Activations | None
        residual, x = self.ops.embed(ids, self.embed, self.embed_scale, first.input_norm, first.attention.qkv_proj)
        for i, (layer, after) in enumerate(zip(layers, [*afters, (end, None)], strict=True)):
            if watch is not None:
                watch(residual)
            residual, x = layer(self.ops, residual, x, rotations, kv, after, wanted if i == last else None)
        return residual, x

    def head(self, hidden: Tensor) -> Tensor:
        """Logits after the final soft-cap, fp32 [n, V], of chosen rows of ``forward``'s result, fp32 [n, d].

        NaN where the soft-cap was given an infinite one.
        """
        return self.softcap(self.embed.logits(self.norm(hidden).to(self.dtype)))

    def softcap(self, logits: Tensor) -> Tensor:
        """The final soft-cap of fp32 ``logits``, in place; as they are in a network without one."""
        cap = self.config.final_logit_softcapping
        return logits if cap is None else self.ops.softcap(logits, cap)
