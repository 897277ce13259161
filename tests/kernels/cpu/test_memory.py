"""Memory for weights: tensors of the right shape that own what they lie on."""

from __future__ import annotations

import gc

import pytest
import torch

from gemcut.kernels.cpu import memory
from gemcut.kernels.cpu.memory import huge_empty, huge_zeros


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(), (1,), (0, 5), (3, 7), (1000, 4096)])
def test_shape_dtype_and_values(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = huge_empty(shape, dtype)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert torch.equal(tensor.fill_(3), torch.full(shape, 3, dtype=dtype))


def test_zeros_are_zero_with_and_without_mappings(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        for shape in ((0, 5), (3, 7), (1000, 4096)):
            dirty = huge_empty(shape, torch.bfloat16).fill_(3)
            del dirty  # its memory may come back
            assert torch.equal(huge_zeros(shape, torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16))
        monkeypatch.delattr(memory.mmap, "MAP_ANONYMOUS", raising=False)
        monkeypatch.setattr(torch, "empty", lambda *size, **how: torch.full(*size, 3, **how))


def test_no_memory_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="no room for"):
        huge_zeros((1 << 50,), torch.float32)


def test_small_tensors_do_not_overlap_and_are_aligned() -> None:
    tensors = [huge_empty((i % 97 + 1,), torch.float32).fill_(i) for i in range(500)]
    assert all((tensor == i).all() and tensor.data_ptr() % 64 == 0 for i, tensor in enumerate(tensors))


def test_large_tensors_start_at_a_huge_page_and_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class Mapping(memory.mmap.mmap):  # type: ignore[misc]
        def __del__(self) -> None:
            closed.append(len(self))

    monkeypatch.setattr(memory.mmap, "mmap", Mapping)
    tensor = huge_empty((5 << 20,), torch.uint8)
    assert tensor.data_ptr() % (2 << 20) == 0
    view = tensor[100:200]
    del tensor
    gc.collect()
    assert not closed
    view.fill_(1)
    del view
    gc.collect()
    assert len(closed) == 1
