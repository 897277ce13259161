"""Cutting a stream of tensors: which are cut, what passes, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch

from gemcut.checkpoint.names import expected_shapes, hf_module
from gemcut.config import GemmaConfig
from gemcut.errors import CheckpointError, ParameterError
from gemcut.quantization.four_bit import dequantize_4bit, quantize_4bit
from gemcut.quantization.int8 import quantize_int8_rows
from gemcut.quantization.spec import Quantization, skip_matcher
from gemcut.quantization.stream import quantize_tensor, quantize_tensors
from gemcut.quantization.weights import CheckpointWeight, FourBitWeight, Int8Weight
from support import tiny_config


def whole(dtype: torch.dtype = torch.bfloat16) -> dict[str, CheckpointWeight]:
    generator = torch.Generator().manual_seed(0)
    shapes = expected_shapes(GemmaConfig.from_dict(tiny_config().to_dict()))
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def run(
    tensors: dict[str, CheckpointWeight], spec: Quantization, dtype: torch.dtype | None = None
) -> dict[str, CheckpointWeight]:
    return dict(quantize_tensors(tensors.items(), spec, module_name=hf_module, dtype=dtype))


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_linears_are_cut_and_nothing_else(format: str) -> None:
    tensors = whole()
    result = run(tensors, Quantization(format))  # type: ignore[arg-type]
    assert list(result) == list(tensors)
    for name, weight in result.items():
        linear = name.endswith("proj.weight")
        kind = (Int8Weight if format == "int8" else FourBitWeight) if linear else torch.Tensor
        assert isinstance(weight, kind), name
        assert not linear or tuple(weight.shape) == tuple(tensors[name].shape)
        assert linear or weight is tensors[name]


def test_weights_are_rounded_to_the_loading_dtype_first() -> None:
    tensors = whole(torch.float32)
    name = "layers.0.mlp.up_proj.weight"
    (result,) = run({name: tensors[name]}, Quantization("nf4"), torch.bfloat16).values()
    assert isinstance(result, FourBitWeight)
    assert result.dtype is torch.bfloat16
    expected = quantize_4bit(tensors[name].to(torch.bfloat16), "nf4")  # type: ignore[union-attr]
    assert torch.equal(dequantize_4bit(result), dequantize_4bit(expected))


def test_head_is_cut_in_pieces_as_if_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemcut.quantization.stream.PIECE", 1000)
    table = whole()["embed.weight"]
    assert isinstance(table, torch.Tensor)
    (result,) = run({"embed.weight": table}, Quantization("nf4", head="int8", skip=("lm_head",))).values()
    expected = quantize_int8_rows(table)
    assert isinstance(result, Int8Weight)
    assert torch.equal(result.codes, expected.codes)
    assert torch.equal(result.absmax, expected.absmax)


@pytest.mark.parametrize("spec", [Quantization("nf4"), Quantization("fp4", double_quant=False, block_size=256)])
def test_pieces_are_cut_as_the_whole(spec: Quantization, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemcut.quantization.stream.PIECE", 256 * spec.block_size)
    weight = torch.randn(301, 333, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert spec.format != "int8"
    pieces = quantize_tensor("w", weight, spec)
    whole = quantize_4bit(weight, spec.format, block_size=spec.block_size, double_quant=spec.double_quant)
    assert all(torch.equal(a, b) for a, b in zip(pieces.tensors, whole.tensors, strict=True))


@pytest.mark.parametrize(
    ("pattern", "name", "stays"),
    [
        ("o_proj", "model.layers.0.self_attn.o_proj", True),
        ("proj", "model.layers.0.self_attn.o_proj", True),
        ("model.layers.1", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1", "model.layers.11.mlp.up_proj", False),
        ("model.layers.*.mlp", "model.layers.11.mlp.up_proj", True),
        ("model.layers.*.mlp", "model.layers.11.self_attn.q_proj", False),
        ("model.layers.0.mlp.gate", "model.layers.0.mlp.gate_proj", False),
        ("mlp", "model.layers.0.mlp.gate_proj", False),  # neither the end of the name nor its beginning
        ("a|model.layers.1", "model.layers.11.mlp.up_proj", False),
    ],
)
def test_skip_matches_like_transformers(pattern: str, name: str, stays: bool) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    assert skip_matcher((pattern,))(name) is stays
    assert should_convert_module(name, [pattern]) is not stays


def test_skipped_modules_stay_whole() -> None:
    tensors = whole()
    result = run(tensors, Quantization("nf4", skip=("o_proj", "model.layers.1")))
    left = {name for name, weight in result.items() if weight is tensors[name] and name.endswith("proj.weight")}
    assert left == {n for n in tensors if n.endswith("o_proj.weight") or re.match(r"layers\.1\..*_proj.weight", n)}


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"skip has '\*bad\(', which is no module name"):
        run(whole(), Quantization("nf4", skip=("*bad(",)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["layers.1.mlp.down_proj.weight", "embed.weight", "layers.0.input_norm.scale"])
def test_nan_and_infinity_are_named(bad: float, name: str) -> None:
    tensors = whole()
    tensor = tensors[name]
    assert isinstance(tensor, torch.Tensor)
    tensor.view(-1)[-1] = bad
    with pytest.raises(CheckpointError, match=f"tensor {re.escape(name)} holds NaN or infinity"):
        run(tensors, Quantization("nf4"))


def test_a_sum_that_overflows_is_no_infinity() -> None:
    tensors: dict[str, CheckpointWeight] = {
        "layers.0.mlp.up_proj.weight": torch.full((64, 64), 6e4, dtype=torch.float16)
    }
    assert isinstance(run(tensors, Quantization("nf4"))["layers.0.mlp.up_proj.weight"], FourBitWeight)


def test_values_that_fp16_cannot_hold_are_refused_for_int8() -> None:
    tensors: dict[str, CheckpointWeight] = {"layers.0.mlp.up_proj.weight": torch.full((64, 64), 1e5)}
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight holds magnitudes above 65504"):
        run(tensors, Quantization("int8"))
    run(tensors, Quantization("nf4"))


def test_cut_weights_pass_in_their_own_format_only() -> None:
    result = run(whole(), Quantization("nf4"))
    again = run(result, Quantization("nf4"))
    assert all(again[name] is weight for name, weight in result.items())
    for other in (Quantization("fp4"), Quantization("int8"), Quantization("nf4", block_size=128)):
        with pytest.raises(CheckpointError, match="is quantized already"):
            run(result, other)
