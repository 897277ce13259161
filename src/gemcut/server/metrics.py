"""Metrics: what the server counts, in Prometheus' format.

Everything is counted in the server's own thread, so nothing is locked; the engine's gauges are read when somebody asks.
A step costs one observation for all tokens that came at equal distances, not one a token.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Many
from typing import TYPE_CHECKING

from gemcut.engine.request import Sequence, TokenEvent
from gemcut.engine.results import Stats
from gemcut.server.asgi import Request, Send, respond_bytes

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from gemcut.engine import Engine
    from gemcut.server.state import ServerState

#: Upper bounds of the buckets, in seconds; the same as vLLM's, so that dashboards fit.
FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
BETWEEN_TOKENS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
WHOLE = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
#: Upper bounds of numbers of tokens.
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)

OWN, VLLM = "gemcut", "vllm"
ALIASES = (VLLM,)


class Histogram:
    """How many values fell below each bound, and their sum."""

    def __init__(self, bounds: Many[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Add a value, so many times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, how many values are not above it) as Prometheus wants them."""
        found, total = [], 0
        for bound, count in zip([*map(float, self.bounds), float("inf")], self.counts, strict=True):
            total += count
            found.append(("+Inf" if bound == float("inf") else repr(bound), float(total)))
        return found


class Metrics:
    """What happened so far."""

    def __init__(self) -> None:
        self.http: Counter[tuple[str, int]] = Counter()
        self.refused: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.finished: Counter[str] = Counter({"stop": 0, "length": 0, "cancelled": 0, "error": 0})
        self.running = 0
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = self.steps = 0
        self.first_token = Histogram(FIRST_TOKEN)
        self.between_tokens = Histogram(BETWEEN_TOKENS)
        self.whole, self.queue, self.prefill, self.decode = (Histogram(WHOLE) for _ in range(4))
        self.prompt_sizes, self.answer_sizes = Histogram(TOKENS), Histogram(TOKENS)
        #: When each answer under way had its last token; where it had none yet, minus the time it was submitted at.
        self._last: dict[int, float] = {}

    def request_started(self, endpoint: str) -> None:
        """A request's head is there."""
        self.running += 1

    def answers_started(self, sequences: Iterable[Sequence]) -> None:
        """Answers were given to the engine."""
        for sequence in sequences:
            self._last[sequence.id] = -sequence.submitted

    def step(self, events: Many[TokenEvent]) -> None:
        """What one engine step gave."""
        now, last = time.perf_counter(), self._last
        tokens = same = 0
        earlier = None
        for event in events:
            if event.token_id is None:
                continue
            tokens += 1
            before = last.get(event.request_id)
            if before is None:
                continue
            last[event.request_id] = now
            if before < 0:
                self.first_token.observe(now + before)
            elif before == earlier:
                same += 1
            else:
                if earlier is not None:
                    self.between_tokens.observe(now - earlier, same)
                earlier, same = before, 1
        if earlier is not None:
            self.between_tokens.observe(now - earlier, same)
        self.generated_tokens += tokens
        self.steps += 1

    def answers_ended(self, sequences: Iterable[Sequence]) -> None:
        """Answers have ended, or their client has left: then they are cancelled."""
        for sequence in sequences:
            self._last.pop(sequence.id, None)
            end = sequence.events[-1].finish_reason if sequence.events else None
            self.finished[end or "cancelled"] += 1
            if end is None:
                continue
            stats = Stats.of(sequence)
            self.prompt_tokens += sequence.prompt_length
            self.cached_tokens += stats.cached_tokens
            self.prompt_sizes.observe(sequence.prompt_length)
            self.answer_sizes.observe(stats.generated_tokens)
            if sequence.started is not None:
                self.queue.observe(stats.queued_seconds)
                self.prefill.observe(stats.prefill_seconds)
                self.decode.observe(stats.decode_seconds)
                self.whole.observe(stats.queued_seconds + stats.prefill_seconds + stats.decode_seconds)

    def request_finished(self, endpoint: str, status: int, error: str | None = None, *, at_door: bool = False) -> None:
        """A request has its whole answer (status 499: its client left first).

        Args:
            endpoint: the path of a route, or "other".
            status: the HTTP status.
            error: a word for what went wrong, of those that are in the code; None: nothing.
            at_door: whether it was refused before anything was done for it.
        """
        self.running -= 1
        self.http[endpoint, status] += 1
        if error is not None:
            (self.refused if at_door else self.errors)[error] += 1


