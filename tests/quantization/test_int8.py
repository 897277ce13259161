"""int8 with one scale a row: stored bytes and decoded values are those of bitsandbytes on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemcut.quantization.int8 import dequantize_int8, quantize_int8, quantize_int8_rows

from .inputs import DTYPES, KINDS, matrix

SHAPES = [(1, 1), (5, 7), (33, 129), (300, 1000)]


@pytest.fixture(scope="module")
def functional() -> Any:
    return pytest.importorskip("bitsandbytes.functional")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_code_and_value_is_bitsandbytes(
    shape: tuple[int, int], kind: str, dtype: torch.dtype, functional: Any
) -> None:
    # The format passes through fp16, and stream.cut refuses what that cannot hold: 65,280 is bf16's last value below.
    weight = matrix(kind, shape, dtype).clamp(-65280, 65280)
    codes, absmax, _ = functional.int8_vectorwise_quant(weight.half())
    ours = quantize_int8(weight)
    assert ours.dtype is dtype
    assert torch.equal(ours.absmax, absmax.float())
    assert torch.equal(ours.codes, codes)
    assert torch.equal(dequantize_int8(ours, torch.float32), functional.int8_vectorwise_dequant(codes, absmax))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_fp16_are_as_near_as_8_bits_allow(kind: str, dtype: torch.dtype) -> None:
    weight = matrix(kind, (33, 129), dtype)
    ours = quantize_int8_rows(weight)
    exact = ours.codes.double() * ours.absmax.double()[:, None] / 127
    # Rows of fp32's subnormals, of which 127 / absmax is no fp32 number, become zero.
    step = (weight.double().abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-37)
    assert ((exact - weight.double()).abs() <= step * 0.5001).all()
