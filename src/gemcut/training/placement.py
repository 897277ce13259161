"""Where a run's state and batches lie: one code path for one device, a host's devices, and a pod."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gemcut.config import GemmaConfig
from gemcut.errors import ParameterError
from gemcut.training.driver import Driver
from gemcut.training.fit_step import sharded_network
from gemcut.training.network import Network
from gemcut.training.parameters import Tree
from gemcut.training.placed import PlacedStep
from gemcut.training.placing import place
from gemcut.training.sharding import BATCH, Shardings, check_batch, host_mesh
from gemcut.training.step import Step
from gemcut.training.topology import AXES

_spec: Callable[..., PartitionSpec] = PartitionSpec  # jax gives it no types


class Placement:
    """The devices of a run. ``shape`` is (replica, data, model); empty: all devices along data.

    Raises ParameterError where devices, network or ``batch`` cannot be shared so.
    """

    def __init__(self, config: GemmaConfig, shape: tuple[int, ...], batch: int, driver: Driver) -> None:
        self.mesh: Mesh = _mesh(shape, driver)
        self.driver = driver
        check_batch(batch, dict(self.mesh.shape))
        driver.rows(batch)
        self.own = Shardings(config, self.mesh)

    @property
    def groups(self) -> int:
        """How many parts a batch has."""
        return int(self.mesh.shape["replica"] * self.mesh.shape["data"])

    def __str__(self) -> str:
        kind = jax.devices()[0].device_kind
        if self.mesh.size == 1:
            return f"1 device ({kind})"
        sizes = " × ".join(f"{name} {size}" for name, size in self.mesh.shape.items())
        return f"{self.mesh.size} devices ({kind}): {sizes}"

    def network(self, config: GemmaConfig, dtype: Any, attention: str, remat: str) -> Network:
        """The network of ``config``, which may be a teacher's, with every activation where it belongs."""
        if self.mesh.size == 1:
            return Network(config, dtype, attention=attention, remat=remat)
        network = sharded_network(config, Shardings(config, self.mesh), attention, remat)
        return dataclasses.replace(network, compute_dtype=dtype)

    def hold(self) -> Callable[[Tree], Tree] | None:
        """`Step.hold` of a run."""
        return None if self.mesh.size == 1 else self.own.hold

    def step(self, step: Step) -> PlacedStep:
        """``step`` where this run has its devices."""
        return PlacedStep(step, self.own)

    def weights(self, config: GemmaConfig, read: Callable[[str], Any], dtype: Any) -> Tree:
        """A folder's weights where they lie, a teacher's too. Raises ParameterError where the mesh divides it not."""
        return place(config, read, Shardings(config, self.mesh).weights(), dtype)

    def batch(self, rows: Mapping[str, np.ndarray[Any, Any]], micro: int = 0) -> dict[str, jax.Array]:
        """This process's rows on the devices: (batch, …), or with ``micro`` (micro, batch, …)."""
        out = {}
        for name, array in rows.items():
            if micro:
                array = array.reshape(micro, -1, *array.shape[1:])
            spec = _spec(None, BATCH) if micro else _spec(BATCH)
            out[name] = self.driver.put(np.ascontiguousarray(array), NamedSharding(self.mesh, spec))
        return out

    def agreed(self, flag: bool) -> bool:
        """Whether any process says so. Every process must ask."""
        if self.driver.processes == 1:
            return flag
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))

    def least(self, number: int | None) -> int | None:
        """The smallest of all processes' numbers; None where one has none. Every process must ask."""
        if self.driver.processes == 1:
            return number
        from jax.experimental import multihost_utils

        # In MiB: jax keeps 32 bits of an integer unless it is told otherwise.
        each = multihost_utils.process_allgather(np.asarray(-1 if number is None else number >> 20, np.int32))
        return None if np.min(each) < 0 else int(np.min(each)) << 20


def _mesh(shape: tuple[int, ...], driver: Driver) -> Mesh:
    """The mesh of a run: of all devices, or on one host of the first of them where ``shape`` takes fewer."""
    wanted = (shape[0], shape[1], shape[2]) if shape else None
    devices = jax.devices()
    if wanted is None or driver.processes > 1 or math.prod(wanted) >= len(devices):
        return host_mesh(wanted)
    return Mesh(np.array(devices[: math.prod(wanted)]).reshape(wanted), AXES, axis_types=(AxisType.Auto,) * 3)


def device_bytes() -> int | None:
    """What one device can hold: its own limit, or this machine's free memory for a CPU. None where nothing says."""
    import os

    device = jax.local_devices()[0]  # the others' memory is not told
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return None


def choose_remat(name: str, compiled_bytes: Callable[[str], int], limit: int | None) -> str:
    """``name``; for "auto" the policy that computes least again and fits. ``compiled_bytes`` compiles a step.

    Raises ParameterError where none fits.
    """
    if name != "auto":
        return name
    if limit is None:
        raise ParameterError('remat is "auto", but this device does not say its memory; name none, names, dots or full')
    needed = 0
    for policy in ("none", "dots", "names", "full"):
        needed = compiled_bytes(policy)
        if needed <= limit:
            return policy
    raise ParameterError(
        f"a step needs {needed / 2**30:.1f} GiB a device even with remat full, and {limit / 2**30:.1f} are there; "
        "lower batch and raise micro_batches, lower length, or use more devices"
    )
