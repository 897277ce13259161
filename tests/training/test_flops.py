"""Model FLOPs against counting one by one, published shapes' known figures, and hand-made runs."""

from __future__ import annotations

import pytest

from gemcut.config import FAMILY, GemmaConfig
from gemcut.errors import ParameterError
from gemcut.training.flops import (
    average_keys,
    days,
    flops_per_token,
    flops_utilization,
    multiplied_parameters,
    peak_flops,
)

TWO, NINE, TWENTY_SEVEN = (FAMILY[f"gemma-2-{size}"] for size in ("2b", "9b", "27b"))


def counted(config: GemmaConfig, lengths: list[int]) -> int:
    """FLOPs of whole sequences, by writing down every product a network has and every key a query sees."""
    d, f = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    total = 0
    for length in lengths:
        for kind in config.layer_types:
            for rows, columns in ((d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d)):
                total += 3 * 2 * length * rows * columns
            window = config.sliding_window if kind == "sliding_attention" else length
            seen = sum(1 for t in range(length) for u in range(length) if 0 <= t - u < window)
            total += 3 * 2 * 2 * seen * q
        total += 3 * 2 * length * d * config.vocab_size
    return total


@pytest.mark.parametrize("length", [1, 3, 7, 40])
def test_counted_one_by_one(length: int) -> None:
    config = NINE.replace(sliding_window=7)
    assert flops_per_token(config, length) * length == pytest.approx(counted(config, [length]), rel=1e-12)


def test_packed_documents_attend_inside_themselves() -> None:
    config = NINE.replace(sliding_window=5)
    packed = flops_per_token(config, 40, document_lengths=[20, 3, 17])
    assert packed * 40 == pytest.approx(counted(config, [20, 3, 17]), rel=1e-12)
    assert packed < flops_per_token(config, 40)


def test_known_figures() -> None:
    """2B: 2.024 G in the layers and 0.590 G in the head, 17.0 and 18.0 GFLOP a token."""
    assert multiplied_parameters(TWO) == pytest.approx(2.024e9 + 0.590e9, rel=1e-3)
    assert flops_per_token(TWO, 4096) / 1e9 == pytest.approx(17.0, abs=0.05)
    assert flops_per_token(TWO, 8192) / 1e9 == pytest.approx(18.0, abs=0.05)
    # 27B, a batch of 768 × 8192 tokens on 6,144 chips
    step = flops_per_token(TWENTY_SEVEN, 8192) * 768 * 8192
    assert step / 6144 / 1e12 == pytest.approx(175.6, abs=0.1)


def test_every_parameter_but_the_norms_is_multiplied_once() -> None:
    for config in (TWO, NINE, TWENTY_SEVEN, FAMILY["gemma-3-270m"]):
        norms = config.hidden_size * (4 * config.num_hidden_layers + 1)
        norms += 2 * config.head_dim * config.num_hidden_layers * config.qk_norm
        assert multiplied_parameters(config) == config.num_parameters() - norms


def test_average_keys() -> None:
    assert average_keys(4) == 2.5
    assert average_keys(4, 4) == average_keys(4, 100) == 2.5
    assert average_keys(4, 1) == 1.0
    assert average_keys(4, 2) == (1 + 2 + 2 + 2) / 4


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("cpu", None),
    ],
)
def test_peak_by_device_kind(kind: str, peak: float | None) -> None:
    assert peak_flops(kind) == peak


def test_utilization_and_days() -> None:
    """45 % of one H100's 989 TFLOP/s is 26,200 tokens a second at 2B and T = 4096."""
    token = flops_per_token(TWO, 4096)
    assert flops_utilization(26_200, token, 1, 989.4e12) == pytest.approx(0.45, abs=0.001)
    # a day at 100 % of two chips that do 10 FLOP/s each, a token costing 4
    assert days(86_400 * 20 / 4, 4, 2, 10, 1.0) == pytest.approx(1.0)
    assert days(86_400 * 20 / 4, 4, 2, 10, 0.5) == pytest.approx(2.0)


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(ParameterError, match="sequence length 0 is below 1"):
        flops_per_token(TWO, 0)
    with pytest.raises(ParameterError, match="sequence length 0 is below 1"):
        flops_per_token(TWO, 8, document_lengths=[8, 0])
    with pytest.raises(ParameterError, match="0 chips"):
        flops_utilization(1.0, 1.0, 0, 1e12)
    with pytest.raises(ParameterError, match="positive peak"):
        days(1.0, 1.0, 1, 0.0, 0.5)
    with pytest.raises(ParameterError, match=r"utilization is 1\.5"):
        days(1.0, 1.0, 1, 1e12, 1.5)
