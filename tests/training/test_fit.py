"""The real step compiled for four TPUs that are not here, and what the program says of memory and collectives."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import time
from collections import Counter
from dataclasses import replace
from math import prod

import pytest

from gemcut.config import FAMILY, GemmaConfig
from gemcut.errors import CapacityError, ParameterError
from gemcut.training import program
from gemcut.training.fit import Fit, Plan, default_mesh, fit, report
from gemcut.training.parameters import weights
from gemcut.training.topology import Pod

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

#: Each kind of matrix has a part that is large enough to be scattered by itself, and each group of kinds a size.
CONFIG = GemmaConfig.from_dict(
    {
        "model_type": "gemma2",
        "vocab_size": 1280,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "query_pre_attn_scalar": 128,
        "sliding_window": 128,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
)
PLAN = Plan("tiny", CONFIG, mesh=(1, 2, 2), batch=2, seq=256, remat="full", attention="splash", pieces=2)
POD = Pod.parse("v5p:2x2x1")


@pytest.fixture(scope="module")
def tiny() -> Fit:
    before = time.process_time()
    found = fit(PLAN, POD)
    assert time.process_time() - before < 60, "35 seconds where nothing else runs"
    return found


@needs_libtpu
@pytest.mark.slow
def test_a_chip_holds_its_part_of_weights_and_moments(tiny: Fit) -> None:
    # fp32 weights and two moments: 12 bytes a parameter, matrices over all four chips, norms whole on each.
    held = sum(12 * prod(w.leaf_shape) // (1 if w.path[-1].endswith("norm") else 4) for w in weights(CONFIG))
    assert held <= tiny.memory.arguments <= 1.02 * held
    assert tiny.memory.arguments < tiny.memory.peak <= 95 << 30
    # What a step needs beside its state: not more than the gathered bf16 weights of all layers would be.
    assert tiny.memory.temporary < 2 * CONFIG.num_parameters()
    assert tiny.fits


@needs_libtpu
@pytest.mark.slow
def test_the_gradient_of_every_kind_of_weight_is_scattered(tiny: Fit) -> None:
    # Elements that one of two model parts sums: layers of one place in the pattern are one product in the program.
    wanted: Counter[int] = Counter()
    for weight in weights(CONFIG):
        if not weight.path[-1].endswith("norm"):
            wanted[prod(weight.shape) // 2] += 1 if weight.layers else 2  # the table is looked up and is the head
    scattered = program.scattered_sizes(list(tiny.collectives))
    assert sum(wanted.values()) == 2 * 7 + 2
    assert not wanted - scattered


@needs_libtpu
@pytest.mark.slow
def test_no_collective_is_larger_than_the_table_s_fp32_gradient(tiny: Fit) -> None:
    most = program.largest(list(tiny.collectives))
    assert most is not None
    table = 4 * CONFIG.vocab_size // 2 * CONFIG.hidden_size
    assert most.nbytes <= table
    assert most.times == 1, "once a step, though the loss has two pieces"
    summed = program.largest(list(tiny.collectives), "all-reduce")
    # A whole gradient summed on every chip is what must not be: activations of one sequence are the largest left.
    assert summed is not None
    assert summed.nbytes <= 2 * PLAN.seq * CONFIG.hidden_size * 2
    assert program.traffic(list(tiny.collectives))["all-to-all"].count == 0


@needs_libtpu
@pytest.mark.slow
def test_a_report_is_json_with_the_card_s_days(tiny: Fit) -> None:
    said = json.loads(json.dumps(report(tiny, 0.5)))
    assert said["chips"] == 4
    assert said["mesh"] == {"replica": 1, "data": 2, "model": 2}
    assert said["tokens_per_step"] == 512
    assert said["days_to_card_tokens"] is None
    known = report(replace(tiny, plan=replace(PLAN, size="gemma-2-27b")), 0.5)
    seconds = 13e12 / 512 * tiny.model_flops / (4 * 459e12 * 0.5)
    assert known["days_to_card_tokens"] == pytest.approx(seconds / 86_400)


@needs_libtpu
@pytest.mark.slow
def test_a_step_that_does_not_fit_says_by_how_much_and_what_to_change() -> None:
    large = replace(PLAN, batch=4096, seq=2048, remat="none")
    says = (
        r"needs ([\d.]+) GiB on each chip of v5e:2x2, which has 15\.8: ([\d.]+) GiB too many; try --remat full, or --"
    )
    with pytest.raises(CapacityError, match=says) as error:
        fit(large, Pod.parse("v5e:2x2"))
    numbers = re.search(says, str(error.value))
    assert numbers is not None
    needed, over = map(float, numbers.groups())
    logits = 2048 * 2048 * CONFIG.vocab_size // 2 * 4 / 2**30  # of one chip, in one piece
    assert needed > logits
    assert over == pytest.approx(needed - 15.75, abs=0.1)
    assert "\n" not in str(error.value)


def test_a_plan_that_cannot_be_is_refused_before_anything_is_compiled() -> None:
    with pytest.raises(ParameterError, match="one of the two"):
        fit(PLAN)
    with pytest.raises(ParameterError, match="takes 8 chips, there are 4"):
        fit(replace(PLAN, mesh=(2, 2, 2)), POD)
    if importlib.util.find_spec("libtpu") is None:
        return
    with pytest.raises(ParameterError, match="a multiple of 2"):
        fit(replace(PLAN, batch=3), POD)
    with pytest.raises(ParameterError, match="256 tokens cannot be cut into 3 pieces"):
        fit(replace(PLAN, pieces=3), POD)
    with pytest.raises(ParameterError, match="teacher has a vocabulary of 262,144 tokens, the student of 1,280"):
        fit(replace(PLAN, teacher=FAMILY["gemma-3-270m"]), POD)


@pytest.mark.parametrize(
    ("size", "pod", "slices", "mesh"),
    [
        ("gemma-2-27b", "v5p:16x16x24", 1, (48, 16, 8)),
        ("gemma-2-9b", "v4:16x16x16", 1, (32, 16, 8)),
        ("gemma-2-2b", "v5e:16x16", 2, (32, 16, 1)),
    ],
)
def test_the_card_s_pods_have_a_mesh_of_their_own(size: str, pod: str, slices: int, mesh: tuple[int, int, int]) -> None:
    found = default_mesh(FAMILY[size], Pod.parse(pod, slices))
    assert found == mesh
    assert prod(found) == Pod.parse(pod, slices).chips


def test_an_absent_gpu_says_what_it_needs() -> None:
    if sys.version_info >= (3, 12):
        pytest.skip("this Python may compile for one")
    with pytest.raises(ParameterError, match=r"needs Python 3\.12 and jax 0\.11") as one:
        fit(replace(PLAN, mesh=(1, 1, 1)), gpu="h200")
    assert "\n" not in str(one.value)
