"""Metrics: what a scraper reads, against values counted by hand, and parsed by prometheus_client itself."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.driver import GREEDY, Recording, prompts_of, small_model
from gemcut.engine import SamplingParams
from gemcut.engine.request import TokenEvent
from gemcut.server.metrics import BETWEEN_TOKENS, FIRST_TOKEN, Histogram, Metrics, exposition

MODEL = {"model_name": "tiny"}


def scraped(
    metrics: Metrics, engine: Any = None, **options: Any
) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample by its name and labels."""
    body, content_type = exposition(metrics, "tiny", engine, **options)
    assert content_type.startswith(b"text/plain")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def value(found: Any, name: str, **labels: str) -> float:
    return found[name, frozenset({**MODEL, **labels}.items())]  # type: ignore[no-any-return]


def test_a_histogram_counts_as_prometheus_does() -> None:
    """A value that is a bound belongs below it; counts add up."""
    histogram = Histogram((1, 2, 5))
    for number, times in ((0.5, 1), (1, 2), (1.5, 1), (5, 3), (6, 1)):
        histogram.observe(number, times)
    assert histogram.buckets() == [("1.0", 3), ("2.0", 4), ("5.0", 7), ("+Inf", 8)]
    assert histogram.sum == 0.5 + 2 + 1.5 + 15 + 6


def test_requests_and_tokens_through_an_engine() -> None:
    engine = Recording(small_model())
    metrics = Metrics()
    prompts = prompts_of(9, 20, 3)
    prompts = [[token % 64 for token in prompt] for prompt in (*prompts, prompts[1])]
    sequences = [engine.add(prompt, GREEDY) for prompt in prompts[:3]]
    metrics.answers_started(sequences)
    found = scraped(metrics, engine)
    assert value(found, "gemcut:num_requests_waiting") == 3
    assert value(found, "gemcut:num_requests_running") == 0
    assert value(found, "gemcut:kv_cache_usage_perc") == 0
    metrics.step(engine.step())
    found = scraped(metrics, engine)
    assert value(found, "gemcut:num_requests_waiting") == 0
    assert value(found, "gemcut:num_requests_running") == 3
    full, sliding = engine.cache.full, engine.cache.sliding
    share = max(1 - pool.free / pool.count for pool in (full, sliding))
    assert value(found, "gemcut:kv_cache_usage_perc") == pytest.approx(share)
    assert share > 0
    while engine.has_work:
        metrics.step(engine.step())
    metrics.answers_ended(sequences)
    again = engine.add(prompts[3], GREEDY)
    metrics.answers_started([again])
    while engine.has_work:
        metrics.step(engine.step())
    metrics.answers_ended([again])
    found = scraped(metrics, engine)
    new = 4 * GREEDY.max_new_tokens
    assert value(found, "gemcut:prompt_tokens_total") == 9 + 20 + 3 + 20
    assert value(found, "gemcut:prefix_cache_queries_total") == 52
    assert value(found, "gemcut:prefix_cache_hits_total") == 16  # four blocks of four; the last one is computed again
    assert value(found, "gemcut:generation_tokens_total") == new
    assert value(found, "gemcut:time_to_first_token_seconds_count") == 4
    assert value(found, "gemcut:inter_token_latency_seconds_count") == new - 4
    for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time"):
        assert value(found, f"gemcut:{name}_seconds_count") == 4
    assert value(found, "gemcut:request_success_total", finished_reason="length") == 4
    assert value(found, "gemcut:request_success_total", finished_reason="cancelled") == 0
    assert value(found, "gemcut:request_prompt_tokens_bucket", le="10.0") == 2
    assert (
        value(found, "gemcut:cache_config_info", block_size="4", num_gpu_blocks=str(min(full.count, sliding.count)))
        == 1
    )
    whole = sum(s.ended - s.submitted for s in (*sequences, again))  # type: ignore[operator,misc]
    assert value(found, "gemcut:e2e_request_latency_seconds_sum") == pytest.approx(whole)


