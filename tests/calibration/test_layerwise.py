"""Calibration of a whole checkpoint: streamed layer by layer, resumable, and nearer to the whole network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gemcut.calibration.divergence import Reference
from gemcut.calibration.layerwise import CalibrationState, calibrate, read_calibration_text
from gemcut.checkpoint.load import load_model_weights
from gemcut.checkpoint.names import expected_shapes
from gemcut.checkpoint.resolve import resolve
from gemcut.checkpoint.source import Source
from gemcut.errors import CheckpointError, ParameterError
from gemcut.model import Model
from gemcut.model.dense import DenseKeyValues
from gemcut.quantization.dequantize import dequantize_weight
from gemcut.quantization.four_bit import quantize_4bit
from gemcut.quantization.spec import Quantization
from gemcut.quantization.weights import CheckpointWeight, FourBitWeight, Int8Weight
from support import gguf_path, hf_model, save_checkpoint, tiny_config

SPEC = Quantization("nf4", block_size=32)


@pytest.fixture(scope="module", params=["gemma2", "gemma3_text"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("whole")
    config = tiny_config(request.param, hidden_size=64, intermediate_size=128)
    return resolve(save_checkpoint(folder, hf_model(config)))


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = [40, 1, 33, 64, 2, 64, 64, 64]
    return [[2, *torch.randint(4, 320, (n - 1,), generator=generator).tolist()] for n in lengths]


def build(source: Source, tensors: dict[str, CheckpointWeight], dtype: torch.dtype = torch.float32) -> Model:
    """A network of whole weights from decoded ones: what any kernel must compute, without one."""
    with torch.device("meta"):
        model = Model(source.config(), dtype=dtype)
    whole = ((name, dequantize_weight(weight, torch.float32)) for name, weight in tensors.items())
    load_model_weights(model, whole, dtype=dtype, device="cpu")
    return model


def same(a: CheckpointWeight, b: CheckpointWeight) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    assert not isinstance(a, Tensor)
    assert not isinstance(b, Tensor)
    return all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))


def test_every_tensor_comes_once_and_in_order(source: Source, documents: list[list[int]]) -> None:
    heard: list[tuple[int, int]] = []
    state = CalibrationState()
    found = list(calibrate(source, SPEC, documents, progress=lambda *now: heard.append(now), state=state))
    shapes = expected_shapes(source.config())
    assert [name for name, _ in found] == list(shapes)
    for name, weight in found:
        assert tuple(weight.shape) == shapes[name]
        assert isinstance(weight, FourBitWeight) == (len(shapes[name]) == 2 and name != "embed.weight")
    assert state.layer == source.config().num_hidden_layers
    assert len(state.methods) == 7 * state.layer
    assert heard == sorted(heard)
    assert heard[-1][0] == heard[-1][1]


@pytest.mark.slow
def test_the_hidden_states_are_the_networks_own(source: Source, documents: list[list[int]]) -> None:
    """Layer by layer and in chunks, they are what the cut network computes when it is loaded."""
    state = CalibrationState()
    tensors = dict(calibrate(source, SPEC, documents, state=state))
    model = build(source, tensors)
    expected = [model(torch.tensor(ids), torch.arange(len(ids)), DenseKeyValues(len(ids))) for ids in documents]
    assert state.hidden is not None
    torch.testing.assert_close(state.hidden, torch.cat(expected), rtol=1e-4, atol=1e-3)


def test_nearer_to_the_whole_network_than_plain_rounding(source: Source, documents: list[list[int]]) -> None:
    tensors = dict(source.tensors())
    reference = Reference(build(source, tensors), [document for document in documents if len(document) > 1])
    plain = {
        n: quantize_4bit(t, block_size=32) if n != "embed.weight" and t.ndim == 2 else t for n, t in tensors.items()
    }
    before = reference.compare(build(source, plain))
    after = reference.compare(build(source, dict(calibrate(source, SPEC, documents))))
    assert after.kl < 0.7 * before.kl
    assert after.same_top > before.same_top


@pytest.mark.slow
@pytest.mark.parametrize("layer", [1, 3, 4])
def test_it_goes_on_from_a_saved_state(source: Source, documents: list[list[int]], layer: int, tmp_path: Path) -> None:
    expected = dict(calibrate(source, SPEC, documents))
    state, found = CalibrationState(), {}
    for name, weight in calibrate(source, SPEC, documents, state=state):
        if name.startswith(f"layers.{layer}.") or name == "norm.scale":
            break
        found[name] = weight
        if state.layer == layer:  # the writer saves when a layer's tensors are safe
            state.save(tmp_path / "state.safetensors")
    restored = CalibrationState.load(tmp_path / "state.safetensors")
    assert restored.layer == layer
    found |= dict(calibrate(source, SPEC, documents, state=restored, start_layer=layer))
    assert found.keys() == expected.keys()
    assert all(same(found[name], expected[name]) for name in expected)


def test_head_and_skipped_modules(source: Source, documents: list[list[int]]) -> None:
    spec = SPEC.replace(head="int8", skip=("v_proj", "layers.1.mlp.gate_proj"))
    found = dict(calibrate(source, spec, documents))
    assert isinstance(found["embed.weight"], Int8Weight)
    whole = {name for name, weight in found.items() if isinstance(weight, Tensor) and weight.ndim == 2}
    layers = source.config().num_hidden_layers
    assert whole == {f"layers.{i}.attention.v_proj.weight" for i in range(layers)} | {"layers.1.mlp.gate_proj.weight"}
    original = dict(source.tensors())
    for name in whole:
        assert torch.equal(found[name], original[name])  # type: ignore[arg-type]


def test_little_memory_takes_blocks_of_correlations(source: Source, documents: list[list[int]]) -> None:
    state = CalibrationState()
    list(calibrate(source, SPEC, documents, state=state, memory=130_000))
    assert state.methods["layers.0.mlp.down_proj.weight"] == "blocks of 64 inputs"
    assert state.methods["layers.0.mlp.up_proj.weight"] == "all correlations"


@pytest.mark.parametrize("documents", [[], [[2, 5], []]])
def test_documents_must_hold_tokens(source: Source, documents: Any) -> None:
    with pytest.raises(ParameterError, match="documents"):
        next(calibrate(source, SPEC, documents))


def test_int8_needs_no_calibration(source: Source) -> None:
    with pytest.raises(ParameterError, match="nf4 and fp4"):
        next(calibrate(source, Quantization("int8"), [[2, 5]]))


def test_a_state_must_fit(source: Source, documents: list[list[int]]) -> None:
    with pytest.raises(ParameterError, match="start_layer is 2"):
        next(calibrate(source, SPEC, documents, start_layer=2))
    state = CalibrationState(1, torch.zeros(3, 64))
    with pytest.raises(ParameterError, match="3 tokens"):
        next(calibrate(source, SPEC, documents, start_layer=1, state=state))


def test_damaged_states_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no layer"):
        CalibrationState().save(tmp_path / "state")
    (tmp_path / "state").write_bytes(b"x" * 50)
    with pytest.raises(CheckpointError, match="delete it"):
        CalibrationState.load(tmp_path / "state")
    with pytest.raises(CheckpointError, match="delete it"):
        CalibrationState.load(tmp_path / "absent")


def test_nan_is_named(tmp_path: Path, documents: list[list[int]]) -> None:
    model = hf_model(tiny_config())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    source = resolve(save_checkpoint(tmp_path, model))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        list(calibrate(source, SPEC, documents))


@pytest.mark.slow
def test_real_weights(tmp_path: Path) -> None:
    """On Gemma 3 270M, 2,000 tokens of calibration must take away a third of the damage on text of the same kind.

    Compared in fp32, in which all three networks' products are exact enough and quick.
    """
    import pydoc_data.topics

    source = resolve(gguf_path())
    topics = sorted(pydoc_data.topics.topics.items())
    tokenizer = source.tokenizer()
    (tmp_path / "text").write_text("\n\n".join(text for _, text in topics[::2]), encoding="utf-8")
    (tmp_path / "held-out").write_text("\n\n".join(text for _, text in topics[1::2]), encoding="utf-8")
    documents = read_calibration_text(tmp_path / "text", tokenizer, tokens=2048, context=256)
    held_out = read_calibration_text(tmp_path / "held-out", tokenizer, tokens=1024, context=256)
    tensors: dict[str, CheckpointWeight] = dict(source.tensors(dtype=torch.bfloat16))
    reference = Reference(build(source, tensors), held_out)
    plain = {n: quantize_4bit(t) if n != "embed.weight" and t.ndim == 2 else t for n, t in tensors.items()}  # type: ignore[union-attr,arg-type]
    before = reference.compare(build(source, plain))
    after = reference.compare(build(source, dict(calibrate(source, Quantization("nf4"), documents))))
    assert after.kl < 0.65 * before.kl
    assert after.perplexity < before.perplexity
