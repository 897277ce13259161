"""What several GPUs hold, and where a network goes: arithmetic on pretend devices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gemcut.checkpoint.names import expected_shapes
from gemcut.config import FAMILY
from gemcut.parallel.shape import Share
from gemcut.parallel.shards import cut_before, cut_behind
from gemcut.placement.gpus import GpuSeen, gpus_refusal
from gemcut.placement.plan import MemoryPlan, weight_bytes
from gemcut.placement.split_plan import holds, place, rank_plan, rank_weight_bytes
from gemcut.quantization.spec import Quantization
from gemcut.quantization.stream import quantize_tensors

GB = 10**9
BIG = FAMILY["gemma-2-27b"]


def plan(spec: Quantization | None = None, context: int = 1024) -> MemoryPlan:
    return MemoryPlan.make(BIG, quantization=spec, context=context)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("spec", [None, Quantization("int8", head="int8"), Quantization("nf4", double_quant=False),
                                  Quantization("nf4", double_quant=True)])  # fmt: skip
def test_a_ranks_bytes_are_those_of_its_tensors(size: int, spec: Quantization | None) -> None:
    base = FAMILY["gemma-2-2b"]
    config = base.replace(
        num_hidden_layers=1, layer_types=base.layer_types[:1], vocab_size=640, hidden_size=256, intermediate_size=1024,
        head_dim=64,
    )  # fmt: skip
    share = Share(0, size)
    tensors = {n: torch.ones(s, dtype=torch.bfloat16 if len(s) == 2 else torch.float32)
               for n, s in expected_shapes(config).items()}  # fmt: skip
    kind = spec or Quantization("nf4", double_quant=False)
    stream = cut_before(tensors.items(), config, share, kind)
    if spec is not None:
        stream = quantize_tensors(stream, spec, module_name=lambda name: name)
    own = dict(cut_behind(stream, config, share, kind))
    assert rank_weight_bytes(config, size, "bfloat16", spec) == sum(weight.nbytes for weight in own.values())


def test_one_device_holds_what_the_plan_says() -> None:
    assert rank_weight_bytes(BIG, 1) == weight_bytes(BIG, "bfloat16")
    whole = plan()
    assert rank_plan(whole, 1) is whole
    half = rank_plan(whole, 2)
    assert half.weights == pytest.approx(whole.weights / 2, rel=1e-3)
    assert half.kv(1024) * 2 == whole.kv(1024)
    assert holds(BIG, 2).startswith("16 of 32 heads with 8 of 16 key-value heads, 18,432 of 36,864 MLP columns")
    assert "(the same one on 2 GPUs)" in holds(FAMILY["gemma-2-2b"], 8)


def test_the_order_of_placements() -> None:
    need = plan().total  # about 57 GB
    assert place(plan(), [80 * GB, 80 * GB], 0).kind == "one"
    assert place(plan(), [10 * GB, 80 * GB], 0).layers == {"cuda:1": 46}  # the first is in use
    split = place(plan(), [40 * GB] * 4, 0)
    assert (split.kind, list(split.bytes_by_device)) == ("tensor", ["cuda:0", "cuda:1"])
    assert max(split.bytes_by_device.values()) <= 40 * GB
    assert list(place(plan(), [20 * GB] * 4, 0).bytes_by_device) == [f"cuda:{i}" for i in range(4)]
    # Three GPUs do not divide 32 heads, and two are too small.
    layers = place(plan(), [25 * GB] * 3, 0)
    assert layers.kind == "layers"
    assert sum(layers.layers.values()) == 46
    assert all(size <= 25 * GB for size in layers.bytes_by_device.values())
    offload = place(plan(), [30 * GB], 60 * GB)
    assert offload.kind == "offload"
    assert sum(offload.layers.values()) == 46
    assert offload.bytes_by_device["cuda:0"] <= 30 * GB
    assert offload.step_seconds == pytest.approx(offload.bytes_by_device["cpu"] / 50e9)
    assert place(plan(), [], need).kind == "cpu"
    assert place(plan(), [2 * GB], need).kind == "cpu"
    assert place(plan(), [], need - 1) is None
    assert place(plan(), [2 * GB], 3 * GB) is None


H200 = GpuSeen("NVIDIA H200", (9, 0), 150 * GB, 149 * GB)


def test_gpus_that_cannot_share_a_network() -> None:
    def reason(seen: list[GpuSeen], count: int = 2, peers: bool = True) -> str | None:
        return gpus_refusal(count, seen, lambda one, other: peers)

    assert reason([H200, H200]) is None
    assert reason([H200, replace(H200, memory=149 * GB), replace(H200, name="other")]) is None  # the third is not used
    assert "4 GPUs were asked for, but there are 2 GPUs" in reason([H200, H200], 4)
    assert "there is 1 GPU" in reason([H200])
    assert "GPU 1 a NVIDIA H100" in reason([H200, replace(H200, name="NVIDIA H100")])
    assert "GPU 1 80.0 GB" in reason([H200, replace(H200, memory=80 * GB)])
    assert "no peer access" in reason([H200, H200], peers=False)


def test_an_empty_list_of_gpus_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES is ''" in gpus_refusal(2, [], lambda one, other: True)
