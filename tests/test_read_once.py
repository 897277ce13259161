"""What tests share is what each would have read for itself, and nobody's changes reach anybody else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import AddedToken

import read_once
from checkpoint import gguf_files
from gemcut.text import Tokenizer, tokenizer_json
from support import tokenizer_dir


@pytest.mark.slow
def test_a_shared_tokenizer_is_as_read_anew() -> None:
    data = (tokenizer_dir() / "tokenizer.json").read_bytes()
    first, anew = tokenizer_json.read_backend(data), read_once._read_backend(data)
    assert tokenizer_json.read_backend is read_once.read_backend
    assert first.to_str() == anew.to_str()
    first.add_special_tokens([AddedToken("<mine>", special=True)])
    first.enable_truncation(3)
    first.encode_special_tokens = True
    second = Tokenizer.from_folder(tokenizer_dir()).backend
    assert second.to_str() == anew.to_str()
    assert second.encode_special_tokens is False
    assert second.token_to_id("<mine>") is None
    text = "<bos>The sky\n\nis <b>blue</b>. 日本語 𒀀<unused3>"
    assert second.encode(text).ids == anew.encode(text).ids


def test_a_shared_gguf_file_is_as_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for numpy's class: as gguf's own reader over numpy's own memory maps."""
    monkeypatch.setattr(read_once, "_LARGE", 0)
    path = tmp_path / "tiny.gguf"
    model = gguf_files.tiny(3)
    gguf_files.write(path, model, gguf_files.metadata(model))
    shared: Any = gguf.GGUFReader(path)
    assert gguf.GGUFReader(str(path)) is shared
    monkeypatch.setattr(gguf.gguf_reader, "np", np)
    anew = read_once._GgufReader(path)
    assert isinstance(anew.data, np.memmap)
    assert shared.fields.keys() == anew.fields.keys()
    for name, field in anew.fields.items():
        found = shared.fields[name]
        assert (found.offset, found.data, found.types) == (field.offset, field.data, field.types), name
        assert all(np.array_equal(a, b) for a, b in zip(found.parts, field.parts, strict=True)), name
    assert len(shared.tensors) == len(anew.tensors) > 0
    for found, tensor in zip(shared.tensors, anew.tensors, strict=True):
        assert (found.name, found.tensor_type) == (tensor.name, tensor.tensor_type)
        assert np.array_equal(found.data, tensor.data), found.name
    model = gguf_files.tiny(3, num_hidden_layers=1)
    gguf_files.write(path, model, gguf_files.metadata(model))
    assert len(gguf.GGUFReader(path).tensors) < len(shared.tensors)  # another file by the same name is read
