"""`gemcut plan --gpus N`: what each GPU holds."""

from __future__ import annotations

import json

import pytest

from .conftest import Cli


def test_what_each_of_two_holds(cli: Cli) -> None:
    one = json.loads(cli("plan", "27b", "--memory", "40GB", "--context", "4096", "--json").out)
    two = json.loads(cli("plan", "27b", "--memory", "40GB", "--context", "4096", "--gpus", "2", "--json").out)
    assert (two["gpus"], len(two["plans"])) == (2, len(one["plans"]))
    assert "18,432 of 36,864 MLP columns" in two["each_gpu_holds"]
    for whole, half in zip(one["plans"], two["plans"], strict=True):
        assert half["parameters"] == whole["parameters"]
        assert half["kv_bytes"] * 2 == whole["kv_bytes"]
        # Norms are on both; double-quantized statistics of o and down grow from 8 to 32 bits for 64 weights.
        assert whole["weights_bytes"] <= half["weights_bytes"] * 2 <= 1.04 * whole["weights_bytes"]
    assert [plan["fits"] for plan in one["plans"][:2]] == [False, False]
    assert two["plans"][1]["fits"] is True
    text = cli("plan", "27b", "--memory", "40GB", "--context", "4096", "--gpus", "2").out
    assert "Each of 2 GPUs holds 16 of 32 heads" in text
    assert "on each of 2 GPUs" in text


def test_several_gpus_are_proposed_where_one_is_too_small(cli: Cli) -> None:
    run = cli("plan", "27b", "--memory", "40GB", "--context", "4096", "--dtype", "bfloat16")
    assert "Split over 2 such GPUs it fits" in run.out
    assert "--gpus 2." in run.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus is 0; expected a whole number from 1 on"),
        (["--gpus", "3"], "its 32 attention heads cannot be shared evenly by 3 devices; expected 1 or 2 or 4"),
        (["--gpus", "64"], "cannot be shared evenly by 64 devices"),
    ],
)
def test_bad_counts(cli: Cli, arguments: list[str], message: str) -> None:
    run = cli("plan", "27b", "--memory", "80GB", *arguments)
    assert run.code == 2
    assert message in run.error


def test_gpus_that_are_not_there(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run = cli("generate", "-m", "gemma-3-270m", "--gpus", "2", "x")
    assert run.code == 2
    assert run.error.endswith(
        "2 GPUs were asked for, but torch sees none (CUDA_VISIBLE_DEVICES is ''); use device='cpu' or one device"
    )
