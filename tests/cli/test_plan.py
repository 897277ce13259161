"""gemcut plan: offline from a name alone, numbers that follow from the shapes, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import support
from gemcut.cli import output
from gemcut.cli.plan import DTYPE_NAMES, parse_memory
from gemcut.config import FAMILY
from gemcut.errors import ParameterError
from gemcut.placement.devices import DTYPES

from .conftest import Cli, process


@pytest.mark.parametrize(
    ("name", "member"),
    [
        ("2b", "gemma-2-2b"),
        ("2b-it", "gemma-2-2b"),
        ("gemma-2-9b-it", "gemma-2-9b"),
        ("27B", "gemma-2-27b"),
        ("google/gemma-2-27b-it", "gemma-2-27b"),
        ("gemma-3-270m", "gemma-3-270m"),
        ("google/gemma-3-1b-pt", "gemma-3-1b"),
    ],
)
def test_names_of_the_family_need_no_file(cli: Cli, name: str, member: str) -> None:
    run = cli("plan", name, "--memory", "24GB", "--json")
    assert run.code == 0
    report = json.loads(run.out)
    assert report["model"] == member
    assert {plan["parameters"] for plan in report["plans"]} == {FAMILY[member].num_parameters()}


def test_numbers_of_27b(cli: Cli) -> None:
    run = cli("plan", "27b-it", "--memory", "80GB", "--batch", "3", "--context", "6000", "--json")
    every = json.loads(run.out)["plans"]
    formats = [(plan["dtype"], plan["quantization"] and plan["quantization"]["format"]) for plan in every]
    cut = [("bfloat16", "int8"), ("bfloat16", "nf4"), ("bfloat16", "nf4")]
    assert formats == [("float32", None), ("bfloat16", None), *cut]
    assert [plan["quantization"]["head"] for plan in every[2:]] == [None, None, "int8"]
    plans = {plan["dtype"]: plan for plan in every[:2]}
    plan = plans["bfloat16"]
    # Counted by hand from the published shape: 16 key/value heads of 128 in 23 + 23 layers, keys and values, 2 bytes.
    assert plan["full_kv_bytes_per_token"] == plan["sliding_kv_bytes_per_token"] == 2 * 16 * 128 * 23 * 2
    assert plans["float32"]["full_kv_bytes_per_token"] == 2 * plan["full_kv_bytes_per_token"]
    assert plan["weights_bytes"] == pytest.approx(2 * 27_227_128_320, rel=1e-3)
    full, sliding = 3 * 6000 * 188_416, 3 * 6000 * 188_416
    assert full < plan["kv_bytes"] <= 1.05 * (full + sliding)
    assert plan["total_bytes"] == plan["weights_bytes"] + plan["workspace_bytes"] + plan["kv_bytes"]
    assert plan["memory_bytes"] == 80_000_000_000
    assert plan["fits"] is True
    assert plans["float32"]["fits"] is False
    assert plans["float32"]["largest_context"] == 0


def test_the_table_has_every_format_and_a_verdict(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run = cli("plan", "9b-it", "--memory", "24GB")
    assert run.code == 0
    assert ["float32", "bfloat16", "int8", "nf4", "+", "int8", "head"] in [
        line.split() for line in run.out.splitlines()
    ]
    assert run.out.splitlines()[-1] == "Fits: 8192 tokens in bfloat16, int8, nf4 and nf4 + int8 head, in 24GB."
    assert max(map(len, run.out.splitlines())) <= 80
    assert "bfloat16" not in cli("plan", "9b-it", "--memory", "24GB", "--dtype", "fp32").out
    assert "nf4" not in cli("plan", "9b-it", "--memory", "24GB", "--quantization", "fp4").out


@pytest.mark.parametrize(
    ("args", "answer"),
    [
        (("27b", "--memory", "24GB", "--dtype", "bf16"), "What fits: gemma-2-9b in bfloat16."),
        (("27b", "--memory", "12GB"), "What fits: gemma-2-9b in nf4 + int8 head."),
        (("27b", "--memory", "57GB", "--dtype", "bf16"), "What fits: one request of up to"),
        (
            ("27b", "--memory", "62GB", "--batch", "9", "--dtype", "bf16"),
            "What fits: 2 requests of 8,192 tokens at a time.",
        ),
        (("2b", "--memory", "10MB"), "Does not fit: 8192 tokens"),
    ],
)
def test_what_does_not_fit_is_no_error_and_gets_an_alternative(cli: Cli, args: tuple[str, ...], answer: str) -> None:
    run = cli("plan", *args)
    assert run.code == 0
    assert "Does not fit" in run.out
    assert answer in run.out


def test_this_machine_is_the_default(cli: Cli) -> None:
    report = json.loads(cli("plan", "2b", "--device", "cpu", "--json").out)
    assert report["device"] == "cpu"
    assert report["plans"][0]["memory_bytes"] > 10**8


def test_folders(cli: Cli, tiny: Path) -> None:
    report = json.loads(cli("plan", tiny, "--memory", "1GB", "--json").out)
    assert report["model"] == str(tiny)
    assert report["plans"][0]["context"] == 8192


def test_gguf(cli: Cli) -> None:
    report = json.loads(cli("plan", support.gguf_path(), "--memory", "1GB", "--json").out)
    assert report["plans"][0]["parameters"] == FAMILY["gemma-3-270m"].num_parameters()


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (("27b", "--memory", "lots"), ["lots", "24GB"]),
        (("27b", "--memory", "0GB"), ["0GB"]),
        (("27b", "--memory", "-3GB"), ["-3GB"]),
        (("27b", "--memory", "3XB"), ["3XB"]),
        (("27b", "--dtype", "int4"), ["int4", "bfloat16"]),
        (("27b", "--quantization", "int4"), ["int4", "nf4, fp4, int8"]),
        (("27b", "--quantization", "nf4", "--head", "nf4"), ["--head is 'nf4'", "int8"]),
        (("27b", "--quantization", "nf4", "--block-size", "48"), ["--block-size is 48", "64"]),
        (("27b", "--head", "int8"), ["--quantization"]),
        (("27b", "--context", "9000", "--memory", "1GB"), ["9000", "8192"]),
        (("27b", "--batch", "0", "--memory", "1GB"), ["batch is 0"]),
        (("27b", "--device", "tpu", "--memory", "1GB"), ["tpu", "cuda"]),
        (("27b", "--device", "cuda:99"), ["cuda:99", "--memory"]),
        (("/nowhere",), ["/nowhere", "does not exist"]),
        (("70b",), ["70b"]),
    ],
)
def test_bad_input(cli: Cli, args: tuple[str, ...], parts: list[str]) -> None:
    run = cli("plan", *args)
    assert run.code == 2
    assert run.out == ""
    for part in parts:
        assert part in run.error


def test_a_llama_config_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    run = cli("plan", tmp_path, "--memory", "1GB")
    assert run.code == 2
    assert "llama" in run.error


@pytest.mark.slow
def test_a_hub_id_offline_with_nothing_cached(tmp_path: Path) -> None:
    run = process("plan", "someone/gemma-2-2b-tuned", HF_HOME=str(tmp_path))
    assert run.code == 2
    assert "someone/gemma-2-2b-tuned" in run.error
    assert "HF_HUB_OFFLINE" in run.error


@pytest.mark.parametrize(
    ("text", "count"),
    [("24GB", 24 * 10**9), ("1.5 GiB", 3 * 2**29), ("800mb", 8 * 10**8), ("7", 7), ("2T", 2 * 10**12)],
)
def test_parse_memory(text: str, count: int) -> None:
    assert parse_memory(text) == count


def test_parse_memory_refuses() -> None:
    for text in ("", "GB", "1e9", "1,5GB", "inf", "0.0001", "9" * 400 + "GB", "8 iB", "3 eggs"):
        with pytest.raises(ParameterError):
            parse_memory(text)


def test_dtype_names_are_those_of_the_loader() -> None:
    for short, name in DTYPE_NAMES.items():
        assert DTYPES[short] is DTYPES[name]
    assert set(DTYPES) == set(DTYPE_NAMES) | set(DTYPE_NAMES.values())


@pytest.mark.parametrize("width", [40, 53, 64, 80, 99, 120, 200])
def test_a_number_is_never_shortened(cli: Cli, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """However narrow the terminal is, every number of --json's report is there in full."""
    plans = json.loads(cli("plan", "27b", "--memory", "80GB", "--json").out)["plans"]
    monkeypatch.setenv("COLUMNS", str(width))
    out = cli("plan", "27b", "--memory", "80GB").out
    assert "…" not in out
    for plan in plans:
        assert output.gigabytes(plan["weights_bytes"]) in out
        assert output.gigabytes(plan["total_bytes"]) in out
        assert output.gigabytes(plan["kv_bytes"]) in out
    table = out[: out.index("Fits:")].splitlines()[1:]
    assert max(map(len, table)) <= width
