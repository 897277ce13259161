"""The MLP's gated product of many rows, without a GPU: which row counts it is for, and its twin."""

from __future__ import annotations

import pytest
import torch

from gemcut.kernels.linear.gated import MANY_ROWS, gated_gemm_plain, pays


def test_it_pays_for_many_rows_that_fill_its_tiles() -> None:
    counts = (1, 512, 767, 768, 769, 896, 963, 964, 1023, 1024, 1025, 1200, 1205, 1280, 1281, 2048, 2049, 3600, 3900)
    assert [m for m in counts if pays(m)] == [768, 964, 1023, 1024, 1205, 1280, 2048, 3900]
    assert all(pays(m) for m in range(16 * 256, 20 * 256)), "little is added to so many"
    assert not any(pays(m) for m in range(MANY_ROWS))


@pytest.mark.parametrize("m", [1, 5])
def test_the_twin(m: int) -> None:
    x, weight = torch.randn(m, 24), torch.randn(32, 24)
    gate, up = (x.double() @ part.double().T for part in weight.chunk(2))
    want = gate * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)) * up
    assert (gated_gemm_plain(x, weight) - want).abs().max() < 1e-4
