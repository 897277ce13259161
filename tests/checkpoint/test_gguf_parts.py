"""Split GGUF files, GGUF files in hub repositories, and headers damaged in every way."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint import gguf_files as made
from gemcut.checkpoint import hub_gguf
from gemcut.checkpoint.gguf_header import read_header
from gemcut.checkpoint.quantize import quantize_checkpoint
from gemcut.checkpoint.resolve import resolve
from gemcut.errors import CheckpointError, CheckpointNotFoundError, GemcutError
from gemcut.quantization.spec import Quantization

IDS = [2, 280, 271, 300, 17, 255, 310]


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Any, list[Path]]:
    """A model in parts, as gguf's own writer splits it."""
    model = made.tiny(2)
    made.write(tmp_path / "x.gguf", model, made.metadata(model), split_max_tensors=9)
    return model, sorted(tmp_path.glob("*.gguf"))


def test_a_split_file_loads_by_the_name_of_any_part(parts: tuple[Any, list[Path]], tmp_path: Path) -> None:
    model, paths = parts
    assert [path.name for path in paths] == [f"x-{i:05}-of-{len(paths):05}.gguf" for i in range(1, len(paths) + 1)]
    assert len(paths) > 3
    for path in (paths[0], paths[2], paths[-1]):
        torch.testing.assert_close(made.logits(path, IDS), made.expected_logits(model, IDS), atol=2e-5, rtol=1e-4)
        assert resolve(path).tokenizer().vocab_size == made.VOCAB
        assert resolve(path).weight_files() == paths
        assert resolve(path).nbytes == sum(value.nbytes for value in made.named(model).values())
    quantize_checkpoint(resolve(paths[1]), tmp_path / "out", Quantization("int8"))
    assert made.logits(tmp_path / "out", IDS).isfinite().all()


def test_parts_that_do_not_belong_together(parts: tuple[Any, list[Path]]) -> None:
    _, paths = parts
    last, third = paths[-1].read_bytes(), paths[2].read_bytes()
    paths[-1].unlink()
    with pytest.raises(CheckpointError, match=f"{paths[-1].name} is missing: copy or download it too"):
        resolve(paths[0]).config()
    paths[2].unlink()
    with pytest.raises(CheckpointError, match=f"{paths[2].name} and 1 more is missing"):
        resolve(paths[1]).config()
    paths[-1].write_bytes(last)
    paths[2].write_bytes(last)
    with pytest.raises(CheckpointError, match=f"says it is part {len(paths)} of {len(paths)}, not 3"):
        resolve(paths[0]).config()
    paths[2].write_bytes(third)
    other = paths[0].with_name("renamed.gguf")
    other.write_bytes(paths[0].read_bytes())
    with pytest.raises(CheckpointError, match=f"part 1 of {len(paths)} of a split GGUF, whose parts are found by"):
        resolve(other).config()
    changed = paths[0].read_bytes()
    at = changed.index(b"split.tensors.count") + 19 + 4
    paths[0].write_bytes(changed[:at] + struct.pack("<I", 7) + changed[at + 4 :])
    with pytest.raises(CheckpointError, match="belongs to another file than"):
        resolve(paths[0]).config()


# ---- which file of a repository -------------------------------------------------------------------------------------

FILES = [
    "README.md",
    "gemma-2-2b-it-Q4_K_M.gguf",
    "gemma-2-2b-it-Q4_K_L.gguf",
    "gemma-2-2b-it.Q8_0.gguf",
    "gemma-2-2b-it-bf16/gemma-2-2b-it-bf16-00001-of-00002.gguf",
    "gemma-2-2b-it-bf16/gemma-2-2b-it-bf16-00002-of-00002.gguf",
    "a-IQ3_M.gguf",
    "b-IQ3_M.gguf",
    "mmproj-model-f16.gguf",
    "gemma-2-2b-it.imatrix.gguf",
]


def test_a_file_or_a_quantization_is_chosen() -> None:
    for wanted in ("Q4_K_M", "q4_k_m", "gemma-2-2b-it-Q4_K_M.gguf"):
        assert hub_gguf.choose("o/n", FILES, wanted) == [FILES[1]]
    assert hub_gguf.choose("o/n", FILES, "Q8_0") == [FILES[3]]
    for wanted in ("bf16", FILES[4], FILES[5]):
        assert hub_gguf.choose("o/n", FILES, wanted) == FILES[4:6]
    assert hub_gguf.choose("o/n", FILES, "mmproj-model-f16.gguf") == ["mmproj-model-f16.gguf"]
    with pytest.raises(CheckpointNotFoundError, match=r"holds 2 files in IQ3_M; choose one: o/n:a-IQ3_M.gguf, o/n:b-"):
        hub_gguf.choose("o/n", FILES, "IQ3_M")
    with pytest.raises(
        CheckpointNotFoundError, match=r"holds no Q4_K; choose one: .*o/n:Q4_K_L, o/n:Q4_K_M, o/n:bf16, o/n:Q8_0"
    ):
        hub_gguf.choose("o/n", FILES, "Q4_K")
    with pytest.raises(CheckpointNotFoundError, match=r"o/n on the hub holds no GGUF file"):
        hub_gguf.choose("o/n", ["README.md", "model.safetensors"], "Q4_K_M")


