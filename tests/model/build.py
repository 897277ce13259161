"""Our network from a transformers model's weights, by a mapping of its own (the loader has its own tests)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from gemcut.config import FAMILY, GemmaConfig
from gemcut.model import Model
from gemcut.model.dense import DenseKeyValues, dense_logits

_NORMS = {
    "input_layernorm": "input_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "pre_feedforward_norm",
    "post_feedforward_layernorm": "post_feedforward_norm",
}


def our_model(theirs: Any, dtype: torch.dtype | None = None, **config_changes: Any) -> Model:
    """``theirs``, a transformers model, as our ``Model`` computing in ``dtype`` (its own dtype by default)."""
    weights = theirs.state_dict()
    config = GemmaConfig.from_dict(theirs.config.to_dict()).replace(**config_changes)
    dtype = dtype or theirs.dtype
    with torch.device("meta"):
        model = Model(config, dtype=dtype, device=theirs.device)
    ours = {"embed.weight": weights["model.embed_tokens.weight"].to(dtype)}
    ours["norm.scale"] = 1 + weights["model.norm.weight"].float()
    for i in range(config.num_hidden_layers):
        source, target = f"model.layers.{i}.", f"layers.{i}."
        for name, name_of_ours in _NORMS.items():
            ours[f"{target}{name_of_ours}.scale"] = 1 + weights[f"{source}{name}.weight"].float()
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                ours[f"{target}attention.{name}.scale"] = 1 + weights[f"{source}self_attn.{name}.weight"].float()

        def fused(*names: str, source: str = source) -> Tensor:
            return torch.cat([weights[f"{source}{name}_proj.weight"].to(dtype) for name in names])

        ours[f"{target}attention.qkv_proj.weight"] = fused("self_attn.q", "self_attn.k", "self_attn.v")
        ours[f"{target}attention.o_proj.weight"] = fused("self_attn.o")
        ours[f"{target}mlp.gate_up_proj.weight"] = fused("mlp.gate", "mlp.up")
        ours[f"{target}mlp.down_proj.weight"] = fused("mlp.down")
    model.load_state_dict(ours, strict=True, assign=True)
    return model.eval()


def our_logits(theirs: Any, ids: Tensor, dtype: torch.dtype | None = None, **config_changes: Any) -> Tensor:
    """fp32 [T, V] of our network with the weights of ``theirs``."""
    return dense_logits(our_model(theirs, dtype, **config_changes), ids)


@torch.inference_mode()
def last_logits(model: Model, ids: Tensor, count: int) -> Tensor:
    """fp32 [count, V] of our network's last rows: the head costs most where the vocabulary is a real one."""
    hidden = model(ids, torch.arange(len(ids)), DenseKeyValues(len(ids)))
    return model.head(hidden[-count:])


@torch.no_grad()
def their_logits(theirs: Any, ids: Tensor, last: int = 0) -> Tensor:
    """[T, V] of a transformers model, in the dtype it gives; of its ``last`` rows alone where that is not 0."""
    logits: Tensor = theirs(ids[None], logits_to_keep=last).logits[0]
    return logits


def in_dtype(theirs: Any, dtype: torch.dtype) -> Any:
    """``theirs`` with its parameters in ``dtype``, as ``from_pretrained(dtype=…)`` would leave it.

    ``theirs.to(dtype)`` would round the rotary frequencies too, and make the comparison unfair to transformers.
    """
    for parameter in theirs.parameters():
        parameter.data = parameter.data.to(dtype)
    table = theirs.model.embed_tokens  # √d was rounded when the model was made, if that was in half precision
    table.embed_scale = torch.tensor(table.scalar_embed_scale, dtype=torch.float32)
    return theirs


def their_wide_model(name: str, *, words: int, window: int) -> Any:
    """Two layers of a Gemma 2 at its full width in bf16 with random weights; ``words`` and ``window`` are cut."""
    shape = FAMILY[name].replace(
        num_hidden_layers=2, layer_types=FAMILY[name].layer_types[:2], vocab_size=words, sliding_window=window
    )
    config = Gemma2Config.from_dict(shape.to_dict())
    return Gemma2ForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=dict(_random_weights(config)),
        dtype=torch.bfloat16,
        attn_implementation="eager",
    ).eval()


def _random_weights(config: Any) -> Iterator[tuple[str, Tensor]]:
    """bf16 tensors; one pool of random numbers serves all, since drawing 1.1 billion would take the whole minute.

    The pool's length is a prime, so no two rows of a matrix are the same numbers.
    """
    pool = torch.randn(16_777_213, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Gemma2ForCausalLM(config).named_parameters()}
    start = 0
    for name, shape in shapes.items():
        count = shape.numel()
        spread = 0.3 if len(shape) == 1 else 0.3 * (48 / shape[-1]) ** 0.5
        rolled = pool.roll(-start)
        repeated = rolled.repeat(-(-count // len(pool)))[:count]
        start = (start + count) % len(pool)
        yield name, repeated.mul_(spread).view(shape)


def random_ids(count: int, *, vocab_size: int = 320, seed: int = 0) -> Tensor:
    """``count`` token ids, int64."""
    return torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def rms(error: Tensor) -> float:
    """Root of the mean square, in float64."""
    return error.double().square().mean().sqrt().item()
