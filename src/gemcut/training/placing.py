"""From a checkpoint folder straight onto a mesh, and from a mesh into a folder, with no whole network on any host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from gemcut.config import GemmaConfig
from gemcut.training.importing import Array
from gemcut.training.parameters import Tree, Weight, build, get, weights

Index = tuple[tuple[int, int], ...]


def place(config: GemmaConfig, read: Callable[[str], Array], shardings: Tree, dtype: Any = np.float32) -> Tree:
    """The tree on its devices from ``read(name)``, which gives one Hugging Face tensor (``HuggingFaceFolder.read``).

    ``shardings`` has a Sharding at each leaf. A process reads every tensor and keeps what its own devices hold: at most
    one tensor and one leaf's local parts are in its memory beside the arrays. Raises what ``read`` raises.
    """
    return build(config, lambda weight: _leaf(weight, read, get(shardings, weight.path), np.dtype(dtype)))


def gathered(config: GemmaConfig, tree: Tree) -> Iterator[tuple[str, Array]]:
    """(Hugging Face name, tensor) of a tree on a mesh, one tensor in host memory at a time.

    With many processes every one of them must go through all of it: each tensor is gathered by a collective.
    """
    for weight in weights(config):
        leaf = get(tree, weight.path)
        for i, name in enumerate(weight.hf_names()):
            one = leaf[i] if weight.layers else leaf
            yield name, np.ascontiguousarray(weight.to_hf(_on_host(one)))


def _on_host(array: Any) -> Array:
    if getattr(array, "is_fully_addressable", True):
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _leaf(weight: Weight, read: Callable[[str], Array], sharding: Sharding, dtype: np.dtype[Any]) -> jax.Array:
    shape = weight.leaf_shape
    where = {device: _bounds(index, shape) for device, index in sharding.addressable_devices_indices_map(shape).items()}
    # Devices that hold the same part share it here.
    parts = {bounds: np.empty([stop - start for start, stop in bounds], dtype) for bounds in set(where.values())}
    for layer, name in enumerate(weight.hf_names()):
        if weight.layers and not any(bounds[0][0] <= layer < bounds[0][1] for bounds in parts):
            continue
        one = weight.from_hf(read(name))
        for bounds, part in parts.items():
            if not weight.layers:
                part[...] = one[_slices(bounds)]
            elif bounds[0][0] <= layer < bounds[0][1]:
                part[layer - bounds[0][0]] = one[_slices(bounds[1:])]
        del one  # before the next one is read
    arrays = [jax.device_put(parts[bounds], device) for device, bounds in where.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _bounds(index: Any, shape: tuple[int, ...]) -> Index:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _slices(bounds: Index) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in bounds)
