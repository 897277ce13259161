"""AdamW through optax: fp32 moments beside fp32 master weights, a schedule, clipping by the global norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from gemcut.errors import ParameterError
from gemcut.training.parameters import Tree


@dataclass(frozen=True)
class OptimizerConfig:
    """``rate`` is reached after ``warmup`` steps and falls to ``rate · final`` at the last of ``steps``.

    ``schedule``: ``cosine``; ``wsd`` holds the rate and falls linearly over the last ``decay`` of the steps;
    ``constant``. Weight decay spares the norms. ``clip`` bounds the gradient's global norm; 0 turns it off.
    """

    rate: float = 3e-4
    warmup: int = 100
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    final: float = 0.1
    decay: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "wsd", "constant"):
            raise ParameterError(f"schedule is {self.schedule!r}; expected cosine, wsd or constant")
        ranges = {"rate": (0, 10), "final": (0, 1), "decay": (0, 1), "beta1": (0, 1), "beta2": (0, 1), "clip": (0, 1e9)}
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ParameterError(f"{name} is {getattr(self, name)}; expected {low} to {high:g}")
        if self.warmup < 0 or self.weight_decay < 0 or self.epsilon <= 0:
            raise ParameterError("warmup and weight_decay must be 0 or more, epsilon more than 0")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The rate of update number n, counted from 0."""
    warmup = min(config.warmup, steps)
    left = max(1, steps - warmup)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.rate, left, config.final)
    elif config.schedule == "wsd":
        falling = max(1, round(config.decay * steps))
        after = optax.linear_schedule(config.rate, config.rate * config.final, falling, max(0, left - falling))
    else:
        after = optax.constant_schedule(config.rate)

    def rate(count: jax.Array) -> jax.Array:
        rising = config.rate * (count + 1) / max(1, warmup)
        return jnp.where(count < warmup, rising, after(count - warmup))

    return rate


def optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip, Adam, decoupled weight decay, rate. Its state needs ``out_shardings`` where there are several devices."""
    parts = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    return optax.chain(
        *parts,
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon, mu_dtype=jnp.float32),
        optax.add_decayed_weights(config.weight_decay, mask=_decayed),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )


def _decayed(tree: Tree) -> Tree:
    found: Tree = jax.tree_util.tree_map_with_path(lambda path, leaf: not str(path[-1].key).endswith("norm"), tree)
    return found
