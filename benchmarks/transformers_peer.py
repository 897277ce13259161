"""transformers as a peer, with whole weights or with bitsandbytes' NF4, on the weights of one of our networks."""

from __future__ import annotations

import logging
import time

import torch
import transformers
from torch import nn

from gemcut.model import Model


def as_transformers(model: Model) -> transformers.PreTrainedModel:
    """transformers' model of the same whole weights; the tensors are shared, not copied."""
    config, gemma3 = model.config, model.config.model_type == "gemma3_text"
    kinds = (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM)
    make_config, make_model = kinds if gemma3 else (transformers.Gemma2Config, transformers.Gemma2ForCausalLM)
    with torch.device("meta"):
        peer = make_model(make_config(**config.to_dict(), attn_implementation="eager", dtype=torch.bfloat16))
    state = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.scale - 1}
    state["lm_head.weight"] = model.embed.weight
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    for i, layer in enumerate(model.layers):
        prefix = f"model.layers.{i}."
        for name, part in zip("qkv", layer.attention.qkv_proj.weight.split(layer.attention.sizes), strict=True):
            state[f"{prefix}self_attn.{name}_proj.weight"] = part
        for name, part in zip(("gate", "up"), layer.mlp.gate_up_proj.weight.chunk(2), strict=True):
            state[f"{prefix}mlp.{name}_proj.weight"] = part
        state[prefix + "self_attn.o_proj.weight"] = layer.attention.o_proj.weight
        state[prefix + "mlp.down_proj.weight"] = layer.mlp.down_proj.weight
        for name in norms:
            state[f"{prefix}{name}_layernorm.weight"] = getattr(layer, f"{name}_norm").scale - 1
        if gemma3:
            for name in ("q_norm", "k_norm"):
                state[f"{prefix}self_attn.{name}.weight"] = getattr(layer.attention, name).scale - 1
    state = {name: nn.Parameter(tensor.to(torch.bfloat16), requires_grad=False) for name, tensor in state.items()}
    peer.load_state_dict(state, strict=True, assign=True)
    with torch.device("cpu"):  # tables that no checkpoint holds
        rotary = type(peer.model.rotary_emb)(peer.config)
    peer.model.rotary_emb = rotary
    for module in peer.modules():
        if hasattr(module, "embed_scale"):
            module.embed_scale = torch.tensor(config.hidden_size**0.5)
    return peer.eval()


def cut_by_bitsandbytes(
    peer: transformers.PreTrainedModel, to: str = "nf4", device: str = "cpu"
) -> transformers.PreTrainedModel:
    """``peer`` with every linear layer but the head quantized by bitsandbytes on ``device``.

    "nf4" has double quantization and computes in bf16; "int8" is LLM.int8() with its usual threshold of 6.
    """
    import bitsandbytes.nn as cutters

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line at each product otherwise
    names = [name for name, module in peer.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    for name in names:  # one after another, so that the whole weights go as the quantized ones come
        module = peer.get_submodule(name)
        size, weight = (module.in_features, module.out_features), module.weight.data
        if to == "nf4":
            cut = cutters.Linear4bit(*size, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
            cut.weight = cutters.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
        else:
            cut = cutters.Linear8bitLt(*size, bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
            cut.weight = cutters.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        parent, _, leaf = name.rpartition(".")
        setattr(peer.get_submodule(parent), leaf, cut.to(device))  # moving it is what quantizes
    return peer.eval()


@torch.inference_mode()
def transformers_seconds(
    peer: transformers.PreTrainedModel, prompts: list[list[int]], steps: int
) -> tuple[float, float]:
    """(prefill, decode) seconds: forward with its default cache, greedy, ``steps`` tokens after the first."""
    start = time.perf_counter()
    out = peer(input_ids=torch.tensor(prompts), use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1].argmax(-1, keepdim=True)
    middle = time.perf_counter()
    for _ in range(steps):
        out = peer(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
    return middle - start, time.perf_counter() - middle
