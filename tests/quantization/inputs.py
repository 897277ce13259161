"""Matrices of many kinds for tests that compare bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("normal", "heavy", "constant", "zero", "mixed", "grid", "small", "denormal", "huge")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def matrix(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A finite matrix of a kind: seeded by its shape."""
    generator = torch.Generator().manual_seed(shape[0] * 10_007 + shape[1])
    normal = torch.randn(shape, generator=generator)
    largest = torch.finfo(dtype).max
    values = {
        "normal": normal * 0.02,
        "heavy": normal * torch.randn(shape, generator=generator).mul(3).exp(),
        "constant": torch.full(shape, -0.37),
        "zero": torch.zeros(shape),
        "mixed": normal * (torch.rand(shape[0], 1, generator=generator) > 0.5),
        "grid": torch.randint(-8, 9, shape, generator=generator) / 8.0,  # many equal values, and ties
        "small": normal * 1e-6,
        "denormal": normal * torch.finfo(dtype).smallest_normal * 0.1,
        "huge": normal / 8 * largest,
    }[kind]
    return values.clamp(-largest, largest).to(dtype)
