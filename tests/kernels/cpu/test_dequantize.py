"""GGUF blocks to whole weights by the compiled kernels (dequantize.cpp), against the gguf library, bit for bit."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from gemcut.kernels.cpu import dequantize as native
from gemcut.kernels.cpu import library as cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


def blocks_of(number: int, count: int) -> np.ndarray:
    """Random blocks: their fp16 statistics are every kind of number, NaN, infinities and subnormal ones among them."""
    size = GGML_QUANT_SIZES[GGMLQuantizationType(number)][1]
    return np.random.default_rng(number).integers(0, 256, (count, size), dtype=np.uint8)


def expected(number: int, blocks: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    with np.errstate(all="ignore"):
        values = quants.dequantize(blocks.reshape(1, -1), GGMLQuantizationType(number))
    return torch.from_numpy(values).view(-1).to(dtype)


def same_bits(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether all values are the same, -0 told from 0; any NaN is as good as another."""
    kind = torch.int32 if wanted.dtype == torch.float32 else torch.int16
    return bool(torch.all((found.view(kind) == wanted.view(kind)) | (found.isnan() & wanted.isnan())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("number", sorted(native.TYPES))
def test_it_gives_the_library_s_values(number: int, dtype: torch.dtype) -> None:
    blocks = blocks_of(number, 2000)
    wanted = expected(number, blocks, dtype)
    assert wanted.isfinite().float().mean() > 0.5
    for variant in cpu.variants():
        run = cpu.library(variant).function("dequantize", native._ARGUMENTS, ctypes.c_int)
        for threads in (1, 3):
            found = torch.full_like(wanted, 7.0)
            address = blocks.ctypes.data
            assert run(number, address, len(blocks), found.data_ptr(), int(dtype == torch.float32), threads) == 1
            assert same_bits(found, wanted), (variant, threads)


def test_it_writes_nothing_beyond_its_blocks() -> None:
    for number in native.TYPES:
        block = GGML_QUANT_SIZES[GGMLQuantizationType(number)][0]
        blocks = blocks_of(number, 3)
        out = torch.full((5 * block,), 7.0)
        assert native.dequantize(number, torch.from_numpy(blocks).view(-1), 3, out[block : 4 * block])
        assert same_bits(out[block : 4 * block], expected(number, blocks, torch.float32))
        assert torch.all(out[:block] == 7.0)
        assert torch.all(out[4 * block :] == 7.0)


def test_what_it_does_not_know_is_left_to_the_library() -> None:
    blocks = torch.zeros(56, dtype=torch.uint8)
    out = torch.full((256,), 7.0)
    assert not native.dequantize(29, blocks, 1, out)  # IQ1_M
    assert not native.dequantize(12, torch.zeros(144, dtype=torch.uint8), 1, out.half())
    assert torch.all(out == 7.0)
