"""One step: losses of all micro-batches, one update. A loss that is not finite changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gemcut.errors import DataError
from gemcut.training.losses import Extras, Score, head_loss, next_token, targets
from gemcut.training.network import Network
from gemcut.training.optimizer import OptimizerConfig, learning_rate, optimizer
from gemcut.training.parameters import Tree, initialise


@dataclass(frozen=True)
class Step:
    """What a step does: ``network`` learns by ``score``; with ``teacher`` its weights come in as the step's second.

    ``steps`` is the length of the whole run, which the schedule needs; ``rows`` the most rows of logits in memory.
    """

    network: Network
    optimizer: OptimizerConfig
    steps: int
    score: Score | None = None
    teacher: Network | None = None
    rows: int = 4096
    #: Holds weights where they lie; what holds a weight holds its gradient, so that sums over chips are scattered.
    hold: Callable[[Tree], Tree] | None = None

    def state(self, tree: Tree) -> Tree:
        """The state of a run that begins with the weights ``tree``: step number, fp32 weights, optimizer state."""
        tree = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
        return {"step": jnp.zeros((), jnp.int32), "weights": tree, "optimizer": self._transform.init(tree)}

    def fresh(self, key: jax.Array) -> Tree:
        """``state`` of random weights. Traceable: give it to ``jax.jit`` with ``out_shardings``, or to eval_shape."""
        return self.state(initialise(self.network.config, key))

    @property
    def _transform(self) -> optax.GradientTransformation:
        return optimizer(self.optimizer, self.steps)

    def loss(self, tree: Tree, batch: Extras, teacher: Tree | None = None) -> tuple[jax.Array, Extras]:
        """(loss summed over tokens, sums: ``tokens``, ``nll``, …) of one batch of (batch, length) arrays."""
        network = self.network
        tree = _working_copy(network, tree)
        if self.hold is not None:
            tree = self.hold(tree)
        hidden = network.hidden(tree, batch["tokens"], batch["segments"], batch["positions"])
        extras, constants = targets(batch), {}
        for name in ("top_ids", "top_probabilities"):
            if name in batch:
                extras[name] = batch[name]
        if self.teacher is not None and teacher is not None:
            seen = self.teacher.hidden(teacher, batch["tokens"], batch["segments"], batch["positions"])
            extras["teacher"] = jax.lax.stop_gradient(seen)
            constants["teacher_table"] = teacher["embed_tokens"].astype(self.teacher.compute_dtype)
        score = self.score or next_token()
        total, sums = head_loss(network, score, hidden, tree["embed_tokens"], extras, constants, self.rows)
        return total, {"tokens": extras["weights"].sum(), **sums}

    def __call__(self, state: Tree, batch: Extras, teacher: Tree | None = None) -> tuple[Tree, Extras]:
        """(new state, metrics). ``batch`` arrays are (micro-batches, batch, length); gradients of all are one update.

        Metrics are fp32 scalars: ``loss`` and other means over learned tokens, ``tokens``, ``gradient_norm``, ``rate``,
        and ``finite``, which is 0 where loss or gradient was not; the state is then the old one.
        """
        weights = state["weights"]

        def micro(total: Any, part: Extras) -> tuple[Any, None]:
            (loss, sums), gradient = jax.value_and_grad(self.loss, has_aux=True)(weights, part, teacher)
            return jax.tree.map(jnp.add, total, ({"loss": loss, **sums}, gradient)), None

        first, rest = jax.tree.map(lambda x: x[0], batch), jax.tree.map(lambda x: x[1:], batch)
        (loss, sums), gradient = jax.value_and_grad(self.loss, has_aux=True)(weights, first, teacher)
        total = ({"loss": loss, **sums}, gradient)
        if batch["tokens"].shape[0] > 1:
            total, _ = jax.lax.scan(micro, total, rest)
        sums, gradient = total
        tokens = jnp.maximum(sums.pop("tokens"), 1)
        gradient = jax.tree.map(lambda g: g / tokens, gradient)
        norm = optax.global_norm(gradient)
        metrics = {name: value / tokens for name, value in sums.items()}
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        updates, inner = self._transform.update(gradient, state["optimizer"], weights)
        new = {"step": state["step"] + 1, "weights": optax.apply_updates(weights, updates), "optimizer": inner}
        rate = learning_rate(self.optimizer, self.steps)(state["step"])
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        more = {"tokens": tokens, "gradient_norm": norm, "rate": rate, "finite": finite}
        return new, {name: jnp.asarray(value, jnp.float32) for name, value in {**metrics, **more}.items()}


def check_finite(step: int, metrics: Extras, documents: Callable[[], list[str]]) -> None:
    """Raise DataError where a step found no finite loss; ``documents`` gives the names of the batch's documents."""
    if not metrics["finite"]:
        ids = documents()
        shown = ", ".join(ids[:20]) + (f" and {len(ids) - 20} more" if len(ids) > 20 else "")
        raise DataError(
            f"step {step}: the loss is {float(metrics['loss'])}, its gradient's norm "
            f"{float(metrics['gradient_norm'])}; "
            f"nothing was updated; look at documents {shown}, or lower the learning rate"
        )


def _working_copy(network: Network, tree: Tree) -> Tree:
    """Matrices in the compute dtype, once a step. Norms stay fp32, and the table, whose gradient sums two products."""

    def convert(path: Any, leaf: jax.Array) -> jax.Array:
        name = str(path[-1].key)
        return leaf if name.endswith("norm") or name == "embed_tokens" else leaf.astype(network.compute_dtype)

    found: Tree = jax.tree_util.tree_map_with_path(convert, tree)
    return found
