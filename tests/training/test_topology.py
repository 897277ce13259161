"""Names of pods and meshes, and what a person who gets one wrong reads."""

from __future__ import annotations

import sys

import pytest

from gemcut.errors import ParameterError
from gemcut.training.topology import CHIPS, GPUS, Pod, check_mesh, gpu_mesh, parse_mesh


@pytest.mark.parametrize(
    ("name", "slices", "chips"),
    [("v5p:16x16x24", 1, 6144), ("v4:16x16x16", 1, 4096), ("v5e:16x16", 2, 512), ("v5p:2x2x1", 1, 4)],
)
def test_the_card_s_pods_have_their_chips(name: str, slices: int, chips: int) -> None:
    pod = Pod.parse(name, slices)
    assert pod.chips == chips
    assert pod.name == name


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5p-8", "expected a kind and its shape"),
        ("", "expected a kind and its shape"),
        ("v5p:", "expected a kind and its shape"),
        ("v5p:16x16x24_twisted", "expected a kind and its shape"),
        ("v9:4x4x4", "unknown kind; expected one of v4, v5e, v5p, v6e"),
        ("v5p:16x16", "has 2 numbers; a v5p pod has 3"),
        ("v5e:4x4x4", "has 3 numbers; a v5e pod has 2"),
        ("v5p:0x4x4", "has 0 chips"),
        ("v5p:999998x999998x1", "expected 1 to"),
        ("v5p:3x5x7", "whole hosts"),
    ],
)
def test_a_pod_that_cannot_be_is_refused(name: str, says: str) -> None:
    with pytest.raises(ParameterError, match=says) as error:
        Pod.parse(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "48,16", "48,16,8,1", "48,0,8", "-1,2,3", "a,b,c"])
def test_a_mesh_is_three_numbers(text: str) -> None:
    with pytest.raises(ParameterError, match="three numbers from 1"):
        parse_mesh(text)


def test_a_mesh_takes_every_chip_and_keeps_model_and_data_inside_a_slice() -> None:
    check_mesh(parse_mesh("48,16,8"), 6144)
    check_mesh(parse_mesh("2,256,1"), 512, slices=2)
    with pytest.raises(ParameterError, match="takes 6,272 chips, there are 6,144; 16 × 8 leaves 48 replicas"):
        check_mesh((49, 16, 8), 6144)
    with pytest.raises(ParameterError, match="choose three numbers"):
        check_mesh((1, 5, 7), 6144)
    with pytest.raises(ParameterError, match="no multiple of 2"):
        check_mesh((1, 512, 1), 512, slices=2)


def test_memory_is_the_product_s() -> None:
    # Google's data sheets: 32 GB (v4), 16 GB (v5e), 95 GB (v5p), 32 GB (v6e); XLA keeps a part of v5e's and v6e's.
    sizes = {name: round(chip.memory / 2**30) for name, chip in CHIPS.items()}
    assert sizes == {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 31}
    assert GPUS["h200"].memory / 1e9 > 140


def test_an_absent_gpu_needs_a_newer_python_and_says_so() -> None:
    with pytest.raises(ParameterError, match="expected one of h100, h200"):
        gpu_mesh("h900")
    if sys.version_info < (3, 12):
        with pytest.raises(ParameterError, match=r"needs Python 3\.12 and jax 0\.11"):
            gpu_mesh("h200")
