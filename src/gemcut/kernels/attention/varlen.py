"""Attention of many queries on an NVIDIA GPU, sequences of any lengths side by side: the side of it without Triton.

Three ways to compute the same: `triton_varlen` (varlen_triton.py), `flash_attn_varlen` (the flash-attn package, where
it is installed) and `plain_varlen`, their twin; a fourth for some cases on Hopper is in varlen_hopper.py. Each takes
queries that are scaled already.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemcut.kernels.attention.case import AttentionCase
from gemcut.kernels.gpu import NEEDS_GPU, Gpu

#: One sequence of a batch: (its first row in the batch, queries, its first row in the keys, index of the first query
#: among its keys).
VarlenSegment = tuple[int, int, int, int]

LOG2E = math.log2(math.e)
#: With a cap of up to this, exp(score) and sums of 2^17 of them times values stay far inside fp32's and bf16's range.
FIXED_CAP = 60.0


@dataclass(frozen=True)
class VarlenSpec:
    """What is computed. ``window`` None: the whole context; it counts the query itself."""

    softcap: float | None
    window: int | None


#: (query [T, heads, D], keys [L, kv_heads, D], values [L, kv_heads, D], segments, spec) -> [T, heads · D].
VarlenAttention = Callable[[Tensor, Tensor, Tensor, Sequence[VarlenSegment] | Tensor, VarlenSpec], Tensor]


def fresh_segments(spans: Sequence[Any]) -> tuple[VarlenSegment, ...] | None:
    """The segments of a batch whose rows hold all keys there are; None where a sequence has older ones.

    ``spans``: gemcut.model.attention.Span.
    """
    if any(span.context_length != span.length for span in spans):
        return None
    return tuple((span.start, span.length, span.start, 0) for span in spans)


@dataclass(frozen=True)
class Tiling:
    """How the kernel splits its work: rows (queries times heads that share a key head), keys at a time."""

    rows: int
    keys: int
    warps: int
    stages: int


def tiling(head_dim: int, major: int) -> Tiling:
    """What was fastest on an H100 for its generation; on older GPUs what fits their shared memory and registers."""
    if major >= 9:
        return Tiling(128, 64, 8, 2) if head_dim > 128 else Tiling(64, 64, 4, 3)
    return Tiling(64, 32, 8, 2) if head_dim > 128 else Tiling(128, 32, 8, 2)


def triton_reason() -> str | None:
    """None where Triton is installed and can take tensor descriptors, else one line that says why not."""
    try:
        found = importlib.util.find_spec("triton.tools.tensor_descriptor")
    except ImportError:
        found = None
    return None if found is not None else "needs the triton package, 3.4 or newer (it comes with torch's CUDA wheels)"


def supports(case: AttentionCase, gpu: Gpu | None) -> str | None:
    """None where the Triton kernel serves ``case``, else one line that says why not."""
    if gpu is None:
        return NEEDS_GPU
    if gpu.capability < (8, 0):
        return "needs compute capability 8.0 (Ampere) or newer"
    if case.dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bfloat16 or float16, not in {case.dtype}"
    if case.head_dim not in (16, 32, 64, 128, 256):
        return f"takes heads of 16 to 256 values, a power of two, not {case.head_dim}"
    if case.group > 32:
        return f"takes up to 32 query heads a key head, not {case.group}"
    return None


def triton_varlen(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: Sequence[VarlenSegment] | Tensor,
    spec: VarlenSpec,
    *,
    shape: Tiling | None = None,
) -> Tensor:
    """Attention through the Triton kernel.

    Args:
        query: bf16 or fp16 [T, heads, D], scaled; rows in any stride.
        keys, values: [L, kv_heads, D], heads side by side; rows in any stride that is a multiple of 16 bytes.
        segments: the sequences. Query i of one sits at index ``offset + i`` of its keys and sees none after it. Where
            they change from replay to replay of a graph: int32 [n, 4], what ``tiles`` made of them; tiles without
            queries may be among them.
        spec: soft-cap and window.
        shape: how to split the work; None takes what suits the GPU.

    Returns:
        [T, heads · D] in the query's dtype; rows that no segment covers are unwritten.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    from gemcut.kernels.attention.varlen_triton import prefill

    heads, head_dim = query.shape[1:]
    kv_heads, on_gpu = keys.shape[1], query.is_cuda
    shape = shape or tiling(head_dim, torch.cuda.get_device_capability(query.device)[0] if on_gpu else 9)
    group = heads // kv_heads
    table = segments if isinstance(segments, Tensor) else tile_table(tuple(segments), shape.rows // group, query.device)
    out = torch.empty((query.shape[0], heads * head_dim), dtype=query.dtype, device=query.device)
    block = [shape.keys, head_dim]
    cap = spec.softcap
    prefill[(kv_heads, len(table))](
        query,
        out,
        *(TensorDescriptor.from_tensor(part.flatten(1), block) for part in (keys, values)),
        table,
        query.stride(0),
        out.stride(0),
        spec.window or 0,
        1.0 / cap if cap else 1.0,
        cap * LOG2E if cap else LOG2E,
        HEAD_DIM=head_dim,
        GROUP=group,
        CAP=cap is not None,
        FIXED=cap is not None and cap <= FIXED_CAP and query.dtype != torch.float16,
        WINDOW=spec.window is not None,
        NATIVE=on_gpu,
        BLOCK_M=shape.rows,
        BLOCK_N=shape.keys,
        STAGES=shape.stages,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
    return out


def tile_queries(heads: int, kv_heads: int, head_dim: int, device: torch.device) -> int:
    """Queries of a tile on a GPU, where its ``tiling`` is taken."""
    return tiling(head_dim, torch.cuda.get_device_capability(device)[0]).rows // (heads // kv_heads)


def tiles(segments: Sequence[VarlenSegment], queries: int) -> list[VarlenSegment]:
    """Each segment split into tiles of up to ``queries``; those that see most come first, to end together."""
    found = [
        (row + start, min(queries, count - start), first_key, offset + start)
        for row, count, first_key, offset in segments
        for start in range(0, count, queries)
    ]
    return sorted(found, key=lambda tile: -tile[3])


@functools.lru_cache(maxsize=16)
def tile_table(segments: tuple[VarlenSegment, ...], queries: int, device: torch.device) -> Tensor:
    return torch.tensor(tiles(segments, queries), dtype=torch.int32, device=device)


def flash_attn_reason() -> str | None:
    """None where the flash-attn package is installed and knows soft-caps, else one line that says why not."""
    if importlib.util.find_spec("flash_attn") is None:
        return "the flash-attn package is not installed"
    try:
        version = importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return "the flash-attn package does not say its version"
    numbers = [int(part) if part.isdigit() else 0 for part in version.split(".")[:2]]
    return None if numbers >= [2, 6] else f"flash-attn {version} has no soft-cap; 2.6 or newer is needed"


def flash_attn_varlen(
    query: Tensor, keys: Tensor, values: Tensor, segments: Sequence[VarlenSegment] | Tensor, spec: VarlenSpec
) -> Tensor:
    """Attention through the flash-attn package; arguments as in ``triton_varlen``.

    Runs are in the order of their rows and their keys and leave no row out.
    """
    from flash_attn import flash_attn_varlen_func

    assert not isinstance(segments, Tensor)  # tables of tiles are for gemcut's own kernels
    lengths = [offset + count for _, count, _, offset in segments]
    starts = [sum(lengths[:i]) for i in range(len(segments))]
    if [key for _, _, key, _ in segments] != starts:  # gathered blocks have gaps
        parts = [slice(key, key + length) for (_, _, key, _), length in zip(segments, lengths, strict=True)]
        keys, values = torch.cat([keys[part] for part in parts]), torch.cat([values[part] for part in parts])
    counts = tuple(count for _, count, _, _ in segments)
    rows, ends = _offsets(counts, query.device), _offsets(tuple(lengths), query.device)
    options: dict[str, Any] = {"softcap": spec.softcap or 0.0, "causal": True, "softmax_scale": 1.0}
    if spec.window is not None:
        options["window_size"] = (spec.window - 1, 0)
    out: Tensor = flash_attn_varlen_func(query, keys, values, rows, ends, max(counts), max(lengths), **options)
    return out.flatten(1)


@functools.lru_cache(maxsize=16)
def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [n + 1]: where each of parts of these lengths begins, and where the last ends."""
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32, device=device)


def plain_varlen(
    query: Tensor, keys: Tensor, values: Tensor, segments: Sequence[VarlenSegment], spec: VarlenSpec
) -> Tensor:
    """The same in plain torch, whole score matrices at a time."""
    out = torch.empty((query.shape[0], query.shape[1] * query.shape[2]), dtype=query.dtype, device=query.device)
    group = query.shape[1] // keys.shape[1]
    for row, count, first_key, offset in segments:
        part = slice(first_key, first_key + offset + count)
        key, value = (x[part].repeat_interleave(group, dim=1).transpose(0, 1) for x in (keys, values))
        scores = torch.bmm(query[row : row + count].transpose(0, 1), key.transpose(1, 2)).float()
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        place = torch.arange(offset, offset + count, device=query.device)[:, None]
        index = torch.arange(offset + count, device=query.device)
        hidden = index > place
        if spec.window is not None:
            hidden |= index <= place - spec.window
        weights = scores.masked_fill_(hidden, -torch.inf).softmax(dim=-1).to(query.dtype)
        out[row : row + count] = torch.bmm(weights, value).transpose(0, 1).flatten(1)
    return out
