"""How many rows of x fused products are for, by the published matrices, without a GPU."""

from __future__ import annotations

import pytest

from gemcut.kernels.linear.cuda import fused_rows

MATRICES = {
    "2b o": (2304, 2048),
    "2b down": (2304, 9216),
    "9b o": (3584, 4096),
    "9b qkv": (8192, 3584),
    "9b gate and up": (28672, 3584),
    "27b o": (4608, 4096),
    "27b down": (4608, 36864),
    "27b gate and up": (73728, 4608),
}


@pytest.mark.parametrize(
    ("name", "four_bit", "int8"),
    [
        ("2b o", 384, 384),
        ("2b down", 640, 512),
        ("9b o", 384, 384),
        ("9b qkv", 640, 512),
        ("9b gate and up", 640, 512),
        ("27b o", 384, 384),
        ("27b down", 896, 768),
        ("27b gate and up", 896, 768),
    ],
)
def test_rows_that_stay_fused(name: str, four_bit: int, int8: int) -> None:
    n, k = MATRICES[name]
    assert (fused_rows(n * k, True), fused_rows(n * k, False)) == (four_bit, int8)
