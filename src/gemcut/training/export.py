"""Write trained weights as a Hugging Face folder, one tensor in memory at a time, without torch.

Names and shapes follow from the config, so each file's header is written first and every tensor goes straight to its
place, in whatever order the tensors come.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gemcut.checkpoint import names
from gemcut.checkpoint.safetensors_header import INDEX, ITEM_BYTES
from gemcut.config import GemmaConfig
from gemcut.errors import CheckpointError, ParameterError
from gemcut.training.importing import CHUNK, DTYPES, Array, check_finite

_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
EMBEDDING = "model.embed_tokens.weight"
#: A tokenizer's files, as Hugging Face names them.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class _Slot:
    file: int
    offset: int
    shape: tuple[int, ...]


def export_folder(
    path: str | Path,
    config: GemmaConfig,
    tensors: Iterable[tuple[str, Any]],
    *,
    dtype: str = "bfloat16",
    beside: str | Path | None = None,
    generation_config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    writes: bool = True,
) -> Path:
    """Write config.json, safetensors files and what belongs to them; ``path`` is whole or not there.

    Args:
        path: a folder that does not exist or is empty.
        tensors: (Hugging Face name, array), each tensor once, in any order. The embedding may have rows past
            ``config.vocab_size`` (a table padded so that a mesh divides it): they are cut off.
        dtype: "bfloat16", "float32" or "float16".
        beside: a folder whose tokenizer files and, without ``generation_config``, generation_config.json are copied.
        writes: False goes through ``tensors`` and writes nothing: what the processes of a run do that do not write
            but must take part in gathering each tensor.

    Raises:
        ParameterError: unknown dtype, or a shard size below 1.
        CheckpointError: a tensor is missing, surplus, there twice, of a wrong shape, or not finite; ``path`` is taken
            or cannot be written. Nothing is left there.
    """
    if dtype not in _CODES:
        raise ParameterError(f"dtype is {dtype!r}; expected one of {', '.join(_CODES)}")
    if max_shard_bytes < 1:
        raise ParameterError(f"max_shard_bytes is {max_shard_bytes}; expected at least 1")
    path = Path(path)
    if not writes:
        for _ in tensors:
            pass
        return path
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} already exists and is not empty; choose another name or remove it")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        _write_weights(part, config, tensors, _CODES[dtype], max_shard_bytes)
        _write_json(part / "config.json", {**config.to_dict(), "torch_dtype": dtype})
        if generation_config:
            _write_json(part / "generation_config.json", generation_config)
        if beside is not None:
            _copy_beside(Path(beside), part)
        if path.exists():
            path.rmdir()
        part.rename(path)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; nothing was left there, free some space and try again"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return path


def hugging_face_shapes(config: GemmaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Hugging Face folder of this config, with its shape, the embedding first."""
    return {names.to_hf(ours): shape for ours, shape in names.expected_shapes(config).items()}


def _write_weights(
    folder: Path, config: GemmaConfig, tensors: Iterable[tuple[str, Any]], code: str, limit: int
) -> None:
    slots, count = _plan(folder, hugging_face_shapes(config), code, limit)
    waiting = dict(slots)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(folder / _file_name(i, count), "r+b")) for i in range(count)]
        for name, tensor in tensors:
            if name not in slots:
                raise CheckpointError(f"cannot export {name}: the config has no place for it")
            if name not in waiting:
                raise CheckpointError(f"cannot export {name}: it came twice")
            slot = waiting.pop(name)
            _write_tensor(files[slot.file], slot, name, tensor, code)
            del tensor  # before the next one is made
        if waiting:
            more = f" and {len(waiting) - 1} more" if len(waiting) > 1 else ""
            raise CheckpointError(f"cannot export: tensor {next(iter(waiting))} is missing{more}")
        for file in files:
            file.flush()
            os.fsync(file.fileno())


def _plan(folder: Path, shapes: Mapping[str, tuple[int, ...]], code: str, limit: int) -> tuple[dict[str, _Slot], int]:
    """Write every file's header and say where each tensor goes."""
    shards: list[dict[str, int]] = [{}]
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * ITEM_BYTES[code]
        if shards[-1] and sum(shards[-1].values()) + nbytes > limit:
            shards.append({})
        shards[-1][name] = nbytes
    slots: dict[str, _Slot] = {}
    for i, shard in enumerate(shards):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, nbytes in shard.items():
            header[name] = {"dtype": code, "shape": list(shapes[name]), "data_offsets": [end, end + nbytes]}
            end += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / _file_name(i, len(shards)), "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
        for name in shard:
            slots[name] = _Slot(i, 8 + len(text) + header[name]["data_offsets"][0], shapes[name])
    if len(shards) > 1:
        weight_map = {name: _file_name(slot.file, len(shards)) for name, slot in sorted(slots.items())}
        total = sum(sum(shard.values()) for shard in shards)
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return slots, len(shards)


def _write_tensor(file: BinaryIO, slot: _Slot, name: str, tensor: Any, code: str) -> None:
    array: Array = np.asarray(tensor)
    if name == EMBEDDING and array.ndim == 2 and array.shape[0] > slot.shape[0]:
        array = array[: slot.shape[0]]
    if array.shape != slot.shape:
        raise CheckpointError(
            f"cannot export {name}: its shape is {list(array.shape)}; the config asks for {list(slot.shape)}"
        )
    file.seek(slot.offset)
    row = math.prod(slot.shape[1:])
    step = max(1, CHUNK // row)
    for start in range(0, slot.shape[0], step):  # converting the whole would hold it twice
        with np.errstate(over="ignore"):  # what a cast overflows is found as infinity
            rows = np.ascontiguousarray(array[start : start + step], DTYPES[code])
        check_finite(f"cannot export {name} as {code}: it", rows)
        file.write(rows.reshape(-1).view(np.uint8).data)


def _file_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _copy_beside(source: Path, target: Path) -> None:
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file() and not (target / name).exists():
            shutil.copyfile(source / name, target / name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", target / "additional_chat_templates")


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
