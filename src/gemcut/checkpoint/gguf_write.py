"""Write a checkpoint as one GGUF file, as llama.cpp's converter would: bf16, or quantized to Q8_0 or Q4_0."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gemcut.checkpoint import names
from gemcut.checkpoint.gguf_config import read_config
from gemcut.checkpoint.source import Source
from gemcut.config import SLIDING, GemmaConfig
from gemcut.errors import CheckpointError, ConfigError, ParameterError
from gemcut.progress import Report
from gemcut.text.gguf_vocab import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from gemcut.text.tokenizer import Tokenizer

#: What weights can become: the name of a type, and llama.cpp's number of a file that is mostly of it.
FORMATS = {"bf16": ("BF16", 32), "q8_0": ("Q8_0", 7), "q4_0": ("Q4_0", 2)}
_BLOCK = 32
#: Values that are quantized at once: numpy makes several copies of them in fp32.
_VALUES = 1 << 24
#: Of the config: what a GGUF file says elsewhere, or not at all, without an effect on the network.
_ELSEWHERE = ("torch_dtype", "eos_token_ids", "bos_token_id", "pad_token_id")


def write_gguf(source: Source, out: Path, kind: str, progress: Report | None = None) -> dict[str, int]:
    """Write ``source`` to the file ``out``, which appears when it is whole; gives the number of tensors by type.

    Norms are kept in fp32. With q4_0 the embedding, which is the head, too, is Q8_0. A row that blocks of 32 do not
    divide is bf16. One tensor is held at a time.

    Args:
        source: a checkpoint of whole weights, with its tokenizer.
        kind: one of FORMATS.
        progress: hears (bytes written, bytes in all).

    Raises:
        ParameterError: ``kind`` is unknown.
        ConfigError: the network has something that a GGUF file cannot say.
        CheckpointError: the weights are quantized, or the file is there or cannot be written.
        TokenizerError: there is no tokenizer, or one of another kind.
    """
    if kind not in FORMATS:
        raise ParameterError(f"the format is {kind!r}; expected one of {', '.join(FORMATS)}")
    if out.exists():
        raise CheckpointError(f"{out} already exists; choose another name or remove it")
    if source.quantization is not None:
        raise CheckpointError(f"{source.name} is quantized to {source.quantization.format}; convert the whole model")
    config = source.config()
    shapes = names.expected_shapes(config)
    section = network_keys(config)
    check_sayable(out, config, section, shapes)
    vocabulary = vocabulary_keys(source.tokenizer(), config.vocab_size)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        counts = _write(part, source, shapes, {**section, **vocabulary}, kind, progress)
        os.replace(part, out)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {out}: {error.strerror or error}; nothing was left there, free some space and try again"
        ) from None
    finally:
        part.unlink(missing_ok=True)
    return counts


def network_keys(config: GemmaConfig) -> dict[str, Any]:
    """The network's metadata under llama.cpp's keys."""
    gemma3 = config.model_type == "gemma3_text"
    found: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    if not gemma3:
        del found["rope.freq_base"]  # llama.cpp's converter does not write it; 10,000 is what all readers take
        found["attn_logit_softcapping"] = float(config.attn_logit_softcapping or 0.0)
        found["final_logit_softcapping"] = float(config.final_logit_softcapping or 0.0)
    elif config.final_logit_softcapping is not None:
        found["final_logit_softcapping"] = float(config.final_logit_softcapping)
    if SLIDING in config.layer_types:
        found["attention.sliding_window"] = config.sliding_window
    if gemma3 and config.rope_scaling_factor != 1.0:
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(config.rope_scaling_factor)}
    architecture = "gemma3" if gemma3 else "gemma2"
    return {"general.architecture": architecture, **{f"{architecture}.{key}": value for key, value in found.items()}}


def check_sayable(
    out: Path, config: GemmaConfig, section: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ConfigError where a reader of these keys would build another network than ``config`` describes."""
    ids = {"eos_token_id": list(config.eos_token_ids), "bos_token_id": config.bos_token_id, "pad_token_id": 0}
    found = read_config(out, section, shapes, ids)
    for field in dataclasses.fields(GemmaConfig):
        ours, theirs = getattr(config, field.name), getattr(found, field.name)
        if field.name == "sliding_window" and SLIDING not in config.layer_types:
            continue
        if field.name not in _ELSEWHERE and ours != theirs:
            raise ConfigError(
                f"{field.name} is {str(ours)[:60]}, where every reader of a GGUF file of {config.num_hidden_layers} "
                f"layers takes {str(theirs)[:60]}; this network cannot be written as one"
            )


