"""The relative error of cut matrices, in pieces, against float64 on the whole."""

from __future__ import annotations

import pytest
import torch

from gemcut.quantization.dequantize import dequantize_weight
from gemcut.quantization.error import relative_error
from gemcut.quantization.four_bit import quantize_4bit
from gemcut.quantization.int8 import quantize_int8_rows
from gemcut.quantization.spec import Quantization
from gemcut.quantization.stream import quantize_tensor
from gemcut.quantization.weights import Int8Weight

SPECS = [
    Quantization("nf4"),
    Quantization("nf4", double_quant=False, block_size=32),
    Quantization("fp4", block_size=4096),
    Quantization("int8"),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (301, 333), (300, 4096), (3, 200_001)])
def test_pieces_add_up_to_the_whole(spec: Quantization, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[-1] *= 5  # the last piece counts
    packed = quantize_tensor("w", weight, spec)
    expected = (dequantize_weight(packed, torch.float32).double() - weight.double()).norm() / weight.double().norm()
    assert relative_error(weight, packed) == pytest.approx(expected.item(), rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 640, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = weight.clone()
    packed = quantize_4bit(weight)
    expected = (dequantize_weight(packed, torch.float32).double() - weight.double()).norm() / weight.double().norm()
    assert relative_error(weight, packed) == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_that_fp32_cannot_hold(scale: float) -> None:
    weight = torch.randn(40, 640, generator=torch.Generator().manual_seed(0))
    ordinary = relative_error(weight, quantize_4bit(weight, double_quant=False))
    assert 0.05 < ordinary < 0.15
    scaled = weight * scale
    assert relative_error(scaled, quantize_4bit(scaled, double_quant=False)) == pytest.approx(ordinary, rel=1e-4)


def test_matrices_of_zeros() -> None:
    zeros = torch.zeros(8, 64)
    assert relative_error(zeros, quantize_4bit(zeros)) == 0.0
    assert relative_error(zeros, quantize_int8_rows(zeros)) == 0.0


def test_an_error_as_large_as_the_matrix() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    nothing = Int8Weight(torch.zeros(16, 64, dtype=torch.int8), torch.ones(16), torch.float32)
    assert relative_error(weight, nothing) == 1.0


def test_a_sample_is_near_the_whole() -> None:
    weight = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(3)).mul_(0.02).bfloat16()
    cut = quantize_4bit(weight)
    assert relative_error(weight, cut, sample=1 << 18) == pytest.approx(relative_error(weight, cut), rel=0.01)
    assert relative_error(weight, cut, sample=1 << 30) == relative_error(weight, cut)
