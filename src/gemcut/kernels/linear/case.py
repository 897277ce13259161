"""What a linear layer asks a kernel to compute, and how an implementation offers to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gemcut.kernels.gpu import Gpu
from gemcut.quantization.weights import CheckpointWeight, Weight


@dataclass(frozen=True)
class LinearCase:
    """A GEMV or GEMM to be computed: ``x [W₀; W₁; …]ᵀ``.

    Attributes:
        weights: matrices of the same inputs whose results stand side by side.
        compute_dtype: of ``x``; what packed weights are dequantized to. Sums are fp32.
        out_dtype: of the result.
        activation_threshold: see gemcut.quantization.spec.Quantization.
    """

    weights: tuple[CheckpointWeight, ...]
    compute_dtype: torch.dtype
    out_dtype: torch.dtype
    activation_threshold: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows of all matrices, columns)."""
        return sum(weight.shape[0] for weight in self.weights), self.weights[0].shape[1]


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
        supports: None, or the reason why it cannot serve the case on a GPU, None being a CPU (gemcut.kernels.gpu).
        prepare: makes the kernel.
        unavailable: None, or what it lacks on this machine, whatever the case.
    """

    name: str
    supports: Callable[[LinearCase, Gpu | None], str | None]
    prepare: Callable[[LinearCase, torch.device], LinearKernel]
    unavailable: Callable[[], str | None] = lambda: None

    def refusal(self, case: LinearCase, gpu: Gpu | None) -> str | None:
        """None, or why it cannot serve ``case`` on this machine, on its GPU ``gpu`` or on its CPU."""
        return self.supports(case, gpu) or self.unavailable()
