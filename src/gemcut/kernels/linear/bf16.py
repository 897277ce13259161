"""bf16 weights, as stored, times one to eight rows, on an NVIDIA GPU: linears and the head over the vocabulary."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F

from gemcut.errors import ParameterError
from gemcut.kernels.gpu import NEEDS_GPU, Gpu
from gemcut.kernels.linear.case import LinearCase
from gemcut.kernels.linear.gemv import Layout, Storage, gemv

STORAGE = Storage("bf16_gemv", 64, 2048, 0, 64, Layout(8, 6, 2), Layout(16, 4, 1))


class Format(ctypes.Structure):
    """``struct Format`` of kernels/linear/bf16_gemv.cu."""

    _fields_ = (("weight", ctypes.c_void_p), ("n", ctypes.c_int), ("k", ctypes.c_int))


def supports(case: LinearCase, gpu: Gpu | None) -> str | None:
    """None where `bf16_gemv` and `bf16_head` serve ``case``, else one line that says why not."""
    if gpu is None:
        return NEEDS_GPU
    if len(case.weights) != 1 or not isinstance(case.weights[0], torch.Tensor):
        return "the bf16 kernel takes one unquantized matrix at a time"
    return _refusal(case.weights[0])


def _refusal(weight: torch.Tensor) -> str | None:
    if weight.dtype != torch.bfloat16 or not weight.is_contiguous():
        return f"the bf16 kernel needs a contiguous bf16 weight, not {weight.dtype}, strides {weight.stride()}"
    if weight.shape[1] % 8 or weight.data_ptr() % 16:
        return f"the bf16 kernel needs rows that begin at multiples of 16 bytes, not rows of {weight.shape[1]}"
    return None


def bf16_gemv(x: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [m, k] bf16, m from 1 to 8; weight [n, k] -> bf16 [m, n], summed in fp32."""
    return gemv(STORAGE, _argument(x, weight), x, weight.shape[0], out=out)


def bf16_head(x: torch.Tensor, weight: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """x [m, d] bf16, m from 1 to 8; weight [vocabulary, d] -> fp32 logits, after the soft-cap if any."""
    return gemv(STORAGE, _argument(x, weight), x, weight.shape[0], out_dtype="float32", softcap=softcap)


def _argument(x: torch.Tensor, weight: torch.Tensor) -> ctypes.Structure:
    reason = _refusal(weight)
    if reason is not None:
        raise ParameterError(reason)
    if x.shape[-1] != weight.shape[1]:
        raise ParameterError(f"x has {x.shape[-1]} columns, the weight {weight.shape[1]}")
    return Format(weight.data_ptr(), *weight.shape)


def bf16_gemv_plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same in plain torch."""
    return F.linear(x, weight)


def bf16_head_plain(x: torch.Tensor, weight: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """The same in plain torch; the GEMM in fp32, so that logits are not rounded to bf16."""
    logits = F.linear(x.float(), weight.float())
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
