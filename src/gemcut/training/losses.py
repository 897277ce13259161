"""Losses, all through one head: a piece of the sequence at a time, so logits of a whole batch are never in memory.

``head_loss`` multiplies hidden states with the table, caps, asks a *score* for the loss of one piece, and computes the
gradients of hidden states and table there and then (in the forward pass: the logits are not made twice). Operands are
of the compute dtype, sums fp32; the gradient of a logit is rounded to the compute dtype before its two products.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gemcut.training.network import Network, soft_cap

Extras = dict[str, jax.Array]
#: (logits (batch, piece, vocabulary), extras of the piece, constants) -> (loss summed over the piece, other sums).
Score = Callable[[jax.Array, Extras, Extras], tuple[jax.Array, Extras]]


def head_loss(
    network: Network,
    score: Score,
    hidden: jax.Array,
    table: jax.Array,
    extras: Extras,
    constants: Extras | None = None,
    rows: int = 4096,
) -> tuple[jax.Array, Extras]:
    """The sum of ``score`` over all pieces, in fp32, and its other sums.

    ``hidden`` is (batch, length, width), ``table`` (vocabulary, width) of any dtype; each of ``extras`` is
    (batch, length, …) and cut alike. A piece has at most ``rows`` rows, but at least one position of each sequence.
    No gradient flows into extras and constants.
    """
    batch, length = hidden.shape[:2]
    size = max(n for n in range(1, length + 1) if length % n == 0 and (n == 1 or n * batch <= rows))
    found: tuple[jax.Array, Extras] = _head(score, network, size, hidden, table, extras, constants or {})
    return found


def _cut(size: int, x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _logits(network: Network, hidden: jax.Array, table: jax.Array) -> jax.Array:
    raw = jnp.einsum("bcd,vd->bcv", hidden, table, preferred_element_type=network.wide)
    return network.constrain(raw, ("batch", None, "vocab")) if network.constrain else raw


def _prepare(network: Network, hidden: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array]:
    table = table.astype(network.compute_dtype)
    if network.constrain:  # the residual may be split along the length, which pieces cut
        hidden = network.constrain(hidden, ("batch", None, None))
        table = network.constrain(table, ("vocab", None))
    return hidden, table


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _head(
    score: Score, network: Network, size: int, hidden: jax.Array, table: jax.Array, extras: Extras, constants: Extras
) -> tuple[jax.Array, Extras]:
    hidden, table = _prepare(network, hidden, table)

    def piece(part: tuple[jax.Array, Extras]) -> tuple[jax.Array, Extras]:
        capped = soft_cap(_logits(network, part[0], table), network.config.final_logit_softcapping)
        return score(capped, part[1], constants)

    sums = jax.lax.map(piece, jax.tree.map(partial(_cut, size), (hidden, extras)))
    found: tuple[jax.Array, Extras] = jax.tree.map(lambda x: x.sum(0), sums)
    return found


def _forward(
    score: Score, network: Network, size: int, hidden: jax.Array, table: jax.Array, extras: Extras, constants: Extras
) -> tuple[tuple[jax.Array, Extras], tuple[jax.Array, jax.Array]]:
    given = table.dtype
    hidden, table = _prepare(network, hidden, table)
    # Each group of devices adds up its own table gradient; all of them are summed once, not once a piece.
    groups = network.groups if size < hidden.shape[1] else 1
    cap = network.config.final_logit_softcapping

    def apiece(total: jax.Array) -> jax.Array:
        return network.constrain(total, ("batch", "vocab", None)) if network.constrain and groups > 1 else total

    def piece(total: jax.Array, part: tuple[jax.Array, Extras]) -> tuple[jax.Array, Any]:
        h, extra = part
        loss, pull, others = jax.vjp(
            lambda raw: score(soft_cap(raw, cap), extra, constants), _logits(network, h, table), has_aux=True
        )
        slope = pull(jnp.ones_like(loss))[0].astype(network.compute_dtype)
        dh = jnp.einsum("bcv,vd->bcd", slope, table, preferred_element_type=network.wide).astype(h.dtype)
        apart = [x.reshape(groups, -1, *x.shape[1:]) for x in (slope, h)]
        total = total + jnp.einsum("gbcv,gbcd->gvd", *apart, preferred_element_type=network.wide)
        return apiece(total), (loss, others, dh)

    start = apiece(jnp.zeros((groups, *table.shape), network.wide))
    total, (losses, others, dh) = jax.lax.scan(piece, start, jax.tree.map(partial(_cut, size), (hidden, extras)))
    total = total.sum(0)
    dh = jnp.moveaxis(dh, 0, 1).reshape(hidden.shape)
    return (losses.sum(0), jax.tree.map(lambda x: x.sum(0), others)), (dh, total.astype(given))


def _backward(score: Score, network: Network, size: int, kept: Any, pull: Any) -> tuple[Any, Any, None, None]:
    dh, dtable = kept
    scale = pull[0]
    return (dh * scale).astype(dh.dtype), (dtable * scale).astype(dtable.dtype), None, None


_head.defvjp(_forward, _backward)


def targets(batch: Extras) -> Extras:
    """``targets`` and ``weights`` of (batch, length) for the next token of the same document.

    The last token of a document predicts nothing, nor does padding (segment 0). Where the batch has an ``answer`` mask,
    only tokens inside it are learned.
    """
    tokens, segments = batch["tokens"], batch["segments"]
    following = jnp.roll(segments, -1, 1).at[:, -1].set(0)
    wanted = (segments == following) & (segments > 0)
    if "answer" in batch:
        wanted &= jnp.roll(batch["answer"], -1, 1) != 0
    return {"targets": jnp.roll(tokens, -1, 1), "weights": wanted.astype(jnp.float32)}


def next_token(z_loss: float = 0.0) -> Score:
    """Cross-entropy with ``targets`` in nats, and ``z_loss`` times the squared log of the softmax's sum."""

    def score(logits: jax.Array, extras: Extras, constants: Extras) -> tuple[jax.Array, Extras]:
        total = jax.nn.logsumexp(logits, -1)
        nll = ((total - _chosen(logits, extras["targets"])) * extras["weights"]).sum()
        loss = nll + z_loss * (total * total * extras["weights"]).sum() if z_loss else nll
        return loss, {"nll": nll}

    return score


