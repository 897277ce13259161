"""What each format costs in quality, on the real Gemma 3 270M: KL divergence, perplexity, size and speed.

    python benchmarks/quantization_quality.py --articles boolq/dev.jsonl.gz --plot docs/quantization.png

Three kinds of text that do not overlap, each with a part to calibrate on and another to measure on: Python's reference
manual (``pydoc_data.topics``) and its standard library's source code, which every Python brings (PSF licence), and
encyclopedia articles: the passages of BoolQ's dev.jsonl(.gz) (CC BY-SA 3.0; ``--articles``, left out if not given).

Every variant runs with bf16 arithmetic on dequantized weights, which is what all kernels approximate; the reference is
the bf16 network. Speed is that of the packed weights with the kernels that the engine takes. ``--cache`` keeps finished
rows, so that an interrupted run goes on. ``--speed-only`` measures nothing but each format's speed.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import gzip
import json
import os
import platform
import random
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gemcut
from gemcut.calibration.divergence import Divergence, Reference
from gemcut.calibration.layerwise import calibrate
from gemcut.checkpoint.load import load_model_weights
from gemcut.checkpoint.names import to_hf
from gemcut.checkpoint.resolve import resolve
from gemcut.checkpoint.source import Source
from gemcut.engine import Engine, EngineConfig, Request, SamplingParams
from gemcut.kernels.cpu.memory import huge_empty
from gemcut.loading import build_network
from gemcut.model import Model
from gemcut.model.bind import bind_kernels
from gemcut.quantization.dequantize import dequantize_weight
from gemcut.quantization.spec import Quantization
from gemcut.quantization.stream import quantize_tensors
from gemcut.quantization.weights import CheckpointWeight

DTYPE = torch.bfloat16
Documents = list[list[int]]


@dataclass(frozen=True)
class Variant:
    """One way to quantize; ``calibration`` names the kinds of text it saw."""

    name: str
    spec: Quantization | None
    calibration: tuple[str, ...] = ()


def manual() -> list[str]:
    """Chapters of the Python reference manual."""
    import pydoc_data.topics

    return [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]


def code() -> list[str]:
    """Modules of the standard library."""
    files = sorted(glob.glob(os.path.join(sysconfig.get_paths()["stdlib"], "*.py")))
    return [Path(file).read_text(encoding="utf-8", errors="ignore") for file in files if os.path.getsize(file) > 3000]


def articles(path: Path) -> list[str]:
    """Encyclopedia passages, one of each title."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = {row["title"]: row["passage"] for row in map(json.loads, data.splitlines())}
    return [f"{title}\n\n{passage}" for title, passage in rows.items()]


def split(texts: list[str], encode: Callable[[str], list[int]], calibration: int, held_out: int) -> list[Documents]:
    """[calibration documents, held-out documents] of so many tokens, from different texts, in documents of 512."""
    random.Random(0).shuffle(texts)
    half = len(texts) // 2
    return [_documents(texts[:half], encode, calibration), _documents(texts[half:], encode, held_out)]


def _documents(texts: list[str], encode: Callable[[str], list[int]], tokens: int) -> Documents:
    documents: Documents = []
    left = tokens
    for text in texts:
        ids = encode(text[:6000])  # of long texts the beginning, so that many texts have a say
        for start in range(0, min(len(ids), 1022), 511):
            document = [2, *ids[start : start + 511]][:left]
            if len(document) >= 64:
                documents.append(document)
                left -= len(document)
        if left < 64:
            break
    return documents


def network(source: Source, tensors: dict[str, CheckpointWeight]) -> Model:
    """The bf16 network of dequantized weights."""
    with torch.device("meta"):
        model = Model(source.config(), dtype=DTYPE)
    whole = (
        (name, weight if name.endswith(".scale") and isinstance(weight, Tensor) else dequantize_weight(weight, DTYPE))
        for name, weight in tensors.items()
    )
    load_model_weights(model, whole, dtype=DTYPE, device="cpu")
    return model


