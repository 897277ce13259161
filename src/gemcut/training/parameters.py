"""The parameter tree: layers of one place in the repeating pattern are stacked, so that a scan walks over them.

The tree is made of dicts: ``tree["layers"]["0"]["self_attn"]["q_proj"]``. Gemma 2's layers repeat as (sliding, full),
so ``layers`` has two places, and each leaf there holds ``groups`` layers along axis 0. Layers that the pattern does not
divide (Gemma 3 1B: 26 = 4 · 6 + 2) are in ``rest``, one place each, with a leading axis of 1. Names are Hugging Face's.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemcut.config import GemmaConfig, LayerKind

#: A nested dict of arrays (or of shapes, shardings, …).
Tree = dict[str, Any]
#: Where a leaf is in the tree.
Path = tuple[str, ...]


@dataclass(frozen=True)
class Pattern:
    """How a network's layers repeat: ``kinds`` of one group, number of whole ``groups``, kinds of the ``rest``."""

    kinds: tuple[LayerKind, ...]
    groups: int
    rest: tuple[LayerKind, ...]

    @classmethod
    def of(cls, config: GemmaConfig) -> Pattern:
        """The shortest pattern whose repetition gives ``config.layer_types``."""
        kinds = config.layer_types
        period = next(p for p in range(1, len(kinds) + 1) if all(k == kinds[i % p] for i, k in enumerate(kinds)))
        groups = len(kinds) // period
        return cls(kinds[:period], groups, kinds[groups * period :])


@dataclass(frozen=True)
class Weight:
    """One kind of weight: where it is, its shape in one layer, what its axes mean, and its Hugging Face tensor.

    ``axes`` names each axis of ``shape`` for sharding rules: ``vocab``, ``embed`` (the width), ``heads``, ``kv_heads``,
    ``head_dim`` or ``mlp``; a leaf inside a layer has one more axis in front, ``layers``, of length ``stack``.
    ``layers`` are the layer numbers along it; for a weight outside the layers ``stack`` is 0 and ``layers`` is empty.
    ``outputs`` counts the trailing axes of ``shape`` that Hugging Face puts first, 0 where nothing is transposed.
    """

    path: Path
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    hf_name: str  # with {} for the layer's number
    outputs: int = 0
    layers: tuple[int, ...] = ()

    @property
    def stack(self) -> int:
        """Layers along the leading axis; 0 for a leaf without one."""
        return len(self.layers)

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """The leaf's shape in the tree."""
        return (self.stack, *self.shape) if self.layers else self.shape

    @property
    def leaf_axes(self) -> tuple[str, ...]:
        """The names of the leaf's axes."""
        return ("layers", *self.axes) if self.layers else self.axes

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of one Hugging Face tensor."""
        if not self.outputs:
            return self.shape
        cut = len(self.shape) - self.outputs
        return int(np.prod(self.shape[cut:])), int(np.prod(self.shape[:cut]))

    def hf_names(self) -> list[str]:
        """The Hugging Face tensors of this leaf, in the order of its leading axis."""
        return [self.hf_name.format(i) for i in self.layers] if self.layers else [self.hf_name]

    def to_hf(self, one: Any) -> Any:
        """One layer's array as Hugging Face stores it: a matrix with outputs first. Numpy and jax arrays alike."""
        if not self.outputs:
            return one
        outputs, inputs = self.hf_shape
        return one.reshape(inputs, outputs).T

    def from_hf(self, tensor: Any) -> Any:
        """The inverse of ``to_hf``."""
        return tensor.T.reshape(self.shape) if self.outputs else tensor


def weights(config: GemmaConfig) -> list[Weight]:
    """Every leaf of the tree, in the tree's order of layers."""
    pattern = Pattern.of(config)
    period, groups = len(pattern.kinds), pattern.groups
    vocab, width = config.vocab_size, config.hidden_size
    found = [Weight(("embed_tokens",), (vocab, width), ("vocab", "embed"), "model.embed_tokens.weight")]
    for place in range(period):
        found += _layer(config, ("layers", str(place)), tuple(g * period + place for g in range(groups)))
    for place in range(len(pattern.rest)):
        found += _layer(config, ("rest", str(place)), (groups * period + place,))
    return [*found, Weight(("norm",), (width,), ("embed",), "model.norm.weight")]


