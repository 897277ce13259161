"""Ours beside transformers, bitsandbytes and llama.cpp on a CPU, in one process, on the same shapes.

    python benchmarks/cpu_inference.py                     # 2B shape (random weights) and the real Gemma 3 270M
    python benchmarks/cpu_inference.py --case 270m --repeat 5
    python benchmarks/cpu_inference.py --engines nf4,transformers,llama.cpp-Q4_0

Engines: bf16, nf4, int8 (ours; quantized ones with an 8-bit head), transformers (bf16), bitsandbytes (transformers with
its NF4, double quantization, bf16 head), llama.cpp-Q4_0 (Q6_K table, its default), llama.cpp-Q8_0; for the 270M
llama.cpp runs the file that the weights come from (Q4_K_M). Rows: prefill of 512 tokens, decode of one request after
those, and decode of 8 requests together. Engines take turns within each repetition, so that a noisy neighbour hits
all of them; ratios are medians over repetitions of one engine's time by another's. The read bandwidth is measured
before and after with as many threads; the higher counts as the limit.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from options import names_of
from transformers_peer import as_transformers, cut_by_bitsandbytes, transformers_seconds

import gemcut
from gemcut.checkpoint.load import load_model_weights
from gemcut.checkpoint.names import expected_shapes, hf_module
from gemcut.checkpoint.resolve import resolve
from gemcut.config import FAMILY, GemmaConfig
from gemcut.engine import Engine, EngineConfig, Request, SamplingParams
from gemcut.kernels.cpu.memory import huge_empty
from gemcut.loading import build_network
from gemcut.model import Model
from gemcut.model.bind import bind_kernels
from gemcut.quantization.spec import Quantization
from gemcut.quantization.stream import quantize_tensors
from gemcut.quantization.weights import CheckpointWeight

PROMPT, STEPS, BATCH = 512, 24, 8
CPU = torch.device("cpu")
OURS = {
    "bf16": None,
    "nf4": Quantization("nf4", head="int8"),
    "int8": Quantization("int8", head="int8"),
}
PEERS = ("transformers", "bitsandbytes", "llama.cpp-Q4_0", "llama.cpp-Q8_0", "llama.cpp-Q4_K_M")
#: What a peer imports, and what pip calls it.
PACKAGES = {"bitsandbytes": "bitsandbytes", "llama_cpp": "llama-cpp-python"}
MEASUREMENTS = (f"prefill {PROMPT}", "decode, 1 request", f"decode, {BATCH} together")

#: (prompts, steps) -> (prefill, decode) seconds; None where the engine does not do batches.
Seconds = Callable[[list[list[int]], int], tuple[float, float]]


@dataclass
class Contestant:
    """One engine with one model: how to run it, what a decode step reads, and seconds by measurement."""

    name: str
    run: Seconds
    step_bytes: int
    batches: bool = True
    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in MEASUREMENTS})


def random_tensors(config: GemmaConfig) -> list[tuple[str, torch.Tensor]]:
    """A random bf16 checkpoint of trained-like size, our unfused names."""
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for name, shape in expected_shapes(config).items():
        if name.endswith("scale"):
            tensors.append((name, torch.ones(shape)))
        else:
            tensors.append((name, torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)))
    return tensors


def network(config: GemmaConfig, tensors: list[tuple[str, torch.Tensor]], spec: Quantization | None) -> Model:
    """Our network of these tensors, quantized to ``spec``, with kernels bound."""
    model = build_network(config, dtype=torch.bfloat16, device=CPU, quantization=spec)
    stream: list[tuple[str, CheckpointWeight]] = list(tensors)
    quantized = stream if spec is None else quantize_tensors(stream, spec, module_name=hf_module)
    load_model_weights(model, quantized, dtype=torch.bfloat16, device=CPU, allocate=huge_empty)
    bind_kernels(model, CPU)
    return model


def engine_seconds(model: Model, prompts: list[list[int]], steps: int) -> tuple[float, float]:
    """(prefill, decode) seconds of our engine: until every prompt has its first token, then ``steps`` more each."""
    engine = Engine(model, CPU, EngineConfig(max_context=1024, sequences=len(prompts)))
    params = SamplingParams(max_new_tokens=steps + 1, temperature=0, ignore_eos=True)
    sequences = [engine.submit(Request(prompt_ids=tuple(prompt), params=params)) for prompt in prompts]
    start = time.perf_counter()
    while any(sequence.output_length == 0 for sequence in sequences):
        engine.step()
    middle = time.perf_counter()
    while engine.has_work:
        engine.step()
    return middle - start, time.perf_counter() - middle


def read_bandwidth() -> float:
    """Bytes a second that a plain sum over 1 GB of fp32 reads, best of five."""
    block = huge_empty((2**28,), torch.float32)
    block.fill_(1.0)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        block.sum()
        seconds.append(time.perf_counter() - start)
    return block.nbytes / min(seconds)


def step_bytes(model: Model) -> int:
    """Bytes a decode step of one request reads: every weight once (the embedding serves as the head)."""
    packed = sum(weight.nbytes for module in model.modules() for weight in getattr(module, "weights", ()))
    return packed + sum(parameter.nbytes for parameter in model.parameters())


def missing(name: str) -> list[str]:
    """The modules that the engine ``name`` needs and that are not installed."""
    wanted = [module for module in PACKAGES if name.startswith(module.replace("_", "."))]
    return [module for module in wanted if importlib.util.find_spec(module) is None]


def llama_contestant(name: str, path: Path, threads: int) -> Contestant:
    """llama.cpp on one file."""
    from llama_peer import LlamaPeer

    peer = LlamaPeer(path, threads)
    return Contestant(name, lambda prompts, n: peer.seconds(prompts[0], n), path.stat().st_size, batches=False)


def contestants(
    names: list[str], config: GemmaConfig, tensors: list[tuple[str, torch.Tensor]], gguf: Path | None
) -> list[Contestant]:
    """The engines asked for, as far as they run this model: ``gguf`` is the real file, None for a random model."""
    found = []
    threads = torch.get_num_threads()
    whole: Model | None = None
    if {"bf16", "transformers"} & set(names):
        whole = network(config, tensors, None)
    for name in names:
        if name in OURS:
            model = whole if name == "bf16" else network(config, tensors, OURS[name])
            assert model is not None
            found.append(Contestant(name, lambda p, n, model=model: engine_seconds(model, p, n), step_bytes(model)))
        elif name == "transformers":
            assert whole is not None
            peer = as_transformers(whole)
            run = lambda p, n, peer=peer: transformers_seconds(peer, p, n)  # noqa: E731
            found.append(Contestant(name, run, step_bytes(whole)))
        elif name == "bitsandbytes":
            plain = network(config, tensors, None)
            size = step_bytes(plain)
            peer = cut_by_bitsandbytes(as_transformers(plain))
            linear = sum(t.numel() for n, t in tensors if t.ndim == 2 and n != "embed.weight")
            size -= int(linear * (2 - 4.127 / 8))
            run = lambda p, n, peer=peer: transformers_seconds(peer, p, n)  # noqa: E731
            found.append(Contestant(name, run, size))
            del plain
        elif name == "llama.cpp-Q4_K_M" and gguf is not None:
            found.append(llama_contestant(name, gguf, threads))
        elif name in ("llama.cpp-Q4_0", "llama.cpp-Q8_0") and gguf is None:
            from llama_peer import random_gguf

            kind = name.removeprefix("llama.cpp-")
            table = {"Q4_0": "Q6_K", "Q8_0": "Q8_0"}[kind]
            found.append(llama_contestant(name, random_gguf(config, kind, table), threads))
        gc.collect()
    return found


def measure(entries: list[Contestant], vocabulary: int, repeat: int, steps: int) -> None:
    """Take turns: every engine once in each repetition."""
    generator = torch.Generator().manual_seed(1)
    one = torch.randint(10, vocabulary, (1, PROMPT), generator=generator).tolist()
    many = torch.randint(10, vocabulary, (BATCH, 64), generator=generator).tolist()
    for entry in entries:  # warm up
        entry.run(one, 2)
    for _ in range(repeat):
        for entry in entries:
            prefill, decode = entry.run(one, steps)
            entry.seconds[MEASUREMENTS[0]].append(prefill)
            entry.seconds[MEASUREMENTS[1]].append(decode)
            if entry.batches:
                entry.seconds[MEASUREMENTS[2]].append(entry.run(many, steps)[1])


def show(title: str, entries: list[Contestant], bandwidth: float, steps: int) -> None:
    """Print one case."""
    tokens = dict(zip(MEASUREMENTS, (PROMPT, steps, BATCH * steps), strict=True))
    peers = [entry for entry in entries if entry.name not in OURS]
    print(f"\n{title}")
    for measurement in MEASUREMENTS:
        head = "".join(f"{'× ' + peer.name:>18}" for peer in peers)
        print(f"{measurement:22}{'tok/s':>22}{'GB a step':>11}{'GB/s':>7}{'of limit':>10}{head}")
        for entry in entries:
            seconds = entry.seconds[measurement]
            if not seconds:
                continue
            speeds = sorted(tokens[measurement] / s for s in seconds)
            line = f"{statistics.median(speeds):.1f} ({speeds[0]:.1f}–{speeds[-1]:.1f})"
            read = ["", "", ""]
            if measurement.startswith("decode"):
                speed = entry.step_bytes * steps / statistics.median(seconds)
                read = [f"{entry.step_bytes / 1e9:.2f}", f"{speed / 1e9:.1f}", f"{100 * speed / bandwidth:.0f} %"]
            ratios = ""
            for peer in peers:
                pairs = list(zip(peer.seconds[measurement], seconds, strict=False))
                ratio = f"{statistics.median(theirs / own for theirs, own in pairs):.2f}" if pairs else ""
                ratios += f"{ratio:>18}"
            print(f"  {entry.name:20}{line:>22}{read[0]:>11}{read[1]:>7}{read[2]:>10}{ratios}")


def machine() -> str:
    """The processor's name and what matters of it."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            cpu = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    amx = torch.cpu._is_amx_tile_supported() if hasattr(torch.cpu, "_is_amx_tile_supported") else "?"
    return f"{cpu}, {torch.get_num_threads()} threads, AMX {amx}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=["2b", "270m", "all"], default="all")
    engines = (*OURS, *PEERS)
    parser.add_argument("--engines", type=names_of("engine", engines), help="comma-separated; see above")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS, help="tokens to decode in each repetition")
    parser.add_argument("--layers", type=int, help="fewer layers of the 2B shape, for a quick look")
    parser.add_argument("--threads", type=int, help="threads of every engine (default: torch's own choice)")
    args = parser.parse_args()
    absent = [name for name in args.engines or engines if missing(name)]
    if absent:
        needs = sorted({PACKAGES[module] for name in absent for module in missing(name)})
        what = f"{', '.join(absent)} needs pip install {' '.join(needs)}"
        if args.engines:
            parser.error(what)
        print(f"left out: {what}")
    names = [name for name in args.engines or engines if name not in absent]
    if args.threads:
        torch.set_num_threads(args.threads)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, gemcut {gemcut.__version__}"
    print(f"{machine()}; Python {platform.python_version()}, {versions}")
    if any(name.startswith("llama.cpp") for name in names):
        import llama_cpp
        from llama_peer import system_info

        print(f"llama-cpp-python {llama_cpp.__version__}: {system_info().strip()}")
    print(f"{args.repeat} repetitions in turns; median (min–max); {args.steps} decode steps")
    for case in ("2b", "270m"):
        if args.case not in (case, "all"):
            continue
        if case == "2b":
            config, gguf = FAMILY["gemma-2-2b"], None
            if args.layers:
                config = config.replace(num_hidden_layers=args.layers, layer_types=config.layer_types[: args.layers])
            tensors = random_tensors(config)
            title = f"Gemma 2 2B shape, {config.num_hidden_layers} layers, random weights"
        else:
            source = resolve("gemma-3-270m")
            config, gguf, title = source.config(), source.path, "Gemma 3 270M, real weights"
            tensors = [(name, tensor.clone()) for name, tensor in source.tensors(dtype=torch.bfloat16)]
        before = read_bandwidth()
        entries = contestants(names, config, tensors, gguf)
        del tensors
        measure(entries, config.vocab_size, args.repeat, args.steps)
        after = read_bandwidth()
        show(title, entries, max(before, after), args.steps)
        print(f"read bandwidth before and after: {before / 1e9:.1f} and {after / 1e9:.1f} GB/s")
        del entries
        gc.collect()


if __name__ == "__main__":
    main()
