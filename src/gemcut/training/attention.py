"""Attention for training by name. A kernel that cannot do what a network asks says so; nothing falls back.

Every one computes: scores (queries come scaled), soft cap, mask, softmax, values. The mask is causal within a segment,
and a window counts the query: ``0 <= q - k < window``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from gemcut.errors import ParameterError

#: (q, k, v, segments) -> out; q (batch, length, heads, head_dim), k and v with kv heads, segments (batch, length).
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class AttentionShape:
    """What a layer asks: ``head_dim``, ``window`` (None: the whole row), ``cap`` on the scores (None: none)."""

    head_dim: int
    window: int | None
    cap: float | None


@dataclass(frozen=True)
class Implementation:
    """A kernel: ``unable(shape)`` says why it cannot do a shape here, None if it can; ``make(shape)`` gives it."""

    make: Callable[[AttentionShape], Attend]
    unable: Callable[[AttentionShape], str | None]


def attention(name: str, shape: AttentionShape) -> Attend:
    """The kernel ``name`` for ``shape``. Raises ParameterError for an unknown name or what the kernel cannot do."""
    found = REGISTRY.get(name)
    if found is None:
        raise ParameterError(f"attention is {name!r}; expected one of {', '.join(REGISTRY)}")
    reason = found.unable(shape)
    if reason:
        raise ParameterError(f"attention {name!r} cannot be used: {reason}; choose another, such as 'xla'")
    return found.make(shape)


def xla_attention(shape: AttentionShape) -> Attend:
    """Plain attention: scores of length × length are in memory, in fp32 (float64 if the operands are)."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        B, T, N, H = q.shape
        wide = jnp.promote_types(q.dtype, jnp.float32)
        grouped = q.reshape(B, T, k.shape[2], -1, H)
        scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=wide)
        if shape.cap is not None:
            scores = shape.cap * jnp.tanh(scores / shape.cap)
        back = jnp.arange(T)[:, None] - jnp.arange(T)[None]
        seen = (back >= 0) if shape.window is None else (back >= 0) & (back < shape.window)
        seen = seen & (segments[:, :, None] == segments[:, None])
        weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), -1).astype(v.dtype)
        return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(B, T, N, H)

    return attend


def splash_attention(shape: AttentionShape, *, interpret: bool = False) -> Attend:
    """JAX's Pallas kernel for TPUs: window, cap and segments in both passes, without a matrix of scores."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        T, heads = q.shape[1], q.shape[2]
        block = next((size for size in (512, 256, 128) if T % size == 0), None)
        if block is None:
            raise ParameterError(f"attention 'splash' takes lengths of whole blocks of 128; this one is {T}")
        if shape.window is None:
            mask: Any = masks.CausalMask((T, T))
        else:  # the first number counts the keys before the query
            mask = masks.LocalMask((T, T), (shape.window - 1, 0), 0)
        sizes = kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        )
        with jax.ensure_compile_time_eval():
            run = kernel.make_splash_mha(
                mask=masks.MultiHeadMask([mask] * heads),
                head_shards=1,
                q_seq_shards=1,
                attn_logits_soft_cap=shape.cap,
                block_sizes=sizes,
                interpret=interpret,
            )
        repeat = heads // k.shape[2]
        rows = [jnp.swapaxes(x, 1, 2) for x in (q, jnp.repeat(k, repeat, 2), jnp.repeat(v, repeat, 2))]
        out = jax.vmap(run)(*rows, kernel.SegmentIds(segments, segments))
        return jnp.swapaxes(out, 1, 2)

    return attend


def tokamax_attention(shape: AttentionShape) -> Attend:
    """tokamax's attention of the GPU at hand."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        import tokamax

        T = q.shape[1]
        window = None if shape.window is None else (min(shape.window, T) - 1, 0)
        same = segments[:, None, :, None] == segments[:, None, None]
        out: jax.Array = tokamax.dot_product_attention(
            q,
            k,
            v,
            mask=same,
            scale=1.0,
            is_causal=True,
            local_window_size=window,
            logits_soft_cap=shape.cap,
            implementation="mosaic" if jax.default_backend() == "gpu" else "xla_chunked",
        )
        return out

    return attend


def _splash_unable(shape: AttentionShape) -> str | None:
    # A program compiled ahead of time for TPUs is traced on another backend, so the backend decides nothing here.
    if shape.head_dim % 128:
        return f"it takes heads of whole 128 numbers, these have {shape.head_dim}"
    return None


def _tokamax_unable(shape: AttentionShape) -> str | None:
    if importlib.util.find_spec("tokamax") is None:
        return "tokamax is not installed (pip install tokamax; it needs Python 3.12 and jax 0.11.1 or newer)"
    return None


def _able(shape: AttentionShape) -> str | None:
    return None


#: Kernels by name.
REGISTRY: dict[str, Implementation] = {
    "xla": Implementation(xla_attention, _able),
    "splash": Implementation(splash_attention, _splash_unable),
    "tokamax": Implementation(tokamax_attention, _tokamax_unable),
}
