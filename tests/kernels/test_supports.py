"""Every kernel says in the same way whether it serves a case on a GPU, on any machine."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

import gemcut.kernels
import gemcut.model.ops
from gemcut.cli.kernel_cases import FORMATS, layer_shapes, linear_case
from gemcut.config import FAMILY
from gemcut.kernels.gpu import NEEDS_CPU, NEEDS_GPU, PRESETS
from gemcut.kernels.linear import four_bit
from gemcut.kernels.megakernel.decode_step import StepCase
from gemcut.kernels.sampling.draw import DrawCase
from gemcut.model.ops.base import NetworkCase
from gemcut.model.ops.cuda_megakernel import step_shape
from gemcut.quantization import spec

CONFIG = FAMILY["gemma-2-27b"]
NETWORK = NetworkCase(CONFIG, torch.bfloat16)


def modules() -> Iterator[ModuleType]:
    for package in (gemcut.kernels, gemcut.model.ops):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            # Triton's kernel imports triton, which a CPU's torch is without; the C++ library is no module.
            if not found.name.endswith("varlen_triton") and "libgemcut" not in found.name:
                yield importlib.import_module(found.name)


MODULES = {module.__name__.removeprefix("gemcut."): module for module in modules() if hasattr(module, "supports")}


def case_of(name: str) -> Any:
    """A case that the module of this name serves, on an H100 or on a CPU."""
    family, module = name.split(".")[-2:]
    if family in ("linear", "cpu") and module in ("linear", "cuda", "gated", *FORMATS, "four_bit"):
        formats = {"four_bit": "nf4", "bf16": "bf16", "int8": "int8"}
        device = torch.device("cpu" if family == "cpu" else "meta")
        shape = layer_shapes(FAMILY["gemma-2-2b"])["mlp.gate_up_proj"]
        return linear_case(formats.get(module, "nf4"), shape, device)
    if family == "ops":
        return NETWORK
    if family == "megakernel":
        return StepCase(step_shape(CONFIG), four_bit.NESTED, 16)
    if family == "sampling":
        return DrawCase(CONFIG.vocab_size, 40)
    if family == "rowwise":
        return NETWORK.rowwise
    assert module in ("attention", "decode", "varlen", "varlen_hopper")
    return NETWORK.decode_attention(16)


def test_every_format_can_be_asked_about() -> None:
    assert set(FORMATS) == {*spec.FORMATS, "bf16"}


def test_all_families_are_looked_at() -> None:
    families = {name.split(".")[1] for name in MODULES}
    assert families == {"attention", "cpu", "linear", "megakernel", "ops", "rowwise", "sampling"}
    assert len(MODULES) >= 16


@pytest.mark.parametrize("name", MODULES)
def test_one_signature_which_answers_without_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> None:
        raise AssertionError("this machine's GPU was asked")

    for function in ("get_device_properties", "get_device_capability", "is_available", "device_count"):
        monkeypatch.setattr(torch.cuda, function, asked)
    supports = MODULES[name].supports
    signature = inspect.signature(supports)
    assert list(signature.parameters) == ["case", "gpu"]
    assert signature.parameters["gpu"].annotation == "Gpu | None"
    assert signature.return_annotation == "str | None"
    case = case_of(name)
    if ".cpu" in name:
        assert supports(case, None) is None
        assert {supports(case, gpu) for gpu in PRESETS.values()} == {NEEDS_CPU}
    else:
        assert supports(case, None) == NEEDS_GPU
        assert supports(case, PRESETS["h100"]) is None
        assert all(reason is None or " " in reason for reason in (supports(case, gpu) for gpu in PRESETS.values()))
