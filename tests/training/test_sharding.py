"""The same step on one device, on eight pretend ones, and in two processes of four."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from gemcut.config import FAMILY
from gemcut.errors import ParameterError
from gemcut.training.parameters import Weight, weights
from gemcut.training.sharding import check_batch, check_network, weight_spec

SCRIPT = Path(__file__).with_name("pretend_devices.py")


def begin(mesh: str, devices: int, *more: str, **environment: str) -> subprocess.Popen[str]:
    # Code that is made once and run twice: compile it fast.
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    flags += f" --xla_force_host_platform_device_count={devices}"
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **environment}
    command = [sys.executable, str(SCRIPT), mesh, *more]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def told(process: subprocess.Popen[str]) -> Any:
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    found = [line for line in out.splitlines() if line.startswith("{")]  # gloo writes to the same stream
    return json.loads(found[-1]) if found else None


@cache
def one_device() -> Any:
    return told(begin("1,1,1", 1))


def same(found: Any) -> None:
    reference = one_device()
    assert found["losses"] == pytest.approx(reference["losses"], rel=2e-6)
    assert found["losses"][1] < found["losses"][0]
    assert found["sums"].keys() == reference["sums"].keys()
    for name, value in reference["sums"].items():
        assert found["sums"][name] == pytest.approx(value, rel=1e-4, abs=1e-7), name


def goes_on_elsewhere(found: Any) -> None:
    """Saved on one mesh and restored on another bit for bit, the next step is the same but for the order of sums."""
    assert found["on_fewer_devices"] == []
    assert found["equal"]
    assert found["moved"] > 0
    assert found["next"] < found["losses"][1]
    assert found["next_elsewhere"] == pytest.approx(found["next"], rel=2e-6)


@pytest.mark.slow
def test_eight_devices_make_one_device_s_step_and_keep_no_state_on_fewer() -> None:
    found = told(begin("2,2,2", 8))
    assert found["devices"] == 8
    same(found)
    assert found["on_fewer_devices"] == []
    assert all("norm" in name for name in found["whole"]), "only norms are whole on every chip"


@pytest.mark.slow
def test_a_checkpoint_of_one_mesh_goes_on_another(tmp_path: Path) -> None:
    found = told(begin("1,4,2", 8, str(tmp_path), "2,2,2"))
    same(found)
    goes_on_elsewhere(found)


@pytest.mark.slow
def test_two_processes_of_four_devices_make_the_same_step(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {"GEMCUT_COORDINATOR": address, "GEMCUT_PROCESSES": "2"}
    processes = [begin("2,2,2", 4, str(tmp_path), "4,1,2", **shared, GEMCUT_PROCESS=str(number)) for number in range(2)]
    try:
        first, second = map(told, processes)
    finally:
        for process in processes:
            process.kill()
    assert second is None, "only the first process speaks"
    assert first["devices"] == 8
    same(first)
    goes_on_elsewhere(first)  # each process saves and reads its own parts


def test_every_matrix_of_the_card_is_split_over_data_and_model() -> None:
    for size in ("2b", "9b", "27b"):
        for weight in weights(FAMILY[f"gemma-2-{size}"]):
            split = sorted(axis for axis in weight_spec(weight) if axis)
            assert split == ([] if norm(weight) else ["data", "model"]), weight.path


def norm(weight: Weight) -> bool:
    return weight.path[-1].endswith("norm")


def test_a_mesh_that_does_not_divide_the_network_says_what_does() -> None:
    config = FAMILY["gemma-2-9b"]
    check_network(config, {"replica": 2, "data": 512, "model": 4})
    with pytest.raises(ParameterError, match=r"hidden_size 3,584 cannot be split 1024 ways; choose another data, such"):
        check_network(config, {"replica": 1, "data": 1024, "model": 4})
    with pytest.raises(ParameterError, match=r"num_key_value_heads 8 cannot be split 16 ways.* 2 or 4 or 8"):
        check_network(config, {"replica": 1, "data": 256, "model": 16})
    with pytest.raises(ParameterError, match=r"a batch of 100 sequences .* 768 groups .* multiple of 768"):
        check_batch(100, {"replica": 48, "data": 16, "model": 8})