def quantize(
    source: Source, variant: Variant, sets: dict[str, list[Documents]]
) -> Iterator[tuple[str, CheckpointWeight]]:
    """The variant's weights."""
    if variant.spec is None:
        return source.tensors(dtype=DTYPE)
    if not variant.calibration:
        return quantize_tensors(
            source.tensors(dtype=DTYPE), variant.spec, module_name=lambda name: to_hf(name).removesuffix(".weight")
        )
    share = len(variant.calibration)
    documents = [d for kind in variant.calibration for d in sets[kind][0][: len(sets[kind][0]) // share]]
    return calibrate(source, variant.spec, documents, dtype=DTYPE)


def decoder(source: Source, spec: Quantization | None, tensors: dict[str, CheckpointWeight]) -> Callable[[], float]:
    """Gives tok/s of one request on this machine's CPU: 48 tokens after a prompt of 128."""
    cpu = torch.device("cpu")
    model = build_network(source.config(), dtype=DTYPE, device=cpu, quantization=spec)
    load_model_weights(model, iter(tensors.items()), dtype=DTYPE, device=cpu, allocate=huge_empty)
    bind_kernels(model, cpu)
    engine = Engine(model, cpu, EngineConfig(max_context=256, sequences=1))

    def speed() -> float:
        params = SamplingParams(max_new_tokens=49, temperature=0, ignore_eos=True)
        sequence = engine.submit(Request(prompt_ids=tuple(range(1000, 1128)), params=params))
        while sequence.output_length == 0:
            engine.step()
        start = time.perf_counter()
        while engine.has_work:
            engine.step()
        return 48 / (time.perf_counter() - start)

    return speed


def measure(source: Source, variant: Variant, sets: dict[str, list[Documents]], whole: dict[str, Reference]) -> Any:
    """Size, seconds, and what each kind of held-out text says."""
    start = time.perf_counter()
    tensors = dict(quantize(source, variant, sets))
    seconds = time.perf_counter() - start
    linear = [w for n, w in tensors.items() if n != "embed.weight"]
    speed = decoder(source, variant.spec, tensors)
    model = network(source, tensors)
    return {
        "linear_bytes": sum(weight.nbytes for weight in linear),
        "bytes": sum(weight.nbytes for weight in tensors.values()),
        "seconds": seconds,
        "speed": statistics.median(speed() for _ in range(5)),
        "held_out": {kind: dataclasses.asdict(reference.compare(model)) for kind, reference in whole.items()},
    }


def variants(kinds: list[str]) -> list[Variant]:
    nf4, fp4, int8 = (Quantization(name) for name in ("nf4", "fp4", "int8"))
    rows = [
        Variant("bf16", None),
        Variant("int8", int8),
        Variant("int8, int8 head", int8.replace(head="int8")),
        Variant("NF4", nf4),
        Variant("NF4, no double quantization", nf4.replace(double_quant=False)),
        Variant("FP4", fp4),
    ]
    rows += [Variant(f"NF4 calibrated on {kind}", nf4, (kind,)) for kind in kinds]
    rows += [
        Variant("NF4 calibrated on all kinds", nf4, tuple(kinds)),
        Variant("NF4 calibrated on all kinds, int8 head", nf4.replace(head="int8"), tuple(kinds)),
        Variant("FP4 calibrated on all kinds", fp4, tuple(kinds)),
    ]
    return rows


def table(rows: dict[str, Any], kinds: list[str]) -> str:
    """Markdown: one line a variant, KL / perplexity / agreement for each kind of text."""
    plain = rows["NF4"]["held_out"]
    head = (
        "| | MB | tok/s | "
        + " | ".join(f"KL {k}" for k in kinds)
        + " | 99 % | "
        + " | ".join(f"PPL {k}" for k in kinds)
    )
    lines = [head + " | same top token | seconds |", "|---" * (len(kinds) * 2 + 6) + "|"]
    for name, row in rows.items():
        each = [Divergence(**row["held_out"][kind]) for kind in kinds]
        cells = []
        for kind, one in zip(kinds, each, strict=True):
            change = one.kl / plain[kind]["kl"] - 1
            cells.append(f"{one.kl:.4f}" + (f" ({change:+.0%})" if name.startswith("NF4 ") else ""))
        cells.append(f"{max(one.kl_p99 for one in each):.2f}")
        cells += [f"{one.perplexity:.2f}" for one in each]
        top = sum(one.same_top * one.tokens for one in each) / sum(one.tokens for one in each)
        size = f"{row['bytes'] / 1e6:.0f} | {row['speed']:.1f}"
        lines.append(f"| {name} | {size} | {' | '.join(cells)} | {top:.1%} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def plot(rows: dict[str, Any], path: Path) -> None:
    """Size against KL, mean over all kinds of held-out text."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.2), dpi=110)
    colours = {"bf16": "#555555", "int8": "#2c7fb8", "NF4": "#d95f0e", "FP4": "#7a0177"}
    for name, row in rows.items():
        each = list(row["held_out"].values())
        kl = sum(one["kl"] * one["tokens"] for one in each) / sum(one["tokens"] for one in each)
        if kl <= 0 or "no double" in name or ("calibrated" in name and "all kinds" not in name):
            continue  # what would lie on another point
        colour = colours[name.split(",")[0].split(" ")[0]]
        size = row["bytes"] / 1e6
        axes.plot(size, kl, "o" if "calibrated" in name else "s", color=colour, markersize=8)
        label = name.replace("calibrated on all kinds", "calibrated")
        axes.annotate(label, (size, kl), xytext=(9, -3), textcoords="offset points", fontsize=9, color=colour)
    whole = rows["bf16"]["bytes"] / 1e6
    axes.axvline(whole, color=colours["bf16"], linewidth=1, linestyle=":")
    axes.annotate(
        "bf16", (whole, axes.get_ylim()[1]), xytext=(-6, -14), textcoords="offset points", ha="right", fontsize=9
    )
    axes.set_yscale("log")
    axes.set_xlim(right=whole * 1.04)
    axes.set_xlabel("weights, MB")
    axes.set_ylabel("KL divergence from bf16, nats a token")
    axes.set_title("Gemma 3 270M: size against damage (lower left is better)", fontsize=11, loc="left")
    axes.grid(True, which="major", alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--articles", type=Path, help="BoolQ's dev.jsonl or dev.jsonl.gz")
    parser.add_argument("--tokens", type=int, default=4096, help="held-out tokens of each kind (default 4096)")
    parser.add_argument("--calibration", type=int, default=12288, help="calibration tokens of each kind")
    parser.add_argument("--only", help="variants whose name contains this")
    parser.add_argument("--cache", type=Path, default=Path("quality-cache.json"), help="finished rows are kept here")
    parser.add_argument("--plot", type=Path, help="write the plot to this PNG file")
    parser.add_argument("--speed-only", action="store_true", help="measure each format's speed and nothing else")
    args = parser.parse_args()
    source = resolve("gemma-3-270m")
    if args.speed_only:
        specs = list(dict.fromkeys(variant.spec for variant in variants([])))
        speeds = [decoder(source, spec, dict(quantize(source, Variant("", spec), {}))) for spec in specs]
        rounds = [[speed() for speed in speeds] for _ in range(9)]  # in turns: other work hits all of them
        for spec, values in zip(specs, zip(*rounds, strict=True), strict=True):
            print(f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f}) tok/s: {spec or 'bf16'}")
        return
    tokenizer = source.tokenizer()

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_bos=False, parse_special=False)

    texts = {"manual": manual(), "code": code()} | ({"articles": articles(args.articles)} if args.articles else {})
    sets = {kind: split(found, encode, args.calibration, args.tokens) for kind, found in texts.items()}
    kinds = list(sets)
    for kind, (calibration, held_out) in sets.items():
        print(
            f"{kind}: {sum(map(len, calibration))} tokens to calibrate, {sum(map(len, held_out))} held out", flush=True
        )
    key = f"{gemcut.__version__} with speed {args.tokens} {args.calibration} {kinds}"
    cache = json.loads(args.cache.read_text()) if args.cache.is_file() else {}
    rows: dict[str, Any] = cache.setdefault(key, {})
    whole: dict[str, Reference] = {}
    for variant in variants(kinds):
        if variant.name in rows or (args.only and args.only not in variant.name):
            continue
        if not whole:
            model = network(source, dict(source.tensors(dtype=DTYPE)))
            whole = {kind: Reference(model, held_out) for kind, (_, held_out) in sets.items()}
        rows[variant.name] = measure(source, variant, sets, whole)
        args.cache.write_text(json.dumps(cache))
        kl = ", ".join(f"{kind} {one['kl']:.4f}" for kind, one in rows[variant.name]["held_out"].items())
        print(f"{variant.name}: KL {kl}", flush=True)
    ordered = {variant.name: rows[variant.name] for variant in variants(kinds) if variant.name in rows}
    cpu = platform.processor() or platform.machine()
    print(f"\n{time.strftime('%Y-%m-%d')}, {cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    if "NF4" in ordered:
        print(table(ordered, kinds))
    if args.plot:
        plot(ordered, args.plot)


if __name__ == "__main__":
    main()
