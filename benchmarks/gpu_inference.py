"""One user, or several, on one GPU: decode and prefill of a full Gemma 2 shape, random weights, beside transformers.

    python benchmarks/gpu_inference.py --size 27b --weights nf4 --peer transformers
    python benchmarks/gpu_inference.py --size 27b --weights nf4 --peer transformers --quick     # two requests a row
    make bench-gpu                                         # three sizes, four formats, without the peer

Ours is timed through the engine; every repetition is a request of its own, of which decode counts the steps after the
first token and prefill the time until it. The peer is timed through generate(): in bf16, or quantized by bitsandbytes
where that is installed, which the table says. "A token" is what a step must read, weights and cached keys and values,
or the operations of a token's GEMMs; "of limit" compares with the read bandwidth, or the rate of a bf16 GEMM of
8192 x 8192 x 8192, measured before and after (the higher counts). Progress goes to stderr, a table a size to stdout.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import platform
import statistics
import sys
import time
from dataclasses import dataclass

import torch
from gpu_bandwidth import read_bandwidth
from gpu_network import SIZES, WEIGHTS, build, cache_bytes, product_flop
from options import names_of

from gemcut.engine import Engine, EngineConfig, Request, SamplingParams

GREEDY: dict[str, float] = {"temperature": 0}
SAMPLED: dict[str, float] = {"temperature": 0.8, "top_k": 64, "top_p": 0.95, "seed": 1}
PEER_TOKENS = 16  # of transformers' decode, some ten a second


@dataclass(frozen=True)
class Row:
    """One line of the table: tok/s of each repetition, and what bounds them."""

    weights: str
    name: str
    speeds: list[float]
    nbytes: int = 0  # read a token
    flop: int = 0  # done a token

    @property
    def needs(self) -> str:
        return f"{self.nbytes / 1e9:.2f} GB" if self.nbytes else f"{self.flop / 1e9:.1f} GFLOP"

    def of_limit(self, bandwidth: float, rate: float) -> float:
        """The share of the speed that ``bandwidth`` bytes/s or ``rate`` FLOP/s allow."""
        return statistics.median(self.speeds) / (bandwidth / self.nbytes if self.nbytes else rate / self.flop)


def summary(speeds: list[float]) -> str:
    """The median of tok/s, and the smallest and largest."""
    digits = 1 if statistics.median(speeds) < 1000 else 0
    middle, low, high = (f"{v:,.{digits}f}" for v in (statistics.median(speeds), min(speeds), max(speeds)))
    return f"{middle} ({low}–{high})"


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def product_rate() -> float:
    """FLOP/s of a large bf16 matrix product on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    seconds = []
    for _ in range(13):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.mm(a, b)
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return 2 * 8192**3 / statistics.median(seconds[3:])


def request(engine: Engine, prompt: int, new: int, sampling: dict[str, float] = GREEDY) -> tuple[float, float]:
    """(tok/s of the steps after the first, of the prompt until the first token) of one request."""
    ids = torch.randint(3, 255000, (prompt,)).tolist()
    params = SamplingParams(max_new_tokens=new, ignore_eos=True, **sampling)  # type: ignore[arg-type]
    torch.cuda.synchronize()
    started = time.perf_counter()
    sequence = engine.submit(Request(prompt_ids=tuple(ids), params=params))
    while sequence.output_length == 0:
        engine.step()
    first = time.perf_counter()
    while engine.has_work:
        engine.step()
    torch.cuda.synchronize()
    return (new - 1) / (time.perf_counter() - first), prompt / (first - started)


def together(engine: Engine, users: int, prompt: int, new: int) -> float:
    """tok/s of all ``users`` while every one of them decodes, greedily, after its own prompt."""
    params = SamplingParams(max_new_tokens=new, ignore_eos=True, temperature=0)
    prompts = torch.randint(3, 255000, (users, prompt)).tolist()
    sequences = [engine.submit(Request(prompt_ids=tuple(ids), params=params)) for ids in prompts]
    while any(sequence.output_length == 0 for sequence in sequences):
        engine.step()
    torch.cuda.synchronize()
    started, before = time.perf_counter(), sum(sequence.output_length for sequence in sequences)
    while all(sequence.output_length < new for sequence in sequences):
        engine.step()
    torch.cuda.synchronize()
    speed = (sum(sequence.output_length for sequence in sequences) - before) / (time.perf_counter() - started)
    while engine.has_work:
        engine.step()
    return speed


