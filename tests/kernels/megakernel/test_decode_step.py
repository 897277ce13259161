"""What the one launch of a decode step takes, and how its work is dealt out; no GPU needed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gemcut.kernels.gpu import PRESETS
from gemcut.kernels.linear import bf16 as bf16_linear
from gemcut.kernels.linear import four_bit as four_bit_linear
from gemcut.kernels.linear import int8 as int8_linear
from gemcut.kernels.linear.gemv import Storage
from gemcut.kernels.megakernel import decode_step
from gemcut.kernels.megakernel.decode_step import StepCase, StepShape

H100 = PRESETS["h100"]
SHAPES = {
    "2b": StepShape(26, 2304, 9216, 8, 4, 256, 1 / 16, 50.0, 1e-6, 4096),
    "9b": StepShape(42, 3584, 14336, 16, 8, 256, 1 / 16, 50.0, 1e-6, 4096),
    "27b": StepShape(46, 4608, 36864, 32, 16, 128, 1 / 12, 50.0, 1e-6, 4096),
    "270m": StepShape(18, 640, 2048, 4, 1, 256, 1 / 16, None, 1e-6, 512),
}
STORAGES = [four_bit_linear.NESTED, four_bit_linear.FLAT, int8_linear.STORAGE, bf16_linear.STORAGE]


@pytest.mark.parametrize("storage", STORAGES, ids=lambda storage: storage.kernel)
@pytest.mark.parametrize("size", list(SHAPES))
def test_every_block_has_a_part_of_every_product(size: str, storage: Storage) -> None:
    shape = SHAPES[size]
    assert decode_step.supports(StepCase(shape, storage, 16), H100) is None
    plan = decode_step._plan(shape, storage, H100.sms, H100.shared_memory)
    stages = [t * s for t, s in zip(plan.tiles, plan.k_blocks, strict=True)]
    # Else a block could be left behind, and words be written again before it has read them.
    assert plan.blocks <= min(plan.tiles[0], stages[1], plan.tiles[2] // 2, stages[3])
    assert plan.blocks == 132 or size == "270m"
    assert plan.shared_bytes + decode_step._static_bytes(shape, plan.slots, plan.most_tiles) <= H100.shared_memory
    assert plan.partials <= 15
    assert plan.most_tiles * plan.blocks >= max(plan.tiles)
    assert all(k_blocks * storage.k_block >= k for k_blocks, (_, k) in zip(plan.k_blocks, shape.matrices, strict=True))
    assert plan.x_bytes >= 2 * max(k for _, k in shape.matrices)


def test_what_it_refuses_and_why() -> None:
    shape, storage = SHAPES["2b"], bf16_linear.STORAGE
    for changed, word in [
        (replace(shape, heads=32), "query heads"),
        (replace(shape, head_dim=96), "power of two"),
        (replace(shape, hidden=2312), "multiples"),
        (replace(shape, hidden=16384), "at most"),
        (replace(shape, width=147456), "shared memory"),
        (replace(shape, hidden=64, width=8192), "shares rows"),
    ]:
        reason = decode_step.supports(StepCase(changed, storage, 16), H100)
        assert reason is not None
        assert word in reason
    assert "block" in (decode_step.supports(StepCase(shape, storage, 12), H100) or "")
    large = StepCase(SHAPES["27b"], four_bit_linear.NESTED, 16)
    assert "shared memory" in (decode_step.supports(large, PRESETS["rtx4090"]) or "")
