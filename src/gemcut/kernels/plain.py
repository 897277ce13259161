"""Plain PyTorch products: right on any device, the twin every kernel is tested against, and the fallback."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcut.quantization.decode import decode
from gemcut.quantization.int8 import llm_int8_product
from gemcut.quantization.weights import Int8Weight

if TYPE_CHECKING:
    from gemcut.kernels.case import LinearCase


def dense_product(x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """``x`` [T, in] times ``weight`` [out, in] transposed -> [T, out] in ``out_dtype`` (None: that of ``x``).

    One row in bf16 on a CPU goes through the matrix-vector product, which reads a quarter to a half faster there; both
    accumulate in fp32.
    """
    if out_dtype == torch.float32 and x.is_cuda and x.dtype != torch.float32:
        # A bf16 result would put logits near 25 on a grid of 0.125, so the product is kept as fp32.
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    if x.shape[0] == 1 and x.dtype == torch.bfloat16 and not x.is_cuda:
        out = torch.mv(weight, x[0])[None]
    else:
        out = F.linear(x, weight)
    return out if out_dtype is None else out.to(out_dtype)


def plain_linear(case: LinearCase, x: Tensor) -> Tensor:
    """The product of a LinearCase: every matrix is decoded whole, then multiplied. ``x`` is in the compute dtype."""
    parts = []
    for weight in case.weights:
        if isinstance(weight, Int8Weight) and case.activation_threshold is not None:
            part = llm_int8_product(x, weight, case.activation_threshold).to(case.out_dtype)
        else:
            part = dense_product(x, decode(weight, case.compute_dtype), case.out_dtype)
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
