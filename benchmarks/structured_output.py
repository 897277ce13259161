"""What structured output costs: the time of a mask, and tokens a second with 0, 8 and 64 constrained rows.

Rows with a grammar and rows without it answer side by side; 0 constrained rows is the same number of rows without any.

    python benchmarks/structured_output.py --tokenizer ../shared/real/gemma2-tokenizer
    python benchmarks/structured_output.py --tokenizer FOLDER --model FOLDER --weights nf4 --device cuda
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import numpy as np
import torch

from gemcut.config import FAMILY
from gemcut.engine import EngineConfig, Grammar, SamplingParams
from gemcut.engine.masks import GrammarEdit
from gemcut.gemma import Gemma
from gemcut.model import Model
from gemcut.text import Tokenizer

TEXT = {"type": "string"}
SCHEMA = {
    "type": "object",
    "properties": {
        "number": {"type": "string", "pattern": "^INV-[0-9]{6}$"},
        "customer": {"type": "object", "properties": {"name": TEXT, "city": TEXT}, "required": ["name", "city"]},
        "lines": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"text": {"type": "string", "maxLength": 80}, "price": {"type": "number"}},
                "required": ["text", "price"],
            },
            "maxItems": 20,
        },
    },
    "required": ["number", "customer", "lines"],
}


def mask_times(gemma: Gemma, tokens: int) -> None:
    """Time from telling a token to its mask, in one request alone, of a random walk through the grammar."""
    grammar, stops = Grammar.json_schema(SCHEMA), gemma.stop_ids
    started = time.perf_counter()
    gemma.grammars.prepare()
    print(f"set-up of the vocabulary: {time.perf_counter() - started:.2f} s")
    started = time.perf_counter()
    gemma.grammars.compile(grammar)
    print(f"compiling: {(time.perf_counter() - started) * 1e3:.1f} ms")
    alone = np.sort(compute_times(gemma, grammar, tokens)) * 1e6
    print(
        f"computing a mask, processor time: mean {alone.mean():.0f} µs, p99 {np.quantile(alone, 0.99):.0f} µs, "
        f"max {alone[-1]:.0f} µs ({len(alone)} masks)"
    )
    chooser, taken = np.random.default_rng(0), []
    while len(taken) < tokens:
        edit: GrammarEdit = gemma.grammars.edit(grammar, stops, 10**6)
        path = [2]
        for _ in range(200):
            begun = time.perf_counter()
            found = edit(path, 1)
            taken.append(time.perf_counter() - begun)
            assert found.allowed is not None
            allowed = np.flatnonzero(np.unpackbits(found.allowed.numpy().view(np.uint8), bitorder="little"))
            token = int(chooser.choice(allowed))
            if token in stops:
                break
            path.append(token)
    times = sorted(taken)
    print(
        f"a mask, with the way to its thread and back: mean {statistics.mean(times) * 1e6:.0f} µs, "
        f"p99 {times[int(0.99 * len(times))] * 1e6:.0f} µs, max {times[-1] * 1e6:.0f} µs ({len(times)} masks)"
    )


def compute_times(gemma: Gemma, grammar: Grammar, tokens: int) -> np.ndarray:
    """Processor seconds of the matcher's step and mask alone, of random walks through the grammar."""
    base, chooser, taken = gemma.grammars.compile(grammar).matcher, np.random.default_rng(1), []
    row = np.zeros(-(-gemma.config.vocab_size // 32), dtype=np.int32)
    while len(taken) < tokens:
        matcher, token = base.deep_copy(), None
        for _ in range(200):
            begun = time.thread_time()
            if token is not None:
                matcher.consume_token(token)
            matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
            taken.append(time.thread_time() - begun)
            token = int(chooser.choice(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))))
            if token in gemma.stop_ids:
                break
    return np.array(taken)


def throughput(gemma: Gemma, rows: int, constrained: int, new: int) -> float:
    """Tokens a second of ``rows`` answers, the first ``constrained`` of which have a grammar."""
    free = SamplingParams(max_new_tokens=new, ignore_eos=True, seed=1)
    # The length leaves the grammar's own end out of it: an answer that ends sooner would make the batch smaller.
    bound = replace(free, ignore_eos=False, grammar=Grammar.json_schema(SCHEMA), max_new_tokens=new)
    params = [replace(bound if row < constrained else free, seed=row) for row in range(rows)]
    prompts = [[2, 1000 + row] for row in range(rows)]
    started = time.perf_counter()
    results = gemma.complete(prompts, params)
    elapsed = time.perf_counter() - started
    return sum(len(result.token_ids) for result in results) / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder with Gemma's tokenizer.json")
    parser.add_argument("--model", help="a real checkpoint instead of random weights")
    parser.add_argument("--layers", type=int, default=2, help="of the random 2B; all at 0")
    parser.add_argument("--size", default="2b", choices=["2b", "9b", "27b"])
    parser.add_argument("--weights", default="bf16", choices=["bf16", "nf4", "int8"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", default="64")
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--masks", type=int, default=4000)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    tokenizer, rows = Tokenizer.from_folder(options.tokenizer), int(options.rows)
    device = torch.device(options.device)
    engine = EngineConfig(max_batch_size=rows, sequences=4, max_context=512)
    if options.model is not None:
        quantization = None if options.weights == "bf16" else options.weights
        gemma = Gemma.load(
            options.model, device=device, quantization=quantization, max_batch_size=rows, max_context=512
        )
    else:
        if options.weights != "bf16":
            parser.error("random weights are bf16; give --model for others")
        config = FAMILY[f"gemma-2-{options.size}"]
        if options.layers:
            kinds = config.layer_types[: options.layers]
            config = config.replace(num_hidden_layers=options.layers, layer_types=kinds)
        model = Model(config, dtype=torch.bfloat16, device=device)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02)
        gemma = Gemma(model, tokenizer, device, engine=engine)
    print(f"{gemma!r}, {torch.get_num_threads()} threads")
    mask_times(gemma, options.masks)
    counts = sorted({0, min(8, rows), rows})
    for count in counts:
        throughput(gemma, rows, count, 4)  # graphs, grammars, caches
    found: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(options.repetitions):
        for count in counts:
            found[count].append(throughput(gemma, rows, count, options.new))
    base = statistics.median(found[0])
    for count, speeds in found.items():
        speed = statistics.median(speeds)
        print(f"{rows} rows, {count} constrained: {speed:.1f} tok/s ({speed / base:.1%})")


if __name__ == "__main__":
    main()
