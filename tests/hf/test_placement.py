"""What device_map means where there are several GPUs (pretend ones), and what hf_device_map says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gemcut import AutoModelForCausalLM
from gemcut.config import FAMILY
from gemcut.errors import UnsupportedError
from gemcut.hf import auto, placement
from gemcut.hf.placement import gpus_for
from gemcut.placement.plan import MemoryPlan
from support import hf_model, save_checkpoint, tiny_config

GB = 10**9
PLAN = MemoryPlan.make(FAMILY["gemma-2-27b"], context=1024)  # about 57 GB in bf16


@pytest.mark.parametrize(
    ("device_map", "rooms", "expected"),
    [
        ("auto", [80 * GB], (0, 1)),
        ("auto", [80 * GB, 80 * GB], (0, 1)),
        ("auto", [9 * GB, 80 * GB], (1, 1)),
        ("auto", [40 * GB] * 4, (0, 2)),
        ("auto", [20 * GB] * 4, (0, 4)),
        ("auto", [4 * GB] * 4, (0, 1)),  # nowhere: the loader says what would fit
        ("balanced", [80 * GB] * 4, (0, 4)),
        ("balanced", [80 * GB] * 3, (0, 2)),  # 3 do not divide 32 heads
        ("balanced", [80 * GB, 0, 80 * GB], (0, 1)),
        ("sequential", [80 * GB, 80 * GB], (0, 1)),
    ],
)
def test_how_many_gpus(device_map: str, rooms: list[int], expected: tuple[int, int]) -> None:
    assert gpus_for(device_map, PLAN, rooms, torch.bfloat16) == expected


def test_what_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"device_map='sequential' .* 40\.0 GB on the first GPU"):
        gpus_for("sequential", PLAN, [40 * GB, 40 * GB], torch.bfloat16)
    assert gpus_for("auto", PLAN, [40 * GB] * 2, torch.float16) == (0, 1)  # float16 cannot be split


def test_max_memory_bounds_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(placement, "free_memory", lambda device: 50 * GB)
    assert placement.gpu_rooms() == [50 * GB] * 3
    assert placement.gpu_rooms({0: "20GB", 2: "90GB", "cpu": "1GB"}) == [20 * GB, 0, 50 * GB]


def test_auto_loads_over_the_gpus_that_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_checkpoint(tmp_path, hf_model(tiny_config()))
    asked: dict[str, Any] = {}
    real = auto.Gemma.load

    def load(name: Any, **options: Any) -> Any:
        asked.update(options)
        return real(name, **{**options, "device": "cpu", "gpus": None})

    monkeypatch.setattr(auto.Gemma, "load", load)
    monkeypatch.setattr(auto, "placement", lambda *_: (torch.device("cuda", 0), None))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(auto, "gpu_rooms", lambda _: [300_000_000] * 2)
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    assert (asked["gpus"], asked["device"], model.hf_device_map) == (1, torch.device("cuda", 0), {"": 0})
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="balanced")
    assert (asked["gpus"], model.hf_device_map) == (2, {"": [0, 1]})


def test_hf_device_map_of_one_device(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, hf_model(tiny_config()))
    assert AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").hf_device_map == {"": "cpu"}
    assert not hasattr(AutoModelForCausalLM.from_pretrained(folder), "hf_device_map")
