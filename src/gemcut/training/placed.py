"""A step on a mesh: one device and a whole pod are one code path, and so are running and compiling for absent chips."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gemcut.training.losses import Extras
from gemcut.training.parameters import Tree
from gemcut.training.sharding import BATCH, Shardings
from gemcut.training.step import Step


class PlacedStep:
    """``step`` with its state, batches and results where ``shardings`` puts them."""

    def __init__(self, step: Step, shardings: Shardings) -> None:
        self.step, self.shardings = step, shardings

    @cached_property
    def state(self) -> Tree:
        """Shape, dtype and sharding of each array of a run's state: what a checkpoint is restored into."""
        shapes = jax.eval_shape(self.step.fresh, jax.random.key(0))
        return placed(shapes, self.shardings.like(shapes))

    @cached_property
    def keep(self) -> Tree:
        """The sharding of each array of the state. Left to itself, jax puts fresh moments on one device."""
        found: Tree = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        return found

    @property
    def rows(self) -> NamedSharding:
        """Of a batch's arrays, which are (micro-batches, batch, length)."""
        return NamedSharding(self.shardings.mesh, P(None, BATCH, None))

    @cached_property
    def run(self) -> Callable[..., tuple[Tree, Extras]]:
        """(state, batch, teacher's weights) -> (new state, metrics), jitted. The old state's memory is the new one's:
        what was given as ``state`` is gone."""
        return jax.jit(self.step, donate_argnums=0, out_shardings=(self.keep, self.shardings.whole))

    def fresh(self, seed: int) -> Tree:
        """The state of random weights, made where it lies."""
        made: Tree = jax.jit(self.step.fresh, out_shardings=self.keep)(jax.random.key(seed))
        return made

    def begin(self, weights: Tree) -> Tree:
        """The state of a run that begins with ``weights``, which lie anywhere."""
        made: Tree = jax.jit(self.step.state, out_shardings=self.keep)(weights)
        return made

    def lower(self, batch: dict[str, Any], teacher: Tree | None = None) -> Any:
        """The step traced for arrays (or shapes with shardings) and ready to compile, with no state in memory."""
        run: Any = self.run
        return run.lower(self.state, batch, teacher)


def placed(shapes: Tree, shardings: Tree) -> Tree:
    """``shapes`` with a sharding on each leaf."""
    made: Tree = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings
    )
    return made
