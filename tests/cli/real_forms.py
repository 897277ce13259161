"""The real Gemma 3 270M as a GGUF file and as a folder, each way of loading it done once for many tests."""

from __future__ import annotations

import re
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf.constants import GGMLQuantizationType

from gemcut.checkpoint.gguf_header import read_header
from gemcut.checkpoint.resolve import resolve
from gemcut.checkpoint.source import Source
from gemcut.gemma import Gemma
from gemcut.hf import AutoModelForCausalLM, AutoTokenizer
from gemcut.placement.devices import parse_device, parse_dtype
from gemcut.quantization.parse import parse_quantization

_KEPT = 4  # bf16, nf4, fp4 and int8 take less than 2 GB together
_loaded: OrderedDict[Any, tuple[Gemma, list[Any]]] = OrderedDict()
_load = Gemma.load
_tokenizers: dict[str, Any] = {}
_tokenizer = Source.tokenizer


def load_once(name: Any, **options: Any) -> Gemma:
    """``Gemma.load``, which callers that load the same model in the same way need only once. All forms are bf16.

    A relative path is what a test has just written: it is loaded each time.
    """
    if not Path(name).is_absolute():
        return _load(name, **options)
    key = (
        str(name),
        parse_dtype(options.get("dtype", "auto"), torch.bfloat16),
        str(parse_device(options.get("device", "auto"))),
        parse_quantization(options.get("quantization")),
        options.get("attn_implementation", "auto"),
        options.get("kernels", "auto"),
        options.get("max_context"),
    )
    if key not in _loaded:
        while len(_loaded) >= _KEPT:
            _loaded.popitem(last=False)
        gemma = _load(name, **options)
        _loaded[key] = gemma, list(gemma.sampling_levels)
    _loaded.move_to_end(key)
    gemma, levels = _loaded[key]
    gemma.sampling_levels[:] = levels  # a command adds what was typed with it
    return gemma


def forget() -> None:
    """Let all loaded models go."""
    _loaded.clear()


def share_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands, the library and the facade load each model, and read each tokenizer, once."""
    monkeypatch.setattr(Gemma, "load", staticmethod(load_once))
    monkeypatch.setattr(Source, "tokenizer", _tokenizer_once)


def as_folder(gguf: Path, folder: Path) -> Path:
    """``gguf`` as a folder in bf16, which is what a GGUF file is expanded to."""
    with pytest.MonkeyPatch.context() as patch:
        share_loads(patch)
        AutoModelForCausalLM.from_pretrained(gguf, dtype=torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf).save_pretrained(folder)
    return folder


def first_layers(path: Path, out: Path, count: int) -> Path:
    """The GGUF file at ``path`` with its first ``count`` layers alone."""
    header = read_header(path)
    kept = [
        t for t in header.tensors.values() if not (match := re.match(r"blk\.(\d+)\.", t.name)) or int(match[1]) < count
    ]
    raw = path.read_bytes()
    first = next(iter(header.tensors)).encode()
    start = raw.index(struct.pack("<Q", len(first)) + first)
    pairs = bytearray(raw[24:start])
    (pair_count,) = struct.unpack_from("<Q", raw, 16)
    key = f"{header.metadata['general.architecture']}.block_count".encode()
    struct.pack_into("<I", pairs, pairs.index(key) + len(key) + 4, count)
    infos, data, place = b"", [], 0
    for tensor in kept:
        shape = tensor.shape[::-1]
        infos += struct.pack("<Q", len(tensor.name)) + tensor.name.encode()
        infos += struct.pack(
            f"<I{len(shape)}QIQ", len(shape), *map(int, shape), GGMLQuantizationType[tensor.type.name], place
        )
        data += [raw[tensor.offset : tensor.offset + tensor.nbytes], b"\0" * (-tensor.nbytes % 32)]
        place += tensor.nbytes + -tensor.nbytes % 32
    head = raw[:8] + struct.pack("<QQ", len(kept), pair_count) + pairs + infos
    out.write_bytes(b"".join([head, b"\0" * (-len(head) % 32), *data]))
    _tokenizers[str(out.resolve())] = _tokenizer_once(resolve(path))
    return out


def _tokenizer_once(self: Source) -> Any:
    """``Source.tokenizer``, which takes seconds each time."""
    key = str(self.path.resolve())
    if key not in _tokenizers:
        _tokenizers[key] = _tokenizer(self)
    return _tokenizers[key]
