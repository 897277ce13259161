"""The prefill kernels on a GPU against float64: attention, rotation and cache write; then the whole step."""

from __future__ import annotations

import pytest
import torch

from gemcut.config import GemmaConfig
from gemcut.engine import Engine, EngineConfig, Request, SamplingParams
from gemcut.engine.cache import CacheShape, PagedCache, Tables
from gemcut.engine.paged import PagedKeyValues
from gemcut.errors import ParameterError
from gemcut.kernels.attention import varlen as prefill_attention
from gemcut.kernels.attention import varlen_hopper as hopper_attention
from gemcut.kernels.attention.case import AttentionCase
from gemcut.kernels.attention.varlen import (
    VarlenAttention,
    VarlenSegment,
    VarlenSpec,
    flash_attn_varlen,
    plain_varlen,
    triton_varlen,
)
from gemcut.kernels.attention.varlen_hopper import hopper_varlen
from gemcut.kernels.gpu import gpu_of
from gemcut.kernels.rowwise import norm, rope_write
from gemcut.model.attention import choose_attention
from gemcut.model.bind import bind_kernels
from gemcut.model.dense import dense_logits
from gemcut.model.key_values import Span
from gemcut.model.ops.cuda import CudaOps
from gemcut.model.ops.plain import PlainOps
from gemcut.model.rope import RotaryTable
from gpu_support import CONFIG, network, relative_error, rms, rotated

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)


def poison(*shape: int) -> None:
    """Leave NaN in the memory that the next allocation of this size gets."""
    torch.full(shape, torch.nan, device=CUDA, dtype=torch.bfloat16)


def exact(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, segments: tuple[VarlenSegment, ...], spec: VarlenSpec
) -> torch.Tensor:
    """One sequence and one head at a time, in float64."""
    out = torch.full(query.shape, torch.nan, dtype=torch.float64, device=query.device)
    group = query.shape[1] // keys.shape[1]
    for row, count, first, offset in segments:
        for head in range(query.shape[1]):
            key, value = (x[first : first + offset + count, head // group].double() for x in (keys, values))
            scores = query[row : row + count, head].double() @ key.T
            if spec.softcap is not None:
                scores = spec.softcap * torch.tanh(scores / spec.softcap)
            distance = torch.arange(offset, offset + count)[:, None] - torch.arange(offset + count)
            seen = (distance >= 0) & (distance < (spec.window or 1 << 30))
            weights = scores.masked_fill(~seen.to(scores.device), -torch.inf).softmax(dim=-1)
            out[row : row + count, head] = weights @ value
    return out.flatten(1)


def kernels(heads: int, kv_heads: int, head_dim: int, spec: VarlenSpec) -> list[VarlenAttention]:
    """Those that serve bf16 heads of this shape here."""
    case = AttentionCase(heads, kv_heads, head_dim, spec.softcap, torch.bfloat16)
    hopper = hopper_attention.supports(case, gpu_of(0)) is None
    return [triton_varlen, hopper_varlen] if hopper else [triton_varlen]


SEGMENTS: tuple[VarlenSegment, ...] = (
    (0, 300, 0, 0),
    (300, 1, 300, 77),
    (301, 129, 380, 1000),
    (430, 64, 1509, 0),
    (494, 3, 1573, 61),
)
ROWS, KEYS = 497, 1637


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("softcap", [50.0, None])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 4, 128), (4, 1, 256), (6, 2, 64), (2, 2, 32)])
def test_nothing_behind_the_end_of_a_sequence_is_seen(
    heads: int, kv_heads: int, head_dim: int, softcap: float | None, window: int | None
) -> None:
    """NaN or infinity behind each sequence's keys gives what zeros there give: bit for bit, and near float64."""
    segments: tuple[VarlenSegment, ...] = (
        (0, 300, 0, 0),
        (300, 1, 500, 77),
        (301, 129, 800, 40),
        (430, 3, 1100, 61),
        (433, 64, 1400, 0),
    )
    query = (torch.randn(497, heads, head_dim, device=CUDA) * head_dim**-0.5).bfloat16()
    keys, values = torch.randn(2, 1700, kv_heads, head_dim, device=CUDA).bfloat16()
    own = torch.zeros(1700, dtype=torch.bool, device=CUDA)
    for _, count, first, offset in segments:
        own[first : first + offset + count] = True
    spec = VarlenSpec(softcap, window)
    want = exact(query, keys, values, segments, spec)
    for kernel in kernels(heads, kv_heads, head_dim, spec):
        found = []
        for behind in (0.0, torch.nan, -torch.inf):
            keys[~own], values[~own] = behind, behind
            found.append(kernel(query, keys, values, segments, spec))
        assert torch.equal(found[0], found[1]), kernel.__name__
        assert torch.equal(found[0], found[2]), kernel.__name__
        assert relative_error(found[0], want) < 0.01


