"""Read a Gemma 2 or Gemma 3 GGUF file: metadata to config and vocabulary, quantized blocks to tensors."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from gemcut.checkpoint import names
from gemcut.checkpoint.gguf_header import GgufHeader, GgufTensor, read_header
from gemcut.config import GemmaConfig
from gemcut.errors import CheckpointError, ConfigError

_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_CHUNK = 1 << 20  # weights dequantized in one go: small enough for the cache, large enough to hide NumPy's overhead
# The 27B of each generation divides queries by sqrt(hidden / heads), all others by sqrt(head_dim). The file does not
# say so; the number of layers tells them apart.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


class GgufFile:
    """One GGUF file. Opening checks the header and that it holds what its metadata promises.

    Raises CheckpointError for a damaged file, ConfigError for another architecture.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._header: GgufHeader = read_header(path)
        self.architecture = self._text("general.architecture")
        if self.architecture not in _LAYERS_OF_27B:
            raise ConfigError(
                f"{path} holds a model of architecture {self.architecture!r}; gemcut reads 'gemma2' and 'gemma3'"
            )
        if self._header.metadata.get("split.count", 0) not in (0, 1):
            raise CheckpointError(f"{path} is one part of a split GGUF; join the parts with llama-gguf-split --merge")
        self._tensors: dict[str, GgufTensor] = {}
        self._head: GgufTensor | None = None
        for name, tensor in self._header.tensors.items():
            self._add(name, tensor)
        self.config = self._config()
        theirs = {ours: tensor.name for ours, tensor in self._tensors.items()}
        names.check_shapes(path, self.shapes, self.config, theirs, "gguf")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Our names and shapes, in file order."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data in the file."""
        return sum(tensor.nbytes for tensor in self._header.tensors.values())

    @property
    def quantization(self) -> dict[str, int]:
        """Number of tensors by GGML type name, for display."""
        types = [tensor.type.name for tensor in self._tensors.values()]
        return {name: types.count(name) for name in sorted(set(types))}

    def tensors(
        self,
        progress: Callable[[int, int], None] | None = None,
        dtype: torch.dtype | None = None,
        only: Collection[str] | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Stream (our name, tensor) in file order: norms in fp32, other weights in ``dtype``.

        ``dtype`` None: F32, F16 and BF16 tensors as stored, quantized ones dequantized to fp32.
        ``only`` names the tensors wanted; None: all.
        """
        done, total = 0, self.nbytes
        with ThreadPoolExecutor(
            max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)),
            thread_name_prefix="dequantize",
        ) as pool:
            for name, tensor in self._tensors.items():
                if only is not None and name not in only:
                    continue
                wanted = torch.float32 if name.endswith(".scale") else dtype
                yield name, self._read(tensor, wanted, pool)
                self._header.file.release(tensor.offset, tensor.nbytes)
                done += tensor.nbytes
                if progress:
                    progress(done, total)
        if self._head and progress and only is None:
            progress(total, total)

    def generation_config(self) -> dict[str, Any]:
        """Token ids of the metadata under generation_config.json's names."""
        stops = [self._id("eos"), self._id("eot"), self._id("eom")]
        found = {"bos_token_id": self._id("bos"), "pad_token_id": self._id("padding")}
        found["eos_token_id"] = list(dict.fromkeys(i for i in stops if i is not None)) or None  # type: ignore[assignment]
        return {key: value for key, value in found.items() if value is not None}

    def vocabulary(self) -> dict[str, Any]:
        """The keyword arguments of ``Tokenizer.from_gguf_vocab``."""
        tokens, scores, types = (self._list(key) for key in ("tokens", "scores", "token_type"))
        if not (len(tokens) == len(scores) == len(types) == self.config.vocab_size):
            raise CheckpointError(
                f"{self.path}: {len(tokens)} tokens, {len(scores)} scores and {len(types)} types for a vocabulary of "
                f"{self.config.vocab_size}"
            )
        if not all(isinstance(token, str) for token in tokens):
            raise CheckpointError(f"{self.path}: tokenizer.ggml.tokens holds other things than texts")
        metadata = self._header.metadata
        template = metadata.get("tokenizer.chat_template")
        return {
            "tokens": tokens,
            "scores": scores,
            "types": types,
            "chat_template": template if isinstance(template, str) else None,
            "add_space_prefix": metadata.get("tokenizer.ggml.add_space_prefix", True) is True,
            "bos_id": self._id("bos", 2),
            "eos_id": self._id("eos", 1),
            "pad_id": self._id("padding", 0),
            "unk_id": self._id("unknown", 3),
            "cache_key": self._header.digest,
        }

    def _add(self, name: str, tensor: GgufTensor) -> None:
        try:
            ours = names.from_gguf(name)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        if tensor.type not in _PLAIN:
            _require_dequantizer(self.path, tensor)
        if ours == names.LM_HEAD:
            self._head = tensor
        elif ours is not None:
            self._tensors[ours] = tensor

    def _read(self, tensor: GgufTensor, dtype: torch.dtype | None, pool: ThreadPoolExecutor) -> torch.Tensor:
        if tensor.type in _PLAIN:
            stored = self._header.file.tensor(tensor.offset, tensor.shape, _PLAIN[tensor.type])
            return stored if dtype is None else stored.to(dtype)
        out = torch.empty(math.prod(tensor.shape), dtype=dtype or torch.float32)
        block, block_bytes = GGML_QUANT_SIZES[tensor.type]
        data = np.frombuffer(self._header.file.map, np.uint8, tensor.nbytes, tensor.offset)
        step = max(1, _CHUNK // block)

        def convert(first: int) -> None:
            # One long row: blocks do not know of rows, and gguf works through few long rows fastest.
            raw = data[first * block_bytes : (first + step) * block_bytes]
            values = torch.from_numpy(quants.dequantize(raw.reshape(1, -1), tensor.type)).view(-1)
            out[first * block : first * block + len(values)].copy_(values)

        with np.errstate(all="ignore"):
            # A thread of the pool is not in the caller's inference mode, and may fill a tensor made there only in one
            # of its own; tensors made outside it may be filled in it, too.
            list(pool.map(torch.inference_mode()(convert), range(0, tensor.nbytes // block_bytes, step)))
        return out.view(tensor.shape)

    def _config(self) -> GemmaConfig:
        gemma3 = self.architecture == "gemma3"
        layers, heads = self._number("block_count"), self._number("attention.head_count")
        hidden, head_dim = self._number("embedding_length"), self._number("attention.key_length")
        if self._number("attention.value_length", head_dim) != head_dim:
            raise ConfigError(f"{self.path}: value_length differs from key_length {head_dim}; gemcut needs them equal")
        embedding = self._tensors.get("embed.weight")
        if embedding is None:
            raise CheckpointError(f"{self.path}: tensor token_embd.weight is missing; the checkpoint is incomplete")
        large = layers == _LAYERS_OF_27B[self.architecture] and heads
        theta = self._number("rope.freq_base", 1_000_000.0 if gemma3 else 10_000.0)
        data: dict[str, Any] = {
            "model_type": "gemma3_text" if gemma3 else "gemma2",
            "vocab_size": embedding.shape[0],
            "hidden_size": hidden,
            "intermediate_size": self._number("feed_forward_length"),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": self._number("attention.head_count_kv"),
            "head_dim": head_dim,
            "query_pre_attn_scalar": hidden / heads if large else head_dim,
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": self._number("context_length"),
            "sliding_window": self._number("attention.sliding_window"),
            "attn_logit_softcapping": self._number("attn_logit_softcapping", None if gemma3 else 50.0),
            "final_logit_softcapping": self._number("final_logit_softcapping", None if gemma3 else 30.0),
            "rope_theta": theta,
            "eos_token_id": self.generation_config().get("eos_token_id", [1]),
            "bos_token_id": self._id("bos", 2),
            "pad_token_id": self._id("padding", 0),
        }
        if gemma3:
            data["rope_local_base_freq"] = self._number("rope.freq_base_swa", 10_000.0)
            data["sliding_window_pattern"] = self._number("attention.sliding_window_pattern", 6)
        scaling = self._header.metadata.get(f"{self.architecture}.rope.scaling.type", "none")
        if scaling != "none":
            data["rope_scaling"] = {"rope_type": scaling, "factor": self._number("rope.scaling.factor")}
        try:
            return GemmaConfig.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None

    def _text(self, key: str) -> str:
        value = self._header.metadata.get(key)
        if not isinstance(value, str):
            raise CheckpointError(f"{self.path}: metadata {key} is {str(value)[:40]!r}; expected a text")
        return value

    def _number(self, key: str, *default: Any) -> Any:
        """A number of the architecture's own section. Raises ConfigError when it is absent and has no default."""
        full = f"{self.architecture}.{key}"
        value = self._header.metadata.get(full, *default)
        if (value is None and not default) or isinstance(value, (bool, str, list)):
            raise ConfigError(f"{self.path}: metadata {full} is {str(value)[:40]!r}; expected a number")
        return value

    def _list(self, key: str) -> list[Any]:
        value = self._header.metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, list):
            raise CheckpointError(f"{self.path}: metadata tokenizer.ggml.{key} is missing; the file has no vocabulary")
        return value

    def _id(self, key: str, default: int | None = None) -> int | None:
        value = self._header.metadata.get(f"tokenizer.ggml.{key}_token_id", default)
        if value is not None and (type(value) is not int or value < 0):
            raise CheckpointError(f"{self.path}: metadata tokenizer.ggml.{key}_token_id is {str(value)[:40]!r}")
        return value


def _require_dequantizer(path: Path, tensor: GgufTensor) -> None:
    """Raise unless gguf can dequantize this type, found out on one block of zeros."""
    try:
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[tensor.type][1]), np.uint8), tensor.type)
    except NotImplementedError:
        raise CheckpointError(
            f"{path}: tensor {tensor.name} has type {tensor.type.name}, which cannot be dequantized here; use a file "
            "quantized as Q4_K_M, Q8_0, F16 or similar"
        ) from None
