"""Folders of safetensors: values against transformers, every damage named in one line."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gemcut.checkpoint.load import load_model_weights
from gemcut.checkpoint.resolve import resolve
from gemcut.checkpoint.safetensors_header import INDEX
from gemcut.config import GemmaConfig
from gemcut.errors import CheckpointError, ConfigError, GemcutError
from gemcut.model.gemma import Model
from support import hf_model, save_checkpoint, tiny_config


def ours_from_hf(reference: nn.Module) -> dict[str, torch.Tensor]:
    """What a stream must hold, straight from a transformers model: names spelled out here a second time."""
    out = {}
    for name, value in reference.state_dict().items():
        if name == "lm_head.weight":
            continue
        name = name.removeprefix("model.")
        for theirs, ours in [
            ("embed_tokens", "embed"),
            ("self_attn", "attention"),
            ("input_layernorm", "input_norm"),
            ("post_attention_layernorm", "post_attention_norm"),
            ("pre_feedforward_layernorm", "pre_feedforward_norm"),
            ("post_feedforward_layernorm", "post_feedforward_norm"),
        ]:
            name = name.replace(theirs, ours)
        if "norm" in name:
            name, value = name.replace(".weight", ".scale"), 1.0 + value.float()
        out[name] = value
    return out


def meta_model(config: GemmaConfig, dtype: torch.dtype = torch.float32) -> Model:
    with torch.device("meta"):
        return Model(config, dtype=dtype)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "tiny", hf_model(tiny_config()))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    path = save_checkpoint(tmp_path / "sharded", hf_model(tiny_config()), max_shard_size="100KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_values_are_those_of_transformers(tmp_path: Path, model_type: str, dtype: torch.dtype, shard: str) -> None:
    reference = hf_model(tiny_config(model_type), dtype=dtype)
    source = resolve(save_checkpoint(tmp_path / "x", reference, max_shard_size=shard))
    expected = ours_from_hf(reference)
    found = dict(source.tensors())
    assert found.keys() == expected.keys() == source.tensor_shapes().keys()
    assert source.stored_dtype == dtype
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
        assert source.tensor_shapes()[name] == value.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_loading_fills_the_fused_network(tmp_path: Path, dtype: torch.dtype, stored: torch.dtype) -> None:
    reference = hf_model(tiny_config("gemma3_text"), dtype=stored)
    source = resolve(save_checkpoint(tmp_path / "x", reference))
    model = meta_model(source.config(), dtype)
    load_model_weights(model, source.tensors(), dtype=dtype, device="cpu")
    expected = ours_from_hf(reference)
    attention, mlp = "layers.2.attention.", "layers.2.mlp."
    qkv = torch.cat([expected[attention + f"{x}_proj.weight"] for x in "qkv"]).to(dtype)
    assert torch.equal(model.get_parameter(attention + "qkv_proj.weight"), qkv)
    gate_up = torch.cat([expected[mlp + "gate_proj.weight"], expected[mlp + "up_proj.weight"]]).to(dtype)
    assert torch.equal(model.get_parameter(mlp + "gate_up_proj.weight"), gate_up)
    assert torch.equal(model.embed.weight, expected["embed.weight"].to(dtype))
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "cpu"
        assert parameter.dtype == (torch.float32 if name.endswith("scale") else dtype)
        if name.endswith("scale"):
            assert torch.equal(parameter, expected[name])


def test_progress_ends_at_the_total_and_never_goes_back(sharded: Path) -> None:
    source = resolve(sharded)
    stream: list[tuple[int, int]] = []
    placed: list[tuple[int, int]] = []
    load_model_weights(
        meta_model(source.config()),
        source.tensors(lambda *seen: stream.append(seen)),
        dtype=torch.float32,
        device="cpu",
        progress=lambda *seen: placed.append(seen),
    )
    for seen in (stream, placed):
        assert seen == sorted(seen)
        assert seen[-1][0] == seen[-1][1]
    assert (
        stream[-1][1]
        == source.nbytes
        == sum(f.stat().st_size for f in sharded.glob("*.safetensors"))
        - sum(8 + int.from_bytes(f.read_bytes()[:8], "little") for f in sharded.glob("*.safetensors"))
    )


def test_changing_a_streamed_tensor_leaves_the_file_alone(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    for _, tensor in resolve(folder).tensors():
        tensor.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def rewrite(path: Path, change: Any) -> None:
    """Load a safetensors file, let ``change`` edit the dict of tensors, save it."""
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_tied_head_in_the_file_is_verified_and_skipped(folder: Path) -> None:
    file = folder / "model.safetensors"
    rewrite(file, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert "lm_head.weight" in load_file(file)
    assert "lm_head.weight" not in dict(resolve(folder).tensors())

    rewrite(file, lambda t: t["lm_head.weight"][17, 3].add_(1))
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from the embedding"):
        list(resolve(folder).tensors())


def test_a_backbone_without_prefix_and_old_rotary_constants_load(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = {name.removeprefix("model."): value for name, value in load_file(file).items()}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, file)
    assert len(list(resolve(folder).tensors())) == len(tensors) - 1


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(UP), rf"{UP} is missing; the checkpoint is incomplete"),
        (lambda t: [t.pop(UP), t.pop("model.norm.weight")], r"is missing and 1 more"),
        (lambda t: t.update({UP: t[UP][:, :40].clone()}), r"up_proj.weight has shape \[96, 40\].*asks for \[96, 48\]"),
        (lambda t: t.update({UP: t[UP][0].clone()}), r"up_proj.weight has shape \[48\]"),
        (lambda t: t.update({"model.layers.1.mlp.up_proj.bias": torch.ones(3)}), r"unexpected tensor .*up_proj.bias"),
        (lambda t: t.update({"model.layers.4.mlp.up_proj.weight": t[UP].clone()}), r"unexpected tensor model.layers.4"),
        (lambda t: t.update({UP: t[UP].to(torch.float64)}), r"has dtype F64; gemcut reads F32, F16, BF16"),
        (lambda t: t.update({UP: t[UP].to(torch.int8)}), r"is packed"),
    ],
)
def test_wrong_tensors_are_named(folder: Path, change: Any, message: str) -> None:
    rewrite(folder / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=message) as caught:
        list(resolve(folder).tensors())
    assert "\n" not in str(caught.value)


def edit_header(file: Path, change: Any) -> None:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    text = json.dumps(change(header) or header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:-1], r"is cut short: [\d,]+ bytes, its header says [\d,]+"),
        (lambda raw: raw[: len(raw) // 2], r"is cut short"),
        (lambda raw: raw[:100], r"not a safetensors file or is cut short"),
        (lambda raw: raw[:5], r"not a safetensors file or is cut short"),
        (lambda raw: b"", r"is empty"),
        (lambda raw: raw + b"\0" * 16, r"bytes too many"),
        (lambda raw: (1 << 62).to_bytes(8, "little") + raw[8:], r"not a safetensors file"),
        (lambda raw: raw[:8] + b"[" * int.from_bytes(raw[:8], "little") + raw[8:], r"damaged safetensors header"),
        (lambda raw: b"<!DOCTYPE html><html>rate limited</html>" * 9, r"not a safetensors file"),
    ],
)
def test_damaged_files_are_refused_before_reading(folder: Path, change: Any, message: str) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve(folder).tensor_shapes()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h[UP].update(shape=[-96, -48]),
        lambda h: h[UP].update(shape=[1 << 60, 1 << 60]),
        lambda h: h[UP].update(shape="ab"),
        lambda h: h[UP].update(shape=[96.0, 48.0]),
        lambda h: h[UP].update(data_offsets=[0, h[UP]["data_offsets"][1] - h[UP]["data_offsets"][0]]),
        lambda h: h[UP].update(data_offsets=[5]),
        lambda h: h[UP].update(data_offsets=None),
        lambda h: h[UP].update(data_offsets=[-4, h[UP]["data_offsets"][1] - h[UP]["data_offsets"][0] - 4]),
        lambda h: h[UP].update(dtype=["F32"]),
        lambda h: h[UP].pop("dtype") and None,
        lambda h: h.update({UP: 3}),
        lambda h: [h],
    ],
)
def test_insane_headers_are_refused(folder: Path, change: Any) -> None:
    edit_header(folder / "model.safetensors", change)
    with pytest.raises(CheckpointError, match="damaged safetensors header"):
        resolve(folder).tensor_shapes()


def edit_index(folder: Path, change: Any) -> None:
    data = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(change(data) or data))


@pytest.mark.parametrize(
    "name",
    ["../evil.safetensors", "/evil.safetensors", "a/b.safetensors", "..\\e.safetensors", "x.bin", 7],
)
def test_an_index_cannot_leave_the_folder(sharded: Path, name: object) -> None:
    (sharded.parent / "evil.safetensors").write_bytes((next(sharded.glob("*.safetensors"))).read_bytes())
    edit_index(sharded, lambda data: data["weight_map"].update({UP: name}))
    with pytest.raises(CheckpointError, match=r"expected the plain name of a \.safetensors file") as caught:
        resolve(sharded).tensor_shapes()
    assert "\n" not in str(caught.value)


def test_shards_and_index_must_agree(sharded: Path, tmp_path: Path) -> None:
    def broken(change: Any, message: str) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(sharded, copy)
        change(copy)
        with pytest.raises(CheckpointError, match=message):
            resolve(copy).tensor_shapes()
        shutil.rmtree(copy)

    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    where = json.loads((sharded / INDEX).read_text())["weight_map"]
    other = next(file for file in files if file != where[UP])
    broken(lambda f: (f / files[1]).unlink(), f"lacks the shard {files[1]}")
    broken(lambda f: (f / INDEX).unlink(), "no model.safetensors.index.json")
    broken(lambda f: (f / INDEX).write_text("{"), "index.json is damaged")
    broken(lambda f: (f / INDEX).write_text('{"weight_map": []}'), "index.json is damaged")
    broken(lambda f: edit_index(f, lambda d: d["weight_map"].update({UP: other})), f"{other} lacks the tensor {UP}")


def test_folders_that_are_no_checkpoint(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config.json: not a checkpoint folder"):
        resolve(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"it has a.gguf, a GGUF file; give that file's own path"):
        resolve(tmp_path)
    with pytest.raises(CheckpointError, match=r"give its folder"):
        resolve(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"does not exist"):
        resolve(tmp_path / "nothing" / "here")
    with pytest.raises(CheckpointError, match=r"revision='x' can be chosen only on the hub"):
        resolve(folder, revision="x")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"has no model.safetensors \(it has pytorch_model.bin, pickled"):
        resolve(folder).tensor_shapes()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(ConfigError, match=r"model_type is 'llama'"):
        resolve(folder).config()
    (folder / "config.json").write_text(json.dumps({**config, "hidden_activation": "relu"}))
    with pytest.raises(ConfigError, match=r"hidden_activation is 'relu'"):
        resolve(folder).config()
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot read .*config.json"):
        resolve(folder).config()


@pytest.mark.parametrize("damage", range(60))
def test_any_flipped_header_byte_is_an_error_or_harmless(folder: Path, damage: int) -> None:
    file = folder / "model.safetensors"
    raw = bytearray(file.read_bytes())
    length = 8 + int.from_bytes(raw[:8], "little")
    generator = torch.Generator().manual_seed(damage)
    position, bit = (int(torch.randint(limit, (1,), generator=generator)) for limit in (length, 8))
    raw[position] ^= 1 << bit
    file.write_bytes(raw)
    with contextlib.suppress(GemcutError):  # and nothing else
        for _ in resolve(folder).tensors():
            pass


# ---- the strict loader on streams that readers would not produce ------------------------------------------------


def stream(folder: Path) -> dict[str, torch.Tensor]:
    return dict(resolve(folder).tensors())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.1.attention.k_proj.weight"), r"attention.k_proj.weight is missing: .* 96 of 128"),
        (lambda t: t.pop("norm.scale"), r"norm.scale is missing"),
        (lambda t: t.update({"head.weight": t["norm.scale"]}), r"unexpected tensor head.weight"),
        (lambda t: t.update({"embed.weight": t["embed.weight"][:-1]}), r"embed.weight has shape \[319, 48\]; .*320"),
        (lambda t: t.update({"layers.0.mlp.up_proj.weight": torch.ones(97, 48)}), r"layers.0.mlp.up_proj.weight"),
        (lambda t: t.update({"layers.0.mlp.up_proj.weight": torch.ones(96, 47)}), r"layers.0.mlp.up_proj.weight"),
        (lambda t: t.update({"layers.0.mlp.up_proj.weight": torch.ones(500, 48)}), r"layers.0.mlp.up_proj.weight"),
    ],
)  # fmt: skip
def test_the_loader_is_strict_and_leaves_the_model_as_it_was(folder: Path, change: Any, message: str) -> None:
    tensors = stream(folder)
    change(tensors)
    model = meta_model(resolve(folder).config())
    with pytest.raises(CheckpointError, match=message):
        load_model_weights(model, tensors.items(), dtype=torch.float32, device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_tensor_that_comes_twice_is_refused(folder: Path) -> None:
    tensors = [*stream(folder).items()]
    for name in ("norm.scale", "layers.0.attention.k_proj.weight"):
        model = meta_model(resolve(folder).config())
        twice = [*tensors, next(item for item in tensors if item[0] == name)]
        with pytest.raises(CheckpointError, match=f"{name} .*is there twice"):
            load_model_weights(model, twice, dtype=torch.float32, device="cpu")


def test_ctrl_c_while_loading_leaves_the_model_as_it_was(folder: Path) -> None:
    def interrupted() -> Any:
        for i, item in enumerate(resolve(folder).tensors()):
            if i == 7:
                raise KeyboardInterrupt
            yield item

    model = meta_model(resolve(folder).config())
    with pytest.raises(KeyboardInterrupt):
        load_model_weights(model, interrupted(), dtype=torch.float32, device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
    load_model_weights(model, resolve(folder).tensors(), dtype=torch.float32, device="cpu")
    assert not any(parameter.is_meta for parameter in model.parameters())