@pytest.mark.parametrize("window", [None, 1, 50, 128, 700])
@pytest.mark.parametrize(("softcap", "size"), [(50.0, 1.0), (50.0, 40.0), (None, 1.0), (5.0, 3.0), (500.0, 8.0)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(8, 4, 128), (4, 1, 128), (3, 3, 128), (4, 2, 256), (4, 1, 256), (6, 2, 64), (4, 1, 16), (2, 2, 32)],
)
def test_attention(
    heads: int, kv_heads: int, head_dim: int, softcap: float | None, size: float, window: int | None
) -> None:
    """Sequences of unequal lengths, some with older keys; keys and values in rows wider than they are."""
    query = (torch.randn(ROWS, heads, head_dim, device=CUDA) * size * head_dim**-0.5).bfloat16()
    both = torch.randn(KEYS, 2 * kv_heads, head_dim, device=CUDA).bfloat16()
    keys, values = both.split([kv_heads, kv_heads], dim=1)
    spec = VarlenSpec(softcap, window)
    want = exact(query, keys, values, SEGMENTS, spec)
    twin = relative_error(plain_varlen(query, keys, values, SEGMENTS, spec), want)
    for varlen in kernels(heads, kv_heads, head_dim, spec):
        poison(ROWS, heads * head_dim)
        out = varlen(query, keys, values, SEGMENTS, spec)
        assert relative_error(out, want) <= max(1.05 * twin, 1e-9), varlen
        assert torch.equal(out, varlen(query, keys, values, SEGMENTS, spec)), varlen


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 255, 257])
def test_attention_at_every_edge_of_a_block(length: int, head_dim: int) -> None:
    for window in (None, 64, 65, 127):
        for offset in (0, 1, 63, 64, 128):
            keys, values = torch.randn(2, length + offset, 2, head_dim, device=CUDA).bfloat16()
            query = torch.randn(length, 4, head_dim, device=CUDA).bfloat16() / 11
            segments, spec = ((0, length, 0, offset),), VarlenSpec(50.0, window)
            want = exact(query, keys, values, segments, spec)
            for varlen in kernels(4, 2, head_dim, spec):
                poison(length, 4 * head_dim)
                out = varlen(query, keys, values, segments, spec)
                assert relative_error(out, want) < 5e-3, (varlen, window, offset)


@pytest.mark.parametrize("head_dim", [128, 256])
def test_a_row_that_looks_at_one_key_gets_its_value_and_rows_of_no_run_stay_as_they_are(head_dim: int) -> None:
    query, keys, values = (torch.randn(200, n, head_dim, device=CUDA).bfloat16() for n in (4, 2, 2))
    spec, segments = VarlenSpec(50.0, 1), ((3, 150, 20, 0),)
    for varlen in kernels(4, 2, head_dim, spec):
        poison(200, 4 * head_dim)
        out = varlen(query, keys, values, segments, spec)
        assert torch.equal(out[3:153].view(150, 4, head_dim), values[20:170].repeat_interleave(2, dim=1)), varlen
        assert bool(out[:3].isnan().all() & out[153:].isnan().all()), varlen


def test_the_kernel_for_hopper_names_what_it_does_not_take() -> None:
    query, keys = torch.randn(9, 4, 128, device=CUDA).bfloat16(), torch.randn(9, 2, 128, device=CUDA).bfloat16()
    if hopper_attention.supports(AttentionCase(4, 2, 128, 50.0, torch.bfloat16), gpu_of(0)) is not None:
        pytest.skip("needs a Hopper GPU")
    segments, spec = ((0, 9, 0, 0),), VarlenSpec(50.0, None)
    for wrong, given, text in (
        ((query, keys, keys), VarlenSpec(None, None), "soft-cap"),
        ((query, keys, keys), VarlenSpec(61.0, None), "soft-cap"),
        ((query[..., :64], keys[..., :64], keys[..., :64]), spec, "heads of 128 or 256"),
        ((query[:, :3], keys[:, :1], keys[:, :1]), spec, "divide"),
        ((query.half(), keys, keys), spec, "query must be"),
        ((query, keys.transpose(1, 2).contiguous().transpose(1, 2), keys), spec, "keys must be"),
    ):
        with pytest.raises(ParameterError, match=text):
            hopper_varlen(*wrong, segments, given)
    room = torch.tensor([0, 0, 9, 0, 0, 0], dtype=torch.int32, device=CUDA)
    for tiles in (room[:4].long()[None], room[2:][None], room[:4].expand(3, 4)[:, ::2]):
        with pytest.raises(ParameterError, match="tiles must be int32"):
            hopper_varlen(query, keys, keys, tiles, spec)


