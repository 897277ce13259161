"""Four-bit weights (NF4 or FP4, with or without double quantization) times one to eight rows, on an NVIDIA GPU.

The checkpoint's tensors (bitsandbytes' layout) are reordered once at load into the order the matrix instruction wants;
codes and scales keep their size: 4.127 bits a weight with double quantization.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gemcut.errors import ParameterError
from gemcut.kernels.gpu import NEEDS_GPU, Gpu
from gemcut.kernels.linear.case import LinearCase
from gemcut.kernels.linear.gemv import TILE, Layout, Storage, gemv
from gemcut.quantization.four_bit import dequantize_4bit
from gemcut.quantization.spec import NESTED_BLOCK_SIZE, FourBitType
from gemcut.quantization.tables import code_table, dynamic_map
from gemcut.quantization.weights import FourBitWeight, Nested, PackedWeight

BLOCK = 64
K_BLOCK = 256
NESTED_BLOCK = NESTED_BLOCK_SIZE

_LAYOUTS = (Layout(8, 3, 2), Layout(16, 3, 1))
_CODEBOOK_BYTES = 256 * 128 + 1024
NESTED = Storage(
    "four_bit_gemv", K_BLOCK, 2048 + 128, _CODEBOOK_BYTES, 16, *_LAYOUTS, (("NESTED", 1),), "four_bit_fixed", 2048 + 256
)
FLAT = Storage("four_bit_gemv", K_BLOCK, 2048 + 256, _CODEBOOK_BYTES, 16, *_LAYOUTS, (("NESTED", 0),), "four_bit_fixed")


class Format(ctypes.Structure):
    """``struct Format`` of kernels/linear/four_bit_gemv.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "pairs", "byte_map", "groups")),
        ("offsets", ctypes.c_float * 3),
        ("part_tiles", ctypes.c_int * 2),
        *((name, ctypes.c_int) for name in ("n", "blocks", "group_last", "k_blocks")),
    )


