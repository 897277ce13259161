"""Who holds what: a mesh of replica × data × model, and a named sharding for every array of a step.

``model`` splits heads, the MLP and the vocabulary (tensor parallelism); ``data`` splits the width of weights, moments
and gradients (ZeRO); ``replica`` holds copies that only average gradients, and is what goes between slices. Batches are
split over replica and data. Between layers the residual stream is split over ``model`` along the length.

A width split into few columns a chip defeats XLA's reduce-scatter: at 27B, data of 16 or 32 keeps it for every layer
weight, 768 loses it. Hence three axes instead of two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemcut.config import GemmaConfig
from gemcut.errors import ParameterError
from gemcut.training.attention import Attend
from gemcut.training.parameters import Tree, Weight, build
from gemcut.training.topology import AXES

BATCH = ("replica", "data")
#: Which mesh axis splits a weight's axis. Norms, which have only the width, stay whole: they are small.
_WEIGHTS = {"vocab": "model", "embed": "data", "heads": "model", "kv_heads": "model", "mlp": "model"}
_ACTIVATIONS = {"batch": BATCH, "heads": "model", "kv_heads": "model", "mlp": "model", "vocab": "model"}


@dataclass(frozen=True)
class Shardings:
    """The shardings of one network on one mesh. ``split_length`` splits the residual stream's length over model.

    Raises ParameterError where the mesh does not divide the network.
    """

    config: GemmaConfig
    mesh: Mesh
    split_length: bool = True

    def __post_init__(self) -> None:
        if self.mesh.axis_names != AXES:
            raise ParameterError(f"the mesh has the axes {', '.join(self.mesh.axis_names)}; expected {', '.join(AXES)}")
        check_network(self.config, dict(self.mesh.shape))

    def weight(self, weight: Weight) -> NamedSharding:
        """Of one leaf; its moments, master weights and gradient lie the same way."""
        return NamedSharding(self.mesh, weight_spec(weight))

    def weights(self) -> Tree:
        """The tree of ``parameters.build`` with a sharding at each leaf."""
        return build(self.config, self.weight)

    @property
    def whole(self) -> NamedSharding:
        """Everything on every chip: counters, losses."""
        return NamedSharding(self.mesh, P())

    @property
    def batch(self) -> NamedSharding:
        """Of (batch, length)."""
        return NamedSharding(self.mesh, P(BATCH, None))

    def like(self, tree: Any) -> Any:
        """Shardings for an optimizer's state (or any tree): a leaf that stands for a weight lies as that weight does.

        A leaf stands for a weight where its path ends with the weight's path and its shape is the weight's; all others
        must be scalars or small, and are whole on every chip. Left to itself, jax puts fresh moments on one device.
        """
        leaves: dict[tuple[str, ...], Weight] = {}
        build(self.config, lambda weight: leaves.setdefault(weight.path, weight))

        def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
            names = tuple(_name(key) for key in path)
            for start in range(len(names)):
                weight = leaves.get(names[start:])
                if weight is not None and tuple(leaf.shape) == weight.leaf_shape:
                    return self.weight(weight)
            return self.whole

        return jax.tree_util.tree_map_with_path(place, tree)

    def hold(self, tree: Tree) -> Tree:
        """``Step``'s hook: the weights, held where they lie. The gradients of what it gives are held there, too: left
        alone, XLA may sum a whole gradient on every chip where a part would do."""
        held: Tree = jax.tree.map(jax.lax.with_sharding_constraint, tree, self.weights())
        return held

    def constrain(self, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        """``Network``'s hook: the same activation, held where its axes say."""
        spec: list[Any] = [_ACTIVATIONS.get(axis) if axis else None for axis in axes]
        # An axis can be split once: the length takes what heads, MLP or vocabulary leave.
        if self.split_length and "model" not in spec and "length" in axes and "embed" in axes:
            place = axes.index("length")
            if x.shape[place] % self.mesh.shape["model"] == 0:
                spec[place] = "model"
        held: jax.Array = jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(*spec)))
        return held

    def per_device(self, attend: Attend) -> Attend:
        """``Network``'s hook for kernels: each chip attends with its own heads and sequences."""
        if self.mesh.size == 1:
            return attend
        heads = P(BATCH, None, "model", None)
        wrap: Callable[..., Any] = partial(
            jax.shard_map, mesh=self.mesh, in_specs=(heads, heads, heads, P(BATCH, None)), out_specs=heads
        )
        found: Attend = wrap(attend, check_vma=False)
        return found

    @property
    def groups(self) -> int:
        """How many groups of devices share a batch."""
        return int(self.mesh.shape["replica"] * self.mesh.shape["data"])

    @property
    def lookup(self) -> str:
        """How ids meet the table: a one-hot product keeps its gradient split where the vocabulary is split."""
        return "onehot" if self.mesh.shape["model"] > 1 else "take"


def weight_spec(weight: Weight) -> P:
    """The mesh axes that split a leaf."""
    if len(weight.axes) == 1:
        return P()
    return P(*(_WEIGHTS.get(axis) for axis in weight.leaf_axes))


def check_network(config: GemmaConfig, mesh: Mapping[str, int]) -> None:
    """Raise ParameterError where a mesh does not divide a network."""
    data, model = mesh["data"], mesh["model"]
    sizes = {
        "num_attention_heads": (config.num_attention_heads, model, "model"),
        "num_key_value_heads": (config.num_key_value_heads, model, "model"),
        "intermediate_size": (config.intermediate_size, model, "model"),
        "vocab_size": (config.vocab_size, model, "model"),
        "hidden_size": (config.hidden_size, data, "data"),
    }
    for name, (size, parts, axis) in sizes.items():
        if size % parts:
            fits = [n for n in range(1, parts) if size % n == 0][-3:]
            raise ParameterError(
                f"{name} {size:,} cannot be split {parts} ways; choose another {axis}, such as {_or(fits)}, and give "
                "the other chips to replica"
            )


def check_batch(batch: int, mesh: Mapping[str, int]) -> None:
    """Raise ParameterError where sequences of a step cannot be shared by a mesh."""
    groups = mesh["replica"] * mesh["data"]
    if batch < 1 or batch % groups:
        raise ParameterError(
            f"a batch of {batch:,} sequences cannot be shared by {groups:,} groups of chips (replica × data); choose a "
            f"multiple of {groups:,}"
        )


def host_mesh(shape: tuple[int, int, int] | None = None) -> Mesh:
    """The mesh of the devices that are here; by default all of them along data. Raises ParameterError."""
    from jax.experimental import mesh_utils
    from jax.sharding import AxisType

    from gemcut.training.topology import check_mesh

    devices = jax.devices()
    shape = shape or (1, len(devices), 1)
    check_mesh(shape, len(devices))
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def _name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def _or(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))
