"""One trace of requests through the engine, as a server would send them: time to first token, gaps, tokens a second.

    python benchmarks/serving_engine.py --requests 40 --rate 2
    python benchmarks/serving_engine.py --write trace.jsonl --seed 1     # for another engine
    python benchmarks/serving_engine.py --replay trace.jsonl

Requests arrive at random (a Poisson process of ``--rate`` a second); prompts and answers have random lengths between
two bounds, even on a logarithmic scale. A line of a trace has ``at`` (seconds), ``prompt`` (token ids), ``new``
(tokens of the answer, never fewer), ``temperature`` and ``seed``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import platform
import random
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import gemcut
from gemcut import Gemma, SamplingParams


@dataclass
class Times:
    """When things of one request happened, in seconds from the trace's beginning."""

    due: float
    asked: float = 0.0
    returned: float = 0.0  # when the call that starts it came back
    tokens: list[float] = field(default_factory=list)


def make_trace(options: argparse.Namespace, vocabulary: int) -> list[dict[str, Any]]:
    chance, at, trace = random.Random(options.seed), 0.0, []

    def length(bounds: list[int]) -> int:
        return round(math.exp(chance.uniform(math.log(bounds[0]), math.log(bounds[1]))))

    for number in range(options.requests):
        at += chance.expovariate(options.rate)
        prompt = [2, *(chance.randrange(1000, vocabulary) for _ in range(length(options.prompt) - 1))]
        sampled = chance.random() < options.sampled
        row = {"at": round(at, 4), "prompt": prompt, "new": length(options.new), "seed": number}
        trace.append({**row, "temperature": 1.0 if sampled else 0.0})
    return trace


async def replay(gemma: Gemma, trace: list[dict[str, Any]]) -> list[Times]:
    """Send each request when it is due and read its events."""
    begin = time.perf_counter()

    async def one(row: dict[str, Any]) -> Times:
        times = Times(row["at"])
        await asyncio.sleep(max(0.0, row["at"] - (time.perf_counter() - begin)))
        times.asked = time.perf_counter() - begin
        params = SamplingParams(
            max_new_tokens=row["new"], temperature=row["temperature"], seed=row["seed"], ignore_eos=True
        )
        stream = gemma.stream_ids(row["prompt"], params)
        times.returned = time.perf_counter() - begin
        async for _ in stream.events():
            times.tokens.append(time.perf_counter() - begin)
        (await stream.finished()).checked()
        return times

    return list(await asyncio.gather(*map(one, trace)))


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least ``share`` of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def resident_bytes() -> int:
    """What this process holds in memory; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


def watched(gemma: Gemma) -> list[float]:
    """The ends of all steps from now on, by `time.perf_counter`."""
    ends: list[float] = []
    step = gemma.engine.step

    def timed() -> Any:
        try:
            return step()
        finally:
            ends.append(time.perf_counter())

    gemma.engine.step = timed  # type: ignore[method-assign]
    return ends


def report(rows: list[Times], ends: list[float]) -> dict[str, float]:
    first = [times.tokens[0] - times.due for times in rows]
    gaps = [later - earlier for times in rows for earlier, later in pairwise(times.tokens)]
    calls = [times.returned - times.asked for times in rows]
    spans = [(times.tokens[0], times.tokens[-1]) for times in rows]
    steps = [after - before for before, after in pairwise(ends)]
    count = sum(len(times.tokens) for times in rows)
    return {
        "output tok/s": count / (max(end for _, end in spans) - min(times.asked for times in rows)),
        "first token, p50 ms": 1000 * percentile(first, 0.5),
        "first token, p99 ms": 1000 * percentile(first, 0.99),
        "gap of tokens, p50 ms": 1000 * percentile(gaps or [0.0], 0.5),
        "gap of tokens, p99 ms": 1000 * percentile(gaps or [0.0], 0.99),
        "gap of tokens, longest ms": 1000 * max(gaps, default=0.0),
        "step, longest ms": 1000 * max(steps, default=0.0),
        "stream() returns within, p99 ms": 1000 * percentile(calls, 0.99),
        "stream() returns within, longest ms": 1000 * max(calls),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--quantization", default=None)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
    parser.add_argument("--prompt", type=int, nargs=2, default=[16, 1024], metavar=("FROM", "TO"))
    parser.add_argument("--new", type=int, nargs=2, default=[8, 128], metavar=("FROM", "TO"))
    parser.add_argument("--sampled", type=float, default=0.5, help="this share of them draws at temperature 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--step-seconds", default="auto", help="the engine's time budget of a step; 0: none; without it its default"
    )
    parser.add_argument("--write", type=Path, default=None, help="write the trace and end")
    parser.add_argument("--replay", type=Path, default=None, help="take the trace from this file")
    options = parser.parse_args()
    if options.replay is not None:
        trace = [json.loads(line) for line in options.replay.read_text().splitlines()]
    else:
        trace = make_trace(options, 200_000)
    if options.write is not None:
        options.write.write_text("".join(json.dumps(row) + "\n" for row in trace))
        return
    gemma = Gemma.load(
        options.model,
        dtype=options.dtype,
        device=options.device,
        quantization=options.quantization,
        step_seconds="auto" if options.step_seconds == "auto" else float(options.step_seconds),
        progress=False,
    )
    where = torch.cuda.get_device_name(gemma.device) if gemma.device.type == "cuda" else platform.processor()
    print(f"{gemma!r} on {where or gemma.device}, {torch.get_num_threads()} threads of PyTorch {torch.__version__}")
    print(
        f"gemcut {gemcut.__version__}, Python {platform.python_version()}, {len(trace)} requests, seed {options.seed}"
    )
    tokens = sum(len(row["prompt"]) for row in trace), sum(row["new"] for row in trace)
    print(
        f"{tokens[0]} prompt tokens, {tokens[1]} new ones, the last request at {max(row['at'] for row in trace):.1f} s"
    )
    ends = watched(gemma)
    found: dict[str, list[float]] = {}
    memory = []
    for repetition in range(options.repetitions + 1):  # the first one warms up
        gemma.engine.cache.forget()  # nothing runs, and no prompt of the last round may be found
        ends.clear()
        rows = asyncio.run(replay(gemma, trace))
        memory.append(resident_bytes())
        if repetition:
            for name, value in report(rows, ends).items():
                found.setdefault(name, []).append(value)
    for name, values in found.items():
        values.sort()
        print(f"{name}: {values[len(values) // 2]:.1f} ({values[0]:.1f} to {values[-1]:.1f})")
    print(f"memory after each round, MB: {', '.join(f'{size / 1e6:.0f}' for size in memory)}")


if __name__ == "__main__":
    main()
