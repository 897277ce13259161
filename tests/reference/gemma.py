"""Gemma 2 and Gemma 3 (text) in float64, slowly, straight from the formulas of the two reports.

It shares nothing with ``gemcut.model``: it reads the keys of a Hugging Face config.json and tensors under their
Hugging Face names, decides by itself which layers slide, and computes every step in float64, one head after another.
Sources: Gemma 2 report (arXiv 2408.00118) §2, Gemma 3 report (arXiv 2503.19786) §2, RMSNorm (1910.07467),
RoPE (2104.09864), GQA (2305.13245), GeGLU (2002.05202), GELU's tanh approximation (1606.08415).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def reference_logits(
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    ids: Sequence[int] | Tensor,
    *,
    scale_dtype: torch.dtype = torch.float64,
    last: int = 0,
) -> Tensor:
    """Logits float64 [T, V] of one sequence, or [last, V] of its last rows.

    Args:
        weights: tensors named as in a Hugging Face checkpoint, of any dtype; each is taken as exact.
        config: the keys of the checkpoint's config.json, of either era.
        ids: T token ids.
        scale_dtype: √d, by which embeddings are multiplied, is rounded to this dtype (the compute dtype of whoever
            is compared; training rounded it to bf16).
        last: how many rows to return, counted from the end; 0 for all.
    """
    ids = torch.as_tensor(ids)

    def w(name: str) -> Tensor:
        return weights[name].detach().to(torch.float64)

    def norm(x: Tensor, name: str) -> Tensor:
        mean_square = (x * x).sum(-1, keepdim=True) / x.shape[-1]
        return x / torch.sqrt(mean_square + config.get("rms_norm_eps", 1e-6)) * (1 + w(name))

    scale = torch.tensor(math.sqrt(config["hidden_size"]), dtype=torch.float64).to(scale_dtype).double()
    x = weights["model.embed_tokens.weight"][ids].double() * scale
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        y = norm(x, prefix + "input_layernorm.weight")
        y = _attention(y, w, prefix + "self_attn.", config, i, norm)
        x = x + norm(y, prefix + "post_attention_layernorm.weight")
        y = norm(x, prefix + "pre_feedforward_layernorm.weight")
        gate, up = y @ w(prefix + "mlp.gate_proj.weight").T, y @ w(prefix + "mlp.up_proj.weight").T
        y = (_gelu_tanh(gate) * up) @ w(prefix + "mlp.down_proj.weight").T
        x = x + norm(y, prefix + "post_feedforward_layernorm.weight")
    logits = norm(x[-last:], "model.norm.weight") @ w("model.embed_tokens.weight").T
    return _soft_cap(logits, _final_cap(config))


def _attention(x: Tensor, w: Any, prefix: str, config: Mapping[str, Any], layer: int, norm: Any) -> Tensor:
    T, head_dim = x.shape[0], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    q = (x @ w(prefix + "q_proj.weight").T).reshape(T, heads, head_dim)
    k = (x @ w(prefix + "k_proj.weight").T).reshape(T, kv_heads, head_dim)
    v = (x @ w(prefix + "v_proj.weight").T).reshape(T, kv_heads, head_dim)
    if _is_gemma3(config):
        q, k = norm(q, prefix + "q_norm.weight"), norm(k, prefix + "k_norm.weight")
    sliding = _slides(config, layer)
    q, k = _rope(q, *_rope_of(config, sliding)), _rope(k, *_rope_of(config, sliding))
    position = torch.arange(T)
    distance = position[:, None] - position[None, :]  # query − key
    visible = distance >= 0
    if sliding:
        visible &= distance < config["sliding_window"]  # the query itself is one of the window
    cap = None if _is_gemma3(config) else config.get("attn_logit_softcapping", 50.0)
    outputs = []
    for head in range(heads):
        group = head // (heads // kv_heads)
        scores = q[:, head] @ k[:, group].T / math.sqrt(config["query_pre_attn_scalar"])
        scores = _soft_cap(scores, cap)
        exponentials = torch.where(visible, torch.exp(scores - scores.amax(-1, keepdim=True)), 0.0)
        outputs.append(exponentials / exponentials.sum(-1, keepdim=True) @ v[:, group])
    return torch.cat(outputs, dim=-1) @ w(prefix + "o_proj.weight").T


def _rope(x: Tensor, theta: float, factor: float) -> Tensor:
    """Turn the pair (x[i], x[i + head_dim/2]) by position / factor · theta^(−2i/head_dim)."""
    T, _, head_dim = x.shape
    half = head_dim // 2
    frequency = torch.tensor([theta ** (-2 * i / head_dim) for i in range(half)], dtype=torch.float64)
    angle = (torch.arange(T, dtype=torch.float64) / factor)[:, None, None] * frequency
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), dim=-1)


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _soft_cap(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


def _is_gemma3(config: Mapping[str, Any]) -> bool:
    return bool(config["model_type"] == "gemma3_text")


def _final_cap(config: Mapping[str, Any]) -> float | None:
    return config.get("final_logit_softcapping", None if _is_gemma3(config) else 30.0)


def _slides(config: Mapping[str, Any], layer: int) -> bool:
    if config.get("layer_types"):
        return bool(config["layer_types"][layer] == "sliding_attention")
    # Gemma 2: layers 0, 2, 4, … slide. Gemma 3: five sliding layers, then one that sees everything.
    return layer % 6 != 5 if _is_gemma3(config) else layer % 2 == 0


def _rope_of(config: Mapping[str, Any], sliding: bool) -> tuple[float, float]:
    """(theta, linear factor) of one layer, from ``rope_parameters`` or the older flat keys."""
    parameters = config.get("rope_parameters")
    if _is_gemma3(config):
        if parameters:
            rope = parameters["sliding_attention" if sliding else "full_attention"]
            return rope["rope_theta"], rope.get("factor", 1.0)
        if sliding:
            return config.get("rope_local_base_freq", 10_000.0), 1.0
        return config.get("rope_theta", 1_000_000.0), (config.get("rope_scaling") or {}).get("factor", 1.0)
    return (parameters or config).get("rope_theta", 10_000.0), 1.0
