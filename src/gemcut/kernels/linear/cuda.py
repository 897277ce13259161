"""Linear layers on an NVIDIA GPU: GEMV, fused GEMM, dequantization and cuBLAS, by the rows of x.

Computes: y = x W^T on an NVIDIA GPU, by the rows of x: GEMV, fused GEMM, or dequantization and cuBLAS
Shapes: x bf16 [m, k], a LinearCase's weights -> bf16 or fp32 [m, n]
Runs: linear/dispatch.py prepares a kernel for each linear layer
Schedule: linear/routes.py says up to how many rows each kernel serves; here are also the launches of *_dequant.cu
Invariants: W is read packed up to the last route; beyond it, it is dequantized into one buffer that all layers share

`gemcut.kernels.linear.routes` says up to how many rows each serves. Beyond the last the weights are dequantized to
bf16, as many rows at a time as fit a buffer that all layers share, for cuBLAS.

The two GEMMs of an MLP's gate and up, the gating and the rounding are one launch where that serves and pays
(gemcut.kernels.linear.gated); packed weights are dequantized for it, too.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from gemcut.errors import ParameterError
from gemcut.kernels.gpu import NEEDS_GPU, Gpu, gpu_of
from gemcut.kernels.linear import bf16 as bf16_linear
from gemcut.kernels.linear import four_bit as four_bit_linear
from gemcut.kernels.linear import gated as gated_gemm
from gemcut.kernels.linear import gemm as fused_gemm
from gemcut.kernels.linear import int8 as int8_linear
from gemcut.kernels.linear.case import LinearCase, LinearImplementation, LinearKernel
from gemcut.kernels.linear.gemv import MAX_ROWS, TILE, Storage, gemv
from gemcut.kernels.linear.int8 import PackedInt8
from gemcut.kernels.linear.layout import Ordered
from gemcut.kernels.linear.plain import dense_matmul
from gemcut.kernels.linear.routes import routes
from gemcut.kernels.runtime import nvrtc
from gemcut.kernels.runtime.nvrtc import CudaKernel, compile_kernel, read_sources
from gemcut.quantization.tables import code_table
from gemcut.quantization.weights import FourBitWeight, Int8Weight

# Dequantized weights stand here. The more rows at a time, the smaller the share of SMs that have nothing to do at a
# GEMM's end; so much holds 27B's largest small side whole, and less will do where a GPU has less memory.
BUFFER_BYTES = 324 << 20
HEAD_BYTES = 32 << 20


def supports(case: LinearCase, gpu: Gpu | None) -> str | None:
    """None where these kernels serve ``case``, else one line that says why not."""
    if gpu is None:
        return NEEDS_GPU
    if case.compute_dtype != torch.bfloat16:
        return f"computes in bfloat16 only, not in {case.compute_dtype}"
    if case.out_dtype not in (torch.bfloat16, torch.float32):
        return f"gives bfloat16 or float32, not {case.out_dtype}"
    if case.activation_threshold is not None:
        return "keeps activations whole; LLM.int8()'s arithmetic (activation_threshold) runs in plain PyTorch"
    for kind, (format_supports, _) in _FORMATS.items():
        if all(isinstance(weight, kind) for weight in case.weights):
            return format_supports(case, gpu)
    return "takes matrices of one format together, and one whole matrix at a time"


#: What a kernel reads: one matrix, or several of the same inputs one below the other.
Rows = four_bit_linear.PackedFourBit | PackedInt8 | Tensor


class FewRows:
    """Up to ``most_few`` rows of x through ``few``, up to ``most_some`` through ``some``, more through ``many``.

    ``rows`` is what they read; ``ordered``: whether ``some`` takes x in order (gemcut.kernels.linear.layout), too.
    ``gated``: of matrices whose rows are gate, then up, gives ``gelu(gate) · up`` of many rows of x in one launch.
    """

    def __init__(
        self,
        rows: Rows,
        few: Callable[[Tensor], Tensor],
        many: Callable[[Tensor], Tensor],
        most_few: int,
        some: Callable[[Tensor], Tensor] | Callable[[Tensor | Ordered], Tensor] | None = None,
        most_some: int = 0,
        ordered: bool = False,
        gated: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.rows, self.few, self.some, self.many, self.gated = rows, few, some, many, gated
        self.most_few, self.most_some, self.ordered = most_few, most_some, ordered

    @property
    def weights(self) -> tuple[Rows]:
        """``rows`` alone."""
        return (self.rows,)

    def __call__(self, x: Tensor | Ordered) -> Tensor:
        if isinstance(x, Ordered):
            if not self.groups(x.m):
                raise ParameterError(f"a GEMM of {x.m} rows reads them as they are, not in order")
            return self.some(x)  # type: ignore[misc, arg-type]
        rows = x.shape[0]
        if 0 < rows <= self.most_few:
            return self.few(x)
        if self.some is not None and 0 < rows <= self.most_some:
            return self.some(x)
        return self.many(x)

    def groups(self, m: int) -> int:
        """Groups of eight rows that ``m`` rows of x are best put in order by; 0: they are read as they are."""
        return fused_gemm.order_groups(m) if self.ordered and self.most_few < m <= self.most_some else 0


#: Dequantizes rows of W, from one (a multiple of ``TILE``) on so many, into bf16 [rows, k].
Dequantize = Callable[[int, int, Tensor], None]


def _packed_kernel(
    case: LinearCase,
    packed: four_bit_linear.PackedFourBit | PackedInt8,
    storage: Storage,
    few: Callable[[Tensor], Tensor],
    fused: Callable[[Tensor | Ordered], Tensor],
    dequantize: Dequantize,
) -> FewRows:
    # What is kept for later must not hold the case: its matrices go when the layer owns the packed ones.
    shape, out_dtype, device = case.shape, case.out_dtype, packed.codes.device

    def many(x: Tensor) -> Tensor:
        return _by_segments(x, *shape, dequantize, out_dtype)

    # The head's logits are wanted of few rows at a time: not worth a large buffer.
    _buffer(device).announce(*shape, BUFFER_BYTES if out_dtype == torch.bfloat16 else HEAD_BYTES)
    gpu = gpu_of(device.index or 0)
    most_few, most_some, _ = (route.up_to_rows for route in routes(storage, *shape, gpu))
    assert most_few is not None
    assert most_some is not None
    if gpu.wgmma_refusal is None:
        gated = None if gated_gemm.supports(case, gpu) else functools.partial(_gated_by_segments, shape, dequantize)
        return FewRows(packed, few, many, most_few, fused, most_some, ordered=True, gated=gated)

    def passes(x: Tensor) -> Tensor:
        return torch.cat([few(part) for part in torch.split(x, MAX_ROWS)])

    return FewRows(packed, few, many, most_few, passes, most_some)


def _four_bit(case: LinearCase) -> LinearKernel:
    packed = four_bit_linear.pack([w for w in case.weights if isinstance(w, FourBitWeight)])
    storage, argument = four_bit_linear.NESTED if packed.nested else four_bit_linear.FLAT, packed.argument
    return _packed_kernel(
        case,
        packed,
        storage,
        lambda x: gemv(storage, argument, x, packed.n),
        lambda x: fused_gemm.gemm(storage, argument, x, packed.n),
        lambda start, count, out: dequantize_four_bit(packed, start // TILE, -(-count // TILE), out),
    )


def _int8(case: LinearCase) -> LinearKernel:
    packed = PackedInt8.of([w for w in case.weights if isinstance(w, Int8Weight)])
    n = packed.codes.shape[0]
    storage, argument = int8_linear.STORAGE, int8_linear.argument(packed)
    out_dtype: Literal["float32", "bfloat16"] = "float32" if case.out_dtype == torch.float32 else "bfloat16"
    return _packed_kernel(
        case,
        packed,
        storage,
        lambda x: gemv(storage, argument, x, n, out_dtype=out_dtype),
        lambda x: fused_gemm.gemm(storage, argument, x, n, out_dtype=out_dtype),
        lambda start, count, out: dequantize_int8(
            packed.codes[start : start + count], packed.scales[start : start + count], out
        ),
    )


def _dense(case: LinearCase) -> LinearKernel:
    (weight,) = case.weights
    assert isinstance(weight, Tensor)
    if case.out_dtype == torch.float32:
        return FewRows(
            weight,
            lambda x: bf16_linear.bf16_head(x, weight, None),
            lambda x: dense_matmul(x, weight, torch.float32),
            _few_dense(weight, float_output=True),
        )
    gated = gated_gemm.supports(case, gpu_of(weight.device.index or 0)) is None
    return FewRows(
        weight,
        lambda x: bf16_linear.bf16_gemv(x, weight),
        lambda x: dense_matmul(x, weight),
        _few_dense(weight, float_output=False),
        gated=(lambda x: gated_gemm.gated_gemm(x, weight)) if gated else None,
    )


def _few_dense(weight: Tensor, *, float_output: bool) -> int:
    """Rows of x that an unquantized weight's GEMV takes."""
    n, k = weight.shape
    found = routes(bf16_linear.STORAGE, n, k, gpu_of(weight.device.index or 0), float_output=float_output)
    assert found[0].up_to_rows is not None
    return found[0].up_to_rows