def _layer(config: GemmaConfig, at: Path, layers: tuple[int, ...]) -> Iterator[Weight]:
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    N, K = config.num_attention_heads, config.num_key_value_heads

    def weight(name: str, shape: tuple[int, ...], axes: tuple[str, ...], outputs: int = 0) -> Weight:
        return Weight((*at, *name.split(".")), shape, axes, f"model.layers.{{}}.{name}.weight", outputs, layers)

    yield weight("input_layernorm", (D,), ("embed",))
    yield weight("self_attn.q_proj", (D, N, H), ("embed", "heads", "head_dim"), 2)
    yield weight("self_attn.k_proj", (D, K, H), ("embed", "kv_heads", "head_dim"), 2)
    yield weight("self_attn.v_proj", (D, K, H), ("embed", "kv_heads", "head_dim"), 2)
    yield weight("self_attn.o_proj", (N, H, D), ("heads", "head_dim", "embed"), 1)
    if config.qk_norm:
        yield weight("self_attn.q_norm", (H,), ("head_dim",))
        yield weight("self_attn.k_norm", (H,), ("head_dim",))
    yield weight("post_attention_layernorm", (D,), ("embed",))
    yield weight("pre_feedforward_layernorm", (D,), ("embed",))
    yield weight("mlp.gate_proj", (D, F), ("embed", "mlp"), 1)
    yield weight("mlp.up_proj", (D, F), ("embed", "mlp"), 1)
    yield weight("mlp.down_proj", (F, D), ("mlp", "embed"), 1)
    yield weight("post_feedforward_layernorm", (D,), ("embed",))


def build(config: GemmaConfig, make: Callable[[Weight], Any]) -> Tree:
    """The tree with ``make(weight)`` at each leaf."""
    tree: Tree = {}
    for weight in weights(config):
        node = tree
        for name in weight.path[:-1]:
            node = node.setdefault(name, {})
        node[weight.path[-1]] = make(weight)
    return tree


def get(tree: Tree, path: Path) -> Any:
    """The leaf of ``tree`` at ``path``."""
    for name in path:
        tree = tree[name]
    return tree


def initialise(config: GemmaConfig, key: jax.Array, dtype: Any = jnp.float32) -> Tree:
    """Random weights: N(0, 1/fan_in), the embedding N(0, 1/width) so that logits start with variance near 1, norms 0.

    Each leaf has a key of its own from its path, so a leaf's numbers do not depend on the others.
    """

    def make(weight: Weight) -> jax.Array:
        if weight.path[-1].endswith("norm"):
            return jnp.zeros(weight.leaf_shape, dtype)
        fan_in = weight.hf_shape[1]
        own = jax.random.fold_in(key, zlib.crc32("/".join(weight.path).encode()))
        drawn: jax.Array = (jax.random.normal(own, weight.leaf_shape, jnp.float32) * fan_in**-0.5).astype(dtype)
        return drawn

    return build(config, make)


def shapes(config: GemmaConfig, dtype: Any = jnp.float32) -> Tree:
    """The tree of ``jax.ShapeDtypeStruct``, without memory for a single weight."""
    found: Tree = jax.eval_shape(lambda: initialise(config, jax.random.key(0), dtype))
    return found


def from_hf(config: GemmaConfig, read: Callable[[str], Any], dtype: Any = jnp.float32) -> Tree:
    """The tree from ``read(name)``, which gives a Hugging Face tensor as an array. For networks that fit one host."""

    def make(weight: Weight) -> jax.Array:
        parts = [weight.from_hf(np.asarray(read(name))) for name in weight.hf_names()]
        return jnp.asarray(np.stack(parts) if weight.layers else parts[0], dtype)

    return build(config, make)


def to_hf(config: GemmaConfig, tree: Tree) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """(name, tensor) for each Hugging Face tensor, one in memory at a time beside the tree."""
    for weight in weights(config):
        leaf = get(tree, weight.path)
        for place, name in enumerate(weight.hf_names()):
            yield name, np.ascontiguousarray(weight.to_hf(np.asarray(leaf[place] if weight.layers else leaf)))


def count(tree: Tree) -> int:
    """Number of parameters in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
