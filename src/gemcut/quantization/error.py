"""How far a cut matrix is from the whole one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from gemcut.quantization.dequantize import dequantize_weight
from gemcut.quantization.pieces import PIECE
from gemcut.quantization.spec import NESTED_BLOCK_SIZE
from gemcut.quantization.weights import FourBitWeight, Int8Weight, Nested


def relative_error(whole: Tensor, cut: FourBitWeight | Int8Weight, *, sample: int | None = None) -> float:
    """``‖W - Q‖ / ‖W‖`` (Frobenius) of ``whole`` [out, in], fp32, fp16 or bf16; 0 if it is all zeros.

    ``sample``: look at about so many values, in stretches spread evenly over the matrix; None: at all.
    Needs a few MB, however large the matrix.
    """
    flat = whole.detach().reshape(-1)
    every = 1 if sample is None else max(1, flat.numel() // sample)
    difference = norm = 0.0
    for start, piece in itertools.islice(_pieces(cut), 0, None, every):
        dequantized = dequantize_weight(piece, torch.float32).view(-1)
        original = flat[start : start + dequantized.numel()].to(torch.float32, copy=True)
        norm += _energy(original)
        difference += _energy(original.sub_(dequantized))
    return float((difference / norm) ** 0.5) if norm else 0.0


def _energy(values: Tensor) -> float:
    """The sum of squares of ``values`` fp32, whatever their size: squares of 1e-30 or 1e30 have no place in fp32."""
    largest = values.abs().max().item()
    return float(values.div(largest).square_().sum().item()) * largest**2 if largest else 0.0


def _pieces(cut: FourBitWeight | Int8Weight) -> Iterator[tuple[int, FourBitWeight | Int8Weight]]:
    """(first value, a part of ``cut``): of whole rows in int8, of whole groups of blocks in 4 bits."""
    n, k = cut.shape
    if isinstance(cut, Int8Weight):
        step = max(1, PIECE // k)
        for row in range(0, n, step):
            yield row * k, Int8Weight(cut.codes[row : row + step], cut.absmax[row : row + step], cut.dtype)
        return
    group = NESTED_BLOCK_SIZE * cut.block_size
    step = max(group, PIECE // group * group)
    for start in range(0, n * k, step):
        count = min(step, n * k - start)
        first, blocks = start // cut.block_size, step // cut.block_size
        codes = cut.codes[start // 2 : (start + count + 1) // 2]
        absmax = cut.absmax[first : first + blocks]
        nested = cut.nested and Nested(cut.nested.scale[start // group : (start + step) // group], cut.nested.offset)
        yield start, FourBitWeight(codes, absmax, cut.quant_type, cut.block_size, (1, count), cut.dtype, nested)
