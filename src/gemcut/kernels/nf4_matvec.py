"""Four-bit weights (NF4 or FP4, with or without double quantization) times one to eight rows, on an NVIDIA GPU.

The checkpoint's tensors (bitsandbytes' layout) are reordered once at load into the order the matrix instruction wants;
codes and scales keep their size: 4.127 bits a weight with double quantization.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gemcut.errors import ParameterError
from gemcut.kernels.matvec import TILE, Layout, Storage, matvec

BLOCK = 64
STEP = 256
NESTED_BLOCK = 256

_LAYOUTS = (Layout(8, 3, 2), Layout(16, 3, 1))
NESTED = Storage("nf4_matvec", STEP, 2048 + 128, 256 * 128 + 1024, 16, *_LAYOUTS, (("NESTED", 1),), "nf4_fixed")
FLAT = Storage("nf4_matvec", STEP, 2048 + 256, 256 * 128 + 1024, 16, *_LAYOUTS, (("NESTED", 0),), "nf4_fixed")


@dataclass(frozen=True)
class FourBitWeight:
    """A weight [n, k] as bitsandbytes stores it, blocks of 64 along k."""

    codes: torch.Tensor  # uint8 [n * k / 2], even column in the high nibble
    absmax: torch.Tensor  # fp32 [n * k / 64], or uint8 with the three nested tensors
    table: torch.Tensor  # fp32 [16]
    n: int
    k: int
    nested_absmax: torch.Tensor | None = None  # fp32 [ceil(blocks / 256)]
    nested_map: torch.Tensor | None = None  # fp32 [256]
    nested_offset: float = 0.0

    def scales(self) -> torch.Tensor:
        """fp32 [n, k / 64], the nested form expanded."""
        if self.nested_absmax is None or self.nested_map is None:
            return self.absmax.float().view(self.n, -1)
        groups = self.nested_absmax.repeat_interleave(NESTED_BLOCK)[: self.absmax.numel()]
        return (self.nested_map[self.absmax.flatten().long()] * groups + self.nested_offset).view(self.n, -1)

    def dequantize(self) -> torch.Tensor:
        """fp32 [n, k]: code times scale."""
        data = self.codes.flatten().long()
        values = self.table[torch.stack((data >> 4, data & 15), dim=1).flatten()]
        return (values.view(self.n, -1, BLOCK) * self.scales()[..., None]).view(self.n, self.k)


class _Format(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "pairs", "byte_map", "groups")),
        ("offset", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("n", "blocks", "group_last", "steps")),
    )


@dataclass(frozen=True)
class PackedFourBit:
    """A `FourBitWeight` in the kernel's order, on a GPU. `supports` says which weights can be packed."""

    codes: torch.Tensor  # uint8 [tiles, steps, 4 blocks, 8 row pairs, 4 quarters, 2 rows, 8]
    scales: torch.Tensor  # uint8 or fp32 [tiles, steps, 8 row pairs, 4 blocks, 2 rows]
    pairs: torch.Tensor  # int32 [256]: two bf16 codes for each byte
    byte_map: torch.Tensor  # fp32 [256], empty without double quantization
    groups: torch.Tensor  # fp32, empty without double quantization
    offset: float
    n: int
    k: int

    @property
    def nested(self) -> bool:
        return self.groups.numel() > 0

    @property
    def nbytes(self) -> int:
        """Bytes one product reads."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales, self.groups))

    def argument(self) -> ctypes.Structure:
        tensors = (self.codes, self.scales, self.pairs, self.byte_map, self.groups)
        blocks, last = self.k // BLOCK, self.groups.numel() - 1
        return _Format(*(t.data_ptr() for t in tensors), self.offset, self.n, blocks, last, self.codes.shape[1])


def supports(weight: FourBitWeight) -> str | None:
    """None where `pack` takes this weight, else one line that says why not."""
    if weight.k % BLOCK:
        return f"four-bit kernels need blocks that end with their row: {weight.k} columns are no multiple of {BLOCK}"
    if weight.absmax.numel() != weight.n * weight.k // BLOCK:
        return f"four-bit kernels need blocks of {BLOCK}: {weight.absmax.numel()} scales for {weight.n} x {weight.k}"
    return None


def pack(weight: FourBitWeight) -> PackedFourBit:
    """Reorders a weight for the kernel, on the weight's device. ParameterError where `supports` gives a reason."""
    reason = supports(weight)
    if reason is not None:
        raise ParameterError(reason)
    tiles, steps = -(-weight.n // TILE), -(-weight.k // STEP)
    rows_missing, columns_missing = tiles * TILE - weight.n, steps * STEP - weight.k
    zero = int(weight.table.abs().argmin())
    codes = weight.codes.view(torch.uint8).view(weight.n, weight.k // 2)
    codes = F.pad(codes, (0, columns_missing // 2, 0, rows_missing), value=zero * 17)
    codes = codes.view(tiles, 2, 8, steps, 4, 4, 8).permute(0, 3, 4, 2, 5, 1, 6).contiguous()
    scales = F.pad(weight.absmax.view(weight.n, -1), (0, columns_missing // BLOCK, 0, rows_missing))
    scales = scales.view(tiles, 2, 8, steps, 4).permute(0, 3, 2, 4, 1).contiguous()
    rounded = weight.table.bfloat16().view(torch.int16).int() & 0xFFFF
    pairs = (rounded[:, None] | rounded[None, :] << 16).flatten().contiguous()  # [high nibble, low nibble]
    none = torch.empty(0, device=codes.device)
    byte_map = none if weight.nested_map is None else weight.nested_map.float().contiguous()
    groups = none if weight.nested_absmax is None else weight.nested_absmax.float().contiguous()
    packed = PackedFourBit(codes, scales, pairs, byte_map, groups, weight.nested_offset, weight.n, weight.k)
    if codes.is_cuda:
        torch.cuda.synchronize(codes.device)  # kernels read weights before the kernels queued ahead of them are done
    return packed


def nf4_matvec(x: torch.Tensor, weight: PackedFourBit, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [m, k] bf16, m from 1 to 8 -> bf16 [m, n], summed in fp32. The sum's order does not depend on timing."""
    if x.shape[-1] != weight.k:
        raise ParameterError(f"x has {x.shape[-1]} columns, the weight {weight.k}")
    return matvec(NESTED if weight.nested else FLAT, weight.argument(), x, weight.n, out=out)


def nf4_matvec_plain(x: torch.Tensor, weight: FourBitWeight) -> torch.Tensor:
    """The same in plain torch: the weight decoded to bf16, then a matmul."""
    return F.linear(x, weight.dequantize().to(x.dtype))
