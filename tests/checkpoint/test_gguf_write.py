"""gemcut convert: what gguf's own reader finds in the file, and what the loader computes from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import support
from checkpoint.gguf_files import logits
from cli.conftest import Cli, cli  # noqa: F401
from gemcut import Gemma
from gemcut.checkpoint.gguf_write import write_gguf
from gemcut.checkpoint.names import to_gguf
from gemcut.checkpoint.resolve import resolve
from gemcut.errors import CheckpointError, ConfigError, GemcutError

pytestmark = pytest.mark.slow  # each file has a vocabulary of 256,000 tokens

IDS = [2, 7, 9, 200, 7, 31, 5, 9, 250, 3]
TEXTS = [
    "Hello  world,\n\n   naïve 漢字 🦜!",
    "<b>x</b>\t  1234567",
    " a   b",
    "",
    "def f(x):\n        return x ** 2\n",
]


def _folder(path: Path, kind: str, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Path:
    """A random checkpoint with the real tokenizer, whose rows blocks of 32 divide; its head divides queries."""
    sizes = {"vocab_size": 256_000, "hidden_size": 64, "intermediate_size": 96, "query_pre_attn_scalar": 16}
    layers = {"num_hidden_layers": 7} if kind == "gemma3_text" else {}
    config = support.tiny_config(kind, **{**sizes, **layers, **more})
    return support.save_checkpoint(path, support.hf_model(config, dtype=dtype), tokenizer=True)


@pytest.fixture(scope="module", params=["gemma2", "gemma3_text"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _folder(tmp_path_factory.mktemp("convert") / "c", request.param)


def test_bf16_is_the_same_network(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    counts = write_gguf(resolve(folder), out, "bf16")
    assert set(counts) == {"BF16", "F32"}
    assert torch.equal(logits(out, IDS), logits(folder, IDS))
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
    ours, theirs = resolve(out), resolve(folder)
    one, other = ours.tokenizer(), theirs.tokenizer()
    for text in TEXTS:
        assert one.encode(text) == other.encode(text)
    assert one.chat_template == other.chat_template
    assert (one.bos_id, one.eos_id, one.pad_id, one.end_of_turn_id) == (
        other.bos_id,
        other.eos_id,
        other.pad_id,
        other.end_of_turn_id,
    )


@pytest.mark.parametrize("kind", ["bf16", "q8_0", "q4_0"])
def test_what_ggufs_own_reader_finds(folder: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "a.gguf"
    counts = write_gguf(resolve(folder), out, kind)
    reader = gguf.GGUFReader(out)
    source = dict(resolve(folder).tensors())
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert sorted(found) == sorted(map(to_gguf, source))
    seen: dict[str, int] = {}
    for name, whole in source.items():
        tensor = found[to_gguf(name)]
        seen[tensor.tensor_type.name] = seen.get(tensor.tensor_type.name, 0) + 1
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(whole.shape)
        right = whole.float().numpy()
        if tensor.tensor_type.name in ("F32", "BF16"):
            np.testing.assert_array_equal(values, right)
            continue
        # Q8_0's step is the block's largest value / 127, Q4_0's is / 8 on one side: no value is off by more than half
        # a step (a whole one at Q4_0's clipped end), beside the fp16 of the step itself.
        blocks = np.abs(right.reshape(-1, 32)).max(1, keepdims=True)
        step = blocks / (127 if tensor.tensor_type.name == "Q8_0" else 8)
        most = step * (0.5 if tensor.tensor_type.name == "Q8_0" else 1.0) + blocks * 2e-3
        assert (np.abs(values.reshape(-1, 32) - right.reshape(-1, 32)) <= most).all()
    assert seen == counts
    assert (kind == "bf16") == ("Q8_0" not in counts)
    assert ("Q4_0" in counts) == (kind == "q4_0")
    assert found["token_embd.weight"].tensor_type.name == {"bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q8_0"}[kind]
    architecture = reader.fields["general.architecture"].contents()
    assert reader.fields[f"{architecture}.embedding_length"].contents() == 64
    assert reader.fields["general.quantization_version"].contents() == 2
    closer = (logits(out, IDS) - logits(folder, IDS)).norm() / logits(folder, IDS).norm()
    assert closer <= {"bf16": 0, "q8_0": 0.05, "q4_0": 0.6}[kind]


def test_rows_that_blocks_do_not_divide_stay_bf16(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "c", "gemma2", hidden_size=48, vocab_size=256_000)
    counts = write_gguf(resolve(folder), tmp_path / "a.gguf", "q8_0")
    assert counts["BF16"] == 1 + 4 * 5  # the embedding, and what reads 48 values, of four layers
    assert counts["Q8_0"] == 4 * 2
    assert torch.isfinite(logits(tmp_path / "a.gguf", IDS)).all()


def test_what_a_file_cannot_say(tmp_path: Path) -> None:
    for more, said in [
        ({"query_pre_attn_scalar": 24}, "query_pre_attn_scalar is 24"),
        ({"rope_theta": 5000.0}, "rope_theta is 5000"),
    ]:
        folder = _folder(tmp_path / said.split()[0], "gemma2", **more)
        with pytest.raises(ConfigError, match=said):
            write_gguf(resolve(folder), tmp_path / "a.gguf", "bf16")
    bare = support.save_checkpoint(
        tmp_path / "bare", support.hf_model(support.tiny_config(query_pre_attn_scalar=16), dtype=torch.bfloat16)
    )
    with pytest.raises(GemcutError, match="tokenizer"):
        write_gguf(resolve(bare), tmp_path / "a.gguf", "bf16")
    assert not list(tmp_path.glob("*.gguf"))
    assert not list(tmp_path.glob(".*.part"))


def test_the_command(cli: Cli, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    out = tmp_path / "a.gguf"
    report = json.loads(cli("convert", folder, out, "--to", "q8_0", "--json").out)
    assert report["bytes"] == out.stat().st_size
    greedy = ("generate", "-t", "0", "-n", "4", "The sky", "-m")
    assert cli(*greedy, out).code == 0
    assert "already exists" in cli("convert", folder, out).error
    assert "expected one of bf16" in cli("convert", folder, tmp_path / "b.gguf", "--to", "q5").error
    assert "ends in .gguf" in cli("convert", folder, tmp_path / "b").error
    assert "there is no folder" in cli("convert", folder, tmp_path / "no" / "b.gguf").error
    again = cli("convert", out, tmp_path / "again.gguf")
    assert (again.code, "is quantized already (Q8_0)" in again.err) == (0, True)
    assert torch.isfinite(logits(tmp_path / "again.gguf", IDS)).all()

    def full(*given: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_gguf(resolve(folder), tmp_path / "c.gguf", "bf16")
    assert not list(tmp_path.glob(".*.part"))


def test_the_real_model(tmp_path: Path) -> None:
    source = support.gguf_path()
    out = tmp_path / "a.gguf"
    write_gguf(resolve(source), out, "q8_0")
    one, other = Gemma.load(out, progress=False), Gemma.load(source, progress=False)
    text = "The capital of France is Paris, and the capital of Italy is Rome.\n\n  Water boils at 100 degrees."
    assert one.encode(text) == other.encode(text)
    mine, right = one.score([text])[0], other.score([text])[0]
    assert abs(sum(mine) - sum(right)) / len(right) < 0.05  # nats a token; Q8_0 of what was Q4_K
