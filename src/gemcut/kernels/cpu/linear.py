"""Linear layers on a CPU: the C++ kernels of src/variant/linear.cpp and gemm.cpp behind dispatch's interface."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from gemcut.kernels.cpu import library as cpu
from gemcut.kernels.gpu import NEEDS_CPU, Gpu
from gemcut.kernels.linear.case import LinearCase, LinearImplementation, LinearKernel
from gemcut.kernels.linear.plain import plain_linear
from gemcut.quantization.spec import FourBitType
from gemcut.quantization.tables import code_table, dynamic_map
from gemcut.quantization.weights import CheckpointWeight, FourBitWeight, Int8Weight

#: The most rows of x that the GEMV serves where it does not take tiles of them; linear.h's limits.
MAX_M = 8
MAX_K = 65536
MAX_PARTS = 64
#: With AVX2: rows up to which tiles are faster for weights that are not packed.
WHOLE_TILED = 32

_FOUR_BIT, _INT8, _BF16, _FP32 = range(4)

# Tables of integers are those of the format times a factor, which is taken off at the end: the largest that the sums of
# linear.cpp hold. FP4's values are multiples of 1/192, so that its integers are exact; NF4's are within 2^-14.
_SHORT_FACTORS = {"nf4": 8191.0, "fp4": 42 * 192.0}


class _Segment(ctypes.Structure):
    """linear.h's Segment."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("column", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("nested_scale", ctypes.c_void_p),
        ("nested_map", ctypes.c_void_p),
        ("nested_planes", ctypes.c_void_p),
        ("codebook", ctypes.c_void_p),
        ("short_codebook", ctypes.c_void_p),
        ("block_size", ctypes.c_int64),
        ("nested_offset", ctypes.c_float),
        ("short_factor", ctypes.c_float),
    )


