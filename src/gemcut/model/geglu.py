"""The gated product between the MLP's two matrix products, once per compute dtype that needs its own care."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemcut.kernels.linear.plain import fp16_rows

GegluDown = Callable[[Tensor, nn.Module], Tensor]


def choose_geglu(dtype: torch.dtype) -> GegluDown:
    """The gated product that is safe where it is stored in ``dtype``.

    What ``down`` computes in may be narrower (``Quantization.compute_dtype``): that product keeps its own rows safe,
    whoever made them.
    """
    return geglu_down_fp16 if dtype == torch.float16 else geglu_down


def geglu_down(gate_up: Tensor, down: nn.Module) -> Tensor:
    """``down(gelu(gate) · up)`` in the dtype of ``gate_up`` [T, 2 · width]; returns [T, d]."""
    gate, up = gate_up.chunk(2, dim=-1)
    out: Tensor = down(F.gelu(gate, approximate="tanh").mul_(up))
    return out


def geglu_down_fp16(gate_up: Tensor, down: nn.Module) -> Tensor:
    """The same for fp16, where the product and what follows overflow in real Gemma weights.

    The product is fp32. A row that is too large is divided by a power of two (which is exact) before it becomes
    fp16 and multiplied back after ``down``, in fp32. Returns fp32 [T, d].
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    product = F.gelu(gate, approximate="tanh").mul_(up)
    rows, factor = fp16_rows(product)
    out: Tensor = down(rows)
    return out.float() * factor
