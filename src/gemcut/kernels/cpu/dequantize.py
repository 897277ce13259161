"""Blocks of a GGUF file to whole weights, by the compiled kernels: the gguf library's values, bit for bit."""

from __future__ import annotations

import ctypes

import torch

from gemcut.kernels.cpu import library

#: The types the kernels know, by their numbers in a file: those that models are published in.
TYPES = frozenset((2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 20, 23))
_ARGUMENTS = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]


def dequantize(number: int, blocks: torch.Tensor, count: int, out: torch.Tensor) -> bool:
    """Fill ``out`` with the values of ``blocks``; False, and nothing is done, where the kernels cannot.

    Args:
        number: the type's number in the file.
        blocks: uint8 [bytes of ``count`` blocks].
        count: how many blocks these are.
        out: as many values as they hold, contiguous, on the CPU.
    """
    known = number in TYPES and out.dtype in (torch.bfloat16, torch.float32)
    if not known or library.unavailable() is not None:
        return False
    run = library.library().function("dequantize", _ARGUMENTS, ctypes.c_int)
    is_fp32 = int(out.dtype == torch.float32)
    return bool(run(number, blocks.data_ptr(), count, out.data_ptr(), is_fp32, library.threads()))
