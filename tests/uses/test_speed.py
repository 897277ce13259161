"""gemcut bench model: numbers that hang together, counted and not guessed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import support
from cli.conftest import Cli, cli  # noqa: F401
from gemcut import Gemma
from gemcut.cli.options import LoadOptions
from gemcut.errors import ContextLengthError, ParameterError
from gemcut.uses.speed import measure, read_bandwidth, weight_bytes
from server.host import NAME, new_gemma, slow_down


@pytest.fixture
def gemma() -> Gemma:
    return new_gemma(max_context=256)


def test_speeds_follow_from_how_long_steps_take(gemma: Gemma) -> None:
    slow_down(gemma, 0.02)  # a step of the engine takes so long at least
    started = time.perf_counter()
    found = measure(gemma, prompt=40, new=9, batch=2, repetitions=2)
    seconds = time.perf_counter() - started
    assert [len(values) for values in (found.prefill, found.first, found.decode)] == [2, 2, 2]
    assert all(rate == pytest.approx(80 / first) for rate, first in zip(found.prefill, found.first, strict=True))
    assert all(first >= 3 * 0.02 for first in found.first)  # 80 tokens in steps of 32
    assert all(rate <= 2 * 8 / (8 * 0.02) for rate in found.decode)  # eight steps for two answers
    assert sum(found.first) + sum(16 / rate for rate in found.decode) < seconds


def test_nothing_of_a_prompt_is_known_before(gemma: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[int, ...], Any]] = []
    prepare = gemma.prepare_stream
    monkeypatch.setattr(
        gemma, "prepare_stream", lambda ids, params: seen.append((tuple(ids), params)) or prepare(ids, params)
    )
    measure(gemma, prompt=20, new=4, batch=2, repetitions=2)
    assert len(seen) == 3 * 2 * 2
    assert len({ids for ids, _ in seen}) == 3 * 2
    assert {(len(ids), params.max_new_tokens, params.ignore_eos) for ids, params in seen} == {
        (20, 1, True),
        (20, 4, True),
    }


def test_bytes_of_the_weights(tmp_path: Path) -> None:
    model = support.hf_model(support.tiny_config(), dtype=torch.float32)
    folder = support.save_checkpoint(tmp_path / "c", model)
    assert weight_bytes(Gemma.load(folder, progress=False)) == sum(p.nbytes for p in model.parameters())
    assert weight_bytes(Gemma.load(folder, quantization="int8", progress=False)) < weight_bytes(
        Gemma.load(folder, progress=False)
    )
    assert read_bandwidth(torch.device("cpu"), 1 << 22, 2) > 0


def test_what_cannot_be_measured(gemma: Gemma) -> None:
    with pytest.raises(ContextLengthError, match="the context holds 256"):
        measure(gemma, prompt=250, new=10)
    with pytest.raises(ParameterError, match="new is 1; expected 2"):
        measure(gemma, new=1)


def test_the_command(cli: Cli, gemma: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(LoadOptions, "load", lambda self, name, **_: gemma)
    more = ("--prompt-tokens", "20", "--output-tokens", "4", "--repeat", "2")
    report = json.loads(cli("bench", "model", NAME, *more, "--batch", "1,3", "--json").out)
    assert [row["batch"] for row in report["rounds"]] == [1, 3]
    assert report["weight_bytes"] == weight_bytes(gemma)
    assert report["steps_per_second_limit"] == report["read_bytes_per_second"] / report["weight_bytes"]
    monkeypatch.setattr("gemcut.uses.speed.read_bandwidth", lambda device: 1.0)  # as on a machine that is busy
    done = cli("bench", "model", NAME, *more)
    assert "more than the limit" in done.error
    monkeypatch.setattr("gemcut.uses.speed.read_bandwidth", lambda device: 1e15)
    assert cli("bench", "model", NAME, *more).err == ""
    lines = done.out.splitlines()
    assert len(lines) == 5
    assert lines[-1].split()[0] == "1"
    for args, said in [
        (("--batch", "0"), "expected numbers from 1"),
        (("--batch", "x"), "expected numbers from 1"),
        (("--repeat", "0"), "at least 1"),
        (("--output-tokens", "1"), "at least 2"),
    ]:
        assert said in cli("bench", "model", NAME, *args).error
