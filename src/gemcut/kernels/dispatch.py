"""Which kernel computes what: a table of implementations, each of which can say why it does not serve a case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from gemcut.errors import UnsupportedError
from gemcut.kernels.plain import plain_linear
from gemcut.quantization.weights import Weight

#: ``x`` [T, in] in the case's compute dtype -> [T, out] in its out dtype.
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


@dataclass(frozen=True)
class Choice:
    """What dispatch decided. ``refused`` gives every implementation tried before, with its reason."""

    name: str
    kernel: LinearKernel
    refused: dict[str, str] = field(default_factory=dict)


PLAIN = LinearImplementation("plain", lambda case, device: None, lambda case, device: partial(plain_linear, case))

#: In order of preference; plain PyTorch serves everything and stands last.
LINEAR: list[LinearImplementation] = [PLAIN]


def choose_linear(case: LinearCase, device: torch.device, kernels: str = "auto") -> Choice:
    """The first implementation that serves ``case``; or, by name, the one asked for.

    Raises UnsupportedError when the one asked for is unknown or cannot serve.
    """
    known = {implementation.name: implementation for implementation in LINEAR}
    if kernels != "auto":
        if kernels not in known:
            raise UnsupportedError(f"kernels={kernels!r} is unknown; choose one of: auto, {', '.join(known)}")
        reason = known[kernels].supports(case, device)
        if reason is not None:
            raise UnsupportedError(f"kernels={kernels!r} cannot serve this model: {reason}")
        return Choice(kernels, known[kernels].prepare(case, device))
    refused: dict[str, str] = {}
    for implementation in LINEAR:
        reason = implementation.supports(case, device)
        if reason is None:
            return Choice(implementation.name, implementation.prepare(case, device), refused)
        refused[implementation.name] = reason
    raise AssertionError("plain serves every case")