def test_attention_in_fp16_keeps_scores_at_the_cap_finite() -> None:
    query = torch.full((70, 4, 128), 20.0, device=CUDA).half()
    keys = torch.full((70, 2, 128), 20.0, device=CUDA).half()
    values = torch.randn(70, 2, 128, device=CUDA).half()
    for softcap in (50.0, None):
        spec = VarlenSpec(softcap, None)
        out = triton_varlen(query, keys, values, ((0, 70, 0, 0),), spec)
        assert relative_error(out, exact(query, keys, values, ((0, 70, 0, 0),), spec)) < 1e-3


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 16, 128), (8, 4, 256), (3, 1, 16), (5, 5, 64)])
@pytest.mark.parametrize("norms", [False, True])
def test_rope_write(heads: int, kv_heads: int, head_dim: int, norms: bool) -> None:
    rows = 37
    qkv = (torch.randn(rows, (heads + 2 * kv_heads) * head_dim, device=CUDA) * 3).bfloat16()
    table = RotaryTable(head_dim, 10000.0, 8192).table(CUDA)
    positions = torch.randint(0, 8192, (rows,), device=CUDA)
    storage = torch.full((2, 9, 8, kv_heads, head_dim), torch.nan, device=CUDA, dtype=torch.bfloat16)
    slots = torch.randperm(72, device=CUDA)[:rows]
    weights = {f"{x}_norm": torch.rand(head_dim, device=CUDA) + 0.5 for x in "qk"} if norms else {}
    poison(rows, heads, head_dim)
    query, key = rope_write.rope_write(
        qkv, table[positions], storage[0], storage[1], slots, 0.3, **weights, eps=1e-6, want_key=True
    )
    parts = qkv.view(rows, -1, head_dim).double().split([heads, kv_heads, kv_heads], dim=1)
    if norms:
        parts = (
            tuple(
                (rms(x, 1e-6) * weights[n]).bfloat16().double()
                for x, n in zip(parts, ("q_norm", "k_norm"), strict=False)
            )
            + parts[2:]
        )
    inverse = 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device=CUDA) / head_dim)
    angles = (positions[:, None] * inverse)[:, None]
    assert relative_error(query, rotated(parts[0], angles) * 0.3) < 2.5e-3
    assert key is not None
    assert relative_error(key, rotated(parts[1], angles)) < 2.5e-3
    keys, values = storage.flatten(1, 2)
    assert torch.equal(keys[slots], key)
    assert torch.equal(values[slots], qkv.view(rows, -1, head_dim)[:, heads + kv_heads :])
    rest = torch.ones(72, dtype=torch.bool, device=CUDA)
    rest[slots] = False
    assert bool(keys[rest].isnan().all())
    assert bool(values[rest].isnan().all())
    kept = storage.clone()
    alone, _ = rope_write.rope_write(
        qkv, table[positions], storage[0], storage[1], torch.full_like(slots, -1), 0.3, **weights, eps=1e-6
    )
    assert torch.equal(alone, query)
    assert torch.equal(storage.nan_to_num(), kept.nan_to_num()), "rows without a place were stored"
    again, none = rope_write.rope_write(
        qkv, table[positions], keys.view(9, 8, kv_heads, head_dim), storage[1], slots, 0.3, **weights, eps=1e-6
    )
    assert none is None
    assert torch.equal(again, query)


@pytest.mark.parametrize("d", [8, 2304, 4608, 8192])
def test_norm_alone_and_add_alone(d: int) -> None:
    residual, weight = torch.randn(70, d, device=CUDA) * 50, torch.randn(d, device=CUDA)
    before = residual.clone()
    assert relative_error(norm.norm(residual, weight, 1e-6), rms(before.double(), 1e-6) * weight.double()) < 2.5e-3
    assert torch.equal(residual, before)
    y = torch.randn(70, d, device=CUDA).bfloat16()
    norm.add_norm(y, residual, weight, 1e-6)
    assert relative_error(residual, before.double() + rms(y.double(), 1e-6) * weight.double()) < 1e-6


