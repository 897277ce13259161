"""8 bits a value with one scale a row: LLM.int8()'s stored form (Dettmers et al. 2022, arXiv 2208.07339)."""

from __future__ import annotations

import torch
from torch import Tensor

from gemcut.quantization.weights import Int8Weight


def quantize_int8(weight: Tensor) -> Int8Weight:
    """Cut ``weight`` [out, in] as bitsandbytes does, which takes it through fp16 first."""
    return _cut(weight.to(torch.float16).float(), weight.dtype)


def quantize_int8_rows(weight: Tensor) -> Int8Weight:
    """Cut ``weight`` [out, in] without the detour through fp16: for the embedding and the head."""
    return _cut(weight.float(), weight.dtype)


def _cut(weight: Tensor, dtype: torch.dtype) -> Int8Weight:
    absmax = weight.abs().amax(dim=1)
    scale = (127.0 / absmax).nan_to_num(posinf=0.0)
    return Int8Weight((weight * scale[:, None]).round().to(torch.int8), absmax, dtype)


def dequantize_int8(weight: Int8Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The matrix [out, in] in ``dtype`` (None: its own), computed in fp32 and rounded once."""
    return (weight.codes.float() * (weight.absmax / 127.0)[:, None]).to(dtype or weight.dtype)


def llm_int8_product(x: Tensor, weight: Int8Weight, threshold: float) -> Tensor:
    """LLM.int8()'s product of ``x`` [T, in] and ``weight`` [out, in] -> fp32 [T, out].

    Rows of ``x`` are rounded to 8 bits, except columns with a magnitude of at least ``threshold`` (0: none excepted),
    which multiply decoded weights.
    """
    x = x.float()
    outlier = (x.abs() >= threshold).any(dim=0) if threshold > 0 else torch.zeros(x.shape[1], dtype=torch.bool)
    inner = x.masked_fill(outlier, 0.0)
    absmax = inner.abs().amax(dim=1, keepdim=True)
    codes = (inner * (127.0 / absmax).nan_to_num(posinf=0.0)).round()
    out = (codes @ weight.codes.float().t()) * (absmax * weight.absmax / (127.0 * 127.0))
    if outlier.any():
        out += x[:, outlier] @ dequantize_int8(weight, torch.float32)[:, outlier].t()
    return out
