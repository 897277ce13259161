"""Read a Gemma 2 or Gemma 3 GGUF file: metadata to config and vocabulary, quantized blocks to tensors."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemcut.checkpoint import names
from gemcut.checkpoint.ggml_types import WHOLE, refusal
from gemcut.checkpoint.gguf_config import LAYERS_OF_27B, read_config
from gemcut.checkpoint.gguf_header import GgufArray, GgufTensor
from gemcut.checkpoint.gguf_parts import all_tensors, read_parts
from gemcut.errors import CheckpointError, ConfigError
from gemcut.progress import Report

if TYPE_CHECKING:
    import torch

    from gemcut.checkpoint.gguf_weight import Dequantize, GgufWeight

#: Our name of a special token, the file's, and its id where the file does not say.
_ROLES = (("bos", "bos", 2), ("eos", "eos", 1), ("pad", "padding", 0), ("unk", "unknown", 3))
_ROPE_FACTORS = "rope_freqs.weight"


class GgufFile:
    """One GGUF file, or all parts of a split one. Opening checks headers and that they hold what the metadata promises.

    ``paths``: the parts, in order.
    Raises CheckpointError for a damaged file, ConfigError for another architecture.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._header, parts = read_parts(path)
        self.paths = [part.file.path for part in parts]
        self._all = all_tensors(parts)
        check_kind(path, self._header.metadata, self._all)
        self._tensors: dict[str, GgufTensor] = {}
        self._heads: list[GgufTensor] = []  # the output head, where the file repeats the embedding
        self._tied = False
        for name, tensor in self._all.items():
            self._add(name, tensor)
        if "embed.weight" not in self._tensors:
            raise CheckpointError(f"{path}: tensor token_embd.weight is missing; the checkpoint is incomplete")
        ids = {"eos_token_id": [1], "bos_token_id": 2, "pad_token_id": 0, **self._special_ids()}
        self.config = read_config(path, self._header.metadata, self.shapes, ids)
        theirs = {ours: tensor.name for ours, tensor in self._tensors.items()}
        names.check_shapes(path, self.shapes, self.config, theirs, "gguf")
        table = self._tensors["embed.weight"]
        for head in self._heads:
            if head.shape != table.shape:
                raise CheckpointError(f"{path}: {head.name} has shape {list(head.shape)}, unlike the embedding")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Our names and shapes, in file order."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data in the file."""
        return sum(tensor.nbytes for tensor in self._all.values())

    @property
    def quantization(self) -> dict[str, int]:
        """Number of tensors by GGML type name, for display."""
        types = [tensor.type.name for tensor in self._tensors.values()]
        return {name: types.count(name) for name in sorted(set(types))}

    def tensors(
        self,
        progress: Report | None = None,
        dtype: torch.dtype | None = None,
        only: Collection[str] | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Stream (our name, tensor) in file order: norms in fp32, other weights in ``dtype``.

        ``dtype`` None: F32, F16 and BF16 tensors as stored, quantized ones dequantized to fp32.
        ``only`` names the tensors wanted; None: all.
        """
        for name, weight in self.weights(progress, dtype, only):
            yield name, weight.whole()

    def weights(
        self,
        progress: Report | None = None,
        dtype: torch.dtype | None = None,
        only: Collection[str] | None = None,
        dequantize: Dequantize | None = None,
    ) -> Iterator[tuple[str, GgufWeight]]:
        """As `tensors`, each still in the file: it is to be read before the next one is asked for.

        ``dequantize`` is tried before the gguf library, whose values it must give.
        """
        import torch

        from gemcut.checkpoint.gguf_weight import GgufWeight

        done, total = 0, self.nbytes
        with ThreadPoolExecutor(
            max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)),
            thread_name_prefix="dequantize",
        ) as pool:
            self._require_tied(pool)
            for name, tensor in self._tensors.items():
                if only is not None and name not in only:
                    continue
                wanted = torch.float32 if name.endswith(".scale") else dtype
                yield name, GgufWeight(tensor, wanted, pool, dequantize)
                tensor.file.release(tensor.offset, tensor.nbytes)
                done += tensor.nbytes
                if progress:
                    progress(done, total)
        if self._heads and progress and only is None:
            progress(total, total)

    def generation_config(self) -> dict[str, Any]:
        """Token ids of the metadata under generation_config.json's names."""
        return self._special_ids()

    def vocabulary(self) -> dict[str, Any]:
        """The keyword arguments of ``Tokenizer.from_gguf_vocab``."""
        metadata, rows = self._header.metadata, self.config.vocab_size
        merges, arrays = self._vocabulary()
        tokens, types = arrays[0].values(), arrays[1].values()
        scores = arrays[2].values() if len(arrays) == 3 else [0.0] * len(tokens)
        # Ollama keeps tokens that have no row; no text can be computed with them. A row without a token is legal.
        kept = _without_padding(tokens[:rows], types[:rows])
        template = metadata.get("tokenizer.chat_template")
        return {
            "tokens": tokens[:kept],
            "scores": scores[:kept],
            "types": types[:kept],
            "merges": None if merges is None else merges.values(),
            "chat_template": template if isinstance(template, str) else None,
            # Gemma puts none in front; Ollama's converter does not say so.
            "add_space_prefix": metadata.get("tokenizer.ggml.add_space_prefix", False) is not False,
            **{f"{role}_id": self._id(theirs, default) for role, theirs, default in _ROLES},
            "cache_key": self._header.digest,
        }

    def special_tokens(self, named: Collection[str]) -> tuple[dict[int, str], dict[str, str], dict[str, str]]:
        """(texts of the special tokens and of those ``named``, by id; texts by role; chat templates by name).

        The vocabulary is not read for it, but looked at as in `vocabulary`, whose errors it raises. An id that is no
        token is left out.
        """
        tokens, template = self._vocabulary()[1][0], self._header.metadata.get("tokenizer.chat_template")
        roles = {f"{role}_token": self._id(theirs, default) for role, theirs, default in _ROLES}
        wanted = {i for i in (*roles.values(), *self._special_ids().get("eos_token_id", ())) if i is not None}
        texts = tokens.texts(wanted, named, self.config.vocab_size)
        names = {role: texts[i] for role, i in roles.items() if i in texts}
        return texts, names, {"default": template} if isinstance(template, str) else {}

    def _vocabulary(self) -> tuple[GgufArray | None, list[GgufArray]]:
        """(merges, [tokens, types, and scores unless merges stand for them]), as many of each of the latter."""
        metadata = self._header.metadata
        model = metadata.get("tokenizer.ggml.model", "llama")
        merges = self._array("merges", "string") if "tokenizer.ggml.merges" in metadata else None
        if model not in ("llama", "gpt2") or (model == "gpt2" and not merges):
            raise CheckpointError(
                f"{self.path}: metadata tokenizer.ggml.model is {str(model)[:40]!r}; gemcut reads the vocabulary "
                "'llama', and 'gpt2' with its merges"
            )
        arrays = [self._array("tokens", "string"), self._array("token_type", "int32", "uint32")]
        if model == "llama":
            arrays.append(self._array("scores", "float32", "float64"))
        if len(set(map(len, arrays))) != 1:
            scores = len(arrays[-1]) if model == "llama" else len(arrays[0])
            raise CheckpointError(
                f"{self.path}: {len(arrays[0])} tokens, {scores} scores and {len(arrays[1])} types; expected as many "
                "of each"
            )
        return merges, arrays

    def _special_ids(self) -> dict[str, Any]:
        stops = [self._id("eos"), self._id("eot"), self._id("eom")]
        if "tokenizer.ggml.eos_token_ids" in self._header.metadata:  # Ollama's, from generation_config.json
            stops += self._list("eos_token_ids", "int32", "uint32")
        found = {"bos_token_id": self._id("bos"), "pad_token_id": self._id("padding")}
        found["eos_token_id"] = list(dict.fromkeys(i for i in stops if i is not None)) or None  # type: ignore[assignment]
        return {key: value for key, value in found.items() if value is not None}

    def _add(self, name: str, tensor: GgufTensor) -> None:
        if name == _ROPE_FACTORS:
            _require_ones(self.path, tensor)
            return
        try:
            ours = names.from_gguf(name)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        if ours is None:
            return
        if not tensor.type.readable:
            raise CheckpointError(f"{self.path}: tensor {name} has type {refusal(tensor.type.number)}")
        if ours == names.LM_HEAD:
            self._heads.append(tensor)
        else:
            self._tensors[ours] = tensor

    def _require_tied(self, pool: ThreadPoolExecutor) -> None:
        """Raise CheckpointError where the file brings an output head whose values are not the embedding's.

        A few rows are compared at a time; the answer is kept.
        """
        import torch

        table = self._tensors["embed.weight"]
        for head in [] if self._tied else self._heads:
            rows = max(1, (64 << 20) // (head.shape[1] * 4))
            for start in range(0, head.shape[0], rows):
                parts = [_rows(each, start, rows) for each in (table, head)]
                ours, theirs = (self._read(part, torch.float32, pool) for part in parts)
                if not torch.equal(ours, theirs):
                    raise CheckpointError(
                        f"{self.path}: {head.name} differs from the embedding; every Gemma ties the two, so this file "
                        "is of another kind or damaged"
                    )
                for part in parts:
                    part.file.release(part.offset, part.nbytes)
        self._tied = True

    def _read(self, tensor: GgufTensor, dtype: torch.dtype | None, pool: ThreadPoolExecutor) -> torch.Tensor:
        from gemcut.checkpoint.gguf_weight import GgufWeight

        return GgufWeight(tensor, dtype, pool, None).whole()

    def _list(self, key: str, *kinds: str) -> list[Any]:
        """The entries of `_array`."""
        return self._array(key, *kinds).values()

    def _array(self, key: str, *kinds: str) -> GgufArray:
        """An array of the vocabulary. Raises CheckpointError where it is missing or holds another kind of thing."""
        full = f"tokenizer.ggml.{key}"
        value = self._header.metadata.get(full)
        if value is None:
            raise CheckpointError(f"{self.path}: metadata {full} is missing; the file has no vocabulary")
        if not isinstance(value, GgufArray) or value.kind not in kinds:
            found = f"{len(value)} of {value.kind}" if isinstance(value, GgufArray) else str(value)[:40]
            raise CheckpointError(f"{self.path}: metadata {full} is {found!r}; expected an array of {kinds[0]}")
        return value

    def _id(self, key: str, default: int | None = None) -> int | None:
        value = self._header.metadata.get(f"tokenizer.ggml.{key}_token_id", default)
        if value is not None and (type(value) is not int or value < 0):
            raise CheckpointError(f"{self.path}: metadata tokenizer.ggml.{key}_token_id is {str(value)[:40]!r}")
        return value


def check_kind(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> None:
    """Raise ConfigError or CheckpointError, and say what to do, unless the file holds a model of the family."""
    kind, architecture = metadata.get("general.type", "model"), metadata.get("general.architecture")
    if kind == "adapter" or "adapter.type" in metadata:
        base = metadata.get("general.base_model.0.name") or metadata.get("general.base_model.0.repo_url")
        of = f" of {base}" if isinstance(base, str) else f" of a {architecture} model"
        raise CheckpointError(
            f"{path} is a LoRA adapter{of}, not a model; merge it into its base (llama-export-lora, or peft's "
            "merge_and_unload) and load the result"
        )
    if kind == "mmproj" or architecture == "clip":
        raise CheckpointError(
            f"{path} is an image encoder (mmproj) that belongs to a model; give the .gguf file of the model itself"
        )
    if kind == "imatrix" or "imatrix.datasets" in metadata:
        raise CheckpointError(f"{path} is an importance matrix for quantizing, not a model; give the model's own file")
    if not isinstance(architecture, str):
        raise CheckpointError(
            f"{path}: metadata general.architecture is {str(architecture)[:40]!r}; expected 'gemma2' or 'gemma3'"
        )
    if architecture not in LAYERS_OF_27B:
        raise ConfigError(f"{path} holds a model of architecture {architecture!r}; gemcut reads 'gemma2' and 'gemma3'")
    if not tensors:
        raise CheckpointError(f"{path} holds a vocabulary and no weights; give the model's own file")
    version = metadata.get("general.quantization_version", 2)
    if version != 2 and any(tensor.type.name not in WHOLE for tensor in tensors.values()):
        raise CheckpointError(
            f"{path} is quantized in blocks of version {str(version)[:40]}, which are laid out otherwise; gemcut reads "
            "version 2: take a file made by a current llama.cpp"
        )


def _rows(tensor: GgufTensor, start: int, count: int) -> GgufTensor:
    """``count`` rows of a matrix from ``start`` on (fewer at its end)."""
    columns, row_bytes = tensor.shape[1], tensor.nbytes // tensor.shape[0]
    count = min(count, tensor.shape[0] - start)
    offset = tensor.offset + start * row_bytes
    return GgufTensor(tensor.name, tensor.file, tensor.type, (count, columns), offset, count * row_bytes)


def _without_padding(tokens: list[str], types: list[int]) -> int:
    """How many tokens there are before the dummies that converters put at the end for rows without a token."""
    end = len(tokens)
    while end and types[end - 1] in (4, 5) and tokens[end - 1].startswith("[PAD") and tokens[end - 1][4:-1].isdigit():
        end -= 1
    return end


def _require_ones(path: Path, tensor: GgufTensor) -> None:
    """Rotary frequencies' own factors are what long-context models have; all ones changes nothing."""
    import numpy as np

    if tensor.type.name != "F32" or any(np.frombuffer(tensor.file.map, "<f4", tensor.nbytes // 4, tensor.offset) != 1):
        raise CheckpointError(
            f"{path}: tensor {tensor.name} stretches the rotary angles, which no published Gemma does; take a file "
            "made from the original model"
        )
