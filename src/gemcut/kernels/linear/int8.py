"""int8 weights with one scale a row, as stored, times one to eight rows of bf16, on an NVIDIA GPU.

Activations stay bf16: nothing passes through fp16 or int8, so there is no outlier handling and no overflow.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gemcut.errors import ParameterError
from gemcut.kernels.gpu import NEEDS_GPU, Gpu
from gemcut.kernels.linear.case import LinearCase
from gemcut.kernels.linear.gemv import Layout, Storage, gemv
from gemcut.quantization.weights import Int8Weight, PackedWeight

STORAGE = Storage("int8_gemv", 128, 2048, 0, 16, Layout(8, 5, 2), Layout(16, 4, 1), fixed_kernel="int8_fixed")


@dataclass(frozen=True, eq=False)
class PackedInt8(PackedWeight):
    """Matrices of the same inputs, one below the other: ``W = codes · scales[:, None]``."""

    codes: torch.Tensor  # int8 [n, k]
    absmax: torch.Tensor  # fp32 [n]: each row's largest magnitude
    scales: torch.Tensor  # fp32 [n]: absmax / 127
    rows: tuple[int, ...]  # of each matrix
    dtypes: tuple[torch.dtype, ...]  # what each matrix's dequantized values are rounded to

    @classmethod
    def of(cls, weights: Sequence[Int8Weight]) -> PackedInt8:
        """Matrices of the same inputs, one below the other; a single one's codes are shared, not copied."""
        codes = [weight.codes for weight in weights]
        absmax = torch.cat([weight.absmax.float() for weight in weights])
        packed = cls(
            codes[0].contiguous() if len(codes) == 1 else torch.cat(codes),
            absmax,
            absmax / 127.0,
            tuple(weight.shape[0] for weight in weights),
            tuple(weight.dtype for weight in weights),
        )
        if packed.codes.is_cuda:
            torch.cuda.synchronize(packed.codes.device)  # kernels read weights before what is queued ahead is done
        return packed

    @property
    def nbytes(self) -> int:
        """Bytes one GEMV reads."""
        return self.codes.nbytes + self.scales.nbytes

    def unpack(self) -> tuple[Int8Weight, ...]:
        """The matrices as they came: views, which share their memory with this."""
        codes, absmax = (torch.split(tensor, list(self.rows)) for tensor in (self.codes, self.absmax))
        return tuple(Int8Weight(*parts) for parts in zip(codes, absmax, self.dtypes, strict=True))

    def dequantize(self) -> torch.Tensor:
        """fp32 [n, k]."""
        return self.codes.float() * self.scales[:, None]


class Format(ctypes.Structure):
    """``struct Format`` of kernels/linear/int8_gemv.cu."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("n", ctypes.c_int),
        ("k", ctypes.c_int),
    )


def supports(case: LinearCase, gpu: Gpu | None) -> str | None:
    """None where `int8_gemv` and `int8_head` serve ``case``, else one line that says why not."""
    if gpu is None:
        return NEEDS_GPU
    if not all(isinstance(weight, Int8Weight) for weight in case.weights):
        return "the int8 kernel takes int8 matrices alone"
    return _unaligned(case.weights[0].shape[1])


def _unaligned(columns: int) -> str | None:
    if columns % 16:
        return f"the int8 kernel needs rows that begin at multiples of 16 bytes, not rows of {columns}"
    return None


def _refusal(weight: PackedInt8) -> str | None:
    codes, scales = weight.codes, weight.scales
    if codes.dtype != torch.int8 or not codes.is_contiguous():
        return f"the int8 kernel needs contiguous int8 codes, not {codes.dtype}, strides {codes.stride()}"
    if scales.dtype != torch.float32 or not scales.is_contiguous() or scales.shape != codes.shape[:1]:
        return f"the int8 kernel needs one fp32 scale a row, not {scales.dtype} {tuple(scales.shape)}"
    if codes.data_ptr() % 16:
        return "the int8 kernel needs codes that begin at a multiple of 16 bytes"
    return _unaligned(codes.shape[1])


def int8_gemv(x: torch.Tensor, weight: PackedInt8, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [m, k] bf16, m from 1 to 8 -> bf16 [m, n], summed in fp32."""
    _check_columns(x, weight)
    return gemv(STORAGE, argument(weight), x, weight.codes.shape[0], out=out)


def int8_head(x: torch.Tensor, weight: PackedInt8, softcap: float | None) -> torch.Tensor:
    """x [m, d] bf16, m from 1 to 8 -> fp32 logits [m, n], `softcap * tanh(logit / softcap)` where given."""
    _check_columns(x, weight)
    return gemv(STORAGE, argument(weight), x, weight.codes.shape[0], out_dtype="float32", softcap=softcap)


def _check_columns(x: torch.Tensor, weight: PackedInt8) -> None:
    if x.shape[-1] != weight.codes.shape[1]:
        raise ParameterError(f"x has {x.shape[-1]} columns, the weight {weight.codes.shape[1]}")


def argument(weight: PackedInt8) -> ctypes.Structure:
    """The kernels' ``struct Format``, which does not keep the weight alive. ParameterError where they refuse it."""
    reason = _refusal(weight)
    if reason is not None:
        raise ParameterError(reason)
    return Format(weight.codes.data_ptr(), weight.scales.data_ptr(), *weight.codes.shape)


def int8_gemv_plain(x: torch.Tensor, weight: PackedInt8) -> torch.Tensor:
    """The same in plain torch: the weight dequantized to bf16, then a matmul."""
    return F.linear(x, weight.dequantize().to(x.dtype))


def int8_head_plain(x: torch.Tensor, weight: PackedInt8, softcap: float | None) -> torch.Tensor:
    """The same in plain torch, in fp32."""
    logits = F.linear(x.float(), weight.dequantize())
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
