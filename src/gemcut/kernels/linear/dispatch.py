"""Which kernel computes what: a table of implementations, each of which can say why it does not serve a case."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from gemcut.errors import UnsupportedError
from gemcut.kernels.cpu.linear import CPU
from gemcut.kernels.gpu import gpu_at
from gemcut.kernels.linear.case import LinearCase, LinearImplementation, LinearKernel
from gemcut.kernels.linear.cuda import CUDA
from gemcut.kernels.linear.plain import PlainLinear

__all__ = ["LINEAR", "PLAIN", "Choice", "LinearCase", "LinearImplementation", "LinearKernel", "choose_linear"]


@dataclass(frozen=True)
class Choice:
    """What dispatch decided. ``refused`` gives every implementation tried before, with its reason."""

    name: str
    kernel: LinearKernel
    refused: dict[str, str] = field(default_factory=dict)


PLAIN = LinearImplementation("plain", lambda case, gpu: None, lambda case, device: PlainLinear(case))

#: In order of preference; plain PyTorch serves everything and stands last.
LINEAR: list[LinearImplementation] = [CUDA, CPU, PLAIN]


def choose_linear(case: LinearCase, device: torch.device, kernels: str = "auto") -> Choice:
    """The first implementation that serves ``case``; or, by name, the one asked for.

    Raises UnsupportedError when the one asked for is unknown or cannot serve.
    """
    known, gpu = {implementation.name: implementation for implementation in LINEAR}, gpu_at(device)
    if kernels != "auto":
        if kernels not in known:
            raise UnsupportedError(f"kernels={kernels!r} is unknown; choose one of: auto, {', '.join(known)}")
        reason = known[kernels].refusal(case, gpu)
        if reason is not None:
            raise UnsupportedError(f"kernels={kernels!r} cannot serve this model: {reason}")
        return Choice(kernels, known[kernels].prepare(case, device))
    refused: dict[str, str] = {}
    for implementation in LINEAR:
        reason = implementation.refusal(case, gpu)
        if reason is None:
            return Choice(implementation.name, implementation.prepare(case, device), refused)
        refused[implementation.name] = reason
    raise AssertionError("plain serves every case")
