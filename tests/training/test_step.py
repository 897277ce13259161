"""A step's update against AdamW in float64 numpy; accumulation; and what a loss that is not finite does."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemcut.config import FAMILY
from gemcut.errors import DataError, ParameterError
from gemcut.training.network import Network
from gemcut.training.optimizer import OptimizerConfig, learning_rate, optimizer
from gemcut.training.step import Step, check_finite

TINY = FAMILY["gemma-2-2b"].replace(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, layer_types=FAMILY["gemma-2-2b"].layer_types[:2], sliding_window=4,
)  # fmt: skip


def batch(micro: int, rows: int, length: int = 8) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(3, 64, (micro * rows, length)).astype(np.int32)
    arrays = {
        "tokens": tokens,
        "segments": np.ones_like(tokens),
        "positions": np.tile(np.arange(length, dtype=np.int32), (len(tokens), 1)),
    }
    return {name: value.reshape(micro, rows, length) for name, value in arrays.items()}


@cache
def step() -> tuple[Step, object]:
    made = Step(Network(TINY, jnp.float32), OptimizerConfig(warmup=2, rate=1e-2), 10)
    return made, jax.jit(made)


def test_the_update_is_adamw_with_clipping_warm_up_and_decay() -> None:
    """Three updates of one matrix and one norm, against the paper's algorithm in float64."""
    config = OptimizerConfig(rate=0.1, warmup=2, schedule="wsd", decay=0.5, final=0.0, clip=1.0, weight_decay=0.3)
    random = np.random.default_rng(0)
    right = {"q_proj": random.normal(size=(3, 2)), "norm": random.normal(size=3)}
    weights = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), right)
    transform = optimizer(config, 4)
    state = transform.init(weights)
    m = dict.fromkeys(right, 0.0)
    v = dict.fromkeys(right, 0.0)
    for t, rate in enumerate([0.05, 0.1, 0.1, 0.05], 1):
        gradient = {name: random.normal(size=value.shape) for name, value in right.items()}
        updates, state = transform.update(jax.tree.map(jnp.float32, gradient), state, weights)
        weights = jax.tree.map(jnp.add, weights, updates)
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        for name, g in gradient.items():
            g = g / max(1.0, norm)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            change = (m[name] / (1 - 0.9**t)) / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-8)
            right[name] = right[name] - rate * (change + (0.3 * right[name] if name == "q_proj" else 0))
            np.testing.assert_allclose(weights[name], right[name], rtol=2e-5, atol=1e-6)


def test_the_cosine_ends_at_its_share() -> None:
    rate = learning_rate(OptimizerConfig(rate=1.0, warmup=2, final=0.1), 12)
    assert [round(float(rate(n)), 4) for n in (0, 1, 2, 7, 12)] == [0.5, 1.0, 1.0, 0.55, 0.1]


def test_micro_batches_are_one_batch() -> None:
    made, run = step()
    state = made.fresh(jax.random.key(0))
    one, metrics = run(state, batch(1, 4))
    two, again = run(state, batch(2, 2))
    assert float(metrics["loss"]) == pytest.approx(float(again["loss"]), rel=1e-6)
    assert float(metrics["gradient_norm"]) == pytest.approx(float(again["gradient_norm"]), rel=1e-5)
    # Adam's first step is the sign of a gradient: compare the moments, which are linear in it.
    for a, b in zip(jax.tree.leaves(one["optimizer"]), jax.tree.leaves(two["optimizer"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8)
    assert metrics["tokens"] == 4 * 7


def test_a_loss_that_is_not_finite_updates_nothing_and_names_the_documents() -> None:
    made, run = step()
    state = made.fresh(jax.random.key(0))
    broken = {**state, "weights": {**state["weights"], "norm": state["weights"]["norm"].at[3].set(jnp.nan)}}
    after, metrics = run(broken, batch(1, 4))
    same = partial(np.testing.assert_array_equal)
    jax.tree.map(same, after, broken)
    with pytest.raises(
        DataError, match=r"step 7: the loss is nan.*nothing was updated; look at documents web:3, web:8"
    ):
        check_finite(7, metrics, lambda: ["web:3", "web:8"])


def test_ranges_are_checked() -> None:
    with pytest.raises(ParameterError, match=r"beta2 is 1.5; expected 0 to 1"):
        OptimizerConfig(beta2=1.5)
    with pytest.raises(ParameterError, match="schedule is 'step'; expected cosine, wsd or constant"):
        OptimizerConfig(schedule="step")