# ---- damage ---------------------------------------------------------------------------------------------------------


def read_all(path: Path) -> None:
    source = resolve(path)
    source.config()
    source.generation_config()
    source.tokenizer()
    for _ in source.tensors():
        pass


def mutated(whole: bytes, header: int, dice: random.Random) -> bytes:
    raw = bytearray(whole)
    for _ in range(dice.choice([1, 1, 2, 8])):
        at = dice.randrange(header if dice.random() < 0.95 else len(raw))
        raw[at] = dice.choice([0, 255, raw[at] ^ (1 << dice.randrange(8)), dice.randrange(256)])
    kind = dice.random()
    at = dice.randrange(8, header - 16)
    if kind < 0.2:  # a whole 64-bit size, or a float that is none
        raw[at : at + 8] = dice.choice([1 << 63, (1 << 64) - 1, 1 << 40, 0, 0x7FC000007FC00000]).to_bytes(8, "little")
    elif kind < 0.3:  # another type of a value or of an array
        raw[at : at + 4] = dice.randrange(13).to_bytes(4, "little")
    elif kind < 0.4:  # a stretch lost, or there twice
        raw[at : at + dice.randrange(1, 40)] = b"" if dice.random() < 0.5 else raw[at - 8 : at + 16]
    return bytes(raw)


@pytest.mark.slow
@pytest.mark.parametrize("style", ["llama.cpp", "ollama", "split"])
@pytest.mark.filterwarnings("ignore")
def test_damage_is_one_line(tmp_path: Path, style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever bytes change, the answer is a GemcutError, or other values."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = made.tiny(3, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    path = tmp_path / "x.gguf"
    if style == "ollama":
        general = {"tokenizer.ggml.eos_token_ids": [1, 5], "tokenizer.ggml.merges": ["▁ t", "h e", "▁t he"]}
        made.write(path, model, made.ollama_metadata(model, "later"), general=general, space_prefix=None)
    else:
        made.write(path, model, made.metadata(model), split_max_tensors=20 if style == "split" else 0)
        path = path if style == "llama.cpp" else tmp_path / "x-00001-of-00002.gguf"
    whole = path.read_bytes()
    header = min(tensor.offset for tensor in read_header(path).tensors.values())
    dice = random.Random(style)
    refused = 0
    for _ in range(400):
        path.write_bytes(mutated(whole, header, dice))
        try:
            read_all(path)
        except GemcutError as error:
            refused += 1
            assert "\n" not in str(error)  # noqa: PT017
            assert len(str(error)) < 600  # noqa: PT017
    assert 100 < refused < 400


@pytest.mark.parametrize(
    ("key", "kind", "message"),
    [
        ("scores", "string", r"tokenizer.ggml.scores is '\d+ of string'; expected an array of float32"),
        ("tokens", "int32", r"tokenizer.ggml.tokens is '\d+ of int32'; expected an array of string"),
        ("token_type", "float32", r"token_type is '\d+ of float32'; expected an array of int32"),
        ("merges", "int32", r"merges is '\d+ of int32'; expected an array of string"),
        ("scores", "number", r"scores is '7'; expected an array of float32"),
        ("tokens", None, "tokens is missing; the file has no vocabulary"),
    ],
)
def test_a_vocabulary_of_other_types(
    tmp_path: Path, key: str, kind: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    values: dict[str | None, Any] = {
        "string": ["1"] * made.VOCAB, "int32": [1] * made.VOCAB, "float32": [1.0] * made.VOCAB, "number": 7, None: None,
    }  # fmt: skip
    original = gguf.GGUFWriter.add_key_value

    def other(self: Any, name: str, value: Any, *rest: Any, **more: Any) -> None:
        if name != f"tokenizer.ggml.{key}":
            original(self, name, value, *rest, **more)

    monkeypatch.setattr(gguf.GGUFWriter, "add_key_value", other)
    model = made.tiny(2)
    general = {f"tokenizer.ggml.{key}\0": None}

    def add(writer: Any, name: str, value: Any) -> None:
        if not name.endswith("\0"):
            real(writer, name, value)
        elif kind is not None:
            place = gguf.GGUFValueType.UINT32 if kind == "number" else gguf.GGUFValueType.ARRAY
            original(writer, name[:-1], values[kind], place)

    real = made.add
    monkeypatch.setattr(made, "add", add)
    path = made.write(tmp_path / "x.gguf", model, made.metadata(model), general=general)
    with pytest.raises(CheckpointError, match=message):
        resolve(path).tokenizer()
