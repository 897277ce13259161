"""GEMMs with weights that are dequantized a segment of rows at a time, and the buffer they share; no GPU needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from gemcut.kernels.linear import cuda as cuda_linear
from gemcut.kernels.linear import gated as gated_gemm

CPU = torch.device("cpu")


@pytest.fixture
def buffer(monkeypatch: pytest.MonkeyPatch) -> cuda_linear._Buffer:
    """An empty one of a device of 80 GB."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 << 30))
    fresh = cuda_linear._Buffer(CPU)
    monkeypatch.setattr(cuda_linear, "_buffer", lambda device: fresh)
    return fresh


def copier(weight: Tensor, segments: list[int]) -> cuda_linear.Dequantize:
    """Copies rows as the kernels dequantize them: whole tiles from a tile's first row on."""

    def copy(start: int, count: int, out: Tensor) -> None:
        assert start % cuda_linear.TILE == 0
        assert out.shape == (count, weight.shape[1])
        out.copy_(weight[start : start + count])
        segments.append(count)

    return copy


@pytest.mark.parametrize("limit", [1, 16 * 40 * 2, 300 * 40 * 2, 1 << 30])
def test_segments_cover_every_row_once(
    buffer: cuda_linear._Buffer, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(cuda_linear, "BUFFER_BYTES", limit)
    monkeypatch.setattr(gated_gemm, "gated_gemm", lambda x, w, out: out.copy_(gated_gemm.gated_gemm_plain(x, w)))
    x = torch.randn(5, 40).bfloat16()
    for n in (16, 32, 336, 2080):
        weight, segments = torch.randn(n, 40).bfloat16(), []
        buffer.announce(n, 40, limit)
        out = cuda_linear._by_segments(x, n, 40, copier(weight, segments), torch.bfloat16)
        assert torch.allclose(out.float(), x.float() @ weight.float().T, atol=0.05, rtol=0.02)
        assert sum(segments) == n
        segments.clear()
        if n % 32 == 0:
            gated = cuda_linear._gated_by_segments((n, 40), copier(weight, segments), x)
            assert torch.allclose(gated.float(), gated_gemm.gated_gemm_plain(x, weight).float(), atol=0.05, rtol=0.02)
            assert sum(segments) == n


def test_the_buffer_is_as_large_as_the_largest_matrix_and_no_larger(buffer: cuda_linear._Buffer) -> None:
    buffer.announce(1000, 64, cuda_linear.BUFFER_BYTES)  # 63 tiles of 16 rows
    buffer.announce(100, 64, cuda_linear.BUFFER_BYTES)
    first = buffer.values(16 * 64)
    assert len(first) == 1008 * 64
    assert buffer.values(1) is first
    buffer.announce(256_000, 4608, cuda_linear.HEAD_BYTES)
    assert len(buffer.values(1)) == cuda_linear.HEAD_BYTES // 2
    buffer.announce(1 << 20, 4608, cuda_linear.BUFFER_BYTES)
    assert len(buffer.values(1)) == cuda_linear.BUFFER_BYTES // 2
    assert buffer.kept[0] is first  # what a captured graph uses


def test_a_small_gpu_gives_a_small_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=8 << 30))
    buffer = cuda_linear._Buffer(CPU)
    buffer.announce(73728, 4608, cuda_linear.BUFFER_BYTES)
    assert len(buffer.values(1)) * 2 == (8 << 30) // 128
