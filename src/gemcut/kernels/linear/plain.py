"""Linear layers in plain PyTorch: right on any device, the twin every kernel is tested against, and the fallback."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcut.kernels.linear.case import LinearCase
from gemcut.quantization.dequantize import dequantize_weight
from gemcut.quantization.int8 import llm_int8_product
from gemcut.quantization.weights import CheckpointWeight, Int8Weight

#: The largest magnitude of a row that is multiplied in fp16; the sum over an MLP's width must stay finite too.
FP16_SAFE = 2.0**7


def softcap_in_place(values: Tensor, cap: float) -> Tensor:
    """``cap · tanh(values / cap)`` of fp32 ``values``, in place (Gemma 2 report, arXiv 2408.00118, section 2).

    An infinite value becomes NaN: as ``±cap`` an overflow would pass for a logit.
    """
    nothing = values - values  # of infinity NaN
    return values.div_(cap).tanh_().mul_(cap).add_(nothing)


def dense_matmul(x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """``x`` [T, in] times ``weight`` [out, in] transposed -> [T, out] in ``out_dtype`` (None: that of ``x``).

    One row in bf16 on a CPU goes through PyTorch's GEMV, which reads a quarter to a half faster there; both
    accumulate in fp32.
    """
    if out_dtype == torch.float32 and x.is_cuda and x.dtype != torch.float32:
        # A bf16 result would put logits near 25 on a grid of 0.125, so the result is kept as fp32.
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    if x.shape[0] == 1 and x.dtype == torch.bfloat16 and not x.is_cuda:
        out = torch.mv(weight, x[0])[None]
    else:
        out = F.linear(x, weight)
    return out if out_dtype is None else out.to(out_dtype)


def dense_matmul_fp16(x: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``x`` [T, in] in bf16 or fp32 times ``weight`` fp16 [out, in] transposed -> [T, out], computed in fp16.

    ``x`` may hold what fp16 cannot (GeGLU's result passes 65,504 in real weights): see ``fp16_rows``.
    """
    rows, factor = fp16_rows(x.float())
    return (dense_matmul(rows, weight, torch.float32) * factor).to(out_dtype)


def fp16_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` fp32 [T, n] as (rows fp16 [T, n], factor fp32 [T, 1]) with ``x = rows · factor``, but for fp16's rounding.

    A row with a magnitude above ``FP16_SAFE`` is divided by a power of two, which is exact; 1 is the factor of others.
    """
    peak = x.abs().amax(dim=-1, keepdim=True)
    factor = torch.exp2((peak / FP16_SAFE).clamp_min(1.0).log2().ceil())
    return (x / factor).to(torch.float16), factor


def plain_linear(case: LinearCase, x: Tensor) -> Tensor:
    """The result of a LinearCase: every matrix is dequantized whole, then multiplied.

    ``x`` is in the compute dtype; where that is fp16, ``x`` may be wider and hold what fp16 cannot.
    """
    parts = []
    wider = case.compute_dtype == torch.float16 and x.dtype != torch.float16
    for weight in case.weights:
        if isinstance(weight, Int8Weight) and case.activation_threshold is not None:
            # Computed in fp32: rounded to fp16, as bitsandbytes does, as far as fp16 goes.
            near = torch.where(x.half().isfinite(), x.half().float(), x.float()) if wider else x
            part = llm_int8_product(near, weight, case.activation_threshold).to(case.out_dtype)
        elif wider:
            part = dense_matmul_fp16(x, dequantize_weight(weight, torch.float16), case.out_dtype)
        else:
            part = dense_matmul(x, dequantize_weight(weight, case.compute_dtype), case.out_dtype)
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


@dataclass(frozen=True, eq=False)
class PlainLinear:
    """``plain_linear`` of one case."""

    case: LinearCase

    @property
    def weights(self) -> tuple[CheckpointWeight, ...]:
        """The case's."""
        return self.case.weights

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [T, in] -> [T, out]."""
        return plain_linear(self.case, x)
