"""Many users on one GPU: what a mixed step costs, and many requests at once. Full shapes, random weights.

    python benchmarks/gpu_many.py --size 27b --weights nf4,bf16 --requests 192
    python benchmarks/gpu_many.py --size 2b --weights nf4 --mixed 8,64,192 --chunks 128,1024

Mixed steps: so many sequences get their next token, after 128 tokens each, while a prompt's chunk is computed beside
them. Next to its time stand that of a prompt of as many tokens as the step has in all, that of decode attention alone
(all layers as one CUDA graph), and the step's time over their sum. Requests: prompts of 100 to 1,024 tokens, evenly,
all submitted at once, with answers of 256 tokens; the engine's steps are timed by kind. Medians (smallest–largest).
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import time
from collections.abc import Callable

import torch
from gpu_bandwidth import read_bandwidth
from gpu_network import SIZES, WEIGHTS, build
from gpu_timing import replay_seconds
from options import names_of

from gemcut.engine import Engine, EngineConfig, Request, SamplingParams
from gemcut.engine.paged import PagedKeyValues
from gemcut.engine.scheduler import Scheduled
from gemcut.model import Model
from gemcut.model.key_values import Span

CONTEXT = 128


def submit(engine: Engine, length: int, new: int, sampling: dict[str, float] | None = None) -> object:
    ids = torch.randint(3, 255000, (length,)).tolist()
    params = SamplingParams(max_new_tokens=new, ignore_eos=True, **(sampling or {"temperature": 0}))  # type: ignore[arg-type]
    return engine.submit(Request(prompt_ids=tuple(ids), params=params))


def timed(call: Callable[[], object]) -> float:
    """Milliseconds until the GPU has done it."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


