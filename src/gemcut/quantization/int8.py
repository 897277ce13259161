"""8 bits a value with one scale a row: LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), in bitsandbytes' bytes.

The stored form and its dequantized values are those of bitsandbytes' CPU code, bit for bit. In products two things of
its are left out, for they only do harm: activations do not pass through fp16, which ends at 65,504, and products are
scaled by 1 / 127², not by the constant 6.200124e-05, which is off by 2 parts in 10⁵.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gemcut.quantization.pieces import PIECE, in_pieces
from gemcut.quantization.weights import Int8Weight

# So many products of two 8-bit values add up exactly in fp32: 127² · 1040 < 2²⁴.
_EXACT_SUM = 1040
#: What the unit of a product of two codes is, in units of their rows' largest magnitudes.
_UNIT = 1.0 / (127.0 * 127.0)


def quantize_int8(weight: Tensor) -> Int8Weight:
    """Cut ``weight`` [out, in] (finite) as bitsandbytes does, which takes it through fp16 first."""
    return _cut(weight, lambda rows: rows.to(torch.float16).float())


def quantize_int8_rows(weight: Tensor) -> Int8Weight:
    """Cut ``weight`` [out, in] (finite) without the detour through fp16: for the embedding and the head."""
    return _cut(weight, lambda rows: rows.float())


def _cut(weight: Tensor, prepare: Callable[[Tensor], Tensor]) -> Int8Weight:
    weight = weight.detach()
    n, k = weight.shape
    codes = torch.empty(n, k, dtype=torch.int8, device=weight.device)
    absmax = torch.empty(n, dtype=torch.float32, device=weight.device)

    def quantize_piece(start: int, stop: int) -> None:
        rows = prepare(weight[start:stop])
        scaled = torch.abs(rows)
        torch.amax(scaled, dim=1, out=absmax[start:stop])
        torch.mul(rows, _steps(absmax[start:stop])[:, None], out=scaled)
        codes[start:stop] = scaled.round_()

    in_pieces(quantize_piece, n, max(1, PIECE // k), weight.device)
    return Int8Weight(codes, absmax, weight.dtype)


def _steps(absmax: Tensor) -> Tensor:
    """How many of 127 steps a unit is in rows with ``absmax``; 0 in rows of zeros, whose codes are 0."""
    return (127.0 / absmax).nan_to_num_(posinf=0.0)


def dequantize_int8(weight: Int8Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The matrix [out, in] in ``dtype`` (None: its own), computed in fp32 and rounded once."""
    n, k = weight.shape
    out = torch.empty(n, k, dtype=dtype or weight.dtype, device=weight.codes.device)

    def dequantize_piece(start: int, stop: int) -> None:
        values = weight.codes[start:stop].float()
        out[start:stop] = values.mul_(weight.absmax[start:stop, None]).mul_(1.0 / 127.0)

    in_pieces(dequantize_piece, n, max(1, PIECE // k), out.device)
    return out


def llm_int8_product(x: Tensor, weight: Int8Weight, threshold: float) -> Tensor:
    """LLM.int8()'s product of ``x`` [T, in] and ``weight`` [out, in] -> fp32 [T, out].

    Rows of ``x`` are rounded to 8 bits, and products of codes are added up as whole numbers. Columns with a magnitude
    of at least ``threshold`` (0: none) are left out of that: they multiply dequantized weights. A row's scale is its
    largest magnitude below ``threshold``, wherever that stands.
    """
    x = x.float()
    codes, absmax, outliers = _round_rows(x, threshold)
    out = _whole_product(codes, weight.codes).float() * (absmax[:, None] * weight.absmax) * _UNIT
    if outliers.numel():
        columns = Int8Weight(weight.codes[:, outliers], weight.absmax, torch.float32)
        out += x[:, outliers] @ dequantize_int8(columns).t()
    return out


def _round_rows(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of ``x`` fp32 in 8 bits: (codes, whole numbers in fp32 [T, in]; absmax fp32 [T]; outlier columns)."""
    large = x.abs() >= threshold if threshold > 0 else torch.zeros_like(x, dtype=torch.bool)
    outliers = large.any(dim=0).nonzero().flatten()
    inner = x.masked_fill(large, 0.0)
    absmax = inner.abs().amax(dim=1)
    codes = inner.mul_(_steps(absmax)[:, None]).round_()
    codes[:, outliers] = 0.0
    return codes, absmax, outliers


def _whole_product(codes: Tensor, weight: Tensor) -> Tensor:
    """``codes`` [T, in], whole numbers up to 127 in fp32, times ``weight`` int8 [out, in] transposed: int32, exact."""
    out = torch.zeros(codes.shape[0], weight.shape[0], dtype=torch.int32, device=codes.device)
    for start in range(0, codes.shape[1], _EXACT_SUM):
        stop = start + _EXACT_SUM
        out += (codes[:, start:stop] @ weight[:, start:stop].float().t()).to(torch.int32)
    return out
