"""Prefill attention without a GPU: segments, gathered keys, who is chosen, the kernel in Triton's interpreter."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import ModuleType

import pytest
import torch

from gemcut.config import FAMILY, GemmaConfig
from gemcut.engine.cache import CacheShape, PagedCache, Tables
from gemcut.engine.paged import PagedKeyValues
from gemcut.errors import UnsupportedError
from gemcut.kernels.attention import varlen as prefill_attention
from gemcut.kernels.attention import varlen_hopper as hopper_attention
from gemcut.kernels.attention.case import AttentionCase
from gemcut.kernels.attention.varlen import (
    VarlenSegment,
    VarlenSpec,
    flash_attn_varlen,
    fresh_segments,
    plain_varlen,
    tiles,
)
from gemcut.kernels.gpu import PRESETS
from gemcut.model import attention
from gemcut.model.attention import AttentionSpec, attend, choose_attention, eager_attention, varlen_attention
from gemcut.model.key_values import Span
from support import tiny_config

CPU = torch.device("cpu")
SEGMENTS: tuple[VarlenSegment, ...] = ((0, 30, 0, 0), (30, 1, 32, 17), (31, 12, 64, 40))


def reference(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, segments: tuple[VarlenSegment, ...], spec: VarlenSpec
) -> torch.Tensor:
    """The network's own attention, one sequence at a time."""
    parts = []
    for row, count, first, offset in segments:
        part = slice(first, first + offset + count)
        own = AttentionSpec(spec.softcap, spec.window)
        parts.append(attend(query[row : row + count], keys[part], values[part], offset, own).flatten(1))
    return torch.cat(parts)


