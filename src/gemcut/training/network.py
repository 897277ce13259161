"""Gemma's network for training, on one page: the same numbers as the torch network, with gradients.

Precision is the field's for training. Products take operands of the compute dtype (bfloat16) and sum in fp32; the
residual stream is kept in the compute dtype; norms, rotary angles, attention scores and soft caps are fp32 (float64
where the compute dtype is). Sharding comes from outside: ``constrain(array, axes)`` is told the name of each axis of an
activation (``batch``, ``length``, ``embed``, ``heads``, ``kv_heads``, ``head_dim``, ``mlp``, ``vocab``; None for one
that must be whole) and may answer with the same array under a sharding constraint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name as _checkpoint_name

from gemcut.config import FULL, GemmaConfig, LayerKind
from gemcut.errors import ParameterError
from gemcut.training.attention import Attend, AttentionShape, attention
from gemcut.training.parameters import Pattern, Tree

#: The name of each axis of an activation.
Axes = tuple[str | None, ...]
Constrain = Callable[[jax.Array, Axes], jax.Array]
#: Wraps a function of one device's (q, k, v, segments) so that it runs on every device's part.
PerDevice = Callable[[Attend], Attend]

_POLICIES = jax.checkpoint_policies
#: What the backward pass keeps of a layer; the rest is computed again. "none" keeps everything.
REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "dots": _POLICIES.dots_with_no_batch_dims_saveable,
    "names": _POLICIES.save_only_these_names("attention", "attention_out", "mlp_out"),
    "full": _POLICIES.nothing_saveable,
}
_RESIDUAL = ("batch", "length", "embed")


@dataclass(frozen=True)
class Network:
    """A network of ``config``; its weights are a tree of ``parameters.py``, of any dtype.

    ``attention`` names the kernel (``gemcut.training.attention``), ``remat`` what the backward pass keeps,
    ``lookup`` how token ids meet the table: ``take``, or ``onehot``, a product whose gradient stays split over the
    vocabulary. Raises ParameterError for a name that is none of these, or a kernel that cannot do this network.
    """

    config: GemmaConfig
    compute_dtype: Any = jnp.bfloat16
    attention: str = "xla"
    remat: str = "none"
    lookup: str = "take"
    constrain: Constrain | None = None
    per_device: PerDevice | None = None
    #: How many groups of devices share a batch; each adds up a table's gradient of its own.
    groups: int = 1

    def __post_init__(self) -> None:
        for name, known in (("remat", tuple(REMAT)), ("lookup", ("take", "onehot"))):
            if getattr(self, name) not in known:
                raise ParameterError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")
        for kind in set(self.config.layer_types):
            self._attend(kind)

    def hidden(self, tree: Tree, tokens: jax.Array, segments: jax.Array, positions: jax.Array) -> jax.Array:
        """(batch, length, width) after the last norm, in the compute dtype.

        ``tokens``, ``segments`` and ``positions`` are int32 (batch, length). A token sees earlier ones of its own
        segment in its own row; a segment must be contiguous. ``positions`` rotate, counting from 0 in each segment.
        """
        x = self._embed(tree["embed_tokens"], tokens)
        pattern = Pattern.of(self.config)
        rotations = {kind: self._rotation(kind, positions) for kind in set(self.config.layer_types)}

        def layers(kinds: tuple[LayerKind, ...], x: jax.Array, places: Tree) -> jax.Array:
            for place, kind in enumerate(kinds):
                x = self._remat(kind)(x, places[str(place)], rotations[kind], segments)
            return x

        x, _ = jax.lax.scan(lambda x, group: (layers(pattern.kinds, x, group), None), x, tree["layers"])
        if pattern.rest:
            x = layers(pattern.rest, x, jax.tree.map(lambda leaf: leaf[0], tree["rest"]))
        return self._to(self._norm(x, tree["norm"]), *_RESIDUAL)

    def logits(self, tree: Tree, hidden: jax.Array) -> jax.Array:
        """(…, vocabulary) in fp32, soft-capped: for samples and tests. Losses take ``hidden`` (see losses.py)."""
        table = tree["embed_tokens"].astype(self.compute_dtype)
        logits = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=self.wide)
        return soft_cap(logits, self.config.final_logit_softcapping)

    def _embed(self, table: jax.Array, tokens: jax.Array) -> jax.Array:
        # Whole over the data axis first: left to itself the partitioner moves tokens to the table's parts.
        table = table.astype(self.compute_dtype)
        table = _moved(self.constrain, ("vocab", None), None, table) if self.constrain else table
        if self.lookup == "take":
            x = jnp.take(table, tokens, axis=0)
        else:
            chosen = jax.nn.one_hot(tokens, self.config.vocab_size, dtype=self.compute_dtype)
            x = self._to(chosen, "batch", "length", "vocab") @ table
        return self._to(x * jnp.asarray(self.config.hidden_size**0.5, self.compute_dtype), *_RESIDUAL)

    def _layer(
        self, kind: LayerKind, x: jax.Array, w: Tree, rotation: tuple[jax.Array, jax.Array], segments: jax.Array
    ) -> jax.Array:
        h = self._whole(self._norm(x, w["input_layernorm"]))
        a = self._attention(kind, h, w["self_attn"], rotation, segments)
        x = self._to(x + self._norm(a, w["post_attention_layernorm"]), *_RESIDUAL)
        h = self._whole(self._norm(x, w["pre_feedforward_layernorm"]))
        m = self._mlp(h, w["mlp"])
        return self._to(x + self._norm(m, w["post_feedforward_layernorm"]), *_RESIDUAL)

    def _attention(
        self, kind: LayerKind, h: jax.Array, w: Tree, rotation: tuple[jax.Array, jax.Array], segments: jax.Array
    ) -> jax.Array:
        q, k, v = (self._product("btd,dnh->btnh", h, w[name]) for name in ("q_proj", "k_proj", "v_proj"))
        if self.config.qk_norm:
            q, k = self._norm(q, w["q_norm"]), self._norm(k, w["k_norm"])
        q = self._to(rotate(q, rotation, self.config.attention_scale), "batch", "length", "heads", "head_dim")
        k = self._to(rotate(k, rotation), "batch", "length", "kv_heads", "head_dim")
        v = self._to(v, "batch", "length", "kv_heads", "head_dim")
        a = _named(self._attend(kind)(q, k, v, segments), "attention")
        a = self._to(a, "batch", "length", "heads", "head_dim")
        out = self._to(self._product("btnh,nhd->btd", a, w["o_proj"]), *_RESIDUAL)
        return _named(out, "attention_out")

    def _mlp(self, h: jax.Array, w: Tree) -> jax.Array:
        gate = self._to(self._product("btd,df->btf", h, w["gate_proj"]), "batch", "length", "mlp")
        up = self._to(self._product("btd,df->btf", h, w["up_proj"]), "batch", "length", "mlp")
        wide = jax.nn.gelu(gate.astype(self.wide), approximate=True) * up.astype(self.wide)
        out = self._to(self._product("btf,fd->btd", wide.astype(self.compute_dtype), w["down_proj"]), *_RESIDUAL)
        return _named(out, "mlp_out")

    def _product(self, axes: str, x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.einsum(axes, x, weight.astype(self.compute_dtype))

    def _norm(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        y = x.astype(self.wide)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.config.rms_norm_eps)
        return (y * (1 + scale.astype(self.wide))).astype(self.compute_dtype)

    def _rotation(self, kind: LayerKind, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(cos, sin) of (batch, length, 1, head_dim / 2)."""
        full = kind == FULL
        theta = self.config.rope_theta if full else self.config.rope_local_theta
        half = self.config.head_dim // 2
        inverse = theta ** -(jnp.arange(half, dtype=self.wide) / half) / (
            self.config.rope_scaling_factor if full else 1
        )
        angle = positions[..., None, None].astype(self.wide) * inverse
        return jnp.cos(angle), jnp.sin(angle)

    def _attend(self, kind: LayerKind) -> Attend:
        config = self.config
        window = None if kind == FULL else config.sliding_window
        attend = attention(self.attention, AttentionShape(config.head_dim, window, config.attn_logit_softcapping))
        return self.per_device(attend) if self.per_device else attend

    def _remat(self, kind: LayerKind) -> Callable[..., jax.Array]:
        def layer(x: jax.Array, w: Tree, rotation: tuple[jax.Array, jax.Array], segments: jax.Array) -> jax.Array:
            return self._layer(kind, x, w, rotation, segments)

        policy = REMAT[self.remat]
        return layer if policy is None else jax.checkpoint(layer, policy=policy)

    def _whole(self, h: jax.Array) -> jax.Array:
        """``h`` with its whole length on each device: a block's input is gathered, not its weights."""
        return _moved(self.constrain, ("batch", None, "embed"), _RESIDUAL, h) if self.constrain else h

    def _to(self, x: jax.Array, *axes: str | None) -> jax.Array:
        return self.constrain(x, axes) if self.constrain else x

    @property
    def wide(self) -> Any:
        """The dtype of norms, angles, scores and logits: fp32, or float64 where the compute dtype is."""
        return jnp.promote_types(self.compute_dtype, jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _moved(constrain: Constrain, there: Axes, back: Axes | None, x: jax.Array) -> jax.Array:
    """``x`` held at ``there``, its gradient at ``back`` (None: where it is wanted). A plain constraint would hold the
    gradient at ``there``, too, and so sum it whole on every device."""
    return constrain(x, there)


def _moved_forward(constrain: Constrain, there: Axes, back: Axes | None, x: jax.Array) -> tuple[jax.Array, None]:
    return constrain(x, there), None


def _moved_backward(
    constrain: Constrain, there: Axes, back: Axes | None, kept: None, gradient: jax.Array
) -> tuple[jax.Array]:
    return (constrain(gradient, back) if back else gradient,)


_moved.defvjp(_moved_forward, _moved_backward)


def _named(x: jax.Array, name: str) -> jax.Array:
    """``x`` under a name that a remat policy can keep."""
    mark: Callable[[jax.Array, str], Any] = _checkpoint_name  # jax gives it no types
    named: jax.Array = mark(x, name)
    return named


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array], scale: float = 1.0) -> jax.Array:
    """Rotary embedding in fp32, times ``scale`` before one rounding to ``x.dtype``. (batch, length, heads, dim)"""
    cos, sin = rotation
    a, b = jnp.split(x.astype(cos.dtype), 2, -1)
    return (jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1) * scale).astype(x.dtype)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """``cap · tanh(x / cap)``; ``x`` where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)
