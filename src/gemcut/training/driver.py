"""How a run is driven: one host, many controllers, or one process that sees a whole pod (Pathways).

The step, the mesh and the shardings are the same in all three. What differs is here: how jax is started, how a batch
reaches the chips, and who prints. Saving is orbax's in each; with Pathways orbax is told so by pathwaysutils.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemcut.errors import ParameterError
from gemcut.files import shown

if TYPE_CHECKING:
    import jax
    import numpy as np
    from jax.sharding import Sharding

HOST, CONTROLLERS, PATHWAYS = "host", "controllers", "pathways"
DRIVERS = ("auto", HOST, CONTROLLERS, PATHWAYS)


@dataclass(frozen=True)
class Driver:
    """A started run's driver: ``kind``, the number of this process and how many there are."""

    kind: str
    process: int = 0
    processes: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process prints, draws samples and writes metrics. Every process takes part in saving."""
        return self.process == 0

    def rows(self, batch: int) -> slice:
        """The rows of a global batch that this process reads. Raises ParameterError where it cannot be shared."""
        if batch % self.processes:
            raise ParameterError(
                f"a batch of {batch} sequences cannot be shared by {self.processes} processes; choose a multiple"
            )
        each = batch // self.processes
        return slice(self.process * each, (self.process + 1) * each)

    def put(self, rows: np.ndarray[Any, Any], sharding: Sharding) -> jax.Array:
        """A batch on the chips, from this process's rows (all of them unless there are many controllers)."""
        import jax

        if self.processes == 1:
            placed: jax.Array = jax.device_put(rows, sharding)
            return placed
        make: Any = jax.make_array_from_process_local_data
        joined: jax.Array = make(sharding, rows)
        return joined


def chosen(name: str, environment: Mapping[str, str] = os.environ) -> str:
    """The driver that ``name`` means. "auto" is Pathways where JAX_PLATFORMS names its proxy, many controllers where
    GEMCUT_COORDINATOR or a Slurm step of several tasks says so, else one host. Raises ParameterError."""
    if name not in DRIVERS:
        raise ParameterError(f"driver is {shown(name)}; expected one of {', '.join(DRIVERS)}")
    if name != "auto":
        return name
    if "proxy" in environment.get("JAX_PLATFORMS", "").split(","):
        return PATHWAYS
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    if "SLURM_PROCID" in environment and tasks.isdigit() and int(tasks) > 1:
        return CONTROLLERS
    return CONTROLLERS if environment.get("GEMCUT_COORDINATOR") else HOST


def start(name: str = "auto") -> Driver:
    """Start jax for a run; call before anything asks jax for devices.

    Many controllers find each other by themselves on TPUs and under Slurm; elsewhere GEMCUT_COORDINATOR
    (HOST:PORT), GEMCUT_PROCESSES and GEMCUT_PROCESS say where and who. Raises ParameterError.
    """
    kind = chosen(name)
    if kind == PATHWAYS:
        return _pathways()
    if kind == CONTROLLERS:
        return _controllers()
    _pass_over_libtpu()
    return Driver(HOST)


def _pass_over_libtpu() -> None:
    """Where libtpu is installed for `gemcut train fit` and no TPU is here, keep jax from looking for one, at length."""
    tpus = [path for name in ("accel*", "vfio/[0-9]*") for path in Path("/dev").glob(name)]
    if "JAX_PLATFORMS" in os.environ or tpus or importlib.util.find_spec("libtpu") is None:
        return
    import jax

    gpus = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    settings: Any = jax.config
    if settings.jax_platforms is None:
        settings.update("jax_platforms", "cuda,cpu" if gpus else "cpu")


def wait_for_all(driver: Driver, name: str) -> None:
    """Wait until every process of a run is at ``name``."""
    if driver.processes > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def _controllers() -> Driver:
    import jax

    settings: Any = jax.config
    if settings.jax_platforms == "cpu":  # CPUs of several processes sum over gloo
        settings.update("jax_cpu_collectives_implementation", "gloo")
    address = os.environ.get("GEMCUT_COORDINATOR")
    try:
        if address:
            jax.distributed.initialize(address, _number("GEMCUT_PROCESSES", 1), _number("GEMCUT_PROCESS", 0))
        else:
            jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise ParameterError(
            f"the processes of the run did not find each other ({str(error).splitlines()[0][:160]}); outside Slurm and "
            "TPU pods set GEMCUT_COORDINATOR=HOST:PORT, GEMCUT_PROCESSES and GEMCUT_PROCESS"
        ) from None
    return Driver(CONTROLLERS, jax.process_index(), jax.process_count())


def _number(name: str, least: int) -> int:
    text = os.environ.get(name, "")
    if not text.isdigit() or int(text) < least:
        raise ParameterError(f"{name} is {shown(text)}; expected a whole number from {least} on")
    return int(text)


def _pathways() -> Driver:
    for name, example in (("JAX_PLATFORMS", "proxy"), ("JAX_BACKEND_TARGET", "grpc://HEAD:29000")):
        value = os.environ.get(name, "")
        if ("proxy" not in value.split(",")) if name == "JAX_PLATFORMS" else not value.startswith("grpc://"):
            raise ParameterError(f"Pathways needs {name}={example} in the environment; it is {shown(value)}")
    if importlib.util.find_spec("pathwaysutils") is None:
        raise ParameterError("Pathways needs pathwaysutils: pip install pathwaysutils")
    os.environ.setdefault("ENABLE_PATHWAYS_PERSISTENCE", "1")  # orbax then saves through Pathways' own handler
    importlib.import_module("pathwaysutils").initialize()  # before anything asks jax for devices
    import jax

    try:
        jax.devices()
    except RuntimeError as error:
        raise ParameterError(
            f"no Pathways proxy answers at {os.environ['JAX_BACKEND_TARGET']} ({_last(error)}); start its head, "
            "or leave JAX_PLATFORMS unset for a run without Pathways"
        ) from None
    return Driver(PATHWAYS)


def _last(error: BaseException) -> str:
    return next(
        (line.strip()[:160] for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__
    )
