"""``gemcut info --kernels --gpu``: which kernel another GPU would run."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from gemcut.cli.kernel_routes import Asked, route_report
from gemcut.config import FAMILY

from .conftest import Cli


def parts(cli: Cli, *options: str) -> dict[str, Any]:
    report = json.loads(cli("info", "27b", "--kernels", "--json", *options).out)
    return {part["part"].split(" [")[0]: part for part in report["parts"]}


def test_each_gpu_has_its_own_kernels(cli: Cli) -> None:
    a100 = parts(cli, "--gpu", "a100", "--format", "nf4", "--rows", "16")
    assert a100["attention.o_proj"]["kernel"] == "four_bit_fixed"  # small: up to 16 rows at once on every GPU
    assert a100["mlp.gate_up_proj"]["kernel"] == "four_bit_gemv"
    assert "9.0" in a100["mlp.gate_up_proj"]["not"]["four_bit_gemm"]
    h100 = parts(cli, "--gpu", "h100", "--format", "nf4", "--rows", "16")
    assert h100["mlp.gate_up_proj"]["kernel"] == "four_bit_gemm"
    assert "several sequences" in h100["a whole decode step"]["not"]["decode_step"]
    one = parts(cli, "--gpu", "h100", "--format", "nf4", "--rows", "1")
    assert one["a whole decode step"]["kernel"] == "decode_step"


def test_matrices_that_no_kernel_takes_are_plain_pytorchs() -> None:
    odd = replace(FAMILY["gemma-2-2b"], hidden_size=2312)  # no whole number of blocks of 64 values, or of 16 bytes
    for format_name, word in ("nf4", "no multiple of 64"), ("int8", "16 bytes"):
        report = {part["part"]: part for part in route_report(odd, Asked.of("h100", format_name, 1))}
        part = report["mlp.gate_up_proj [18432, 2312]"]
        assert part["kernel"] == "plain PyTorch"
        assert word in part["not"]["cuda"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--gpu", "x"], "h200, h100, a100, rtx4090, l4"),
        (["--gpu", "a100", "--format", "q4"], "nf4, fp4, int8, bf16"),
        (["--gpu", "a100", "--rows", "0"], "from 1 to"),
        (["--rows", "1"], "need --gpu"),
    ],
)
def test_wrong_questions_are_one_line(cli: Cli, options: list[str], word: str) -> None:
    run = cli("info", "--kernels", *options)
    assert run.code == 2
    assert word in run.error
    assert run.error.count("\n") <= 1
