"""The two attention functions against a direct float64 computation, and the choice of an implementation by name."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gemcut.config import FAMILY
from gemcut.errors import UnsupportedError
from gemcut.model import attention
from gemcut.model.attention import AttentionSpec, attend, attend_decode, choose_attention

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


def _direct(query: Tensor, keys: Tensor, values: Tensor, offset: int, spec: AttentionSpec) -> Tensor:
    """One score at a time, in float64."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    for i in range(query.shape[0]):
        q = offset + i
        visible = [k for k in range(keys.shape[0]) if q - k >= 0 and (spec.window is None or q - k < spec.window)]
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            scores = [float(query[i, head].double() @ keys[k, group].double()) for k in visible]
            if spec.softcap is not None:
                scores = [spec.softcap * math.tanh(score / spec.softcap) for score in scores]
            total = sum(math.exp(score) for score in scores)
            for score, k in zip(scores, visible, strict=True):
                out[i, head] += math.exp(score) / total * values[k, group].double()
    return out


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape) * 2


SPECS = [AttentionSpec(cap, window) for cap in (None, 2.0) for window in (None, 1, 4, 7, 50)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("offset", [0, 3, 9])
def test_attend(spec: AttentionSpec, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of 11 queries after ``offset`` older keys, in tiles of 4 so that tiles and windows cross."""
    monkeypatch.setattr(attention, "QUERY_TILE", 4)
    query = _random(11, HEADS, HEAD_DIM)
    keys, values = _random(offset + 11, KV_HEADS, HEAD_DIM), _random(offset + 11, KV_HEADS, HEAD_DIM)
    expected = _direct(query, keys, values, offset, spec)
    assert (attend(query, keys, values, offset, spec) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_attend_decode(spec: AttentionSpec) -> None:
    """Contexts of unequal length in one batch; what lies behind a context's end is garbage and has no effect."""
    lengths = [1, 2, 5, 12]
    query = _random(len(lengths), HEADS, HEAD_DIM)
    keys, values = _random(len(lengths), 12, KV_HEADS, HEAD_DIM), _random(len(lengths), 12, KV_HEADS, HEAD_DIM)
    for row, length in enumerate(lengths):
        keys[row, length:] = values[row, length:] = 1e4
    got = attend_decode(query, keys, values, torch.tensor(lengths), spec)
    for row, length in enumerate(lengths):
        expected = _direct(query[row : row + 1], keys[row, :length], values[row, :length], length - 1, spec)
        assert (got[row] - expected[0]).abs().max() < 1e-5


def test_fp16_softmax_survives_scores_at_the_cap() -> None:
    """exp(50) overflows fp16, and so do the raw scores here; the softmax is fp32 and subtracts the maximum."""
    query = torch.full((3, HEADS, HEAD_DIM), 200.0).half()
    keys, values = torch.full((3, KV_HEADS, HEAD_DIM), 200.0).half(), _random(3, KV_HEADS, HEAD_DIM).half()
    spec = AttentionSpec(50.0, None)
    out = attend(query, keys, values, 0, spec)
    assert torch.isfinite(out).all()
    assert (out - _direct(query, keys, values, 0, spec)).abs().max() < 5e-3


def test_an_unknown_backend_is_refused_by_name() -> None:
    """transformers once ran SDPA without the soft-cap in silence."""
    arguments = (FAMILY["gemma-2-2b"], torch.bfloat16, torch.device("cpu"))
    assert choose_attention("eager", *arguments).name == "eager"
    with pytest.raises(UnsupportedError, match="'no_such_attention'"):
        choose_attention("no_such_attention", *arguments)
