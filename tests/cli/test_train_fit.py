"""``gemcut train fit``: what it says of a step that does not fit, and of what cannot be asked."""

from __future__ import annotations

import importlib.util
import json
import re
import sys

import pytest

from gemcut.config import FAMILY

from .conftest import Cli, process


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["2b"], "say what to compile for: --pod v5p:16x16x24 or --gpu h200, one of the two"),
        (["2b", "--pod", "v5p:2x2x1", "--gpu", "h200"], "one of the two"),
        (["2b", "--gpu", "h200", "--slices", "2"], "--slices is for pods"),
        (["3b", "--pod", "v5p:2x2x1"], "size is '3b'; expected one of"),
        (["2b", "--pod", "v5p-8"], "expected a kind and its shape"),
        (["2b", "--pod", "v5p:2x2x1", "--mesh", "1,4"], "three numbers from 1"),
        (["2b", "--pod", "v5p:2x2x1", "--mesh", "1,2,1"], "takes 2 chips, there are 4"),
        (["2b", "--pod", "v5p:2x2x1", "--teacher", "90b"], "size is '90b'"),
        (["2b", "--pod", "v5p:2x2x1", "--batch", "0"], "--batch is 0; expected 1 to"),
        (["2b", "--pod", "v5p:2x2x1", "--loss-pieces", "0"], "--loss-pieces is 0; expected 1 to"),
        (["2b", "--pod", "v5p:2x2x1", "--mfu", "1.5"], "--mfu is 1.5; expected a share"),
        (["2b", "--pod", "v5p:2x2x1", "--remat", "some"], "--remat is 'some'; expected one of auto, none"),
        (["2b", "--pod", "v5p:2x2x1", "--attention", "flash"], "--attention is 'flash'; expected one of auto, xla"),
    ],
)
def test_what_cannot_be_asked_is_one_line(cli: Cli, args: list[str], says: str) -> None:
    run = cli("train", "fit", *args)
    assert run.code == 2
    assert says in run.error
    assert run.out == ""


def test_a_gpu_that_is_not_here_says_what_it_needs(cli: Cli) -> None:
    if sys.version_info >= (3, 12):
        pytest.skip("this Python may compile for one")
    run = cli("train", "fit", "2b", "--gpu", "h200")
    assert run.code == 2
    assert "needs Python 3.12 and jax 0.11 or newer; this is Python 3.11" in run.error


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_real_size_that_does_not_fit_says_by_how_much() -> None:
    # Without rematerialization 16 sequences of 8,192 tokens keep far more than a v5e has; XLA refuses in seconds.
    options = {"--pod": "v5e:2x2", "--mesh": "1,4,1", "--remat": "none", "--batch": "16"}
    run = process("train", "fit", "2b", *[word for pair in options.items() for word in pair], stdin=b"")
    assert run.code == 2
    said = re.fullmatch(
        r"error: the step of gemma-2-2b needs ([\d.]+) GiB on each chip of v5e:2x2, which has 15\.8: ([\d.]+) GiB too "
        r"many; try --remat full, or --batch 4, or --seq 4096, or more chips",
        run.error,
    )
    assert said is not None, run.error
    config = FAMILY["gemma-2-2b"]
    kept = config.num_hidden_layers * 4 * 8192 * config.intermediate_size * 2 * 2 / 2**30  # gate and up of 4 sequences
    assert float(said[1]) > kept
    assert float(said[2]) == pytest.approx(float(said[1]) - 15.75, abs=0.1)


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 12), reason="compiling for a GPU that is not here needs Python 3.12")
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="jax-cuda13-plugin is not installed")
def test_a_step_for_a_gpu_that_is_not_here_is_compared_with_its_memory() -> None:
    ask = ("train", "fit", "2b", "--gpu", "h200", "--seq", "4096", "--batch", "4")
    run = process(*ask, "--json", stdin=b"")
    assert run.code == 0, run.err
    said = json.loads(run.out)["bytes_per_chip"]
    state = 12 * FAMILY["gemma-2-2b"].num_parameters()  # fp32 weights and two moments
    assert state < said["arguments"] < 1.001 * state
    assert state < said["peak"] < said["capacity"]
    # XLA compiles what is larger than the card, too.
    run = process(*ask, "--remat", "none", stdin=b"")
    assert run.code == 2
    assert "GiB on each chip of one NVIDIA H200, which has 139.8: " in run.error
    assert "more chips" not in run.error
