"""Special tokens looked up in a checkpoint's files, against the tokenizer that is built from all of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from checkpoint import gguf_files
from gemcut.checkpoint.resolve import resolve
from gemcut.text.special import SpecialTokens
from gemcut.text.tokenizer import Tokenizer
from support import gguf_path, tokenizer_dir

SAME = ("bos_id", "eos_id", "start_of_turn_id", "end_of_turn_id", "chat_template", "chat_templates", "template_tokens")


def is_that_of(special: SpecialTokens | None, tokenizer: Any) -> bool:
    assert special is not None
    for name in SAME:
        assert getattr(special, name) == getattr(tokenizer, name), name
    return all(tokenizer.id_to_token(i) == text for i, text in special.texts.items())


def test_the_real_gemma2_folder() -> None:
    special = SpecialTokens.from_folder(tokenizer_dir())
    assert is_that_of(special, Tokenizer.from_folder(tokenizer_dir()))
    assert special is not None
    assert special.knows([1, 107])
    assert not special.knows([1, 200_000])


def test_the_real_270m_file() -> None:
    source = resolve(gguf_path())
    special = source.special_tokens()
    assert is_that_of(special, source.tokenizer())
    assert special is not None
    assert special.knows(source.generation_config()["eos_token_id"])


@pytest.mark.parametrize("general", [{}, {"tokenizer.ggml.eot_token_id": 5, "tokenizer.chat_template": "{{ 1 }}"}])
def test_a_file_written_here(tmp_path: Path, general: dict[str, Any]) -> None:
    model = gguf_files.tiny(2)
    path = gguf_files.write(tmp_path / "x.gguf", model, gguf_files.metadata(model), general=general)
    source = resolve(path)
    assert is_that_of(source.special_tokens(), source.tokenizer())


def changed(folder: Path, **names: Any) -> Path:
    """The real Gemma 2 tokenizer's folder with other small files beside it."""
    folder.mkdir(exist_ok=True)
    shutil.copyfile(tokenizer_dir() / "tokenizer.json", folder / "tokenizer.json")
    for name, content in names.items():
        (folder / name.replace("__", ".")).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "names",
    [
        {},
        {"tokenizer_config__json": {"eos_token": "<end_of_turn>", "chat_template": "{{ messages }}", "sep_token": "x"}},
        {"special_tokens_map__json": {"pad_token": {"content": "<eos>"}}, "chat_template__jinja": "{{ bos_token }}"},
        {"tokenizer_config__json": {"chat_template": [{"name": "default", "template": "a"},
                                                      {"name": "tool_use", "template": "b"}]}},
    ],
)  # fmt: skip
def test_names_and_templates_of_small_files(tmp_path: Path, names: dict[str, Any]) -> None:
    folder = changed(tmp_path / "f", **names)
    assert is_that_of(SpecialTokens.from_folder(folder), Tokenizer.from_folder(folder))


def test_what_only_the_tokenizer_can_tell(tmp_path: Path) -> None:
    """A special token that is not among the added ones, a file cut short, or one that is no tokenizer's."""
    folder = changed(tmp_path / "f", tokenizer_config__json={"eos_token": "▁the"})
    assert SpecialTokens.from_folder(folder) is None
    (folder / "tokenizer_config.json").unlink()
    assert SpecialTokens.from_folder(folder) is not None
    whole = (folder / "tokenizer.json").read_bytes()
    strange = (b"3]}", b'{"id": "1", "content": "<eos>"}]}', b"[" * 100_000 + b"}")
    cut = (b"", whole[:100_000], whole[: whole.index(b'"normalizer"')], b"{}")
    for data in (*cut, *(b'{"added_tokens": [' + rest for rest in strange)):
        (folder / "tokenizer.json").write_bytes(data)
        assert SpecialTokens.from_folder(folder) is None
    (folder / "tokenizer.json").unlink()
    assert SpecialTokens.from_folder(folder) is None