@pytest.mark.parametrize("spec", [VarlenSpec(50.0, None), VarlenSpec(None, 5), VarlenSpec(2.0, 33)], ids=str)
def test_the_twin_and_the_flash_attn_package(spec: VarlenSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's stand-in has its signature and semantics (packed keys, causal to the end) in plain torch."""

    def flash_attn_varlen_func(  # type: ignore[no-untyped-def]
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0,
    ):  # fmt: skip
        rows, ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        assert causal
        assert softmax_scale == 1.0
        assert window_size[1] == (-1 if window_size[0] < 0 else 0)
        assert k.shape[0] == ends[-1]
        bounds = zip(rows, rows[1:], ends, ends[1:], strict=False)
        segments = tuple((row, end - row, key, key_end - key - (end - row)) for row, end, key, key_end in bounds)
        assert max_seqlen_q == max(segment[1] for segment in segments)
        assert max_seqlen_k == max(segment[1] + segment[3] for segment in segments)
        window = None if window_size[0] < 0 else window_size[0] + 1
        return reference(q, k, v, segments, VarlenSpec(softcap or None, window)).view(q.shape)

    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    query, (keys, values) = torch.randn(43, 4, 16), torch.randn(2, 120, 2, 16)
    want = reference(query, keys, values, SEGMENTS, spec)
    assert (plain_varlen(query, keys, values, SEGMENTS, spec) - want).abs().max() < 1e-5
    assert (flash_attn_varlen(query, keys, values, SEGMENTS, spec) - want).abs().max() < 1e-5


def test_varlen_attention_over_the_paged_cache() -> None:
    """Chunks and single tokens of two sequences against the plain path, in both groups, with blocks given back."""
    config = GemmaConfig.from_dict(tiny_config().to_dict())
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    assert config.sliding_window < 40
    caches = [PagedCache(config, CacheShape(4, 64, 64), torch.float32, CPU) for _ in range(2)]
    tables = [Tables(), Tables()]
    varlen = partial(varlen_attention, plain_varlen)
    for chunks in ([(0, 30), (0, 5)], [(30, 1), (5, 1)], [(31, 20), (6, 37)], [(51, 9), (43, 1)]):
        spans, rows = [], 0
        for table, (start, count) in zip(tables, chunks, strict=True):
            caches[0].extend(table, start, count)
            spans.append(Span(rows, count, start + count))
            rows += count
        assert (fresh_segments(spans) is None) == (chunks[0][0] > 0)
        for layer in range(config.num_hidden_layers):
            spec = AttentionSpec(5.0, config.sliding_window if layer not in config.full_layers else None)
            query = torch.randn(rows, heads, head_dim)
            key, value = torch.randn(2, rows, kv_heads, head_dim)
            kvs = [PagedKeyValues(config, cache, tables, spans) for cache in caches]
            want = eager_attention(query, key, value, layer, kvs[0], spec)
            assert (varlen(query, key, value, layer, kvs[1], spec) - want).abs().max() < 1e-5
            keys, values, segments = kvs[0].gathered(layer)
            got = plain_varlen(query, keys, values, segments, VarlenSpec(spec.softcap, spec.window))
            assert (got - want).abs().max() < 1e-5
            table = kvs[0].block_table(layer)
            group = [t.full if layer in config.full_layers else t.sliding for t in tables]
            assert [[max(block, 0) for block in blocks] for blocks in group] == [
                row[: len(blocks)] for row, blocks in zip(table.tolist(), group, strict=True)
            ]


def test_the_kernel_for_hopper_says_which_heads_it_does_not_take() -> None:
    for heads, kv_heads, head_dim, cap, reason in (
        (8, 4, 64, 50.0, "heads of 128 or 256, not of 64"),
        (6, 2, 128, 50.0, "divide 128, not 3"),
        (8, 4, 128, None, "soft-cap of up to 60"),
        (8, 4, 128, 61.0, "soft-cap of up to 60"),
    ):
        case = AttentionCase(heads, kv_heads, head_dim, cap, torch.bfloat16)
        assert reason in str(hopper_attention.supports(case, PRESETS["a100"]))


def test_flash_attention_2_says_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = FAMILY["gemma-2-2b"]
    with pytest.warns(UserWarning, match="needs an NVIDIA GPU"):
        found = choose_attention("flash_attention_2", config, torch.float16, CPU)
    assert found.name == "flash_attention_2"
    assert found.function is eager_attention
    with pytest.raises(UnsupportedError, match=r"bfloat16 or float16, not in torch\.float32"):
        choose_attention("flash_attention_2", config, torch.float32, CPU)
    with pytest.raises(UnsupportedError, match="'triton' cannot serve this model: needs an NVIDIA GPU"):
        choose_attention("triton", config, torch.bfloat16, CPU)
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(attention, "gpu_at", lambda device: PRESETS["a100"])
    monkeypatch.setattr(prefill_attention, "flash_attn_reason", lambda: None)
    assert choose_attention("flash_attention_2", config, torch.float16, cuda).varlen is flash_attn_varlen
    monkeypatch.setattr(prefill_attention, "flash_attn_reason", lambda: "it is not there")

    def triton(reason: str | None) -> None:
        there = replace(attention.IMPLEMENTATIONS["triton"], unavailable=lambda: reason)
        monkeypatch.setitem(attention.IMPLEMENTATIONS, "triton", there)

    triton(None)
    found = choose_attention("flash_attention_2", config, torch.float16, cuda)
    assert found.varlen is prefill_attention.triton_varlen
    assert found.detail == "gemcut's own Triton kernel: it is not there"
    triton("needs the triton package")
    with pytest.raises(UnsupportedError, match="it is not there, and gemcut's own kernel needs the triton package"):
        choose_attention("flash_attention_2", config, torch.float16, cuda)
    assert choose_attention("auto", config, torch.float16, cuda).name == "eager"


INTERPRETED = """
import torch
from gemcut.kernels.attention.varlen import Tiling, VarlenSpec, plain_varlen, tiles, triton_varlen
segments = ((0, 37, 0, 0), (37, 1, 40, 20), (38, 21, 70, 64))
for heads, kv_heads, head_dim in ((4, 2, 16), (3, 1, 32)):
    for window in (None, 1, 5, 33):
        for softcap in (None, 5.0, 50.0, 100.0):
            query = torch.randn(59, heads, head_dim)
            both = torch.randn(160, 2 * kv_heads, head_dim)
            keys, values = both[:, :kv_heads], both[:, kv_heads:]
            spec = VarlenSpec(softcap, window)
            out = triton_varlen(query, keys, values, segments, spec, shape=Tiling(16 if heads == 4 else 32, 16, 4, 1))
            want = plain_varlen(query.double(), keys.double(), values.double(), segments, spec)
            assert (out - want).abs().max() < 1e-4, (heads, window, softcap)
            rows = 16 if heads == 4 else 32
            found = torch.tensor([*tiles(segments, rows // (heads // kv_heads)), (0, 0, 0, 0)], dtype=torch.int32)
            again = triton_varlen(query, keys, values, found, spec, shape=Tiling(rows, 16, 4, 1))
            assert torch.equal(again, out)
"""


def test_tiles_hold_every_query_once_and_those_that_see_most_come_first() -> None:
    segments = ((0, 37, 0, 0), (37, 1, 40, 20), (38, 21, 70, 64))
    found = tiles(segments, 8)
    assert all(1 <= count <= 8 for _, count, _, _ in found)
    assert [offset for *_, offset in found] == sorted((offset for *_, offset in found), reverse=True)
    queries = sorted((row + i, key, offset + i) for row, count, key, offset in found for i in range(count))
    assert queries == [(row + i, key, offset + i) for row, count, key, offset in segments for i in range(count)]


def test_the_kernel_in_tritons_interpreter() -> None:
    pytest.importorskip("triton", reason="needs the triton package")
    numpy = tuple(int(part) for part in __import__("numpy").__version__.split(".")[:2])
    if numpy >= (2, 4):
        pytest.skip("Triton's interpreter breaks with NumPy 2.4 and newer")
    import os

    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", INTERPRETED], check=True, env=environment)
