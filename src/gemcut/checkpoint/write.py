"""Write a checkpoint folder in Hugging Face layout: complete under its name, or not there at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gemcut.checkpoint.bnb import config_entries
from gemcut.checkpoint.safetensors_header import INDEX
from gemcut.config import GemmaConfig
from gemcut.errors import CheckpointError
from gemcut.quantization.spec import Quantization
from gemcut.quantization.state import to_stored
from gemcut.quantization.weights import CheckpointWeight

if TYPE_CHECKING:
    from gemcut.text.tokenizer import Tokenizer

_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int8: "I8",
}
_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def save_folder(
    path: str | Path,
    config: GemmaConfig,
    tensors: Iterable[tuple[str, CheckpointWeight]],
    tokenizer: Tokenizer | None,
    max_shard_bytes: int = 5_000_000_000,
    *,
    generation_config: Mapping[str, Any] | None = None,
    quantization: Quantization | None = None,
) -> Path:
    """Write config.json, safetensors (Hugging Face names, in shards of at most ``max_shard_bytes``), and the tokenizer.

    Everything goes to a temporary folder beside ``path`` that is renamed at the end: a full disk, an error or Ctrl-C
    leaves nothing behind. ``path`` must not exist or be empty. One shard's tensors are held at a time. Cut weights are
    written as bitsandbytes stores them; ``quantization`` says in config.json what they are.
    Raises CheckpointError.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} already exists and is not empty; choose another name or remove it")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        dtype = _write_shards(part, tensors, max_shard_bytes)
        data = {**config.to_dict(), "torch_dtype": dtype}
        if quantization is not None:
            data |= config_entries(quantization, dtype)
        _write_json(part / "config.json", data)
        if generation_config:
            _write_json(part / "generation_config.json", generation_config)
        if tokenizer is not None:
            tokenizer.save(part)
        if path.exists():
            path.rmdir()
        part.rename(path)
    except CheckpointError:  # one of them is an OSError too
        raise
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; nothing was left there, free some space and try again"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return path


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> int:
    """Write one safetensors file and flush it to disk; return its bytes of tensor data. Raises OSError."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Wider types first keep every tensor aligned to its own size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    for name, tensor in ordered:
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"cannot save {name} as {tensor.dtype}; expected one of {', '.join(_DTYPES.values())}"
            )
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            file.write(raw.numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return end


def _write_shards(folder: Path, tensors: Iterable[tuple[str, CheckpointWeight]], limit: int) -> str:
    """Write the weights as they come, starting a new file before one would pass ``limit``; return the main dtype.

    The main dtype is that of most bytes of whole tensors. What stands for one cut weight lies in one file.
    """
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total = held = 0
    bytes_of: dict[torch.dtype, int] = {}

    def flush() -> None:
        nonlocal total, held
        if pending:
            total += write_safetensors(folder / f"shard-{len(shards)}", pending)
            shards.append(list(pending))
        pending.clear()
        held = 0

    for name, weight in tensors:
        stored = to_stored(name, weight)
        nbytes = sum(tensor.nbytes for tensor in stored.values())
        if held and held + nbytes > limit:
            flush()
        pending |= stored
        held += nbytes
        if isinstance(weight, torch.Tensor):
            bytes_of[weight.dtype] = bytes_of.get(weight.dtype, 0) + nbytes
    flush()
    if not shards:
        raise CheckpointError("there is no tensor to save")
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
    else:
        weight_map: dict[str, str] = {}
        for i, held_names in enumerate(shards):
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            (folder / f"shard-{i}").rename(folder / file)
            weight_map |= dict.fromkeys(held_names, file)
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    return _NAMES[_DTYPES[max(bytes_of, key=lambda dtype: bytes_of[dtype])]]


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        with contextlib.suppress(OSError):
            os.fsync(file.fileno())