def prepare(case: LinearCase, device: torch.device) -> LinearKernel:
    """The kernel of a case that ``supports`` takes."""
    _, make = next(found for kind, found in _FORMATS.items() if isinstance(case.weights[0], kind))
    return make(case)


#: For each kind of weight, which cases its kernels serve, and what makes one.
_FORMATS: dict[type, tuple[Callable[[LinearCase, Gpu | None], str | None], Callable[[LinearCase], LinearKernel]]] = {
    FourBitWeight: (four_bit_linear.supports, _four_bit),
    Int8Weight: (int8_linear.supports, _int8),
    Tensor: (bf16_linear.supports, _dense),
}

CUDA = LinearImplementation("cuda", supports, prepare, nvrtc.unavailable_reason)


class _Buffer:
    """Where dequantized weights stand, one for all layers of a device: what is queued on the stream uses it in turn.

    As large as the largest matrix that was announced, up to `BUFFER_BYTES` and a small part of the device's memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._announced = device, 0
        self._share = torch.cuda.get_device_properties(device).total_memory // 128
        #: Captured graphs go on using what they were captured with, so none is given back.
        self.kept: list[Tensor] = []

    def announce(self, n: int, k: int, most: int) -> None:
        """A matrix [n, k] will be dequantized, whole or in parts of up to ``most`` bytes."""
        self._announced = max(self._announced, min(-(-n // TILE) * TILE * k * 2, most))

    def values(self, least: int) -> Tensor:
        """bf16, at least so many, uninitialised."""
        count = max(min(self._announced, self._share, BUFFER_BYTES) // 2, least)
        if not self.kept or len(self.kept[-1]) < count:
            self.kept.append(torch.empty(count, dtype=torch.bfloat16, device=self.device))
        return self.kept[-1]


@functools.cache
def _buffer(device: torch.device) -> _Buffer:
    return _Buffer(device)


@functools.cache
def _four_bit_kernel(nested: bool, device: int) -> CudaKernel:
    sources = read_sources(
        "runtime/launch.cuh", "linear/gemv.cuh", "linear/four_bit_gemv.cu", "linear/four_bit_dequant.cu"
    )
    return compile_kernel(sources, "four_bit_dequant", (("NESTED", int(nested)),), device)


class _FourBitDequant(ctypes.Structure):
    _fields_ = (
        ("codebook", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("first_tile", ctypes.c_int),
        ("tiles", ctypes.c_int),
        ("k", ctypes.c_int),
    )


def dequantize_four_bit(packed: four_bit_linear.PackedFourBit, first_tile: int, tiles: int, out: Tensor) -> None:
    """Rows of ``tiles`` tiles of 16 from ``first_tile`` on, dequantized into ``out`` bf16 [rows, k]."""
    codebook = code_table(packed.quant_type, out.device)
    task = _FourBitDequant(codebook.data_ptr(), out.data_ptr(), first_tile, tiles, packed.k)
    blocks = min(-(-tiles * packed.codes.shape[1] // 8), 132 * 16)
    _four_bit_kernel(packed.nested, out.device.index or 0).launch((blocks, 1), 256, 0, (task, packed.argument))


class _Int8Dequant(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("k", ctypes.c_int),
    )


def dequantize_int8(values: Tensor, scales: Tensor, out: Tensor) -> None:
    """int8 [n, k] times fp32 [n] into ``out`` bf16 [n, k]; n is at most 65535."""
    n, k = values.shape
    kernel = compile_kernel(
        read_sources("runtime/launch.cuh", "linear/int8_dequant.cu"), "int8_dequant", (), out.device.index or 0
    )
    task = _Int8Dequant(values.data_ptr(), scales.data_ptr(), out.data_ptr(), k)
    kernel.launch((-(-k // 4096), n), 256, 0, (task,))


def _by_segments(x: Tensor, n: int, k: int, dequantize: Dequantize, out_dtype: torch.dtype) -> Tensor:
    """x bf16 [m, k], any m, times W [n, k] transposed -> [m, n]. W is dequantized some rows at a time, for cuBLAS."""
    buffer = _buffer(x.device).values(TILE * k)
    segment_rows = min(max(buffer.numel() // k // TILE * TILE, TILE), 65520)
    segments = -(-n // segment_rows)
    segment_rows = -(-n // segments // TILE) * TILE if segments > 1 else n
    out = torch.empty((x.shape[0], n), dtype=out_dtype, device=x.device)
    for start in range(0, n, segment_rows):
        count = min(segment_rows, n - start)
        weight = buffer[: count * k].view(count, k)
        dequantize(start, count, weight)
        target = out[:, start : start + count]
        if out_dtype == x.dtype:
            torch.mm(x, weight.t(), out=target)
        else:
            target.copy_(torch.mm(x, weight.t(), out_dtype=out_dtype))
    return out


def _gated_by_segments(shape: tuple[int, int], dequantize: Dequantize, x: Tensor) -> Tensor:
    """bf16 ``gelu(gate) · up`` [m, n / 2] of x bf16 [m, k] and packed weights [n, k] = ``shape``, gate before up.

    As many rows of both as the buffer holds are dequantized at a time.
    """
    n, k = shape
    buffer = _buffer(x.device).values(2 * TILE * k)
    width, most = n // 2, max(min(buffer.numel() // k // 2, 65520) // TILE * TILE, TILE)
    segments = -(-width // most)
    segment_rows = -(-width // segments // TILE) * TILE
    out = torch.empty((x.shape[0], width), dtype=torch.bfloat16, device=x.device)
    for start in range(0, width, segment_rows):
        count = min(segment_rows, width - start)
        weight = buffer[: 2 * count * k].view(2 * count, k)
        dequantize(start, count, weight[:count])
        dequantize(width + start, count, weight[count:])
        gated_gemm.gated_gemm(x, weight, out=out[:, start : start + count])
    return out
