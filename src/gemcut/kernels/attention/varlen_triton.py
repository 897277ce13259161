"""Attention of many queries in Triton: soft-cap, causal, window, grouped heads, sequences of any lengths.

Computes: causal attention of packed prompts with an optional soft-cap and window, in Triton
Shapes: query [T, heads, D], keys and values [L, kv_heads, D], bf16 or fp16; tiles int32 [n, 4] -> [T, heads, D]
Runs: attention/varlen.py (triton_varlen); grid [key heads, tiles], BLOCK_M rows: queries times heads of the key head
Schedule: FlashAttention-2 (arXiv 2307.08691), varlen, TMA descriptors; only blocks at the edges are masked
Invariants: sums are of the weights as rounded; with a soft-cap of up to 60 in bf16 no running maximum is needed

A program takes one key head and a tile of one sequence's queries. The query heads that share the key head are further
rows of its matrices. Keys that the tile cannot see are never read.

With a soft-cap no running maximum is needed in bf16: scores lie within ±cap, so exp(score) stays far inside the range
that bf16 shares with fp32, and so do the sums.

This module needs the triton package; `gemcut.kernels.attention.varlen` imports it when it is used.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x, NATIVE: tl.constexpr):
    if NATIVE:  # one instruction, relative error 2^-11: a quarter of what rounding a score to bf16 costs
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def _blocks(
    accumulator, total, top, q, keys, values, first, end, key_start, column, place, window, inverse_cap, scale,
    CAP: tl.constexpr, FIXED: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr, NATIVE: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds the keys ``first … end - 1``, in whole blocks from ``first`` on, to the running softmax."""
    for at in tl.range(first, end, BLOCK_N, num_stages=STAGES):
        scores = tl.dot(q, keys.load([key_start + at, column]).T)
        if CAP:
            scores = _tanh(scores * inverse_cap, NATIVE)
        scores = scores * scale
        if MASKED:
            index = at + tl.arange(0, BLOCK_N)
            seen = index[None, :] <= place[:, None]
            if WINDOW:
                seen = seen & (index[None, :] > place[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        if FIXED:
            weights = tl.exp2(scores)
        else:
            best = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(best == float("-inf"), 0.0, best)  # a row may see none of these keys
            keep = tl.exp2(top - base)
            weights = tl.exp2(scores - base[:, None])
            accumulator = accumulator * keep[:, None]
            total = total * keep
            top = best
        rounded = weights.to(q.dtype)
        # What the dot below weighs with is what is summed: a row that looks at one key gets that key's value.
        total += tl.sum(rounded.to(tl.float32), 1)
        value = values.load([key_start + at, column])
        if MASKED:  # behind the end stands the next sequence, or what a block held before: 0 times NaN would be NaN
            value = tl.where((at + tl.arange(0, BLOCK_N) < end)[:, None], value, 0.0)
        accumulator = tl.dot(rounded, value, accumulator)
    return accumulator, total, top


@triton.jit
def prefill(
    query, out, keys, values, tiles, query_stride, out_stride, window, inverse_cap, scale,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, CAP: tl.constexpr, FIXED: tl.constexpr, WINDOW: tl.constexpr,
    NATIVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of one key head; see ``varlen.triton_varlen`` for what the arguments hold.

    ``keys`` and ``values`` are tensor descriptors of [L, kv_heads · HEAD_DIM] in blocks [BLOCK_N, HEAD_DIM]; ``tiles``
    int32 [tiles, 4]: first row of the batch, queries, first key, index of the first query among its keys. ``scale``
    turns (capped) scores into exponents of 2.
    """
    head = tl.program_id(0)
    tile = tiles + 4 * tl.program_id(1)
    first_row, count, key_start, offset = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    column = head * HEAD_DIM
    row = tl.arange(0, BLOCK_M)
    index, member = row // GROUP, row % GROUP
    real = index < count
    depth = tl.arange(0, HEAD_DIM)
    inside = (head * GROUP + member)[:, None] * HEAD_DIM + depth[None, :]
    batch_row = (first_row + index).to(tl.int64)[:, None]
    q = tl.load(query + batch_row * query_stride + inside, mask=real[:, None], other=0.0)
    place = offset + tl.minimum(index, count - 1)

    accumulator = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    last = offset + count  # keys the tile's last query sees
    plain_end = (offset + 1) // BLOCK_N * BLOCK_N  # up to here every query sees every key, but for the window
    begin = 0
    plain_begin = 0
    if WINDOW:
        begin = tl.maximum(0, offset - window + 1) // BLOCK_N * BLOCK_N
        plain_begin = (tl.maximum(0, last - window) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        plain_end = tl.maximum(plain_end, begin)
        plain_begin = tl.minimum(plain_begin, plain_end)
        accumulator, total, top = _blocks(
            accumulator, total, top, q, keys, values, begin, plain_begin, key_start, column, place, window,
            inverse_cap, scale, CAP, FIXED, True, WINDOW, NATIVE, BLOCK_N, STAGES,
        )  # fmt: skip
    accumulator, total, top = _blocks(
        accumulator, total, top, q, keys, values, plain_begin, plain_end, key_start, column, place, window,
        inverse_cap, scale, CAP, FIXED, False, WINDOW, NATIVE, BLOCK_N, STAGES,
    )  # fmt: skip
    accumulator, total, top = _blocks(
        accumulator, total, top, q, keys, values, plain_end, last, key_start, column, place, window,
        inverse_cap, scale, CAP, FIXED, True, WINDOW, NATIVE, BLOCK_N, STAGES,
    )  # fmt: skip
    result = accumulator / total[:, None]
    tl.store(out + batch_row * out_stride + inside, result.to(out.dtype.element_ty), mask=real[:, None])
