"""What stands between the matrix products on a CPU (step*.cpp), against float64 and the plain network."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from gemcut.config import GemmaConfig
from gemcut.engine.cache import PagedCache, Tables, shape_for_tokens
from gemcut.engine.paged import PagedKeyValues, Pages
from gemcut.kernels.cpu import library as cpu
from gemcut.kernels.cpu.linear import MAX_M, CpuLinear
from gemcut.kernels.cpu.step import CpuStep
from gemcut.model import Model
from gemcut.model.attention import AttentionSpec, Span
from gemcut.model.bind import bind_kernels
from gemcut.model.dense import DenseKeyValues
from gemcut.model.linear import Linear
from support import tiny_config

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
BF16 = torch.bfloat16
VARIANTS = cpu.variants()


def random(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    """Normal fp32 numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """The norm in float64."""
    x = x.double()
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * scale.double()


def assert_bf16(got: Tensor, want: Tensor, slack: float = 2.0**-20) -> None:
    """``got`` is ``want`` (float64) to half a step of bf16, and ``slack`` of the largest."""
    assert got.dtype == BF16
    error = (got.double() - want).abs()
    assert bool((error <= 2.0**-8 * want.abs() * 1.001 + slack * want.abs().max()).all())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("d", [1, 7, 64, 640, 2304, 2311])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_norms_and_residual(rows: int, d: int, variant: str) -> None:
    """residual += norm(added) · scale, and the residual's own norm."""
    residual, added = random(rows, d, size=20), random(rows, d, seed=1).to(BF16)
    added_scale, scale = random(d, seed=2) + 1, random(d, seed=3) + 1
    want_residual = residual.double() + rms_norm(added, added_scale, 1e-6)
    got_residual = residual.clone()
    out = CpuStep(variant).add_norm(got_residual, added, added_scale, scale, 1e-6)
    torch.testing.assert_close(got_residual.double(), want_residual, rtol=1e-6, atol=1e-5)
    assert out is not None
    assert_bf16(out, rms_norm(got_residual, scale, 1e-6))


@pytest.mark.parametrize("variant", VARIANTS)
def test_norm_alone_and_sum_alone(variant: str) -> None:
    """Nothing to add leaves the residual as it is; no scale gives no result; rows of ``added`` may stand apart."""
    step, residual, scale = CpuStep(variant), random(5, 96), random(96, seed=1)
    before = residual.clone()
    out = step.add_norm(residual, None, None, scale, 1e-6)
    assert out is not None
    assert torch.equal(residual, before)
    assert_bf16(out, rms_norm(residual, scale, 1e-6))
    wide = random(5, 200, seed=2).to(BF16)
    assert step.add_norm(residual, wide[:, 50:146], scale, None, 1e-6) is None
    want = before.double() + rms_norm(wide[:, 50:146], scale, 1e-6)
    torch.testing.assert_close(residual.double(), want, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_and_non_finite_rows(variant: str) -> None:
    """A zero row stays zero; NaN stays in its row."""
    residual, scale = torch.zeros(3, 64), torch.ones(64)
    residual[1, 5], residual[2] = torch.nan, 2.0
    out = CpuStep(variant).add_norm(residual, None, None, scale, 1e-6)
    assert out is not None
    assert bool((out[0] == 0).all())
    assert bool(out[1].isnan().all())
    assert_bf16(out[2], torch.ones(64, dtype=torch.float64))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 2048), (3, 1025), (20, 300)])
def test_geglu(rows: int, width: int, variant: str) -> None:
    """gelu(gate) · up with the tanh form, over the whole range of gates."""
    gate = (random(rows, width) * torch.logspace(-4, 1.5, width)).to(BF16)
    up = random(rows, width, seed=1).to(BF16)
    got = CpuStep(variant).geglu(torch.cat((gate, up), dim=1))
    want = torch.nn.functional.gelu(gate.double(), approximate="tanh") * up.double()
    assert got.dtype == BF16
    # Far on the negative side the tanh form itself falls below fp32's smallest numbers.
    assert bool(((got.double() - want).abs() <= 2.0**-8 * 1.01 * want.abs() + 1e-6 * up.double().abs()).all())