class Exposition:
    """Metrics and an engine as families of Prometheus. ``collect`` is what a registry of prometheus_client calls."""

    def __init__(self, metrics: Metrics, model: str, engine: Engine | None, *, aliases: Many[str] = ()) -> None:
        self.metrics, self.model, self.engine, self.aliases = metrics, model, engine, aliases

    def collect(self) -> Iterator[Metric]:
        """All families under gemcut's names, then under those of each alias."""
        from prometheus_client.core import CounterMetricFamily

        yield from self._families(OWN)
        metrics = self.metrics
        http = CounterMetricFamily(
            "gemcut:http_requests", "HTTP requests by route and status.", labels=["route", "status"]
        )
        for (route, status), count in sorted(metrics.http.items()):
            http.add_metric([route, str(status)], count)
        yield http
        errors = CounterMetricFamily("gemcut:errors", "Requests that ended with an error, by kind.", labels=["kind"])
        for kind, count in sorted(metrics.errors.items()):
            errors.add_metric([kind], count)
        yield errors
        for alias in self.aliases:
            yield from self._families(alias)

    def _families(self, prefix: str) -> Iterator[Metric]:
        from prometheus_client.core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
            InfoMetricFamily,
        )

        metrics, labels, own = self.metrics, ["model_name"], [self.model]

        def gauge(name: str, text: str, value: float) -> Metric:
            family = GaugeMetricFamily(f"{prefix}:{name}", text, labels=labels)
            family.add_metric(own, value)
            return family

        def counter(name: str, text: str, value: float) -> Metric:
            family = CounterMetricFamily(f"{prefix}:{name}", text, labels=labels)
            family.add_metric(own, value)
            return family

        def counters(name: str, text: str, label: str, values: Counter[str]) -> Metric:
            family = CounterMetricFamily(f"{prefix}:{name}", text, labels=[*labels, label])
            for kind, count in sorted(values.items()):
                family.add_metric([*own, kind], count)
            return family

        def histogram(name: str, text: str, values: Histogram) -> Metric:
            family = HistogramMetricFamily(f"{prefix}:{name}", text, labels=labels)
            family.add_metric(own, values.buckets(), values.sum)
            return family

        if self.engine is not None:
            scheduler, cache = self.engine.scheduler, self.engine.cache
            pools = [pool for pool in (cache.full, cache.sliding) if pool.count]
            used = max((1 - pool.free / pool.count for pool in pools), default=0.0)
            waiting = len(scheduler.waiting) + len(self.engine._new)
            yield gauge("num_requests_running", "Answers that are being computed.", len(scheduler.running))
            yield gauge("num_requests_waiting", "Answers that wait for their first step.", waiting)
            yield gauge("kv_cache_usage_perc", "Part of the cache blocks in use, from 0 to 1.", used)
            yield counter("num_preemptions", "Answers that gave their blocks back for others.", scheduler.preemptions)
            info = InfoMetricFamily(f"{prefix}:cache_config", "Size of the key-value cache.", labels=labels)
            blocks = min((pool.count for pool in pools), default=0)
            info.add_metric(own, {"block_size": str(cache.block_size), "num_gpu_blocks": str(blocks)})
            yield info
        yield counter("prefix_cache_queries", "Prompt tokens that were looked for in the cache.", metrics.prompt_tokens)
        yield counter("prefix_cache_hits", "Prompt tokens that were found in the cache.", metrics.cached_tokens)
        yield counter("prompt_tokens", "Tokens of prompts.", metrics.prompt_tokens)
        yield counter("generation_tokens", "Tokens of answers.", metrics.generated_tokens)
        yield histogram("time_to_first_token_seconds", "From a request to its first token.", metrics.first_token)
        yield histogram("inter_token_latency_seconds", "Between two tokens of an answer.", metrics.between_tokens)
        yield histogram("e2e_request_latency_seconds", "From a request to its last token.", metrics.whole)
        yield histogram("request_queue_time_seconds", "From a request to its first step.", metrics.queue)
        yield histogram("request_prefill_time_seconds", "From its first step to its first token.", metrics.prefill)
        yield histogram("request_decode_time_seconds", "From its first token to its last.", metrics.decode)
        yield histogram("request_prompt_tokens", "Tokens of a prompt.", metrics.prompt_sizes)
        yield histogram("request_generation_tokens", "Tokens of an answer.", metrics.answer_sizes)
        finished = metrics.finished
        if prefix == VLLM:
            finished = Counter({"abort" if why == "cancelled" else why: count for why, count in finished.items()})
        yield counters("request_success", "Answers that ended, by reason.", "finished_reason", finished)
        yield counters("admission_rejections", "Requests refused at the door, by reason.", "reason", metrics.refused)


def exposition(
    metrics: Metrics, model: str, engine: Engine | None, *, aliases: Many[str] = (), accept: str = ""
) -> tuple[bytes, bytes]:
    """(what ``GET /metrics`` answers, its content type); ``accept`` is the request's header of that name."""
    from prometheus_client import CollectorRegistry, ProcessCollector
    from prometheus_client.exposition import choose_encoder

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Exposition(metrics, model, engine, aliases=aliases))
    ProcessCollector(registry=registry)
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type.encode()


async def scrape(state: ServerState, request: Request, send: Send) -> None:
    """Metrics for Prometheus."""
    engine = None if state.gemma is None else state.gemma.engine
    accept = request.headers.get("accept", "")
    body, content_type = exposition(state.metrics, state.name, engine, aliases=state.aliases, accept=accept)
    await respond_bytes(send, body, content_type)


#: This module's part of the routes.
ROUTES = {("GET", "/metrics"): scrape}