def vocabulary_keys(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """A SentencePiece vocabulary's keys from a tokenizer of merges.

    SentencePiece joins the two neighbours whose joint piece has the best score, so a piece's score is its place in the
    list of merges.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        data = json.loads(Path(folder, "tokenizer.json").read_text("utf-8"))
    model = data["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise CheckpointError(f"the tokenizer is a {model.get('type')} without bytes; a GGUF file needs Gemma's kind")
    scores: dict[str, float] = {}
    for merge in model["merges"]:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        scores.setdefault(left + right, -float(len(scores)))
    added = {token["id"]: token for token in data["added_tokens"]}
    pieces = {**{i: piece for piece, i in model["vocab"].items()}, **{i: t["content"] for i, t in added.items()}}
    tokens, ranks, kinds = [], [], []
    for i in range(rows):
        piece = pieces.get(i)
        if piece is None:  # a row without a token, as llama.cpp's converter writes it
            piece, kind = f"[PAD{i}]", 5
        elif piece == model["unk_token"]:
            kind = UNKNOWN
        elif i in added or (len(piece) > 1 and not piece.strip("▁")):  # runs of spaces are user-defined there
            kind = CONTROL if i in added and added[i]["special"] else USER_DEFINED
        else:
            kind = BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", piece) else NORMAL
        if kind == NORMAL:  # single characters come last: nothing is joined to make them
            ranks.append(scores.setdefault(piece, -float(len(scores))))
        else:
            ranks.append(0.0 if kind == BYTE else scores.get(piece, -1000.0))
        tokens.append(piece.replace("▁", " ") if kind == USER_DEFINED else piece)
        kinds.append(kind)
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": ranks,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_id,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
    if (unknown := tokenizer.token_to_id(model["unk_token"])) is not None:
        found["tokenizer.ggml.unknown_token_id"] = unknown
    if tokenizer.end_of_turn_id is not None:
        found["tokenizer.ggml.eot_token_id"] = tokenizer.end_of_turn_id
    if tokenizer.chat_template is not None:
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found


def _write(
    part: Path,
    source: Source,
    shapes: Mapping[str, tuple[int, ...]],
    keys: Mapping[str, Any],
    kind: str,
    progress: Report | None,
) -> dict[str, int]:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(part, keys["general.architecture"])
    writer.add_name(source.name)
    writer.add_file_type(FORMATS[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add: dict[type, Any] = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    add |= {str: writer.add_string, list: writer.add_array}
    for key, value in keys.items():
        if key != "general.architecture":
            add[type(value)](key, value)
    kinds, counts, total, done = {}, dict[str, int](), 0, 0
    for name, shape in shapes.items():
        own = kinds[name] = gguf.GGMLQuantizationType[_type_of(name, shape, kind)]
        block, size = gguf.GGML_QUANT_SIZES[own]
        row = shape[-1] // block * size
        nbytes = row * (shape[0] if len(shape) == 2 else 1)
        if own.name == "F32":
            writer.add_tensor_info(names.to_gguf(name), shape, np.dtype(np.float32), nbytes)
        else:
            writer.add_tensor_info(names.to_gguf(name), (shape[0], row), np.dtype(np.uint8), nbytes, raw_dtype=own)
        counts[own.name] = counts.get(own.name, 0) + 1
        total += nbytes
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in shapes:
            ((_, weight),) = source.tensors(only={name})
            assert isinstance(weight, torch.Tensor)
            data = _packed(weight, kinds[name])
            writer.write_tensor_data(data)
            done += data.nbytes
            if progress is not None:
                progress(done, total)
    finally:
        writer.close()
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    return counts


def _type_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    if len(shape) == 1:
        return "F32"
    if kind != "bf16" and shape[-1] % _BLOCK:
        return "BF16"
    return "Q8_0" if kind == "q4_0" and name == "embed.weight" else FORMATS[kind][0]


def _packed(weight: torch.Tensor, kind: Any) -> Any:
    """A tensor's bytes as numpy has them: fp32 [d], or uint8 [rows, bytes of a row]."""
    import gguf
    import numpy as np

    if weight.dim() == 1:
        return weight.float().numpy()
    step = max(1, _VALUES // weight.shape[1])
    parts = [
        gguf.quants.quantize(weight[start : start + step].float().numpy(), kind)
        for start in range(0, len(weight), step)
    ]
    return np.concatenate(parts).view(np.uint8)
