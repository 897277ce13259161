"""What the kernels' tests share."""

from __future__ import annotations

import pytest
import torch

from gemcut.kernels.linear import gemm as packed_gemm


@pytest.fixture
def hopper() -> None:
    """Skips where there is no wgmma."""
    reason = packed_gemm.unavailable_reason(torch.cuda.current_device())
    if reason is not None:
        pytest.skip(reason)
