"""How the matrix-vector kernels split their work, and the packed order, checked without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from four_bit_reference import FP4, NF4, dequantize, quantize
from gemcut.errors import ParameterError
from gemcut.kernels.gpu import PRESETS, Gpu
from gemcut.kernels.linear import bf16 as bf16_linear
from gemcut.kernels.linear import four_bit as four_bit_linear
from gemcut.kernels.linear import int8 as int8_linear
from gemcut.kernels.linear.case import LinearCase
from gemcut.kernels.linear.gemv import TILE, plan_fixed, plan_split, shared_bytes
from gemcut.quantization.weights import CheckpointWeight, Int8Weight

STORAGES = [four_bit_linear.NESTED, four_bit_linear.FLAT, bf16_linear.STORAGE, int8_linear.STORAGE]
LIMIT = 227 * 1024 - 2048


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: f"{s.kernel}{s.defines}")
@pytest.mark.parametrize("n", [1, 16, 17, 1000, 2048, 4608, 8192, 73728, 256000])
@pytest.mark.parametrize("k", [64, 640, 2304, 4096, 4608, 36864])
@pytest.mark.parametrize("limit", [LIMIT, 163 * 1024 - 2048, 99 * 1024 - 2048], ids=["sm90", "sm80", "sm86"])
def test_every_k_block_is_in_one_slice_and_shared_memory_suffices(storage, n, k, limit) -> None:
    tiles, k_blocks = -(-n // 16), -(-k // storage.k_block)
    for m in range(1, 9):
        split = plan_split(storage, tiles, k_blocks, m, 132, limit)
        assert (split.slices - 1) * split.slice_k_blocks < k_blocks <= split.slices * split.slice_k_blocks
        assert split.chunks <= tiles
        assert split.chunks * split.slices <= 132
        assert shared_bytes(storage, split.layout, split.slice_k_blocks, m) <= split.shared_bytes <= limit


@pytest.mark.parametrize(("n", "k"), [(8192, 4608), (4608, 4096), (73728, 4608), (4608, 36864)])
def test_the_busiest_block_of_27b_has_little_more_than_its_share(n: int, k: int) -> None:
    split = plan_split(four_bit_linear.NESTED, n // 16, k // 256, 1, 132, LIMIT)
    busiest = -(-n // 16 // split.chunks) * split.slice_k_blocks
    assert busiest * 132 <= 1.40 * (n // 16) * (k // 256)


@pytest.mark.parametrize(
    ("n", "k", "fixed"),
    [(8192, 4608, 1), (4608, 4096, 1), (4608, 36864, 2), (73728, 4608, 0), (4608, 9216, None), (3584, 14336, None)],
)
@pytest.mark.parametrize("storage", STORAGES[:2], ids=["nested", "flat"])
@pytest.mark.parametrize("limit", [LIMIT, 99 * 1024 - 2048], ids=["sm90", "sm86"])
def test_warps_of_fixed_columns_cover_their_slice(storage, n, k, fixed, limit) -> None:
    tiles, k_blocks = n // 16, k // 256
    frame = plan_split(storage, tiles, k_blocks, 1, 132, limit)
    for m in range(1, 17):
        split = plan_fixed(storage, frame, tiles, k_blocks, m, limit)
        if limit == LIMIT and fixed is not None:
            most = 1 if fixed != 1 else 16 if k // 256 <= 16 else 8
            assert (split.layout.fixed if split else 0) == (fixed if m <= most else 0)
        if split is None:
            continue
        assert split.layout.warps * split.layout.fixed >= split.slice_k_blocks
        assert (split.chunks, split.slices, split.slice_k_blocks) == (frame.chunks, frame.slices, frame.slice_k_blocks)
        assert split.layout.stages % split.layout.fixed == 0
        assert split.layout.rows >= m
        sums = -(-tiles // split.chunks) * split.layout.warps * TILE * split.layout.rows * 4
        assert storage.codebook_bytes + sums <= split.shared_bytes <= limit


def test_too_many_columns_for_shared_memory_is_an_error() -> None:
    with pytest.raises(ParameterError, match="shared memory"):
        plan_split(four_bit_linear.NESTED, 1, 1, 8, 132, 1000)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("n", "k"), [(16, 256), (17, 64), (40, 320), (3, 2304)])
@pytest.mark.parametrize("table", [NF4, FP4], ids=["nf4", "fp4"])
def test_packing_keeps_every_weight(n: int, k: int, nested: bool, table: torch.Tensor) -> None:
    weight = quantize(torch.randn(n, k), table, nested=nested)
    packed = four_bit_linear.pack([weight])
    codes = packed.codes.permute(0, 5, 3, 1, 2, 4, 6).reshape(packed.codes.shape[0] * 16, -1)
    assert torch.equal(codes[:n, : k // 2], weight.codes.view(n, -1))
    scales = packed.scales.permute(0, 4, 2, 1, 3).reshape(packed.scales.shape[0] * 16, -1)
    assert torch.equal(scales[:n, : k // 64], weight.absmax.view(n, -1))
    zeros = torch.cat((codes[n:].flatten(), codes[:n, k // 2 :].flatten())).int()
    assert not table[torch.cat((zeros >> 4, zeros & 15))].any()
    for pairs, dtype in zip(packed.pairs.view(2, 256), (torch.bfloat16, torch.float16), strict=True):
        halves = pairs.view(dtype).view(256, 2)
        assert torch.equal(halves[:, 0], table.to(dtype).repeat_interleave(16))
        assert torch.equal(halves[:, 1], table.to(dtype).repeat(16))


def test_the_dequantized_weight_is_near_the_original() -> None:
    weight = torch.randn(64, 512)
    for nested in (False, True):
        error = dequantize(quantize(weight, NF4, nested=nested)) - weight
        assert 0.08 < (error.norm() / weight.norm()).item() < 0.11


def refusal(supports: Callable[[LinearCase, Gpu | None], str | None], *weights: CheckpointWeight) -> str:
    reason = supports(LinearCase(weights, torch.bfloat16, torch.bfloat16), PRESETS["h100"])
    assert reason is not None
    return reason


def test_weights_the_kernels_do_not_take_are_refused_with_a_reason() -> None:
    whole = quantize(torch.randn(4, 128), NF4, nested=False)
    straddling = replace(whole, shape=(16, 32))
    with pytest.raises(ParameterError, match="multiple of 64"):
        four_bit_linear.pack([straddling])
    assert "multiple of 64" in refusal(four_bit_linear.supports, straddling)
    assert "contiguous" in refusal(bf16_linear.supports, torch.zeros(8, 16, dtype=torch.bfloat16).t())
    assert "16 bytes" in refusal(bf16_linear.supports, torch.zeros(8, 12, dtype=torch.bfloat16))
    assert "one unquantized" in refusal(bf16_linear.supports, *[torch.zeros(8, 16, dtype=torch.bfloat16)] * 2)
    int8 = Int8Weight(torch.zeros(8, 12, dtype=torch.int8), torch.zeros(8), torch.bfloat16)
    assert "16 bytes" in refusal(int8_linear.supports, int8)
    assert "int8 matrices alone" in refusal(int8_linear.supports, whole)
    assert "four-bit matrices alone" in refusal(four_bit_linear.supports, int8)
    with pytest.raises(ParameterError, match="16 bytes"):
        int8_linear.argument(int8_linear.PackedInt8.of([int8]))


@pytest.mark.parametrize("nested", [False, True])
def test_matrices_that_stand_together_come_back_unchanged(nested: bool) -> None:
    weights = [quantize(torch.randn(n, 256), NF4, nested=nested) for n in (64, 128, 30)]
    packed = four_bit_linear.pack(weights)
    assert (packed.n, packed.codes.shape[0]) == (222, 14)
    for weight, back in zip(weights, packed.unpack(), strict=True):
        assert torch.equal(weight.codes, back.codes)
        assert torch.equal(weight.absmax, back.absmax)
        assert torch.equal(dequantize(weight), dequantize(back))
        assert back.nbytes == weight.nbytes
    assert "below" in refusal(four_bit_linear.supports, *weights[::-1])


@pytest.mark.parametrize(("n", "k", "fixed"), [(8192, 4608, 2), (4608, 4096, 2), (73728, 4608, 0), (2304, 2304, 0)])
def test_int8_rows_keep_two_k_blocks_a_warp_for_up_to_eight_rows_of_small_gemvs(n: int, k: int, fixed: int) -> None:
    storage, tiles, k_blocks = int8_linear.STORAGE, n // 16, k // 128
    frame = plan_split(storage, tiles, k_blocks, 1, 132, LIMIT)
    assert plan_fixed(storage, frame, tiles, k_blocks, 9, LIMIT) is None
    for m in range(1, 9):
        split = plan_fixed(storage, frame, tiles, k_blocks, m, LIMIT)
        assert (split.layout.fixed if split else 0) == (fixed if m > 1 or frame.slices > 1 else 0)
        if split is not None:
            assert (split.chunks, split.slices, split.slice_k_blocks) == (132, 1, k_blocks)
            assert split.layout.warps * 2 >= k_blocks
            assert -(-tiles // 132) * split.layout.warps * TILE * 8 * 4 <= split.shared_bytes <= LIMIT