@pytest.mark.parametrize("variant", VARIANTS)
def test_geglu_of_special_values(variant: str) -> None:
    """Huge gates pass or vanish; NaN stays."""
    gate = torch.tensor([[0.0, -0.0, 1e30, -1e30, torch.inf, torch.nan, 100.0, -100.0]], dtype=BF16)
    got = CpuStep(variant).geglu(torch.cat((gate, torch.ones_like(gate)), dim=1))[0].float()
    assert got[:2].tolist() == [0, 0]
    assert got[2] == gate[0, 2]
    assert got[3].abs() == 0
    assert got[4] == torch.inf
    assert bool(got[5].isnan())
    assert got[6:].tolist() == [100.0, 0.0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", [1, 17, 256000])
def test_softcap(count: int, variant: str) -> None:
    """Within a few units in the last place of float64's, from tiny values to far beyond the cap."""
    values = random(count) * torch.logspace(-6, 3, count)
    want = 30 * (values.double() / 30).tanh()
    got = CpuStep(variant).softcap(values.clone(), 30.0).double()
    assert bool(((got - want).abs() <= 5e-7 * want.abs() + 1e-12).all())
    assert bool((got.abs() <= 30).all())
    values[0] = -torch.inf if count == 17 else torch.inf  # no logit: as the cap it would pass for one
    got = CpuStep(variant).softcap(values, 30.0)
    assert got.isnan().nonzero().tolist() == [[0]]


def attention_in_float64(query: Tensor, keys: Tensor, values: Tensor, spec: AttentionSpec) -> Tensor:
    """One query [heads, hd] over keys and values [L, kv_heads, hd], of which the last is its own."""
    heads, length = query.shape[0], keys.shape[0]
    keys, values = (part.double().repeat_interleave(heads // part.shape[1], dim=1) for part in (keys, values))
    scores = torch.einsum("hd,lhd->hl", query.double(), keys)
    if spec.softcap is not None:
        scores = spec.softcap * (scores / spec.softcap).tanh()
    if spec.window is not None:
        scores[:, : max(0, length - spec.window)] = -math.inf
    return torch.einsum("hl,lhd->hd", scores.softmax(dim=-1), values)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotation of [heads, hd] in float64."""
    first, second = x.double().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("threads_per_head", [(8, 4, 256), (4, 1, 64), (3, 3, 6), (2, 1, 40)])
@pytest.mark.parametrize("window", [None, 1, 16, 33])
@pytest.mark.parametrize("special", ["softcap", "norms", "neither"])
def test_attention_of_one_query(
    special: str,
    window: int | None,
    threads_per_head: tuple[int, int, int],
    variant: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several sequences at once, at lengths around a block's borders and the window's edge, on scattered blocks."""
    heads, kv_heads, hd = threads_per_head
    lengths, size = [1, 15, 16, 17, 33, 34, 70], 16
    spec = AttentionSpec(softcap=5.0 if special == "softcap" else None, window=window)
    norms = [random(hd, seed=7) + 1, random(hd, seed=8) + 1] if special == "norms" else [None, None]
    batch, most = len(lengths), -(-max(lengths) // size)
    order = torch.randperm(batch * most, generator=torch.Generator().manual_seed(0)).view(batch, most)
    keys = random(batch * most, size, kv_heads, hd, seed=1).to(BF16)
    values = random(batch * most, size, kv_heads, hd, seed=2).to(BF16)
    slots = torch.tensor([order[b, (n - 1) // size] * size + (n - 1) % size for b, n in enumerate(lengths)])
    qkv = random(batch, (heads + 2 * kv_heads) * hd, seed=3).to(BF16)
    angles = random(batch, hd // 2, seed=4)
    table = torch.cat((angles.cos(), angles.sin()), dim=1)[:, None]
    rotation = table[..., : hd // 2], table[..., hd // 2 :]
    scale = hd**-0.5
    attention = SimpleNamespace(
        layer=0, spec=spec, head_dim=hd, scale=scale, sizes=(heads * hd, kv_heads * hd, kv_heads * hd),
        q_norm=None if norms[0] is None else SimpleNamespace(scale=norms[0], eps=1e-6),
        k_norm=None if norms[1] is None else SimpleNamespace(scale=norms[1], eps=1e-6),
    )  # fmt: skip
    before = keys.clone()
    kv = SimpleNamespace(
        pages=lambda layer: Pages(keys, values, slots),
        padded_blocks=lambda layer: (order.contiguous(), torch.tensor(lengths)),
    )
    got = CpuStep(variant).attend_one(attention, qkv, rotation, kv)
    for threads in (1, 64):  # few share a key head's work by pairs of heads, many by single ones: the same bits
        monkeypatch.setattr(cpu, "threads", lambda count=threads: count)
        assert torch.equal(CpuStep(variant).attend_one(attention, qkv, rotation, kv), got)
    untouched = torch.ones(batch * most * size, dtype=torch.bool)
    untouched[slots] = False
    assert torch.equal(keys.flatten(0, 1)[untouched], before.flatten(0, 1)[untouched])
    for b, length in enumerate(lengths):
        query, key, value = qkv[b].view(-1, hd).split((heads, kv_heads, kv_heads))
        if norms[0] is not None and norms[1] is not None:
            query, key = rms_norm(query, norms[0], 1e-6), rms_norm(key, norms[1], 1e-6)
        cos, sin = rotation[0][b, 0].double(), rotation[1][b, 0].double()
        assert_bf16(keys.flatten(0, 1)[slots[b]], rotated(key, cos, sin))
        assert torch.equal(values.flatten(0, 1)[slots[b]], value)
        live = [part[order[b]].flatten(0, 1)[:length] for part in (keys, values)]
        want = attention_in_float64(rotated(query, cos, sin) * scale, live[0], live[1], spec)
        assert_bf16(got[b].view(heads, hd), want, slack=2.0**-16)


def tiny_model(kind: str, dtype: torch.dtype) -> Model:
    """A random network of three blocks' worth of context; the same bf16 numbers in any dtype."""
    config = GemmaConfig.from_dict(tiny_config(kind).to_dict())
    model = Model(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = (1 + 0.2 * noise) if name.endswith("scale") else (0.2 * noise).to(BF16).to(dtype)
    return model.eval()


@torch.inference_mode()
def logits_of_steps(model: Model, ids: Tensor, prompt: int) -> Tensor:
    """Logits after the prompt and after each further token, one at a time, over a paged cache."""
    shape = shape_for_tokens(model.config, sequences=1, context=len(ids), chunk=len(ids), block_size=16)
    cache = PagedCache(model.config, shape, model.dtype, torch.device("cpu"))
    tables = Tables()
    rows, done = [], 0
    for end in [prompt, *range(prompt + 1, len(ids) + 1)]:
        cache.extend(tables, done, end - done)
        kv = PagedKeyValues(model.config, cache, [tables], [Span(0, end - done, end)])
        hidden = model(ids[done:end], torch.arange(done, end), kv)
        rows.append(model.head(hidden[-1:]))
        done = end
    return torch.cat(rows)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_network(kind: str, variant: str) -> None:
    """Prefill and decode beyond the window: as near to the network in fp32 as the plain one in bf16."""
    ids = torch.randint(0, 300, (60,), generator=torch.Generator().manual_seed(1))
    want = logits_of_steps(tiny_model(kind, torch.float32), ids, 21)
    model = tiny_model(kind, BF16)
    plain = logits_of_steps(model, ids, 21)
    model.step = CpuStep(variant)
    got = logits_of_steps(model, ids, 21)
    assert (got - want).square().mean() <= 1.1 * (plain - want).square().mean()


@torch.inference_mode()
@pytest.mark.parametrize("variant", VARIANTS)
def test_wanted_rows(variant: str) -> None:
    """Behind the last attention only they are computed; the products of fewer rows may round otherwise."""
    model, ids = tiny_model("gemma2", BF16), torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(2))
    model.step = CpuStep(variant)
    positions, wanted = torch.arange(40), torch.tensor([39, 3])
    whole, some = (model(ids, positions, DenseKeyValues(40), rows) for rows in (None, wanted))
    assert some.shape == (2, whole.shape[1])
    assert (some - whole[wanted]).norm() < 0.02 * whole[wanted].norm()


@torch.inference_mode()
@pytest.mark.parametrize("batch", [1, 3, MAX_M, MAX_M + 2])
@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_all_layers_in_one_call(kind: str, variant: str, batch: int) -> None:
    """The same kernels in the same order as one by one: the same bits, for sequences of any lengths."""
    model, library = tiny_model(kind, BF16), cpu.library(variant)
    for module in model.modules():
        if isinstance(module, Linear):
            module.kernel = CpuLinear(module.case, library)
    lengths = [1 + 7 * b for b in range(batch)]
    shape = shape_for_tokens(model.config, sequences=batch, context=128, chunk=128, block_size=16)
    results = []
    for in_one in (True, False):
        cache = PagedCache(model.config, shape, BF16, torch.device("cpu"))
        tables = [Tables() for _ in lengths]
        model.step = CpuStep(variant)
        if not in_one:
            model.step._stack = SimpleNamespace(refusal="as a reference")
        for turn in range(3):
            spans, ids, positions = [], [], []
            for b, length in enumerate(lengths):
                done, new = (0, length) if turn == 0 else (length + turn - 1, 1)
                cache.extend(tables[b], done, new)
                spans.append(Span(len(ids), new, done + new))
                ids += [(7 * b + 3 * i) % 300 for i in range(done, done + new)]
                positions += range(done, done + new)
            kv = PagedKeyValues(model.config, cache, tables, spans)
            hidden = model(torch.tensor(ids), torch.tensor(positions), kv)
        assert (model.step._stack.refusal is None) == in_one
        results.append((hidden, cache.full_storage.clone(), cache.sliding_storage.clone()))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_bind_kernels_sets_it() -> None:
    """In bf16 on a CPU it serves; never where plain PyTorch was asked for, nor in fp32."""
    model, device = tiny_model("gemma2", BF16), torch.device("cpu")
    bind_kernels(model, device)
    assert model.step is not None
    bind_kernels(model, device, "plain")
    assert model.step is None
    model = tiny_model("gemma2", torch.float32)
    bind_kernels(model, device)
    assert model.step is None