def distil(cap: float | None, temperature: float = 1.0, share: float = 1.0) -> Score:
    """``share`` · τ² · KL(teacher ‖ student) at temperature τ, and the rest cross-entropy with the targets.

    Extras hold ``teacher``, the teacher's hidden states; constants ``teacher_table``; ``cap`` is the teacher's.
    """

    def score(logits: jax.Array, extras: Extras, constants: Extras) -> tuple[jax.Array, Extras]:
        table = constants["teacher_table"]
        wide = logits.dtype
        theirs = jnp.einsum("bcd,vd->bcv", extras["teacher"], table, preferred_element_type=wide)
        theirs = jax.nn.log_softmax(soft_cap(theirs, cap) / temperature)
        ours = jax.nn.log_softmax(logits / temperature)
        divergence = ((jnp.exp(theirs) * (theirs - ours)).sum(-1) * extras["weights"]).sum() * temperature**2
        nll = ((jax.nn.logsumexp(logits, -1) - _chosen(logits, extras["targets"])) * extras["weights"]).sum()
        return share * divergence + (1 - share) * nll, {"nll": nll, "divergence": divergence}

    return score


def distil_stored(share: float = 1.0) -> Score:
    """``share`` · cross-entropy with stored teacher probabilities, and the rest cross-entropy with the targets.

    Extras hold ``top_ids`` and ``top_probabilities`` of (batch, length, k); all other words count as one, which has the
    probability that the k leave.
    """

    def score(logits: jax.Array, extras: Extras, constants: Extras) -> tuple[jax.Array, Extras]:
        ids, given = extras["top_ids"], extras["top_probabilities"].astype(logits.dtype)
        total = jax.nn.logsumexp(logits, -1)
        top = jnp.take_along_axis(logits, ids, -1) - total[..., None]
        likely = (given * top).sum(-1)
        if ids.shape[-1] < logits.shape[-1]:  # else no word is left
            without = jnp.put_along_axis(logits, ids, -jnp.inf, -1, inplace=False)
            rest = jax.nn.logsumexp(without, -1) - total
            likely += jnp.maximum(0, 1 - given.sum(-1)) * rest
        cross = -(likely * extras["weights"]).sum()
        nll = ((total - _chosen(logits, extras["targets"])) * extras["weights"]).sum()
        return share * cross + (1 - share) * nll, {"nll": nll, "cross": cross}

    return score


def _chosen(logits: jax.Array, ids: jax.Array) -> jax.Array:
    # A masked sum stays split over the vocabulary, where a gather would move the logits.
    hit = jnp.arange(logits.shape[-1]) == ids[..., None]
    return jnp.where(hit, logits, 0).sum(-1)
