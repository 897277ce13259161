"""The three ways to drive a run. Pathways' server exists in Google's containers alone: its wiring and its error are
tested, no run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from gemcut.errors import ParameterError
from gemcut.training.driver import Driver, chosen, start


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({}, "host"),
        ({"JAX_PLATFORMS": "cpu"}, "host"),
        ({"JAX_PLATFORMS": "proxy"}, "pathways"),
        ({"JAX_PLATFORMS": "proxy,cpu"}, "pathways"),
        ({"GEMCUT_COORDINATOR": "node0:1234"}, "controllers"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}, "controllers"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "1"}, "host"),
        ({"SLURM_NTASKS": "16"}, "host"),  # in a job's script, not in a task that srun started
    ],
)
def test_auto_knows_where_it_is(environment: dict[str, str], kind: str) -> None:
    assert chosen("auto", environment) == kind
    assert chosen("host", environment) == "host"


def test_an_unknown_driver_is_refused() -> None:
    with pytest.raises(ParameterError, match="expected one of auto, host, controllers, pathways"):
        start("ray")


def test_processes_share_a_batch_in_equal_parts() -> None:
    drivers = [Driver("controllers", i, 4) for i in range(4)]
    rows = [list(range(12))[driver.rows(12)] for driver in drivers]
    assert [row for part in rows for row in part] == list(range(12))
    assert [driver.leads for driver in drivers] == [True, False, False, False]
    with pytest.raises(ParameterError, match="cannot be shared by 4 processes"):
        drivers[0].rows(10)


def test_pathways_says_what_its_environment_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    with pytest.raises(ParameterError, match="needs JAX_PLATFORMS=proxy"):
        start("pathways")
    monkeypatch.setenv("JAX_PLATFORMS", "proxy")
    monkeypatch.setenv("JAX_BACKEND_TARGET", "head:29000")
    with pytest.raises(ParameterError, match="JAX_BACKEND_TARGET=grpc://HEAD:29000"):
        start("pathways")
    if importlib.util.find_spec("pathwaysutils") is None:
        monkeypatch.setenv("JAX_BACKEND_TARGET", "grpc://head:29000")
        with pytest.raises(ParameterError, match="pip install pathwaysutils"):
            start("pathways")


@pytest.mark.slow
def test_pathways_is_initialized_before_jax_and_its_silence_is_one_line(tmp_path: object) -> None:
    """A stand-in for pathwaysutils notes when it is called; jaxlib's own proxy client then meets nobody."""
    folder = os.fspath(tmp_path)  # type: ignore[call-overload]
    with open(os.path.join(folder, "pathwaysutils.py"), "w", encoding="utf-8") as file:
        file.write(
            "import jax\n"
            "from jax.extend.backend import ifrt_proxy\n"
            "from jax._src import xla_bridge\n"
            "def initialize():\n"
            "    assert not xla_bridge.backends_are_initialized()\n"
            "    options = ifrt_proxy.ClientConnectionOptions()\n"
            "    options.connection_timeout_in_seconds = 1\n"
            "    make = lambda: ifrt_proxy.get_client('grpc://127.0.0.1:9', options)\n"
            "    jax.extend.backend.register_backend_factory('proxy', make, priority=-1)\n"
            "    print('initialized')\n"
        )
    program = (
        "import jax.extend.backend\n"
        "from gemcut.errors import ParameterError\n"
        "from gemcut.training.driver import start\n"
        "try:\n    start()\n"
        "except ParameterError as error:\n    print(error)\n"
    )
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "proxy",
        "JAX_BACKEND_TARGET": "grpc://127.0.0.1:9",
        "PYTHONPATH": folder + os.pathsep + os.environ.get("PYTHONPATH", ""),
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert lines[:1] == ["initialized"], done.stderr
    assert len(lines) == 2
    assert lines[1].startswith("no Pathways proxy answers at grpc://127.0.0.1:9 (")
