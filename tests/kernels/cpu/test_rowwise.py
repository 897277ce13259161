"""What stands between the matrix products on a CPU (step*.cpp), against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gemcut.kernels.attention.decode import DecodeSpec
from gemcut.kernels.cpu import library as cpu
from gemcut.kernels.cpu.attention import DecodeAttention
from gemcut.kernels.cpu.rowwise import Rowwise
from gemcut.model.attention import AttentionSpec

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
    out = Rowwise(cpu.library(variant)).add_norm(got_residual, added, added_scale, scale, 1e-6)
    torch.testing.assert_close(got_residual.double(), want_residual, rtol=1e-6, atol=1e-5)
    assert out is not None
    assert_bf16(out, rms_norm(got_residual, scale, 1e-6))


@pytest.mark.parametrize("variant", VARIANTS)
def test_norm_alone_and_sum_alone(variant: str) -> None:
    """Nothing to add leaves the residual as it is; no scale gives no result; rows of ``added`` may stand apart."""
    kernels, residual, scale = Rowwise(cpu.library(variant)), random(5, 96), random(96, seed=1)
    before = residual.clone()
    out = kernels.norm(residual, scale, 1e-6)
    assert torch.equal(residual, before)
    assert_bf16(out, rms_norm(residual, scale, 1e-6))
    wide = random(5, 200, seed=2).to(BF16)
    assert kernels.add_norm(residual, wide[:, 50:146], scale, None, 1e-6) is None
    want = before.double() + rms_norm(wide[:, 50:146], scale, 1e-6)
    torch.testing.assert_close(residual.double(), want, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_and_non_finite_rows(variant: str) -> None:
    """A zero row stays zero; NaN stays in its row."""
    residual, scale = torch.zeros(3, 64), torch.ones(64)
    residual[1, 5], residual[2] = torch.nan, 2.0
    out = Rowwise(cpu.library(variant)).norm(residual, scale, 1e-6)
    assert bool((out[0] == 0).all())
    assert bool(out[1].isnan().all())
    assert_bf16(out[2], torch.ones(64, dtype=torch.float64))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 2048), (3, 1025), (20, 300)])
def test_geglu(rows: int, width: int, variant: str) -> None:
    """gelu(gate) · up with the tanh form, over the whole range of gates."""
    gate = (random(rows, width) * torch.logspace(-4, 1.5, width)).to(BF16)
    up = random(rows, width, seed=1).to(BF16)
    got = Rowwise(cpu.library(variant)).geglu(torch.cat((gate, up), dim=1))
    want = torch.nn.functional.gelu(gate.double(), approximate="tanh") * up.double()
    assert got.dtype == BF16
    # Far on the negative side the tanh form itself falls below fp32's smallest numbers.
    assert bool(((got.double() - want).abs() <= 2.0**-8 * 1.01 * want.abs() + 1e-6 * up.double().abs()).all())


@pytest.mark.parametrize("variant", VARIANTS)
def test_geglu_of_special_values(variant: str) -> None:
    """Huge gates pass or vanish; NaN stays."""
    gate = torch.tensor([[0.0, -0.0, 1e30, -1e30, torch.inf, torch.nan, 100.0, -100.0]], dtype=BF16)
    got = Rowwise(cpu.library(variant)).geglu(torch.cat((gate, torch.ones_like(gate)), dim=1))[0].float()
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
    got = Rowwise(cpu.library(variant)).softcap(values.clone(), 30.0).double()
    assert bool(((got - want).abs() <= 5e-7 * want.abs() + 1e-12).all())
    assert bool((got.abs() <= 30).all())
    values[0] = -torch.inf if count == 17 else torch.inf  # no logit: as the cap it would pass for one
    got = Rowwise(cpu.library(variant)).softcap(values, 30.0)
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
    storage = torch.stack([random(batch * most, size, kv_heads, hd, seed=seed).to(BF16) for seed in (1, 2)])
    keys, values = storage
    slots = torch.tensor([order[b, (n - 1) // size] * size + (n - 1) % size for b, n in enumerate(lengths)])
    qkv = random(batch, (heads + 2 * kv_heads) * hd, seed=3).to(BF16)
    angles = random(batch, hd // 2, seed=4)
    table = torch.cat((angles.cos(), angles.sin()), dim=1)[:, None]
    rotation = table[..., : hd // 2], table[..., hd // 2 :]
    scale = hd**-0.5
    decode_spec = DecodeSpec(heads, kv_heads, hd, scale, spec.softcap, window, 1e-6)
    before = keys.clone()
    kernel, blocks = DecodeAttention(cpu.library(variant)), (order.contiguous(), torch.tensor(lengths))

    def attend() -> Tensor:
        return kernel(qkv, storage, slots, blocks, rotation, decode_spec, q_norm=norms[0], k_norm=norms[1])

    got = attend()
    # Few threads take pairs of a sequence's heads, more than 7 × 8 / 2 single ones: the same bits.
    for threads in (1, 29):
        monkeypatch.setattr(cpu, "threads", lambda count=threads: count)
        assert torch.equal(attend(), got)
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
