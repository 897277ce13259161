"""How products of packed weights with many rows choose their kernel, checked without a GPU."""

from __future__ import annotations

import re

import pytest

from gemcut.kernels.linear import four_bit as four_bit_linear
from gemcut.kernels.linear import int8 as int8_linear
from gemcut.kernels.linear.gemm import TILE_ROWS, choose_variant, shared_bytes
from gemcut.kernels.runtime.wgmma import wgmma_source

HOPPER = 227 * 1024
SHAPES = [(1, 64), (4608, 4096), (8192, 4608), (73728, 4608), (4608, 36864), (256000, 4608)]


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize(
    "storage", [four_bit_linear.NESTED, four_bit_linear.FLAT, int8_linear.STORAGE], ids=["nested", "flat", "int8"]
)
def test_tiles_cover_all_rows_and_fit_shared_memory(storage, n: int, k: int) -> None:
    for m in range(1, 1025):
        variant = choose_variant(storage, m, n, k)
        tiles = -(-m // variant.rows)
        assert tiles == -(-m // TILE_ROWS[-1]), "more tiles than the largest would need"
        assert variant.rows == min(rows for rows in TILE_ROWS if rows * tiles >= m)
        assert shared_bytes(storage, variant) + 1024 <= HOPPER
        assert variant.threads <= 1024


@pytest.mark.parametrize("rows", TILE_ROWS)
def test_the_generated_instruction_numbers_its_operands(rows: int) -> None:
    source = wgmma_source("wgmma", rows, a_in_registers=True)
    assert f"m64n{rows}k16" in source
    numbers = {int(number) for number in re.findall(r"%(\d+)", source)}
    assert numbers == set(range(rows // 2 + 6))
    assert source.count('"+f"') == rows // 2