def test_choices() -> None:
    model = network("bf16", bound=True)
    assert isinstance(model.ops, CudaOps)
    assert model.attention_implementation.name == "triton"
    bind_kernels(model, CUDA, "plain")
    assert isinstance(model.ops, PlainOps)
    bind_kernels(model, CUDA)
    arguments = model.config, torch.float16, CUDA
    assert choose_attention("triton", *arguments).varlen is triton_varlen
    large = GemmaConfig.from_dict({**CONFIG, "head_dim": 128})
    assert choose_attention("auto", large, torch.bfloat16, CUDA).varlen is kernels(8, 4, 128, VarlenSpec(5.0, None))[-1]
    assert choose_attention("auto", large, torch.float16, CUDA).varlen is triton_varlen
    found = choose_attention("flash_attention_2", *arguments)
    if prefill_attention.flash_attn_reason() is None:
        assert found.varlen is flash_attn_varlen
        assert "package" in found.detail
    else:
        assert found.varlen is triton_varlen
        assert "not installed" in found.detail


@pytest.mark.parametrize(("weights", "head_dim"), [("bf16", 64), ("nf4", 64), ("bf16", 128), ("bf16", 256)])
def test_a_step_gives_the_plain_networks_hidden_states(weights: str, head_dim: int) -> None:
    """Prompts in chunks beside single tokens, windows shorter than a chunk; the cache's contents too."""
    model, plain = (network(weights, bound=bound, head_dim=head_dim) for bound in (True, False))
    assert model.attention_implementation.varlen is kernels(8, 4, head_dim, VarlenSpec(5.0, None))[-1]
    assert isinstance(model.ops, CudaOps)
    assert isinstance(plain.ops, PlainOps)
    chunks = [(0, 90), (90, 40), (130, 1), (131, 60)], [(0, 33), (33, 1), (34, 1), (35, 100)]
    tables = [Tables(list(range(60)), list(range(60, 120))), Tables(list(range(60, 120)), list(range(60)))]
    ids = torch.randint(0, 1000, (2, 200), generator=torch.Generator().manual_seed(4)).to(CUDA)
    caches = [PagedCache(model.config, CacheShape(4, 128, 128), torch.bfloat16, CUDA) for _ in range(2)]
    for step in range(4):
        spans, rows, positions = [], [], []
        for sequence in range(2):
            start, count = chunks[sequence][step]
            spans.append(Span(len(positions), count, start + count))
            rows.append(ids[sequence, start : start + count])
            positions += range(start, start + count)
        outputs = []
        for network_, cache in zip((model, plain), caches, strict=True):
            kv = PagedKeyValues(network_.config, cache, tables, spans)
            with torch.inference_mode():
                outputs.append(network_(torch.cat(rows), torch.tensor(positions, device=CUDA), kv))
        assert relative_error(outputs[0], outputs[1].double()) < 0.02, step
        wanted = torch.tensor([span.start + span.length - 1 for span in spans], device=CUDA)
        with torch.inference_mode():
            kv = PagedKeyValues(model.config, caches[0], tables, spans)
            some = model(torch.cat(rows), torch.tensor(positions, device=CUDA), kv, wanted)
        assert relative_error(some, outputs[1][wanted].double()) < 0.02, step
        assert relative_error(caches[0].full_storage, caches[1].full_storage.double()) < 0.03
        assert relative_error(caches[0].sliding_storage, caches[1].sliding_storage.double()) < 0.03


def test_logits_without_a_cache_are_near_the_plain_ones() -> None:
    model, plain = network("bf16", bound=True), network("bf16", bound=False)
    ids = torch.randint(0, 1000, (150,), device=CUDA)
    assert relative_error(dense_logits(model, ids), dense_logits(plain, ids).double()) < 0.02


def test_explicit_eager_and_plain_kernels_are_obeyed() -> None:
    model = network("bf16", bound=True)
    device, config = CUDA, EngineConfig(max_batch_tokens=64, block_size=4, max_context=256)
    assert Engine(model, device, config).runner.graph_refusal is None
    model.asked_attention = "eager"
    assert "eager" in str(Engine(model, device, config).runner.graph_refusal)
    model.asked_attention = "auto"
    bind_kernels(model, CUDA, "plain")
    engine = Engine(model, device, config)
    assert "plain" in str(engine.runner.graph_refusal)
    sequence = engine.submit(Request(prompt_ids=(1, 2, 3), params=SamplingParams(max_new_tokens=4, temperature=0)))
    while engine.has_work:
        engine.step()
    assert len(sequence.tokens) == 7
