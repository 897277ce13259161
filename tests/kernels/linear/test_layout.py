"""The order of x for products of many rows, checked without a GPU."""

from __future__ import annotations

import torch

from gemcut.kernels.linear.gemm import TILE_ROWS, order_groups
from gemcut.kernels.linear.layout import Ordered


def test_every_value_stands_where_the_matrix_instruction_looks() -> None:
    m, k, groups = 21, 300, 4
    x = torch.arange(m * k).view(m, k) % 251  # exact in bf16
    ordered = Ordered.empty(m, k, groups, torch.device("cpu"))
    assert ordered.values.shape == (8, groups, 8, 8, 8)  # 300 columns take two runs of 256
    ordered.values.fill_(torch.nan)
    for row in range(m):
        for column in range(k):
            quarter, inner = divmod(column % 64, 16)
            i, h, e = inner // 4, inner % 4 // 2, inner % 2
            ordered.values[column // 64, row // 8, 2 * i + h, row % 8, 2 * quarter + e] = x[row, column].item()
    assert ordered.groups == groups
    assert torch.equal(ordered.rows(), x.bfloat16())


def test_groups_hold_all_rows_and_fill_tiles() -> None:
    for m in range(1, 1025):
        rows = order_groups(m) * 8
        assert m <= rows
        assert any(rows % tile == 0 and rows // tile == -(-m // TILE_ROWS[-1]) for tile in TILE_ROWS)
