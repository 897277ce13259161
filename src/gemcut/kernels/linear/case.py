"""What a linear layer asks a kernel to compute, and how an implementation offers to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gemcut.quantization.weights import CheckpointWeight, Weight


@dataclass(frozen=True)
class LinearCase:
    """A product to be computed: ``x [W₀; W₁; …]ᵀ``.

    Attributes:
        weights: matrices of the same inputs whose results stand side by side.
        compute_dtype: of ``x``; what packed weights are decoded to. Sums are fp32.
        out_dtype: of the result.
        activation_threshold: see gemcut.quantization.spec.Quantization.
    """

    weights: tuple[CheckpointWeight, ...]
    compute_dtype: torch.dtype
    out_dtype: torch.dtype
    activation_threshold: float | None = None


class LinearKernel(Protocol):
    """Computes a LinearCase."""

    @property
    def weights(self) -> tuple[Weight, ...]:
        """What it reads: the case's weights, or one PackedWeight made of them, which the layer owns from then on."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """``x`` [T, in] in the case's compute dtype (where that is fp16, or in a wider one) -> [T, out] in its out
        dtype."""


@dataclass(frozen=True)
class LinearImplementation:
    """A registered way to compute a LinearCase.

    Attributes:
        supports: None, or the reason why it cannot serve the case on a device.
        prepare: makes the kernel.
    """

    name: str
    supports: Callable[[LinearCase, torch.device], str | None]
    prepare: Callable[[LinearCase, torch.device], LinearKernel]
