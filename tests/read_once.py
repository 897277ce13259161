"""Large files that hundreds of tests read again and again: read once a process, and handed out as if read anew.

The real vocabulary has 256,000 entries: reading tokenizer.json takes 1.5 s each time, and gguf's reader 20 s for the
real GGUF file. ``test_read_once.py`` checks that what is handed out is what reading would give.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import gguf.gguf_reader
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

from gemcut.text import tokenizer_json

_LARGE = 1 << 20
_read_backend, _GgufReader = tokenizer_json.read_backend, gguf.GGUFReader
_backends: dict[bytes, Backend] = {}


def read_backend(data: bytes) -> Backend:
    """``tokenizer_json.read_backend``: the large model within a tokenizer, which never changes, is shared."""
    if len(data) < _LARGE:
        return _read_backend(data)
    key = hashlib.sha256(data).digest()
    backend = _backends[key] if key in _backends else _read_backend(data)
    if backend.truncation or backend.padding:  # which a copy would lack
        return backend
    _backends[key] = backend
    return _copy(backend)


def _copy(backend: Backend) -> Backend:
    """A tokenizer of its own, with the same model."""
    new = Backend(backend.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if getattr(backend, part) is not None:
            setattr(new, part, getattr(backend, part))
    new.add_tokens([token for _, token in sorted(backend.get_added_tokens_decoder().items())])
    return new


class _PlainArrays:
    """numpy for gguf's reader, whose 6,500,000 slices take a third of the time without the class ``memmap``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def memmap(self, *args: Any, **options: Any) -> np.ndarray[Any, Any]:
        return np.memmap(*args, **options).view(np.ndarray)


def gguf_reader(path: Any, mode: Any = "r") -> Any:
    """``gguf.GGUFReader``, for a large file once; nobody changes what it gives."""
    status = Path(path).stat()
    if mode != "r" or status.st_size < _LARGE:
        return _GgufReader(path, mode)
    return _large_gguf(str(path), status.st_size, status.st_mtime_ns)


@cache
def _large_gguf(path: str, size: int, changed: int) -> Any:
    return _GgufReader(path)


def install(patch: pytest.MonkeyPatch) -> None:
    """Let the package under test, transformers and gguf itself read large files once."""
    patch.setattr(tokenizer_json, "read_backend", read_backend)
    patch.setattr(gguf.gguf_reader, "np", _PlainArrays())
    patch.setattr(gguf, "GGUFReader", gguf_reader)
