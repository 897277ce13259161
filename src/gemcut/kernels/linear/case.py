"""What a linear layer asks a kernel to compute, and how an implementation offers to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gemcut.quantization.weights import Weight

#: ``x`` [T, in] in the case's compute dtype (where that is fp16, or in a wider one) -> [T, out] in its out dtype.
LinearKernel = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LinearCase:
    """A product to be computed: ``x [W₀; W₁; …]ᵀ``.

    Attributes:
        weights: matrices of the same inputs whose results stand side by side.
        compute_dtype: of ``x``; what packed weights are decoded to. Sums are fp32.
        out_dtype: of the result.
        activation_threshold: see gemcut.quantization.spec.Quantization.
    """

    weights: tuple[Weight, ...]
    compute_dtype: torch.dtype
    out_dtype: torch.dtype
    activation_threshold: float | None = None


@dataclass(frozen=True)
class LinearImplementation:
    """A registered way to compute a LinearCase.

    Attributes:
        supports: None, or the reason why it cannot serve the case on a device.
        prepare: makes the kernel; may repack weights and hold the result.
    """

    name: str
    supports: Callable[[LinearCase, torch.device], str | None]
    prepare: Callable[[LinearCase, torch.device], LinearKernel]