class _Plan(ctypes.Structure):
    """linear.h's Plan."""

    _fields_ = (
        ("segments", ctypes.POINTER(_Segment)),
        ("count", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("out_is_fp32", ctypes.c_int64),
    )


_LINEAR_ARGUMENTS = [
    ctypes.POINTER(_Plan),
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int,
]


_GEMM_ARGUMENTS = [
    ctypes.POINTER(_Plan),
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int,
]


def many_rows(library: cpu.Library) -> Any:
    """The GEMM of many rows of bf16, or None where the library has none for this instruction set."""
    try:
        return library.function("gemm", _GEMM_ARGUMENTS)
    except AttributeError:
        return None


def supports(case: LinearCase, gpu: Gpu | None) -> str | None:
    """None, or why the kernel cannot serve ``case``, which it does on a CPU alone."""
    if gpu is not None:
        return NEEDS_CPU
    if case.compute_dtype not in (torch.bfloat16, torch.float32):
        return f"computes in bfloat16 and float32, not in {case.compute_dtype}"
    if case.out_dtype not in (torch.bfloat16, torch.float32):
        return f"gives bfloat16 and float32, not {case.out_dtype}"
    if len(case.weights) > MAX_PARTS:
        return f"takes at most {MAX_PARTS} matrices at once, not {len(case.weights)}"
    return next((reason for weight in case.weights if (reason := _refused(weight, case)) is not None), None)


def _refused(weight: CheckpointWeight, case: LinearCase) -> str | None:
    k = weight.shape[1]
    if not 1 <= k <= MAX_K:
        return f"takes from 1 to {MAX_K} inputs, not {k}"
    tensors = (weight,) if isinstance(weight, Tensor) else weight.tensors
    if any(tensor.device.type != "cpu" or not tensor.is_contiguous() for tensor in tensors):
        return "needs contiguous weights in the CPU's memory"
    if isinstance(weight, FourBitWeight):
        if weight.block_size < 32 or weight.block_size & (weight.block_size - 1):
            return f"takes blocks of a power of two from 32 on, not of {weight.block_size}"
        if k % weight.block_size:
            return f"a row of {k} values is not a whole number of blocks of {weight.block_size}"
    elif isinstance(weight, Int8Weight):
        if case.activation_threshold is not None:
            return "keeps activations whole: LLM.int8()'s own arithmetic (activation_threshold) is plain PyTorch's"
    elif weight.dtype not in (torch.bfloat16, torch.float32):
        return f"multiplies bfloat16 and float32 weights, not {weight.dtype}"
    elif weight.dtype != case.compute_dtype:
        return f"weights in {weight.dtype} are to be computed with in {case.compute_dtype}"
    return None


@functools.cache
def _tables(quant_type: FourBitType) -> tuple[Tensor, Tensor]:
    """(fp32 [16], int16 [16]: the same times the format's factor)."""
    table = code_table(quant_type)
    return table, (table * _SHORT_FACTORS[quant_type]).round().to(torch.int16)


@functools.cache
def _map_planes() -> Tensor:
    """The dynamic map's bytes, uint8 [4, 256]: the first of every value, the second, …"""
    return dynamic_map().view(torch.uint8).view(256, 4).t().contiguous()


def _segment(weight: CheckpointWeight, column: int) -> _Segment:
    """``weight`` as the library sees it: addresses, of tensors that the caller keeps."""
    rows = weight.shape[0]
    if isinstance(weight, FourBitWeight):
        table, short = _tables(weight.quant_type)
        nested = weight.nested
        return _Segment(
            _FOUR_BIT, rows, column, weight.codes.data_ptr(), weight.absmax.data_ptr(),
            None if nested is None else nested.scale.data_ptr(), dynamic_map().data_ptr(), _map_planes().data_ptr(),
            table.data_ptr(), short.data_ptr(), weight.block_size, 0.0 if nested is None else nested.offset,
            _SHORT_FACTORS[weight.quant_type],
        )  # fmt: skip
    if isinstance(weight, Int8Weight):
        return _Segment(
            kind=_INT8, rows=rows, column=column, data=weight.codes.data_ptr(), absmax=weight.absmax.data_ptr()
        )
    kind = _BF16 if weight.dtype == torch.bfloat16 else _FP32
    return _Segment(kind=kind, rows=rows, column=column, data=weight.data_ptr())


class CpuLinear:
    """The result of a LinearCase: up to ``few`` rows of x at the speed of memory, more of them in panels (gemm.cpp).

    Many rows in fp32, or on Arm, are plain PyTorch's.
    """

    def __init__(self, case: LinearCase, library: cpu.Library) -> None:
        # The case keeps the tensors alive whose addresses the segments hold.
        self.case, self.weights = case, case.weights
        self.columns = sum(weight.shape[0] for weight in case.weights)
        segments, column = (_Segment * len(case.weights))(), 0
        for i, weight in enumerate(case.weights):
            segments[i] = _segment(weight, column)
            column += weight.shape[0]
        k = case.weights[0].shape[1]
        out_is_fp32 = case.out_dtype == torch.float32
        self._plan = _Plan(ctypes.cast(segments, ctypes.POINTER(_Segment)), len(case.weights), k, out_is_fp32)
        self._segments = segments
        self._plan_reference = ctypes.byref(self._plan)
        self.plan_address = ctypes.addressof(self._plan)
        self._x_is_bf16 = int(case.compute_dtype == torch.bfloat16)
        self.run = library.function("linear", _LINEAR_ARGUMENTS)
        self.many = many_rows(library) if case.compute_dtype == torch.bfloat16 else None
        # Tiles of 16 rows cost the same however many are used. Measured where bf16 is multiplied in pairs: they win
        # from six rows on, but without AMX not for four-bit weights.
        four_bit = any(isinstance(weight, FourBitWeight) for weight in case.weights)
        wins = library.variant == "amx" or (library.variant == "avx512bf16" and not four_bit)
        self.few = 5 if wins else MAX_M
        if library.variant == "avx2":
            self.few = self._few_with_avx2()

    def _few_with_avx2(self) -> int:
        """Tiles (tiles.h) serve any number of rows: of packed weights always faster than panels, which use fp32;
        of others up to 32, where panels (PyTorch's product in fp32) begin to win."""
        whole = [isinstance(weight, Tensor) for weight in self.case.weights]
        if self._x_is_bf16:
            return WHOLE_TILED if any(whole) else 1 << 30
        return WHOLE_TILED if all(whole) else MAX_M

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [T, in] in the compute dtype -> [T, out] in the out dtype."""
        rows = x.shape[0]
        if rows == 0 or (rows > self.few and self.many is None):
            return plain_linear(self.case, x)
        if x.stride(1) != 1:
            x = x.contiguous()
        out = torch.empty((rows, self.columns), dtype=self.case.out_dtype)
        if rows > self.few and self.many is not None:
            self.many(
                self._plan_reference, x.data_ptr(), rows, x.stride(0), out.data_ptr(), self.columns, cpu.threads()
            )
            return out
        self.run(
            self._plan_reference, x.data_ptr(), rows, x.stride(0), self._x_is_bf16, out.data_ptr(), self.columns,
            cpu.threads(),
        )  # fmt: skip
        return out


def prepare(case: LinearCase, device: torch.device) -> LinearKernel:
    """The kernel of ``case``, which ``supports`` accepted."""
    return CpuLinear(case, cpu.library())


CPU = LinearImplementation("cpu", supports, prepare, cpu.unavailable)