def our_rows(size: str, weights: str, options: argparse.Namespace) -> list[Row]:
    """All rows of one size and kind of weights."""
    model, nbytes = build(size, weights, options.layers)
    config, device = model.config, torch.device("cuda", torch.cuda.current_device())
    memory = int(torch.cuda.mem_get_info()[0] * 0.6) if options.users else None
    engine = Engine(model, device, EngineConfig(max_batch_tokens=4096, max_context=8192, kv_memory=memory))
    progress(f"{weights}: {nbytes / 1e9:.2f} GB of weights; graphs: {engine.runner.graph_refusal or 'yes'}")
    rows: list[Row] = []

    def decode(engine: Engine, kind: str, context: int, sampling: dict[str, float]) -> None:
        request(engine, context, 8, sampling)  # compiles and captures
        speeds = [request(engine, context, options.new, sampling)[0] for _ in range(options.repetitions)]
        read = nbytes + cache_bytes(config, context + options.new // 2)
        rows.append(Row(weights, f"{kind} after {context}", speeds, nbytes=read))
        progress(f"  {rows[-1].name}: {summary(speeds)}")

    for context in options.contexts:
        decode(engine, "decode", context, GREEDY)
        if not options.greedy_only:
            decode(engine, "sampled", context, SAMPLED)
    for users in options.users:
        context = options.contexts[0]
        together(engine, users, context, 8)  # compiles and captures
        speeds = [together(engine, users, context, options.new) for _ in range(options.repetitions)]
        # of a step, which gives each user a token
        step = nbytes + users * cache_bytes(config, context + options.new // 2)
        rows.append(Row(weights, f"decode of {users} users after {context}", speeds, nbytes=step // users))
        progress(f"  {rows[-1].name}: {summary(speeds)}")
    for length in options.prefill:
        for _ in range(3):  # compiles; captures, at a short size's second prompt; replays
            request(engine, length, 1)
        speeds = [request(engine, length, 1)[1] for _ in range(options.repetitions)]
        rows.append(Row(weights, f"prefill {length}", speeds, flop=sum(product_flop(la) for la in model.layers)))
        progress(f"  {rows[-1].name}: {summary(speeds)}")
    if options.several_launches:
        twin = Engine(model, device, engine.config)
        twin.runner.one_launch = False
        for context in options.contexts:
            decode(twin, "several launches a layer", context, GREEDY)
    return rows


def peers(size: str, options: argparse.Namespace) -> dict[tuple[str, str], list[float]]:
    """tok/s of each repetition of one size by (the peer's name, row)."""
    from gpu_peer import build_peer, peer_name, peer_speeds

    speeds = {}
    for name in dict.fromkeys(peer_name(weights) for weights in options.weights):
        progress(name)
        peer = build_peer(size, options.layers, name)
        measured = peer_speeds(peer, options.contexts, options.prefill, PEER_TOKENS, options.repetitions)
        speeds.update({(name, row): values for row, values in measured.items()})
        for row, values in measured.items():
            progress(f"  {row}: {summary(values)}")
        del peer
        free()
    return speeds


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def print_table(rows: list[Row], beside: dict[tuple[str, str], list[float]], bandwidth: float, rate: float) -> None:
    """Markdown, a line for each row; ``beside`` the peers' tok/s where they were measured."""
    print("| weights | tok/s | a token | gemcut, median (min–max) | of limit | peer | peer, median (min–max) | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row.weights, row.name, row.needs, summary(row.speeds), f"{row.of_limit(bandwidth, rate):.1%}"]
        peer = ["", "", ""]
        if beside:
            from gpu_peer import peer_name

            name = peer_name(row.weights)
            speeds = beside.get((name, row.name))
            if speeds:
                ratio = statistics.median(row.speeds) / statistics.median(speeds)
                peer = [name, summary(speeds), f"{ratio:.2f}"]
        print("| " + " | ".join([*cells, *peer]) + " |")


def lengths(text: str) -> list[int]:
    values = [int(part) for part in text.split(",") if part]
    if not all(0 < value <= 8000 for value in values):
        raise argparse.ArgumentTypeError(f"lengths from 1 to 8000 are possible, not {text}")
    return values


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Users of one GPU, full shapes, random weights.")
    parser.add_argument(
        "--size", type=names_of("size", SIZES), default=["27b"], help=f"comma-separated: {', '.join(SIZES)}"
    )
    parser.add_argument(
        "--weights", type=names_of("weights", WEIGHTS), default=["nf4"], help=f"comma-separated: {', '.join(WEIGHTS)}"
    )
    parser.add_argument("--peer", choices=["none", "transformers"], default="none")
    parser.add_argument("--contexts", type=lengths, default=[128], help="prompts before decoding, comma-separated")
    parser.add_argument(
        "--users", type=lengths, default=[], help="how many decode together, after the first context, comma-separated"
    )
    parser.add_argument("--prefill", type=lengths, default=[2048, 4096], help="prompts to time, comma-separated")
    parser.add_argument("--layers", type=int, help="cut the network to so many layers (for a quick check)")
    parser.add_argument("--new", type=int, default=96, help="tokens of a request whose decoding is timed")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--greedy-only", action="store_true", help="leave out the requests that draw their tokens")
    parser.add_argument(
        "--several-launches", action="store_true", help="also decode with several launches a layer, on the same network"
    )
    parser.add_argument(
        "--quick", action="store_true", help="the first weights, context and prefill length only, two repetitions"
    )
    options = parser.parse_args()
    if options.quick:
        options.repetitions = 2
        options.weights, options.contexts, options.prefill = (
            values[:1] for values in (options.weights, options.contexts, options.prefill)
        )
    if options.new < 2 or options.repetitions < 1 or (options.layers is not None and options.layers < 1):
        parser.error("--new takes 2 or more, --repetitions and --layers 1 or more")
    if options.peer == "transformers" and importlib.util.find_spec("transformers") is None:
        parser.error("--peer transformers needs transformers; pip install transformers")
    if not torch.cuda.is_available():
        parser.error("this benchmark needs an NVIDIA GPU and a torch build with CUDA")
    return options


def main() -> None:
    options = parse()
    for size in options.size:
        measure(size, options)


def measure(size: str, options: argparse.Namespace) -> None:
    """Measures one size and prints its table."""
    started = time.perf_counter()
    limits = [(read_bandwidth(), product_rate())]
    rows: list[Row] = []
    for weights in options.weights:
        rows += our_rows(size, weights, options)
        free()
    limits.append((read_bandwidth(), product_rate()))
    beside = peers(size, options) if options.peer == "transformers" else {}
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if beside:
        import gpu_peer

        versions += ", " + gpu_peer.versions()
    bandwidths, rates = zip(*limits, strict=True)
    layers = f", {options.layers} layers" if options.layers else ""
    print(f"device {torch.cuda.get_device_name()}; {versions}")
    print(f"Gemma 2 {size} shape{layers}, random weights; {options.repetitions} requests a row,")
    print(f"{options.new} tokens each ({PEER_TOKENS + 1} of the peer); {time.perf_counter() - started:.0f} s in all")
    print(f"read bandwidth before and after {bandwidths[0] / 1e9:,.0f} and {bandwidths[1] / 1e9:,.0f} GB/s, ", end="")
    print(f"bf16 product {rates[0] / 1e12:.0f} and {rates[1] / 1e12:.0f} TFLOP/s\n")
    print_table(rows, beside, max(bandwidths), max(rates))
    print(flush=True)


if __name__ == "__main__":
    main()