def summary(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


@torch.inference_mode()
def attention_alone(engine: Engine, count: int) -> float:
    """Milliseconds of decode attention of the first ``count`` running sequences, all layers."""
    model, running = engine.model, engine.scheduler.running[:count]
    tables = [engine.scheduler.tables[sequence.id] for sequence in running]
    spans = [Span(row, 1, sequence.computed) for row, sequence in enumerate(running)]
    kv = PagedKeyValues(model.config, engine.cache, tables, spans)
    spec = model.layer_list[0].attention.decode_spec
    values = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    qkv = torch.randn(count, values, device=engine.device).bfloat16()
    ops = model.ops
    for layer in model.layer_list:  # what is uploaded at first use must not be captured
        ops._attend_decode(layer.attention, qkv, kv)  # type: ignore[attr-defined]

    def run() -> None:
        for layer in model.layer_list:
            ops._attend_decode(layer.attention, qkv, kv)  # type: ignore[attr-defined]

    return 1e3 * statistics.median(replay_seconds([run], 7, 1))


def mixed(model: Model, counts: list[int], chunks: list[int], repetitions: int) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    print("| answers | chunk | mixed, ms | prompt of as many, ms | attention, ms | over the sum | answers alone, ms |")
    print("|---|---|---|---|---|---|---|", flush=True)
    config = EngineConfig(max_batch_tokens=8192, max_context=8192, kv_memory=int(torch.cuda.mem_get_info()[0] * 0.6))
    engine = Engine(model, device, config)
    for count in counts:
        found: dict[tuple[str, int], list[float]] = {}
        for repetition in range(repetitions + 2):  # a size's second prompt captures a graph
            engine.reset()
            engine.cache.forget()
            for chunk in chunks:
                submit(engine, chunk + count, 1)
                found.setdefault(("prompt", chunk), []).append(timed(engine.step))
            for _ in range(count):
                submit(engine, CONTEXT, 400)
            while any(sequence.output_length == 0 for sequence in engine._sequences.values()):
                engine.step()
            for chunk in chunks:
                for _ in range(3):
                    engine.step()
                found.setdefault(("answers", chunk), []).append(timed(lambda: [engine.step() for _ in range(8)]) / 8)
                submit(engine, chunk, 1)
                found.setdefault(("mixed", chunk), []).append(timed(engine.step))
            if repetition == repetitions + 1:
                alone = attention_alone(engine, count)
        for chunk in chunks:
            both, prompt, answers = (found[kind, chunk][2:] for kind in ("mixed", "prompt", "answers"))
            ratio = statistics.median(both) / (statistics.median(prompt) + alone)
            cells = [count, chunk, summary(both), summary(prompt), f"{alone:.2f}", f"{ratio:.2f}", summary(answers)]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def requests(
    model: Model, count: int, new: int, chunk: int, sampling: dict[str, float] | None, repetitions: int
) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    memory = int((torch.cuda.mem_get_info()[0] - (6 << 30)) * 0.9)
    engine = Engine(model, device, EngineConfig(max_batch_tokens=chunk, max_context=8192, kv_memory=memory))
    torch.manual_seed(0)
    lengths = torch.linspace(100, 1024, count).round().int()[torch.randperm(count)].tolist()
    batches: list[list[Scheduled]] = []
    schedule = engine.scheduler.schedule

    def noted() -> list[Scheduled]:
        batches.append(schedule())
        return batches[-1]

    engine.scheduler.schedule = noted  # type: ignore[method-assign]
    speeds = []
    for repetition in range(repetitions + 1):  # the first one captures
        engine.cache.forget()
        batches.clear()
        steps: list[float] = []
        for length in lengths:
            submit(engine, length, new, sampling)
        torch.cuda.synchronize()
        started = last = time.perf_counter()
        while engine.has_work:
            engine.step()
            now = time.perf_counter()
            steps.append(1e3 * (now - last))
            last = now
        torch.cuda.synchronize()
        if repetition:
            speeds.append(count * new / (time.perf_counter() - started))
    print(
        f"{count} requests at once, {sum(lengths)} prompt tokens, answers of {new}, chunks of {chunk}, "
        f"{sampling or 'greedy'}: output tok/s {summary(speeds)}; {engine.scheduler.preemptions} preemptions"
    )
    for kind in ("decode", "mixed"):
        own = [
            (batch, ms)
            for batch, ms in zip(batches, steps, strict=True)
            if batch and (max(s.length for s in batch) == 1) == (kind == "decode")
        ]
        if own:
            rows = statistics.mean(sum(s.length == 1 for s in batch) for batch, _ in own)
            prompt = statistics.mean(sum(s.length for s in batch if s.length > 1) for batch, _ in own)
            print(
                f"  the last time's {len(own)} {kind} steps: {statistics.mean(ms for _, ms in own):.2f} ms each, "
                f"{rows:.1f} rows and {prompt:.0f} prompt tokens on average",
                flush=True,
            )
    del engine


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="27b")
    parser.add_argument("--weights", type=names_of("kind of weights", WEIGHTS), default=["nf4"])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--mixed", type=numbers, default=[], help="answers in a mixed step: 8,64,192")
    parser.add_argument("--chunks", type=numbers, default=[128, 512, 1024, 4096])
    parser.add_argument("--requests", type=numbers, default=[], help="requests at once")
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--chunk", type=numbers, default=[4096], help="max_batch_tokens of --requests")
    parser.add_argument("--sampled", action="store_true", help="requests draw: temperature 0.8, top_p 0.95, top_k 64")
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {platform.python_version()}; "
        f"read bandwidth {read_bandwidth() / 1e9:,.0f} GB/s",
        flush=True,
    )
    for weights in options.weights:
        print(f"\n{options.size} {weights}\n", flush=True)
        model, _ = build(options.size, weights, options.layers)
        if options.mixed:
            mixed(model, options.mixed, options.chunks, options.repetitions)
        for count in options.requests:
            for chunk in options.chunk:
                sampling = {"temperature": 0.8, "top_p": 0.95, "top_k": 64} if options.sampled else None
                requests(model, count, options.new, chunk, sampling, options.repetitions)
                gc.collect()
                torch.cuda.empty_cache()
        del model
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