def test_distances_between_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that go on together are one observation, with the right count; one that joined has its own distance."""
    now = 100.0
    monkeypatch.setattr("gemcut.server.metrics.time.perf_counter", lambda: now)
    metrics = Metrics()
    engine = Recording(small_model())
    one, two = engine.add([1], GREEDY), engine.add([2], GREEDY)
    one.submitted, two.submitted = 99.9, 99.97
    metrics.answers_started([one, two])

    def step(*ids: int) -> None:
        metrics.step([TokenEvent(i, 5) for i in ids])

    step(one.id, two.id)
    assert metrics.first_token.counts == Histogram(FIRST_TOKEN).counts[:4] + [1, 0, 0, 1] + [0] * 15
    now = 100.02
    step(one.id, two.id)
    now = 100.05
    step(one.id)
    now = 100.09
    step(one.id, two.id, 12345)  # one that nobody told of is counted as a token alone
    expected = Histogram(BETWEEN_TOKENS)
    for distance, times in ((0.02, 2), (0.03, 1), (0.04, 1), (0.07, 1)):
        expected.observe(distance, times)
    assert metrics.between_tokens.counts == expected.counts
    assert metrics.between_tokens.sum == pytest.approx(expected.sum)
    assert metrics.generated_tokens == 8
    metrics.answers_ended([one, two])
    assert metrics._last == {}


def test_errors_and_refusals() -> None:
    metrics = Metrics()
    for endpoint, status, error, door in (
        ("/v1/models", 200, None, False),
        ("/v1/chat/completions", 400, "invalid_value", False),
        ("/v1/chat/completions", 429, "rate_limit_exceeded", True),
        ("other", 404, "not_found", False),
        ("/v1/chat/completions", 400, "invalid_value", False),
    ):
        metrics.request_started(endpoint)
        metrics.request_finished(endpoint, status, error, at_door=door)
    assert metrics.running == 0
    found = scraped(metrics)
    assert (
        found["gemcut:http_requests_total", frozenset({"route": "/v1/chat/completions", "status": "400"}.items())] == 2
    )
    assert found["gemcut:errors_total", frozenset({"kind": "invalid_value"}.items())] == 2
    assert value(found, "gemcut:admission_rejections_total", reason="rate_limit_exceeded") == 1
    assert found["process_resident_memory_bytes", frozenset()] > 0


def test_what_was_cancelled_before_its_first_step() -> None:
    engine = Recording(small_model())
    metrics = Metrics()
    sequence = engine.add([1, 2], SamplingParams(max_new_tokens=3))
    metrics.answers_started([sequence])
    engine.cancel(sequence.id)
    metrics.step(engine.step())
    metrics.answers_ended([sequence])
    found = scraped(metrics, engine)
    assert value(found, "gemcut:request_success_total", finished_reason="cancelled") == 1
    assert value(found, "gemcut:request_queue_time_seconds_count") == 0


def test_an_alias_adds_the_names_that_gateways_ask_for() -> None:
    """Those of the inference gateway's protocol for model servers, with vLLM's labels."""
    found = scraped(Metrics(), Recording(small_model()), aliases=("vllm",))
    for name in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc", "prompt_tokens_total"):
        assert value(found, f"vllm:{name}") == value(found, f"gemcut:{name}") == 0
    assert any(name == "vllm:cache_config_info" for name, _ in found)
    assert value(found, "vllm:request_success_total", finished_reason="abort") == 0  # vLLM's word for cancelled
    assert value(found, "gemcut:request_success_total", finished_reason="cancelled") == 0
    assert not any(name.startswith("vllm:") for name, _ in scraped(Metrics(), Recording(small_model())))


def test_openmetrics_where_it_is_asked_for() -> None:
    body, content_type = exposition(Metrics(), "tiny", None, accept="application/openmetrics-text; version=1.0.0")
    assert content_type.startswith(b"application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
