"""GGUF files of tiny random transformers models, written with gguf's own writer as llama.cpp's and Ollama's converters
write them: their keys, their spellings, their vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as Q

from gemcut.checkpoint.resolve import resolve
from gemcut.loading import load_network
from gemcut.model.dense import dense_logits
from support import hf_model, tiny_config

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def vocabulary(user_defined: int = 4) -> tuple[list[str], list[float], list[int]]:
    """Some 320 pieces of Gemma's kind. ``user_defined``: the type of such pieces, which Ollama calls normal (1)."""
    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    user = ["\n", "\n\n", "  ", "   ", "<b>"] if user_defined == 4 else ["\n", "\n\n", "▁▁", "▁▁▁", "<b>"]
    normal = ["▁t", "he", "▁the", "▁", *"abcdefghijklmnopqrstuvwxyz", *"ABC.,!<>_/0123456789:[]"]
    tokens = control + user + [f"<0x{byte:02X}>" for byte in range(256)] + normal
    types = [3, 3, 3, 2, *([user_defined if user_defined == 1 else 3] * 2)] + [user_defined] * len(user)
    types += [6] * 256 + [1] * len(normal)
    score = 0.0 if user_defined == 1 else -1000.0
    scores = [score] * (len(control) + len(user)) + [0.0] * 256 + [-float(i) for i in range(len(normal))]
    return tokens, scores, types


VOCAB = len(vocabulary()[0])


def tiny(generation: int, **overrides: Any) -> Any:
    """A random transformers model; its queries are divided as a GGUF file can say (by the head's width)."""
    values = {"vocab_size": VOCAB, "query_pre_attn_scalar": 16, "num_hidden_layers": 7 if generation == 3 else 4}
    return hf_model(tiny_config("gemma2" if generation == 2 else "gemma3_text", **{**values, **overrides}))


def metadata(model: Any) -> dict[str, Any]:
    """The section llama.cpp's converter writes for a model, without the architecture's name in front."""
    config = model.config
    found = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.sliding_window": config.sliding_window,
    }
    if config.model_type == "gemma2":
        found["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
        found["final_logit_softcapping"] = float(config.final_logit_softcapping)
    else:
        found["rope.freq_base"] = float(config.rope_parameters["full_attention"]["rope_theta"])
    return found


def ollama_metadata(model: Any, age: str) -> dict[str, Any]:
    """The section Ollama's converter writes. ``age``: "first" (March 2025) or "later", for Gemma 3."""
    found = metadata(model)
    if model.config.model_type == "gemma2":
        return found
    base = found.pop("rope.freq_base")
    found["rope.local.freq_base"] = float(model.config.rope_parameters["sliding_attention"]["rope_theta"])
    if age == "first":
        return {**found, "rope.global.freq_base": base, "final_logit_softcapping": 30.0}
    kinds = [kind == "sliding_attention" for kind in model.config.layer_types]
    return {**found, "rope.freq_base": base, "attention.sliding_window_pattern": kinds}


def write(
    path: Path,
    model: Any,
    section: dict[str, Any],
    *,
    kind: Q = Q.F32,
    vocab: tuple[list[str], list[float], list[int]] | None = None,
    general: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    skip: tuple[str, ...] = (),
    space_prefix: bool | None = False,
    **writer_options: Any,
) -> Path:
    """Write ``model``. ``section``: keys without the architecture; None values are left out. ``general``: whole keys.
    ``tensors``: more of them, by name."""
    architecture = "gemma2" if model.config.model_type == "gemma2" else "gemma3"
    writer = gguf.GGUFWriter(path, architecture, **writer_options)
    for key, value in {**{f"{architecture}.{key}": value for key, value in section.items()}, **(general or {})}.items():
        add(writer, key, value)
    tokens, scores, types = vocab or vocabulary()
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    if space_prefix is not None:
        writer.add_add_space_prefix(space_prefix)
    for name, value in {**named(model), **(tensors or {})}.items():
        if name in skip:
            continue
        if value.ndim == 1:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """One metadata value of the type a converter gives it."""
    if value is None:
        return
    for kind, call in ((bool, writer.add_bool), (int, writer.add_uint32), (float, writer.add_float32),
                       (str, writer.add_string), (list, writer.add_array)):  # fmt: skip
        if type(value) is kind:
            call(key, value)
            return
    raise TypeError(key)


def named(model: Any) -> dict[str, np.ndarray]:
    """The model's tensors under llama.cpp's names, norms as 1 + w."""
    found = {}
    for name, value in model.state_dict().items():
        short = name.removeprefix("model.").removesuffix(".weight")
        if name == "lm_head.weight":
            continue
        if short.startswith("layers."):
            _, layer, rest = short.split(".", 2)
            theirs = f"blk.{layer}.{NAMES[rest]}.weight"
        else:
            theirs = {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[short]
        found[theirs] = (value + 1.0 if "norm" in name else value).numpy()
    return found


def logits(path: Path, ids: list[int]) -> torch.Tensor:
    """What gemcut computes from a file, in fp32 on the CPU: [T, V]."""
    model = load_network(resolve(path), dtype=torch.float32, device=torch.device("cpu"), kernels="plain")
    return dense_logits(model, torch.tensor(ids))


def expected_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """transformers' answer: [T, V]."""
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float()
