"""From outcomes to figures, with values by hand; traces."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import support
from gemcut.bench.client import Outcome
from gemcut.bench.figures import Limits, finite, most_at_once, percentile, summary
from gemcut.bench.load import Round
from gemcut.bench.traffic import Row, as_text, make_trace, read_trace, write_trace
from gemcut.errors import ParameterError


def test_percentiles_by_hand() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.95, 0.99, 1.0)] == [50, 95, 99, 100]
    assert percentile([7.0], 0.99) == 7
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2
    assert math.isnan(percentile([], 0.5))


def _outcome(due: float, times: list[float], end: float, tokens: int, **more: Any) -> Outcome:
    return Outcome(due, due + 0.01, times, end, prompt_tokens=10, completion_tokens=tokens, **more)


def test_figures_by_hand() -> None:
    outcomes = [
        _outcome(1.0, [1.5, 1.6, 1.8], 2.0, 3),  # TTFT 500, TPOT (1.8 - 1.5) / 2, gaps 100 and 200
        _outcome(2.0, [2.1, 2.2], 2.5, 5),  # TTFT 100, TPOT 0.1 / 4: a piece may be several tokens
        _outcome(3.0, [4.0], 4.0, 1),  # TTFT 1000, no TPOT
        _outcome(3.5, [], 5.0, 0, error="HTTP 503", message="full"),
    ]
    found = summary(Round(2.0, 5, outcomes), Limits(ttft=0.6, tpot=0.1))
    assert (found["planned"], found["ended"], found["good"], found["errors"]) == (5, 4, 3, {"HTTP 503": 1})
    assert found["seconds"] == pytest.approx(4.0)  # from 1.0 to 5.0
    assert found["requests_per_second"] == pytest.approx(3 / 4)
    assert found["output_tokens_per_second"] == pytest.approx(9 / 4)
    assert found["prompt_tokens_per_second"] == pytest.approx(30 / 4)
    assert found["ttft_ms"]["p50"] == pytest.approx(500)
    assert found["ttft_ms"]["p99"] == pytest.approx(1000)
    assert found["ttft_ms"]["mean"] == pytest.approx(1600 / 3)
    assert found["tpot_ms"]["p50"] == pytest.approx(25)
    assert found["tpot_ms"]["p95"] == pytest.approx(150)
    assert found["itl_ms"]["p50"] == pytest.approx(100)
    assert found["itl_ms"]["p99"] == pytest.approx(200)
    assert found["e2e_ms"]["p50"] == pytest.approx(1000)
    assert found["goodput"] == pytest.approx(1 / 4)  # the first has a TPOT of 150, the third a TTFT of 1000
    assert summary(Round(2.0, 5, outcomes), Limits(ttft=0.6))["goodput"] == pytest.approx(2 / 4)
    assert found["client_late_ms"] == pytest.approx(10)
    assert most_at_once(outcomes) == 2  # 3.51 to 4.0


def test_nothing_measured_is_no_number() -> None:
    found = summary(Round(1.0, 3), Limits())
    assert math.isnan(found["requests_per_second"])
    assert math.isnan(found["ttft_ms"]["p50"])
    assert json.loads(json.dumps(finite(found), allow_nan=False))["ttft_ms"]["p50"] is None


def test_a_trace_is_poisson() -> None:
    """Gaps of a Poisson process of rate 4 have mean and deviation 1/4; 20,000 of them are known to about a percent."""
    rows = make_trace(4.0, 20_000, (16, 64), (8, 8), seed=1)
    gaps = [later.at - earlier.at for earlier, later in pairwise(rows)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.25, rel=0.03)
    assert math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) == pytest.approx(0.25, rel=0.05)
    lengths = sorted(len(row.prompt) for row in rows)
    assert (lengths[0], lengths[-1]) == (16, 64)
    assert lengths[len(lengths) // 2] == pytest.approx(32, abs=1)  # even on a logarithmic scale
    assert {row.new for row in rows} == {8}
    assert make_trace(4.0, 50, (16, 64), (8, 8), seed=1) == rows[:50]
    assert make_trace(4.0, 50, (16, 64), (8, 8), seed=1, number=1)[0].prompt != rows[0].prompt
    assert {row.at for row in make_trace(math.inf, 5, (1, 1), (1, 1), seed=0)} == {0.0}


def test_traces_of_the_engines_benchmark_are_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = support.ROOT / "benchmarks" / "serving_engine.py"
    spec = importlib.util.spec_from_file_location("serving_engine", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "serving_engine", benchmark)  # dataclasses look themselves up
    spec.loader.exec_module(benchmark)
    options = SimpleNamespace(seed=3, requests=20, rate=5.0, prompt=[4, 30], new=[2, 9], sampled=0.5)
    theirs = benchmark.make_trace(options, 200_000)
    (tmp_path / "trace").write_text("".join(json.dumps(row) + "\n" for row in theirs))
    rows = read_trace(tmp_path / "trace")
    assert [[row.at, list(row.prompt), row.new, row.temperature, row.seed] for row in rows] == [
        [row[key] for key in ("at", "prompt", "new", "temperature", "seed")] for row in theirs
    ]
    write_trace(tmp_path / "again", rows)
    assert [json.loads(line) for line in (tmp_path / "again").read_text().splitlines()] == theirs


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[]", "line 2"),
        ("{", "line 2"),
        ('{"prompt": [1], "new": 1}', "no 'at'"),
        ('{"at": -1, "prompt": [1], "new": 1}', "at is no number"),
        ('{"at": 1e999, "prompt": [1], "new": 1}', "at is no number"),
        ('{"at": true, "prompt": [1], "new": 1}', "at is no number"),
        ('{"at": 0, "prompt": [], "new": 1}', "prompt is no list"),
        ('{"at": 0, "prompt": "hello", "new": 1}', "prompt is no list"),
        ('{"at": 0, "prompt": [-1], "new": 1}', "no token id"),
        ('{"at": 0, "prompt": [1.5], "new": 1}', "no token id"),
        ('{"at": 0, "prompt": [1], "new": 0}', "new is no whole number"),
        ('{"at": 0, "prompt": [1], "new": 1, "temperature": "hot"}', "temperature"),
        ('{"at": 0, "prompt": [1], "new": 1, "seed": 1e3}', "seed"),
        ('{"at": 0, "prompt": [1], "new": ' + "9" * 5000 + "}", "line 2"),
        ("[" * 100_000, "line 2"),
    ],
)
def test_a_bad_trace_names_its_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "trace"
    path.write_text('{"at": 0, "prompt": [1], "new": 1}\n' + line + "\n")
    with pytest.raises(ParameterError, match="line 2") as caught:
        read_trace(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_trace(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name, said in (("empty", "0 requests"), ("bytes", "not UTF-8"), ("none", "No such file"), (".", "a folder")):
        with pytest.raises(ParameterError, match=said):
            read_trace(tmp_path / name)


def test_words_are_about_as_many_as_tokens() -> None:
    assert len(as_text(Row(0.0, tuple(range(100)), 1)).split()) == 99
    assert as_text(Row(0.0, (2,), 1))
