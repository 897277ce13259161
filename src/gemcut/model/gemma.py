"""The whole forward pass of Gemma 2, and of Gemma 3's text models, on one page.

Shapes: T rows (tokens of all sequences of a batch, one after another), d hidden size, V vocabulary.
Sources: Gemma 2 report (arXiv 2408.00118), Gemma 3 report (arXiv 2503.19786).

The residual stream and every norm are fp32 whatever the compute dtype is: it costs next to nothing, makes bf16 more
exact, and keeps fp16 finite, where sums of post-norm outputs pass 65504.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from gemcut import process
from gemcut.config import SLIDING, GemmaConfig
from gemcut.kernels.cpu.step import CpuStep
from gemcut.kernels.cuda_step import CudaStep
from gemcut.kernels.plain import softcap_in_place
from gemcut.model.attention import AttentionFunction, AttentionSpec, KeyValues, choose_attention
from gemcut.model.geglu import choose_geglu
from gemcut.model.linear import EmbeddingFactory, LinearFactory, dense_embedding, dense_linear
from gemcut.model.norm import RMSNorm
from gemcut.model.rope import RotaryTable, rotate
from gemcut.quantization.spec import Quantization

Rotation = tuple[Tensor, Tensor]  # cos, sin


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; queries and keys are normalised per head in Gemma 3."""

    def __init__(self, config: GemmaConfig, layer: int, linear: LinearFactory, attend: AttentionFunction) -> None:
        super().__init__()
        self.layer, self.attend = layer, attend
        self.sizes = (config.query_size, config.key_value_size, config.key_value_size)
        self.head_dim = config.head_dim
        self.qkv_proj = linear(config.hidden_size, self.sizes)  # rows: all of q, then k, then v
        self.o_proj = linear(config.query_size, (config.hidden_size,))
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.scale = config.attention_scale
        self.spec = AttentionSpec(
            softcap=config.attn_logit_softcapping,
            window=config.sliding_window if config.layer_types[layer] == SLIDING else None,
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

    def __init__(self, config: GemmaConfig, linear: LinearFactory, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = linear(config.hidden_size, (config.intermediate_size,) * 2)  # rows: gate, then up
        self.down_proj = linear(config.intermediate_size, (config.hidden_size,))
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
        self.mlp = MLP(config, linear, dtype)
        self.dtype = dtype

    def forward(self, residual: Tensor, rotation: Rotation, kv: KeyValues, wanted: Tensor | None = None) -> Tensor:
        """``residual`` fp32 [T, d] -> fp32 [T, d], or its ``wanted`` rows, int64 [n]."""
        attended: Tensor = self.attention(self.input_norm(residual).to(self.dtype), rotation, kv, wanted)
        if wanted is not None:
            residual = residual[wanted]
        residual = self.post_attention_norm(attended).add_(residual)
        transformed = self.mlp(self.pre_feedforward_norm(residual).to(self.dtype))
        out: Tensor = self.post_feedforward_norm(transformed).add_(residual)
        return out


class Model(nn.Module):
    """A Gemma network. Build it on the meta device, then stream weights in (``gemcut.checkpoint.load``).

    Args:
        config: the network's shape.
        dtype: compute dtype: bfloat16, float16 or float32. Norms and the residual stream are fp32 in each.
        attention: "auto", or the name of an attention implementation.
        device: where it will run; only used to choose the attention implementation.
        linear: makes linear layers; whole ones in ``dtype`` by default.
        embedding: makes the embedding; a whole one in ``dtype`` by default.
        quantization: what those factories cut to; kept for who asks, nothing here depends on it.
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
        self.embed = make_embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Layer(config, i, dtype, make_linear, self.attention_implementation.function)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        #: Computes what stands between the matrix products, in place of the plain code here; see gemcut.model.bind.
        self.step: CpuStep | CudaStep | None = None
        # √d is rounded to the compute dtype, as in training: 67.88 becomes 68 at 27B in bf16.
        self.embed_scale = torch.tensor(math.sqrt(config.hidden_size), dtype=dtype, device="cpu").item()
        positions = config.max_position_embeddings
        self.rope_full = RotaryTable(config.head_dim, config.rope_theta, positions, config.rope_scaling_factor)
        self.rope_sliding = RotaryTable(config.head_dim, config.rope_local_theta, positions)

    def forward(self, ids: Tensor, positions: Tensor, kv: KeyValues, wanted: Tensor | None = None) -> Tensor:
        """Hidden states before the final norm.

        Args:
            ids: token ids, int64 [T].
            positions: each token's position in its sequence, int64 [T].
            kv: keys and values of the batch; says which rows form which sequence.
            wanted: the rows whose hidden states are wanted, int64 [n] with n > 0; None: all. Behind the last layer's
                attention the others serve nobody, and are not computed.

        Returns:
            fp32 [T, d], or [n, d].
        """
        process.check()
        residual: Tensor = self.embed(ids).float() * self.embed_scale
        full, sliding = self.rope_full.at(positions), self.rope_sliding.at(positions)
        rotations = [sliding if kind == SLIDING else full for kind in self.config.layer_types]
        if self.step is not None:
            return self.step.layers(self.layers, residual, rotations, kv, wanted)
        last = len(self.layers) - 1
        for index, (layer, rotation) in enumerate(zip(self.layers, rotations, strict=True)):
            residual = layer(residual, rotation, kv, wanted if index == last else None)
        return residual

    def head(self, hidden: Tensor) -> Tensor:
        """Logits after the final soft-cap, fp32 [n, V], of chosen rows of ``forward``'s result, fp32 [n, d].

        NaN where the soft-cap was given an infinite one.
        """
        logits: Tensor = self.embed.logits(self.norm(hidden).to(self.dtype))
        cap = self.config.final_logit_softcapping
        if cap is not None and self.step is not None:
            return self.step.softcap(logits, cap)
        return logits if cap is None else softcap_in_place(logits, cap)