@dataclass(frozen=True, eq=False)
class PackedFourBit(PackedWeight):
    """Up to three matrices of the same inputs, one below the other, in the kernel's order. See ``pack``."""

    codes: torch.Tensor  # uint8 [tiles, k_blocks, 4 blocks, 8 row pairs, 4 quarters, 2 rows, 8]
    scales: torch.Tensor  # uint8 or fp32 [tiles, k_blocks, 8 row pairs, 4 blocks, 2 rows]
    pairs: torch.Tensor  # int32 [512]: two codes for each byte, in bf16, then in fp16
    byte_map: torch.Tensor  # fp32 [256], empty without double quantization
    groups: torch.Tensor  # fp32, empty without double quantization
    offsets: tuple[float, ...]  # of each matrix
    rows: tuple[int, ...]  # of each matrix
    k: int
    quant_type: FourBitType
    dtypes: tuple[torch.dtype, ...]  # what each matrix's dequantized values are rounded to

    @property
    def n(self) -> int:
        """Rows in all."""
        return sum(self.rows)

    @property
    def nested(self) -> bool:
        """Whether scales are bytes."""
        return self.groups.numel() > 0

    @property
    def nbytes(self) -> int:
        """Bytes one GEMV reads."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales, self.groups))

    @functools.cached_property
    def argument(self) -> ctypes.Structure:
        """The kernel's ``struct Format``."""
        pointers = (t.data_ptr() for t in (self.codes, self.scales, self.pairs, self.byte_map, self.groups))
        offsets = (ctypes.c_float * 3)(*self.offsets)
        ends = [sum(self.rows[: i + 1]) // TILE if i + 1 < len(self.rows) else 2**31 - 1 for i in range(2)]
        blocks, last = self.k // BLOCK, self.groups.numel() - 1
        return Format(*pointers, offsets, (ctypes.c_int * 2)(*ends), self.n, blocks, last, self.codes.shape[1])

    def unpack(self) -> tuple[FourBitWeight, ...]:
        """The matrices as they came; their bytes are put in order again, into new memory."""
        return tuple(map(self._matrix, range(len(self.rows))))

    def _matrix(self, index: int) -> FourBitWeight:
        start, count = sum(self.rows[:index]), self.rows[index]
        tiles = slice(start // TILE, -(-(start + count) // TILE))
        codes, scales = self.codes[tiles], self.scales[tiles]
        codes = codes.permute(0, 5, 3, 1, 2, 4, 6).reshape(len(codes) * TILE, -1)[:count, : self.k // 2]
        scales = scales.permute(0, 4, 2, 1, 3).reshape(len(scales) * TILE, -1)[:count, : self.k // BLOCK]
        nested = None
        if self.nested:
            first, last = start * self.k // BLOCK, (start + count) * self.k // BLOCK
            groups = self.groups[first // NESTED_BLOCK : -(-last // NESTED_BLOCK)]
            nested = Nested(groups, self.offsets[index])
        shape = (count, self.k)
        return FourBitWeight(
            codes.reshape(-1), scales.reshape(-1), self.quant_type, BLOCK, shape, self.dtypes[index], nested
        )


def supports(case: LinearCase, gpu: Gpu | None) -> str | None:
    """None where four-bit kernels serve ``case``, else one line that says why not."""
    if gpu is None:
        return NEEDS_GPU
    weights = [weight for weight in case.weights if isinstance(weight, FourBitWeight)]
    if len(weights) != len(case.weights):
        return "four-bit kernels take four-bit matrices alone"
    if case.out_dtype == torch.float32:
        return "four-bit kernels give bfloat16 only"
    return _refusal(weights)


def _refusal(weights: Sequence[FourBitWeight]) -> str | None:
    """None where `pack` takes these matrices of the same inputs together, else one line that says why not."""
    if not 1 <= len(weights) <= 3:
        return f"four-bit kernels take one to three matrices together, not {len(weights)}"
    first = weights[0]
    for index, weight in enumerate(weights):
        n, k = weight.shape
        if weight.block_size != BLOCK:
            return f"four-bit kernels need blocks of {BLOCK}, not of {weight.block_size}"
        if k % BLOCK:
            return f"four-bit kernels need blocks that end with their row: {k} columns are no multiple of {BLOCK}"
        if (k, weight.quant_type, weight.nested is None) != (first.shape[1], first.quant_type, first.nested is None):
            return "four-bit kernels need matrices of one format to stand together"
        if index + 1 < len(weights) and (n % TILE or (n * k // BLOCK) % NESTED_BLOCK):
            return f"a matrix of {n} x {k} ends inside a tile or a group of scales: nothing can stand below it"
    return None


def pack(weights: Sequence[FourBitWeight]) -> PackedFourBit:
    """Reorders matrices for the kernel, on their device. ParameterError where they cannot stand together."""
    reason = _refusal(weights)
    if reason is not None:
        raise ParameterError(reason)
    first = weights[0]
    device, k = first.codes.device, first.shape[1]
    codebook = code_table(first.quant_type, device)
    k_blocks = -(-k // K_BLOCK)
    zero = int(codebook.abs().argmin())
    tiles = [-(-weight.shape[0] // TILE) for weight in weights]
    codes = torch.empty((sum(tiles), k_blocks, 4, 8, 4, 2, 8), dtype=torch.uint8, device=device)
    scales = torch.empty((sum(tiles), k_blocks, 8, 4, 2), dtype=first.absmax.dtype, device=device)
    at = 0
    for weight, count in zip(weights, tiles, strict=True):
        n = weight.shape[0]
        missing, columns = count * TILE - n, k_blocks * K_BLOCK - k
        part = F.pad(weight.codes.view(torch.uint8).view(n, k // 2), (0, columns // 2, 0, missing), value=zero * 17)
        codes[at : at + count] = part.view(count, 2, 8, k_blocks, 4, 4, 8).permute(0, 3, 4, 2, 5, 1, 6)
        part = F.pad(weight.absmax.view(n, -1), (0, columns // BLOCK, 0, missing))
        scales[at : at + count] = part.view(count, 2, 8, k_blocks, 4).permute(0, 3, 2, 4, 1)
        at += count
    rounded = (
        torch.stack([codebook.to(dtype).view(torch.int16) for dtype in (torch.bfloat16, torch.float16)]).int() & 0xFFFF
    )
    pairs = (rounded[:, :, None] | rounded[:, None, :] << 16).flatten()  # [dtype, high nibble, low nibble]
    nested = [weight.nested for weight in weights if weight.nested is not None]
    none = torch.empty(0, device=device)
    packed = PackedFourBit(
        codes,
        scales,
        pairs,
        dynamic_map(device) if nested else none,
        torch.cat([part.scale.float() for part in nested]) if nested else none,
        tuple(part.offset for part in nested),
        tuple(weight.shape[0] for weight in weights),
        k,
        first.quant_type,
        tuple(weight.dtype for weight in weights),
    )
    if codes.is_cuda:
        torch.cuda.synchronize(codes.device)  # kernels read weights before the kernels queued ahead of them are done
    return packed


def four_bit_gemv(x: torch.Tensor, weight: PackedFourBit, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [m, k] bf16, m from 1 to 8 -> bf16 [m, n], summed in fp32. The sum's order does not depend on timing."""
    if x.shape[-1] != weight.k:
        raise ParameterError(f"x has {x.shape[-1]} columns, the weight {weight.k}")
    return gemv(NESTED if weight.nested else FLAT, weight.argument, x, weight.n, out=out)


def four_bit_gemv_plain(x: torch.Tensor, weights: Sequence[FourBitWeight]) -> torch.Tensor:
    """The same in plain torch: the weights dequantized to bf16, then a matmul."""
    return F.linear(x, torch.cat([dequantize_4bit(weight, x.dtype) for weight in weights]))
