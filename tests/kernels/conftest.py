"""What the kernels' tests share."""

from __future__ import annotations

import pytest
import torch

from gemcut.kernels.gpu import gpu_of


@pytest.fixture
def hopper() -> None:
    """Skips where there is no wgmma."""
    reason = gpu_of(torch.cuda.current_device()).wgmma_refusal
    if reason is not None:
        pytest.skip(reason)
